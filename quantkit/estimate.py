"""ModelConfig x QuantScheme x Workload -> MemoryEstimate: what quantkit's own runtime takes on one GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from calculators.flash import flash_runs
from calculators.hardware import ASSUMED_PLATFORM, Platform
from calculators.kv_cache import KVLayout, cached_tokens, kv_cache_bytes
from calculators.peak import Peaks, Run, at_peak, loaded_bytes, play
from calculators.tape import Layer, Matrix, Model
from calculators.weights import Packing, matrix_bytes, packing_formula, plain_bytes
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
        kv_group: elements of a head that share a scale of the cache; 0 is the whole head.
        prefill_chunk: tokens of the prompt that run through the model at once.

    Raises:
        ConfigError: a number that is not above 0, or bits of a cache that do not exist.
    """

    context: int
    batch: int = 1
    kv_bits: int | None = None
    kv_group: int = 0
    prefill_chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        for field in ("context", "batch", "prefill_chunk"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be above 0")
        if self.kv_group < 0:
            raise ConfigError(f"kv_group is {self.kv_group}; it must be 0, the whole head, or above")
        if self.kv_bits is not None and self.kv_bits not in KV_BITS:
            raise ConfigError(f"kv_bits is {self.kv_bits}; known are {', '.join(map(str, KV_BITS))}")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one scheme under one workload, by component, each at its largest.

    Attributes:
        weights_bytes: every tensor of the model.
        kv_cache_bytes: the whole cache.
        activations_bytes: all else that the forward pass keeps alive at once.
        allocator_bytes: what PyTorch's allocator reserves beyond the requests: rounding and holes.
        overhead_bytes: CUDA context and cuBLAS workspace.
        allocated_bytes: `torch.cuda.max_memory_allocated`; weights, cache, activations, workspace, rounding.
        reserved_bytes: `torch.cuda.max_memory_reserved`.
    """

    scheme: str
    kv_bits: int
    context: int
    batch: int
    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    allocator_bytes: int
    overhead_bytes: int
    allocated_bytes: int
    reserved_bytes: int

    @property
    def total_bytes(self) -> int:
        """What the process takes of the device: reserved, and the CUDA context."""
        parts = (self.weights_bytes, self.kv_cache_bytes, self.activations_bytes)
        return sum(parts) + self.allocator_bytes + self.overhead_bytes


def compute_dtype(config: ModelConfig, scheme: QuantScheme) -> str:
    """Return the dtype the runtime computes in: a plain scheme's own, else the checkpoint's."""
    return scheme.dtype or config.dtype


def kv_layout(
    config: ModelConfig, scheme: QuantScheme, kv_bits: int | None = None, kv_group: int = 0
) -> KVLayout:
    """Return the cache's layout; without `kv_bits` it holds the compute dtype.

    Raises:
        ConfigError: the group does not divide the head.
    """
    bits = kv_bits or DTYPE_BITS[compute_dtype(config, scheme)]
    try:
        return KVLayout(config.n_layers, config.n_kv_heads, config.head_dim, bits, kv_group)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def weight_bytes(config: ModelConfig, scheme: QuantScheme, plan: Mapping[str, QuantScheme]) -> int:
    """Return the bytes of all weights: codes and scales of what `plan` quantizes, the rest plain.

    Equals the summed `nbytes` of the tensors that the runtime holds. A tied head counts once.

    Args:
        config: the model.
        scheme: a plain one sets the dtype of every tensor; else the rest keeps the checkpoint's.
        plan: the scheme of every quantized matrix, as `plan_weights` gives it.
    """
    return sum(weight_parts(config, scheme, plan))


def weight_parts(
    config: ModelConfig, scheme: QuantScheme, plan: Mapping[str, QuantScheme]
) -> tuple[int, ...]:
    """Return the bytes of every tensor the runtime holds, in the order in which it loads them."""
    plain_bits = DTYPE_BITS[compute_dtype(config, scheme)]
    known: dict[tuple[tuple[int, ...], QuantScheme | None], tuple[int, ...]] = {}
    parts: list[int] = []
    for spec in config.tensors:
        key = (spec.shape, plan.get(spec.name))
        if key not in known:
            known[key] = _parts(*key, config.dtype, plain_bits)
        parts += known[key]
    return tuple(parts)


def _parts(
    shape: tuple[int, ...], scheme: QuantScheme | None, dtype: str, plain_bits: int
) -> tuple[int, ...]:
    if scheme is None:
        return (plain_bytes(prod(shape), plain_bits),)
    rows, cols = shape
    return matrix_bytes(rows, cols, scheme.packing(dtype)).parts


class Estimator:
    """One model at one precision on one platform.

    Args:
        config: the model.
        scheme: the precision; its name goes into the results.
        plan: the scheme of every quantized matrix; None means `plan_weights`' default.
        weights_bytes: bytes of all weights where they are known, as of a file; None sums them.
        platform: what the device and its libraries take, and which attention runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        scheme: QuantScheme,
        plan: Mapping[str, QuantScheme] | None = None,
        weights_bytes: int | None = None,
        platform: Platform = ASSUMED_PLATFORM,
    ) -> None:
        self.config, self.scheme, self.platform = config, scheme, platform
        self.plan = plan_weights(config, scheme) if plan is None else plan
        self.weights = weight_parts(config, scheme, self.plan)
        if weights_bytes is not None and weights_bytes != sum(self.weights):
            self.weights = (weights_bytes,)  # how a file splits them is not known here
        self.weights_bytes = sum(self.weights)
        self.model = decoder_model(config, scheme, self.plan, platform)

    @property
    def loaded_bytes(self) -> int:
        """Allocated once the decoder is made, which is also the most until then."""
        return loaded_bytes(self.weights, self.config.head_dim, self.platform.expandable_segments)

    def estimate(self, workload: Workload) -> MemoryEstimate:
        """Return what a workload takes."""
        layout = kv_layout(self.config, self.scheme, workload.kv_bits, workload.kv_group)
        peaks = self.peaks(workload)
        cache = kv_cache_bytes(layout, workload.context, workload.batch, self.config.sliding_window)
        workspace, context = self.platform.workspace.nbytes, self.platform.context.nbytes
        return MemoryEstimate(
            scheme=self.scheme.name,
            kv_bits=layout.bits,
            context=workload.context,
            batch=workload.batch,
            weights_bytes=self.weights_bytes,
            kv_cache_bytes=cache,
            activations_bytes=peaks.requested - self.weights_bytes - cache - workspace,
            allocator_bytes=peaks.reserved - peaks.requested,
            overhead_bytes=context + workspace,
            allocated_bytes=peaks.allocated,
            reserved_bytes=peaks.reserved,
        )

    def peaks(self, workload: Workload, sampled: bool = False) -> Peaks:
        """Return the allocator's peaks; `sampled` runs only the first two chunks of the prompt and the last."""
        return play(self.weights, self.model, *self.setting(workload, sampled))

    def setting(self, workload: Workload, sampled: bool = False) -> tuple[KVLayout, Run]:
        """Return a workload as the calculators know it."""
        layout = kv_layout(self.config, self.scheme, workload.kv_bits, workload.kv_group)
        run = Run(
            workload.context,
            workload.batch,
            workload.prefill_chunk,
            self.platform.workspace.nbytes,
            self.platform.expandable_segments,
            sampled,
        )
        return layout, run


