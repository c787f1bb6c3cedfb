"""Whole models with random weights: a prompt at once, then token by token, attention included; sampling is not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from quantkit.bench.llama import Llama, file_type, write_gguf
from quantkit.bench.machine import Memory
from quantkit.bench.random_weights import RandomCheckpoint
from quantkit.bench.results import ModelRun, Peer
from quantkit.bench.shapes import QUICK_MODEL, token_bytes
from quantkit.bench.timing import Effort, alternate, paired
from quantkit.config import ModelConfig
from quantkit.models.decoder import Decoder
from quantkit.models.loader import load
from quantkit.schemes import QuantScheme

MODELS = ("mistral-7b-instruct-v0.2", "smollm2-135m")
QUICK_MODELS = (QUICK_MODEL,)
_READ_BYTES = 256 << 20  # at most, before each decoding
_PAUSE_S = 0.02


@dataclass(frozen=True)
class Length:
    """Tokens of the prompt, and those decoded after it."""

    prompt: int
    decode: int

    def tokens(self, vocab: int) -> tuple[list[int], list[int]]:
        """Return the ids of both: any will do, and the same for all."""
        ids = [7 * place % vocab for place in range(1, self.prompt + self.decode + 1)]
        return ids[: self.prompt], ids[self.prompt :]


LENGTH, QUICK_LENGTH = Length(512, 32), Length(32, 4)


def measure(
    configs: Sequence[ModelConfig],
    schemes: Sequence[QuantScheme],
    length: Length,
    memory: Memory,
    effort: Effort,
    llama: str | None,
    folder: Path | None,
    progress: Callable[[int], None],
) -> Iterator[ModelRun]:
    """Yield a run of each model in each scheme.

    Args:
        configs: the models' shapes.
        schemes: of their blocks' matrices.
        length: of prompt and answer.
        memory: what decoding is held to.
        effort: how many rounds.
        llama: an interpreter that has `llama_cpp`, to run the same shapes beside; None for none.
        folder: where its file is written for the time being; None for the system's.
        progress: is told of each run.

    Raises:
        BackendError: llama.cpp is asked for and cannot run.
    """
    for config in configs:
        for bits in dict.fromkeys(scheme.bits for scheme in schemes):
            with tempfile.TemporaryDirectory(dir=folder, prefix="quantkit-bench-") as place:
                beside = _write(llama, Path(place), config, bits) if llama else None
                for scheme in schemes:
                    if scheme.bits == bits:
                        yield _run(config, scheme, length, memory, effort, beside)
                        progress(1)


@dataclass(frozen=True)
class _File:
    """A file for llama.cpp, the interpreter that runs it, and the bytes of its tensors."""

    python: str
    path: Path
    bits: int
    weights_bytes: int


def _write(python: str, folder: Path, config: ModelConfig, bits: int) -> _File:
    path = folder / "model.gguf"
    return _File(python, path, bits, write_gguf(path, config, bits))


def _run(
    config: ModelConfig,
    scheme: QuantScheme,
    length: Length,
    memory: Memory,
    effort: Effort,
    beside: _File | None,
) -> ModelRun:
    # equal bits beside a file whose head is quantized; a tied head stays as the embedding is
    include = ("lm_head",) if beside and not config.tie_embeddings else ()
    decoder = load(RandomCheckpoint(config, scheme, include=include), dtype="bf16")
    prompt, answer = length.tokens(config.vocab_size)
    ours = _Ours(decoder, prompt, answer)
    read_bytes = memory.readable(min(_READ_BYTES, decoder.weights_bytes))
    runs: dict[str, Callable[[int], None]] = {"prefill": ours.prefill}
    last: dict[str, Callable[[int], None]] = {
        "read": partial(memory.read, nbytes=read_bytes),
        "decode": ours.decode,
    }
    if beside is None:
        times, peer = alternate(runs | last, effort), None
    else:
        with Llama(
            beside.python, beside.path, torch.get_num_threads(), length.prompt + length.decode
        ) as other:
            runs["peer prefill"] = lambda turn: other.prefill(prompt)
            runs["peer decode"] = lambda turn: other.decode(answer)
            times = alternate(runs | last, effort, _PAUSE_S)
        peer = _peer(other.version, beside, length, times)
    read = token_bytes(config, decoder.weights_bytes)
    return ModelRun(
        model=config.name,
        scheme=scheme.name,
        prompt_tokens=length.prompt,
        decode_tokens=length.decode,
        rounds=len(times["decode"]),
        weights_bytes=decoder.weights_bytes,
        token_bytes=read,
        prefill_tokens_per_s=length.prompt / median(times["prefill"]),
        decode_tokens_per_s=length.decode / median(times["decode"]),
        read_share=length.decode * read / read_bytes * paired(times["read"], times["decode"]),
        peer=peer,
    )


def _peer(version: str, file: _File, length: Length, times: dict[str, list[float]]) -> Peer:
    return Peer(
        name=f"llama.cpp (llama-cpp-python {version})",
        file_type=file_type(file.bits),
        weights_bytes=file.weights_bytes,
        prefill_tokens_per_s=length.prompt / median(times["peer prefill"]),
        decode_tokens_per_s=length.decode / median(times["peer decode"]),
        prefill_speedup=paired(times["peer prefill"], times["prefill"]),
        decode_speedup=paired(times["peer decode"], times["decode"]),
    )


class _Ours:
    """A decoder with a prompt and the tokens after it; each prompt begins with a new cache."""

    def __init__(self, decoder: Decoder, prompt: list[int], answer: list[int]) -> None:
        self._decoder, self._slots = decoder, len(prompt) + len(answer)
        self._prompt, self._answer = torch.tensor([prompt]), torch.tensor([answer])
        self._cache = decoder.new_cache(1, self._slots)

    def prefill(self, turn: int) -> None:
        self._cache = self._decoder.new_cache(1, self._slots)
        self._decoder.prefill(self._prompt, self._cache)

    def decode(self, turn: int) -> None:
        for token in self._answer.split(1, dim=1):
            self._decoder.prefill(token, self._cache)
