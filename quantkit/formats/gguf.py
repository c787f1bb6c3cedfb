"""GGUF checkpoints: llama.cpp's names and layouts mapped to Hugging Face's, tensors dequantized.

Opening reads the header only; the gguf package is imported to dequantize.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.config import ARCHITECTURES, DTYPE_NAMES, ModelConfig, TensorSpec
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_header import GGUFHeader

if TYPE_CHECKING:
    import torch

    from quantkit.formats.checkpoint import ReadFile
    from quantkit.models.tokenizer import Tokenizer

_PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_TORCH_NAMES = {short: long for long, short in DTYPE_NAMES.items()}

_KNOWN = ("llama", "qwen2")
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FREQS = "rope_freqs.weight"


class GGUFCheckpoint(Checkpoint):
    """One GGUF file; see `Checkpoint` for the attributes.

    `config.dtype` is the file's own where its matrices are plain, and bf16 where any is quantized: the
    16-bit type of what is not quantized again. So a quantized GGUF is estimated like the 16-bit model
    it was made from. `schemes` is empty: quantkit computes with GGUF weights dequantized.

    Raises:
        CheckpointError: the file is broken, or its tensors contradict its metadata.
        ConfigError: its metadata is incomplete, or of an architecture or scaling that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = GGUFHeader(path)
        self.config = _config(self.header)
        self.schemes = {}
        self._check()
        self.stored_bytes = sum(
            tensor.nbytes for name, tensor in self.header.tensors.items() if name != _ROPE_FREQS
        )

    def _check(self) -> None:
        unexpected = dict(self.header.tensors)
        unexpected.pop(_ROPE_FREQS, None)
        for spec in self.config.tensors:
            name = gguf_name(spec.name)
            tensor = unexpected.pop(name, None)
            if tensor is None:
                raise CheckpointError(f"{self.path}: the tensor {name} is missing")
            if tensor.shape != spec.shape:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {list(tensor.shape)}, "
                    f"its metadata imply {list(spec.shape)}"
                )
            if len(spec.shape) == 1 and tensor.type not in _PLAIN:
                raise CheckpointError(f"{self.path}: {name} is a vector stored as {tensor.type}")
        for name, tensor in unexpected.items():
            raise CheckpointError(
                f"{self.path}: {name} {list(tensor.shape)} has no place in a {self.config.architecture} model"
            )

    def read(self, spec: TensorSpec, read_file: ReadFile | None = None) -> torch.Tensor:
        """Return a plain tensor in its own dtype, mapped where possible, any other as float32."""
        import numpy as np
        import torch

        tensor = self.header.tensors[gguf_name(spec.name)]
        flat = np.frombuffer(self.header.data, np.uint8, tensor.nbytes, tensor.offset)
        rows = self._half_split(spec.name, flat.reshape(spec.shape[0], -1))
        if tensor.type in _PLAIN:
            dtype = getattr(torch, _TORCH_NAMES[_PLAIN[tensor.type]])
            return torch.from_numpy(rows).view(dtype).view(spec.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            return torch.from_numpy(dequantize(rows, GGMLQuantizationType[tensor.type]))
        except (KeyError, NotImplementedError):
            raise CheckpointError(
                f"{self.path}: {tensor.name} is stored as {tensor.type}, which the installed gguf package "
                "does not dequantize: update it"
            ) from None

    def _half_split(self, name: str, rows: Any) -> Any:
        """Undo llama.cpp's order of Q and K rows: it lays the two halves of a RoPE pair side by side."""
        heads = {"q_proj": self.config.n_heads, "k_proj": self.config.n_kv_heads}.get(name.split(".")[-2])
        if heads is None or self.header.text("general.architecture") != "llama":
            return rows
        pairs = rows.reshape(heads, self.config.head_dim // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def drop_pages(self) -> None:
        self.header.data.madvise(mmap.MADV_DONTNEED)

    def tokenizer(self) -> Tokenizer:
        from quantkit.models.tokenizer import Tokenizer

        return Tokenizer.from_gguf(self.header)

    def hf_config_dict(self) -> dict[str, Any]:
        """Return a config.json with which transformers computes what this file describes.

        Raises:
            CheckpointError: transformers has no setting for these biases or RoPE frequencies.
        """
        config = self.config
        eos = config.eos_token_ids
        raw: dict[str, Any] = {
            "architectures": [name for name, kind in ARCHITECTURES.items() if kind == config.architecture],
            "model_type": config.architecture,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": config.activation,
            "max_position_embeddings": config.max_context,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tie_embeddings,
            "torch_dtype": _TORCH_NAMES[config.dtype],
            "bos_token_id": config.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        }
        if config.architecture == "llama":
            raw |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
        elif config.architecture == "mistral":
            raw["sliding_window"] = config.sliding_window
        self._refuse_biases()
        if config.rope_divisors is not None:
            raw["rope_scaling"] = _llama3_scaling(config, self.path)
        return raw

    def _refuse_biases(self) -> None:
        """Refuse biases that the architecture has not, or lacks, in transformers."""
        config = self.config
        found = (config.qkv_bias, config.o_bias, config.mlp_bias)
        allowed = {
            "llama": (config.qkv_bias, config.qkv_bias, config.mlp_bias),
            "mistral": (False, False, False),
            "qwen2": (True, False, False),
        }[config.architecture]
        if found != allowed:
            raise CheckpointError(
                f"{self.path} cannot be converted: transformers has no {config.architecture} model with "
                f"biases on QKV {found[0]}, attention output {found[1]}, FFN {found[2]}"
            )


def gguf_name(name: str) -> str:
    """Return what GGUF calls the tensor of this Hugging Face name."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_IN_BLOCK[rest]}.{kind}"


def _config(header: GGUFHeader) -> ModelConfig:
    """Return the model that the metadata and the table of tensors describe."""
    arch = header.text("general.architecture")
    if arch not in _KNOWN:
        raise ConfigError(
            f"{header.path}: unknown architecture {arch!r}; known are {', '.join(_KNOWN)} "
            "(Mistral's files say llama)"
        )
    need = _Needed(header, arch)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{header.path}: the tensor token_embd.weight is missing")
    n_layers, n_heads = need("block_count"), need("attention.head_count")
    if n_layers > len(header.tensors):
        raise CheckpointError(f"{header.path}: {n_layers:,} layers, but only {len(header.tensors)} tensors")
    hidden = need("embedding_length")
    head_dim = _head_dim(header, arch, hidden, n_heads)
    _refuse_unsupported(header, arch, head_dim)
    window = header.integer("llama.attention.sliding_window", 0) or None  # qwen2 files do not use theirs
    return ModelConfig(
        name=re.sub(r"[^a-z0-9.]+", "-", header.path.stem.lower()).strip("-.") or "gguf",
        architecture="mistral" if arch == "llama" and window else arch,
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=header.integer(f"{arch}.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        max_context=need("context_length"),
        rope_theta=header.number(f"{arch}.rope.freq_base", 10000.0),
        norm_eps=header.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5),
        dtype=_dtype(header),
        rope_divisors=_rope_divisors(header, head_dim),
        sliding_window=window if arch == "llama" else None,
        tie_embeddings="output.weight" not in header.tensors,
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        o_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
        bos_token_id=header.integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=header.end_token_ids,
    )


class _Needed:
    """Reads whole numbers that must be there, under the architecture's prefix."""

    def __init__(self, header: GGUFHeader, arch: str) -> None:
        self.header, self.arch = header, arch

    def __call__(self, key: str) -> int:
        value = self.header.integer(f"{self.arch}.{key}")
        if value is None:
            raise ConfigError(
                f"{self.header.path}: the metadata key {self.arch}.{key} is missing; "
                "the model cannot be built without it"
            )
        return value


def _head_dim(header: GGUFHeader, arch: str, hidden: int, n_heads: int) -> int:
    for key in ("attention.key_length", "rope.dimension_count"):
        value = header.integer(f"{arch}.{key}")
        if value is not None:
            return value
    if n_heads <= 0 or hidden % n_heads:
        raise ConfigError(f"{header.path}: embedding_length {hidden} is no multiple of {n_heads} heads")
    return hidden // n_heads


def _refuse_unsupported(header: GGUFHeader, arch: str, head_dim: int) -> None:
    """Refuse what would otherwise be computed wrongly in silence."""
    for key, allowed in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("expert_count", 0),
    ):
        value = header.integer(f"{arch}.{key}", allowed)
        if value != allowed:
            raise ConfigError(f"{header.path}: {arch}.{key} is {value}; only {allowed} is supported here")
    kind = header.text(f"{arch}.rope.scaling.type") or "linear"
    factor = header.number(f"{arch}.rope.scaling.factor", header.number(f"{arch}.rope.scale_linear", 1.0))
    if kind != "none" and (kind != "linear" or factor not in (0.0, 1.0)):  # llama.cpp: 0 is unset
        raise ConfigError(f"{header.path}: RoPE scaling {kind!r} by {factor} is not supported; known is none")


def _dtype(header: GGUFHeader) -> str:
    kinds = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) == 2}
    narrow = kinds - {"F32"}
    if not narrow:
        return "fp32"
    return "fp16" if narrow == {"F16"} else "bf16"


