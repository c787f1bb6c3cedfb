"""ModelConfig: one decoder's shapes and constants, and its table of tensors.

Dimension letters used throughout quantkit: B batch, T tokens of this call, S cached tokens,
N output rows, K input columns, G groups in a row.

No torch here: `quantkit estimate` must answer at once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from quantkit.errors import ConfigError

DTYPE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}

# What transformers takes where the key is absent, not null (configuration_mistral.py, configuration_qwen2.py)
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32}
_DEFAULT_WINDOW = 4096

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
        if not 0 < self.rope_theta < math.inf:
            raise ConfigError(f"{self.name}: rope_theta is {self.rope_theta}; it must be above 0 and finite")
        if not 0 <= self.norm_eps < math.inf:
            raise ConfigError(f"{self.name}: norm_eps is {self.norm_eps}; it must be 0 or above, and finite")
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
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
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
        raise ConfigError(f"{where}: {key!r} is {shown(value)}, not an object")
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
    if raw.get("head_dim") is not None:
        head_dim = need.integer("head_dim")
    elif hidden % heads:
        raise ConfigError(
            f"{where}: hidden_size {hidden} is no multiple of {heads} heads and head_dim is absent"
        )
    else:
        head_dim = hidden // heads
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(
            f"{where}: hidden_act {shown(activation)} is not supported; the decoder computes silu"
        )
    biased = architecture == "llama"  # transformers heeds these two keys in no other
    attention_bias = biased and _flag(raw, "attention_bias", where)
    return ModelConfig(
        name=name,
        architecture=architecture,
        vocab_size=need.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=need.integer("intermediate_size"),
        n_layers=need.integer("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=_kv_heads(need, architecture, heads),
        head_dim=head_dim,
        max_context=need.integer("max_position_embeddings"),
        rope_theta=theta,
        norm_eps=need.number("rms_norm_eps"),
        dtype=_dtype(raw, where),
        rope_scaling=scaling,
        sliding_window=_sliding_window(raw, architecture, where),
        tie_embeddings=_flag(raw, "tie_word_embeddings", where),
        qkv_bias=architecture == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=biased and _flag(raw, "mlp_bias", where),
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
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{self.where}: {key!r} is {shown(value)}, not a number")
        return float(value)

    def integer(self, key: str) -> int:
        value = self.number(key)
        if not value.is_integer() or not 0 < value < 2**63:
            found = shown(self.raw[key])
            raise ConfigError(f"{self.where}: {key!r} is {found}; it must be a whole number above 0")
        return int(self.raw[key])


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    """Return the truth value under `key`, false where it is absent or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {key!r} is {shown(value)}; it must be true or false")
    return bool(value)


def _kv_heads(need: _Needed, architecture: str, heads: int) -> int:
    key = "num_key_value_heads"
    if need.raw.get(key) is not None:
        return need.integer(key)
    if key in need.raw:
        return heads
    count = _DEFAULT_KV_HEADS.get(architecture, heads)
    if heads % count:
        raise ConfigError(
            f"{need.where}: the key {key!r} is missing, and {heads} attention heads cannot share {architecture}'s "
            f"default of {count} evenly"
        )
    return count


def _token_ids(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """Return the ids under `key`: one, a list of them, or none; -1 is none, too."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and -1 <= token < 2**63 for token in ids):
        raise ConfigError(f"{where}: {key!r} is {shown(value)}, not a token id or a list of them")
    return tuple(token for token in ids if token >= 0)


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    known = ", ".join(ARCHITECTURES)
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: 'architectures' is {shown(names)}, not a list of names")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names and raw.get("model_type") in ARCHITECTURES.values():
        return str(raw["model_type"])
    found = ", ".join(names) or raw.get("model_type")
    if not found:
        raise ConfigError(f"{where}: the key 'architectures' is missing; known are {known}")
    raise ConfigError(f"{where}: unknown architecture {found}; known are {known}")


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    given = (raw.get(key) for key in ("dtype", "torch_dtype"))
    value = next((dtype for dtype in given if dtype is not None), "float32")
    name = DTYPE_NAMES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if name is None:
        raise ConfigError(f"{where}: dtype {shown(value)} is not one of {', '.join(DTYPE_NAMES)}")
    return name


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    scaling = json_object(raw, "rope_parameters", where) or json_object(raw, "rope_scaling", where)
    theta = _Needed({"rope_theta": 10000.0, **raw, **scaling}, where).number("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(
            f"{where}: RoPE scaling {shown(kind)} is not supported; known are default and llama3"
        )
    need = _Needed(scaling, f"{where} (rope scaling)")
    return theta, RopeScaling(
        factor=need.number("factor"),
        low_freq_factor=need.number("low_freq_factor"),
        high_freq_factor=need.number("high_freq_factor"),
        original_max_position_embeddings=need.integer("original_max_position_embeddings"),
    )


def _sliding_window(raw: Mapping[str, Any], architecture: str, where: str) -> int | None:
    """Return the window every layer uses, or None; layers that differ are refused."""
    raw = {"sliding_window": _DEFAULT_WINDOW, **raw}
    if architecture == "llama" or raw["sliding_window"] is None:
        return None
    if architecture == "qwen2":
        if not _flag(raw, "use_sliding_window", where):
            return None
        kinds = raw.get("layer_types") or ["mixed"]
        if not isinstance(kinds, list):
            raise ConfigError(f"{where}: 'layer_types' is {shown(kinds)}, not a list of names")
        if any(kind != "sliding_attention" for kind in kinds):
            raise ConfigError(
                f"{where}: layers with and without a sliding window are not supported in one model"
            )
    return _Needed(raw, where).integer("sliding_window")