@dataclass(frozen=True)
class Explained:
    """A term of an estimate: the component it belongs to, and how its bytes come about."""

    component: str
    name: str
    formula: str
    nbytes: int


def explain(
    config: ModelConfig,
    scheme: QuantScheme,
    workload: Workload,
    plan: Mapping[str, QuantScheme] | None = None,
    platform: Platform = ASSUMED_PLATFORM,
) -> tuple[Explained, ...]:
    """Return every term of an estimate; their bytes add up to its total."""
    found = Estimator(config, scheme, plan, platform=platform)
    terms = [Explained("weights", *term) for term in _weight_terms(config, scheme, found.plan)]
    layout, run = found.setting(workload)
    entry = found.estimate(workload)
    tokens = cached_tokens(workload.context, config.sliding_window)
    per_token = f"2 x layers {layout.layers} x KV heads {layout.n_kv_heads} x {layout.vector_formula}"
    formula = f"batch {workload.batch} x tokens {tokens:,} x {per_token}"
    terms.append(Explained("KV cache", layout.describe(), formula, entry.kv_cache_bytes))
    fixed = ("KV cache", "cuBLAS workspace")
    alive = [term for term in at_peak(found.weights, found.model, layout, run) if term.name not in fixed]
    terms += [Explained("activations", *term) for term in alive]
    requested = entry.reserved_bytes - entry.allocator_bytes
    holes = f"reserved {entry.reserved_bytes:,} - requested {requested:,}"
    terms.append(Explained("allocator", "rounding, holes, cached segments", holes, entry.allocator_bytes))
    for name, overhead in (("CUDA context", platform.context), ("cuBLAS workspace", platform.workspace)):
        terms.append(Explained("overhead", f"{name}, {overhead.status}", overhead.source, overhead.nbytes))
    return tuple(terms)


