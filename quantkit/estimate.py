"""ModelConfig x QuantScheme x Workload -> MemoryEstimate: what quantkit's own runtime takes on one GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from calculators.activations import Dequantized, Dimensions, workspace_bytes
from calculators.hardware import ASSUMED_OVERHEAD
from calculators.kv_cache import KVLayout, kv_cache_bytes
from calculators.weights import matrix_bytes, plain_bytes
from quantkit.config import DTYPE_BITS, ModelConfig
from quantkit.errors import ConfigError
from quantkit.schemes import QuantScheme, plan_weights

PREFILL_CHUNK = 2048
KV_BITS = (32, 16, 8, 4)


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        context: tokens of a sequence, prompt and answer together.
        batch: sequences at once.
        kv_bits: bits of a cached element; None is the compute dtype's.
        prefill_chunk: tokens of the prompt that run through the model at once.

    Raises:
        ConfigError: a number that is not above 0, or bits of a cache that do not exist.
    """

    context: int
    batch: int = 1
    kv_bits: int | None = None
    prefill_chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        for field in ("context", "batch", "prefill_chunk"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be above 0")
        if self.kv_bits is not None and self.kv_bits not in KV_BITS:
            raise ConfigError(f"kv_bits is {self.kv_bits}; known are {', '.join(map(str, KV_BITS))}")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one scheme under one workload, by component."""

    scheme: str
    kv_bits: int
    context: int
    batch: int
    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.activations_bytes + self.overhead_bytes


def compute_dtype(config: ModelConfig, scheme: QuantScheme) -> str:
    """Return the dtype the runtime computes in: a plain scheme's own, else the checkpoint's."""
    return scheme.dtype or config.dtype


def kv_layout(config: ModelConfig, scheme: QuantScheme, kv_bits: int | None = None) -> KVLayout:
    """Return the cache's layout; without `kv_bits` it holds the compute dtype."""
    bits = kv_bits or DTYPE_BITS[compute_dtype(config, scheme)]
    return KVLayout(config.n_layers, config.n_kv_heads, config.head_dim, bits)


def weight_bytes(config: ModelConfig, scheme: QuantScheme, plan: Mapping[str, QuantScheme]) -> int:
    """Return the bytes of all weights: codes and scales of what `plan` quantizes, the rest plain.

    Equals the summed `nbytes` of the tensors that the runtime holds. A tied head counts once.

    Args:
        config: the model.
        scheme: a plain one sets the dtype of every tensor; else the rest keeps the checkpoint's.
        plan: the scheme of every quantized matrix, as `plan_weights` gives it.
    """
    plain_bits = DTYPE_BITS[compute_dtype(config, scheme)]
    counts = Counter((spec.shape, plan.get(spec.name)) for spec in config.tensors)
    total = 0
    for (shape, quantized), count in counts.items():
        if quantized is None:
            total += count * plain_bytes(prod(shape), plain_bits)
        else:
            rows, cols = shape
            total += count * matrix_bytes(rows, cols, quantized.packing(config.dtype)).total
    return total


def estimate(
    config: ModelConfig,
    scheme: QuantScheme,
    workload: Workload,
    plan: Mapping[str, QuantScheme] | None = None,
    weights_bytes: int | None = None,
) -> MemoryEstimate:
    """Return what a model takes at one precision under one workload.

    Args:
        config: the model.
        scheme: the precision; its name goes into the result.
        workload: context, batch and cache.
        plan: the scheme of every quantized matrix; None means `plan_weights`' default.
        weights_bytes: bytes of all weights where they are known, as of a file; None sums them.
    """
    if plan is None:
        plan = plan_weights(config, scheme)
    layout = kv_layout(config, scheme, workload.kv_bits)
    return MemoryEstimate(
        scheme=scheme.name,
        kv_bits=layout.bits,
        context=workload.context,
        batch=workload.batch,
        weights_bytes=weight_bytes(config, scheme, plan) if weights_bytes is None else weights_bytes,
        kv_cache_bytes=kv_cache_bytes(layout, workload.context, workload.batch, config.sliding_window),
        activations_bytes=workspace_bytes(
            dimensions(config, scheme),
            dequantized(config, plan),
            batch=workload.batch,
            context=workload.context,
            chunk=workload.prefill_chunk,
            kv_bits=layout.bits,
        ),
        overhead_bytes=ASSUMED_OVERHEAD.nbytes,
    )


def dimensions(config: ModelConfig, scheme: QuantScheme) -> Dimensions:
    """Return the widths that activations depend on."""
    return Dimensions(
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        q_width=config.n_heads * config.head_dim,
        kv_width=config.n_kv_heads * config.head_dim,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        element_bytes=DTYPE_BITS[compute_dtype(config, scheme)] // 8,
        window=config.sliding_window,
    )


def dequantized(config: ModelConfig, plan: Mapping[str, QuantScheme]) -> Dequantized:
    """Return the largest matrices that the runtime dequantizes before it multiplies."""
    largest = dict.fromkeys(("attention", "ffn", "head"), 0)
    for spec in config.tensors:
        if spec.name in plan:
            largest[spec.role] = max(largest[spec.role], spec.elements)
    used = set(plan.values())
    unpacked = any(scheme.method == "int" and scheme.bits < 8 for scheme in used)
    group = min((scheme.group for scheme in used if scheme.group), default=0)
    zero_points = any(not scheme.symmetric for scheme in used)
    return Dequantized(
        attention=largest["attention"],
        ffn=largest["ffn"],
        head=largest["head"],
        group=group,
        zero_points=zero_points,
        code_bytes=int(unpacked),
    )
