"""Whole models with random weights: a prompt at once, then token by token, attention included; sampling is not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from quantkit.bench.machine import Memory
from quantkit.bench.random_weights import RandomCheckpoint
from quantkit.bench.results import ModelRun, Peer
from quantkit.bench.timing import Effort, alternate, paired
from quantkit.config import ModelConfig
from quantkit.models.decoder import Decoder
from quantkit.models.loader import load
from quantkit.schemes import QuantScheme

MODELS = ("mistral-7b-instruct-v0.2", "smollm2-135m")
QUICK_MODELS = ("smollm2-135m",)
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
            alike = [scheme for scheme in schemes if scheme.bits == bits]
            with tempfile.TemporaryDirectory(dir=folder, prefix="quantkit-bench-") as place:
                file = Path(place) / f"{config.name}.gguf"
                nbytes = _write(file, config, bits) if llama else 0
                for scheme in alike:
                    yield _run(config, scheme, length, memory, effort, llama, file, nbytes)
                    progress(1)


def _write(path: Path, config: ModelConfig, bits: int) -> int:
    from quantkit.bench.llama import write_gguf

    return write_gguf(path, config, bits)


def _run(
    config: ModelConfig,
    scheme: QuantScheme,
    length: Length,
    memory: Memory,
    effort: Effort,
    llama: str | None,
    file: Path,
    file_bytes: int,
) -> ModelRun:
    decoder = load(RandomCheckpoint(config, scheme), dtype="bf16")
    prompt, answer = length.tokens(config.vocab_size)
    ours = _Ours(decoder, prompt, answer)
    read_bytes = memory.readable(min(_READ_BYTES, decoder.weights_bytes))
    runs: dict[str, Callable[[int], None]] = {"prefill": ours.prefill}
    if llama is None:
        runs |= {"read": partial(memory.read, nbytes=read_bytes), "decode": ours.decode}
        times, peer = alternate(runs, effort), None
    else:
        from quantkit.bench.llama import Llama, file_type

        with Llama(llama, file, torch.get_num_threads(), length.prompt + length.decode) as other:
            runs |= {
                "peer prefill": lambda turn: other.prefill(prompt),
                "peer decode": lambda turn: other.decode(answer),
                "read": partial(memory.read, nbytes=read_bytes),
                "decode": ours.decode,
            }
            times = alternate(runs, effort, _PAUSE_S)
        peer = Peer(
            name=f"llama.cpp (llama-cpp-python {other.version})",
            file_type=file_type(scheme.bits),
            weights_bytes=file_bytes,
            prefill_tokens_per_s=length.prompt / median(times["peer prefill"]),
            decode_tokens_per_s=length.decode / median(times["peer decode"]),
            prefill_speedup=paired(times["peer prefill"], times["prefill"]),
            decode_speedup=paired(times["peer decode"], times["decode"]),
        )
    token_bytes = decoder.weights_bytes
    if not config.tie_embeddings:
        token_bytes -= decoder.weights["model.embed_tokens.weight"].nbytes
    return ModelRun(
        model=config.name,
        scheme=scheme.name,
        prompt_tokens=length.prompt,
        decode_tokens=length.decode,
        rounds=len(times["decode"]),
        weights_bytes=decoder.weights_bytes,
        token_bytes=token_bytes,
        prefill_tokens_per_s=length.prompt / median(times["prefill"]),
        decode_tokens_per_s=length.decode / median(times["decode"]),
        read_share=length.decode * token_bytes / read_bytes * paired(times["read"], times["decode"]),
        peer=peer,
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