def _rope_divisors(header: GGUFHeader, head_dim: int) -> tuple[float, ...] | None:
    """Return what Llama 3.1 divides each RoPE frequency by, None where that is 1 throughout."""
    tensor = header.tensors.get(_ROPE_FREQS)
    if tensor is None:
        return None
    if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{header.path}: {_ROPE_FREQS} is {tensor.type} {list(tensor.shape)}, not F32 [{head_dim // 2}]"
        )
    divisors = struct.unpack_from(f"<{head_dim // 2}f", header.data, tensor.offset)
    if not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
        raise CheckpointError(f"{header.path}: {_ROPE_FREQS} holds values that are not above 0")
    return None if set(divisors) == {1.0} else divisors


def _llama3_scaling(config: ModelConfig, path: Path) -> dict[str, Any]:
    """Return the `rope_scaling` whose divisors are the file's, or refuse.

    Llama 3.1 to 3.3 differ in `factor` alone, which the slowest frequency shows.
    """
    assert config.rope_divisors is not None
    low, high, original, factor = 1.0, 4.0, 8192, _whole(max(config.rope_divisors))
    for index, divisor in enumerate(config.rope_divisors):
        turns = original * config.rope_theta ** (-2 * index / config.head_dim) / (2 * math.pi)
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(divisor, 1 / (blend + (1 - blend) / factor), rel_tol=1e-5):  # float32 either way
            raise CheckpointError(
                f"{path} cannot be converted: config.json has no setting for its RoPE frequencies "
                f"({_ROPE_FREQS} is not Llama 3's scaling)"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _whole(value: float) -> float:
    return float(round(value)) if math.isclose(value, round(value), rel_tol=1e-6) else value