def _weight_terms(
    config: ModelConfig, scheme: QuantScheme, plan: Mapping[str, QuantScheme]
) -> list[tuple[str, str, int]]:
    """Return name, formula and bytes of the tensors of each role, shape and precision."""
    plain = Packing(DTYPE_BITS[compute_dtype(config, scheme)])
    terms = []
    for (role, shape, planned), count in Counter(
        (spec.role, spec.shape, plan.get(spec.name)) for spec in config.tensors
    ).items():
        packing = planned.packing(config.dtype) if planned else plain
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        size = count * matrix_bytes(rows, cols, packing).total
        label = planned.name if planned else f"{plain.code_bits} bits"
        name = f"{role} {' x '.join(map(str, shape))}, {label}"
        terms.append((name, f"{count} x ({packing_formula(rows, cols, packing)})", size))
    return terms


def estimate(
    config: ModelConfig,
    scheme: QuantScheme,
    workload: Workload,
    plan: Mapping[str, QuantScheme] | None = None,
    weights_bytes: int | None = None,
    platform: Platform = ASSUMED_PLATFORM,
) -> MemoryEstimate:
    """Return what a model takes at one precision under one workload; the arguments are Estimator's."""
    return Estimator(config, scheme, plan, weights_bytes, platform).estimate(workload)


def attention_path(config: ModelConfig, scheme: QuantScheme, wanted: str) -> str:
    """Return the attention that runs: what is wanted, or `math` where flash does not take dtype or head."""
    runs = flash_runs(DTYPE_BITS[compute_dtype(config, scheme)] // 8, config.head_dim)
    return wanted if runs else "math"


def decoder_model(
    config: ModelConfig, scheme: QuantScheme, plan: Mapping[str, QuantScheme], platform: Platform
) -> Model:
    """Return the decoder as the calculators know it."""
    plain = Packing(DTYPE_BITS[compute_dtype(config, scheme)])
    matrices = {
        spec.name: Matrix(*spec.shape, plan[spec.name].packing(config.dtype) if spec.name in plan else plain)
        for spec in config.tensors
        if len(spec.shape) == 2
    }
    kinds: dict[Layer, Layer] = {}  # equal layers become one object
    layers = (_layer(matrices, f"model.layers.{index}") for index in range(config.n_layers))
    tied = config.tie_embeddings
    return Model(
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        element_bytes=plain.code_bits // 8,
        layers=tuple(kinds.setdefault(layer, layer) for layer in layers),
        head=matrices["model.embed_tokens.weight" if tied else "lm_head.weight"],
        attention=attention_path(config, scheme, platform.attention),
        sm_count=platform.sm_count,
        window=config.sliding_window,
    )


def _layer(matrices: Mapping[str, Matrix], prefix: str) -> Layer:
    def find(name: str) -> Matrix:
        return matrices[f"{prefix}.{name}_proj.weight"]

    return Layer(
        q=find("self_attn.q"),
        k=find("self_attn.k"),
        v=find("self_attn.v"),
        o=find("self_attn.o"),
        gate=find("mlp.gate"),
        up=find("mlp.up"),
        down=find("mlp.down"),
    )
