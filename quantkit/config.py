"""ModelConfig: one decoder's shapes and constants, and its table of tensors.

Dimension letters used throughout quantkit: B batch, T tokens of this call, S cached tokens,
N output rows, K input columns, G groups in a row.

No torch here: `quantkit estimate` must answer at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.errors import ConfigError

DTYPE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}

MOST_LAYERS = 10_000  # so that a broken file is refused before its tensors are listed
ROLES = ("embedding", "attention", "ffn", "norm", "head")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model.

    Attributes:
        name: the Hugging Face name, such as `model.layers.0.mlp.up_proj.weight`.
        shape: (N, K) for a linear, (V, hidden) for embedding and head, (n,) for norms and biases.
        role: one of `ROLES`; a bias has the role of its linear.
    """

    name: str
    shape: tuple[int, ...]
    role: str

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_block_linear(self) -> bool:
        """Whether this is a weight matrix of attention or FFN: what is quantized by default."""
        return self.role in ("attention", "ffn") and len(self.shape) == 2


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretching of low RoPE frequencies (`rope_type: llama3` in config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """What the estimator, the loader and the forward pass know of a model."""

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_context: int
    rope_theta: float
    norm_eps: float
    dtype: str = "bf16"
    rope_scaling: RopeScaling | None = None
    rope_divisors: tuple[float, ...] | None = None  # of each frequency, where a GGUF spells them out
    sliding_window: int | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads",
                      "n_kv_heads", "head_dim", "max_context"):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{self.name}: {field} is {value!r}; it must be a whole number above 0")
        if self.n_layers > MOST_LAYERS:
            raise ConfigError(
                f"{self.name}: n_layers is {self.n_layers:,}; more than {MOST_LAYERS:,} are no model"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"{self.name}: {self.n_heads} attention heads cannot share {self.n_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{self.name}: head_dim is {self.head_dim}; RoPE needs an even one")
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ConfigError(
                f"{self.name}: sliding_window is {self.sliding_window}; it must be above 0 or null"
            )
        if self.dtype not in DTYPE_BITS:
            raise ConfigError(f"{self.name}: dtype {self.dtype!r} is not one of {', '.join(DTYPE_BITS)}")

    @property
    def dtype_bits(self) -> int:
        return DTYPE_BITS[self.dtype]

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors in the order of the forward pass; a tied head is the embedding and not listed."""
        specs = [TensorSpec("model.embed_tokens.weight", (self.vocab_size, self.hidden_size), "embedding")]
        for layer in range(self.n_layers):
            specs += self._layer_tensors(f"model.layers.{layer}")
        specs.append(TensorSpec("model.norm.weight", (self.hidden_size,), "norm"))
        if not self.tie_embeddings:
            specs.append(TensorSpec("lm_head.weight", (self.vocab_size, self.hidden_size), "head"))
        return tuple(specs)

    def _layer_tensors(self, prefix: str) -> list[TensorSpec]:
        hidden, ffn = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        linears = (
            ("self_attn.q_proj", (q_rows, hidden), "attention", self.qkv_bias),
            ("self_attn.k_proj", (kv_rows, hidden), "attention", self.qkv_bias),
            ("self_attn.v_proj", (kv_rows, hidden), "attention", self.qkv_bias),
            ("self_attn.o_proj", (hidden, q_rows), "attention", self.o_bias),
            ("mlp.gate_proj", (ffn, hidden), "ffn", self.mlp_bias),
            ("mlp.up_proj", (ffn, hidden), "ffn", self.mlp_bias),
            ("mlp.down_proj", (hidden, ffn), "ffn", self.mlp_bias),
        )
        specs = [TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,), "norm")]
        for index, (name, shape, role, bias) in enumerate(linears):
            if index == 4:
                specs.append(TensorSpec(f"{prefix}.post_attention_layernorm.weight", (hidden,), "norm"))
            specs.append(TensorSpec(f"{prefix}.{name}.weight", shape, role))
            if bias:
                specs.append(TensorSpec(f"{prefix}.{name}.bias", shape[:1], role))
        return specs

    @property
    def parameters(self) -> int:
        return sum(spec.elements for spec in self.tensors)

    def parameters_by_role(self) -> dict[str, int]:
        """Return the parameters of each role; a tied head counts under embedding."""
        counts = dict.fromkeys(ROLES, 0)
        for spec in self.tensors:
            counts[spec.role] += spec.elements
        return counts


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        ConfigError: the file is missing, unreadable, or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def json_object(raw: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return the object under `key`, empty where it is absent or null.

    Raises:
        ConfigError: something else stands there.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}: {key!r} is {value!r}, not an object")
    return value or {}


def config_from_json(path: Path) -> ModelConfig:
    """Return the model that the Hugging Face `config.json` at `path` describes."""
    return config_from_dict(read_json(path), name=path.parent.resolve().name, where=str(path))


def config_from_dict(raw: Mapping[str, Any], name: str, where: str) -> ModelConfig:
    """Return the model that a Hugging Face config describes.

    Args:
        raw: the parsed config.json; both `rope_theta`/`torch_dtype` and the newer
            `rope_parameters`/`dtype` are understood.
        name: what to call the model.
        where: named in error messages.

    Raises:
        ConfigError: a needed key is absent, or the architecture is not one the decoder runs.
    """
    architecture = _architecture(raw, where)
    need = _Needed(raw, where)
    heads = need.integer("num_attention_heads")
    hidden = need.integer("hidden_size")
    theta, scaling = _rope(raw, where)
    head_dim = raw.get("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise ConfigError(
                f"{where}: hidden_size {hidden} is no multiple of {heads} heads and head_dim is absent"
            )
        head_dim = hidden // heads
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act {activation!r} is not supported; the decoder computes silu")
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        name=name,
        architecture=architecture,
        vocab_size=need.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=need.integer("intermediate_size"),
        n_layers=need.integer("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=need.integer("num_key_value_heads")
        if raw.get("num_key_value_heads") is not None
        else heads,
        head_dim=head_dim,
        max_context=need.integer("max_position_embeddings"),
        rope_theta=theta,
        norm_eps=need.number("rms_norm_eps"),
        dtype=_dtype(raw, where),
        rope_scaling=scaling,
        sliding_window=_sliding_window(raw, architecture, where),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2" or attention_bias,
        o_bias=architecture != "qwen2" and attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        bos_token_id=next(iter(_token_ids(raw, "bos_token_id", where)), None),
        eos_token_ids=_token_ids(raw, "eos_token_id", where),
    )


class _Needed:
    """Reads keys that must be there, with errors that name file and key."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def number(self, key: str) -> float:
        value = self.raw.get(key)
        if value is None:
            raise ConfigError(
                f"{self.where}: the key {key!r} is missing; the model cannot be built without it"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{self.where}: {key!r} is {value!r}, not a number")
        return float(value)

    def integer(self, key: str) -> int:
        value = self.number(key)
        if value != int(value):
            raise ConfigError(f"{self.where}: {key!r} is {value!r}, not a whole number")
        return int(value)


def _token_ids(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """Return the ids under `key`: one, a list of them, or none."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ConfigError(f"{where}: {key!r} is {value!r}, not a token id or a list of them")
    return tuple(ids)


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    known = ", ".join(ARCHITECTURES)
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise ConfigError(f"{where}: 'architectures' is {names!r}, not a list of names")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names and raw.get("model_type") in ARCHITECTURES.values():
        return str(raw["model_type"])
    found = ", ".join(map(str, names)) or raw.get("model_type")
    if not found:
        raise ConfigError(f"{where}: the key 'architectures' is missing; known are {known}")
    raise ConfigError(f"{where}: unknown architecture {found}; known are {known}")


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    value = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = DTYPE_NAMES.get(str(value).removeprefix("torch."))
    if name is None:
        raise ConfigError(f"{where}: dtype {value!r} is not one of {', '.join(DTYPE_NAMES)}")
    return name


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    scaling = json_object(raw, "rope_parameters", where) or json_object(raw, "rope_scaling", where)
    theta = _Needed({"rope_theta": 10000.0, **raw, **scaling}, where).number("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"{where}: RoPE scaling {kind!r} is not supported; known are default and llama3")
    need = _Needed(scaling, f"{where} (rope scaling)")
    return theta, RopeScaling(
        factor=need.number("factor"),
        low_freq_factor=need.number("low_freq_factor"),
        high_freq_factor=need.number("high_freq_factor"),
        original_max_position_embeddings=need.integer("original_max_position_embeddings"),
    )


def _sliding_window(raw: Mapping[str, Any], architecture: str, where: str) -> int | None:
    """Return the window every layer uses, or None; layers that differ are refused."""
    window = raw.get("sliding_window")
    if architecture == "llama" or window is None:
        return None
    if architecture == "qwen2":
        if not raw.get("use_sliding_window", False):
            return None
        kinds = set(raw.get("layer_types") or ["mixed"])
        if kinds != {"sliding_attention"}:
            raise ConfigError(
                f"{where}: layers with and without a sliding window are not supported in one model"
            )
    return int(window)
