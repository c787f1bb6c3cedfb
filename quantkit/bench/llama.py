"""llama.cpp beside quantkit: a GGUF file of random weights, and a process of another Python that runs it.

llama.cpp is no dependency: whoever wants the comparison names an interpreter that has `llama_cpp`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf
import numpy as np

from quantkit.bench.random_weights import STD
from quantkit.config import ModelConfig, TensorSpec
from quantkit.errors import BackendError

WORKER = Path(__file__).with_name("llama_worker.py")
_BLOCK = 32  # values that share a scale, in both types
_TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def file_type(bits: int) -> str:
    """Return the ggml type that stands beside schemes of so many bits."""
    return str(_TYPES[bits].name)


def write_gguf(path: Path, config: ModelConfig, bits: int) -> int:
    """Write random weights of a model's shapes, every matrix in Q4_0 or Q8_0, and return their bytes.

    Embedding and head are in that type, too. There is no vocabulary but its size.

    Raises:
        BackendError: a matrix has rows that are not whole blocks.
    """
    for spec in config.tensors:
        if len(spec.shape) == 2 and spec.shape[1] % _BLOCK:
            raise BackendError(
                f"{spec.name} of {config.name} has K = {spec.shape[1]}, no multiple of {_BLOCK}: llama.cpp's "
                f"{file_type(bits)} cannot hold it; leave out --llama"
            )
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    sizes = []
    for spec in config.tensors:
        if len(spec.shape) == 1:
            sizes.append(4 * spec.elements)
            writer.add_tensor_info(_name(spec), spec.shape, np.dtype(np.float32), sizes[-1])
        else:
            shape = (spec.shape[0], spec.shape[1] // _BLOCK * _block_bytes(bits))
            sizes.append(shape[0] * shape[1])
            writer.add_tensor_info(_name(spec), shape, np.dtype(np.uint8), sizes[-1], _TYPES[bits])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for spec in config.tensors:  # one at a time: none is kept
        plain = len(spec.shape) == 1
        writer.write_tensor_data(
            np.ones(spec.shape, np.float32) if plain else _blocks(random, spec.elements // _BLOCK, bits)
        )
    writer.close()
    return sum(sizes)


def _name(spec: TensorSpec) -> str:
    name, _, suffix = spec.name.rpartition(".")
    if not name.startswith("model.layers."):
        return f"{_NAMES[name]}.{suffix}"
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"


def _block_bytes(bits: int) -> int:
    return 2 + _BLOCK * bits // 8


def _blocks(random: np.random.Generator, count: int, bits: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return random blocks: a float16 scale, then codes."""
    blocks = np.frombuffer(random.bytes(count * _block_bytes(bits)), np.uint8).reshape(count, -1).copy()
    scale = np.float16(STD * 3**0.5 / 2 ** (bits - 1))
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(-1)


class Llama:
    """A process that runs a GGUF file by llama.cpp; use it as a context manager.

    Args:
        python: an interpreter that has `llama_cpp`.
        path: the file, None to only ask for the version.
        threads: for prompts and for single tokens.
        context: tokens of prompt and answer together.

    Attributes:
        version: of llama-cpp-python.

    Raises:
        BackendError: there is no such interpreter, it has no `llama_cpp`, or the file cannot be run.
    """

    def __init__(self, python: str, path: Path | None = None, threads: int = 1, context: int = 1) -> None:
        found = shutil.which(python)
        if found is None:
            raise BackendError(
                f"{python} is no Python to run: --llama names an interpreter that has llama_cpp"
            )
        command = [found, str(WORKER), "" if path is None else str(path), str(threads), str(context)]
        self._python = python
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self.version = str(self._answer()["version"])
        except BackendError:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def prefill(self, tokens: list[int]) -> None:
        """Forget everything and run a prompt at once."""
        self._ask("prefill", tokens)

    def decode(self, tokens: list[int]) -> None:
        """Run tokens one by one after what was run before."""
        self._ask("decode", tokens)

    def _ask(self, what: str, tokens: list[int]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which is what its answer will be
            self._process.stdin.write(json.dumps({what: tokens}) + "\n")
            self._process.stdin.flush()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            answer = {"error": "it ended without a word"}
        if "error" in answer:
            raise BackendError(
                f"{self._python} cannot run llama.cpp: {answer['error']}; --llama names an interpreter that "
                "has llama_cpp (pip install llama-cpp-python)"
            )
        return answer
