"""Peak workspace of quantkit's own runtime beside weights and KV cache: prefill in chunks, and decode.

One forward pass is a handful of phases; each lists the tensors that are alive at its widest moment,
in the order and dtypes of `quantkit/models/decoder.py` and `quantkit/kernels/reference.py`. The peak is
the largest phase. Attention is taken to be fused: no (T, S) scores are held. Chunk and context count
at their largest together, so that a short last chunk is bounded by a whole one. Decode is prefill with
T = 1: no term of it is larger.

B batch, T tokens of a chunk, S keys attended to, e bytes of an element of the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from calculators.units import ceil_div

FP32 = 4  # bytes
INT64 = 8  # bytes, of token ids and positions
BOOL = 1  # byte


@dataclass(frozen=True)
class Dimensions:
    """Widths of one decoder, in elements.

    Attributes:
        hidden: of the residual.
        ffn: of gate and up.
        q_width: query heads times head_dim.
        kv_width: key/value heads times head_dim.
        head_dim: of a head.
        vocab: of the logits.
        element_bytes: of the compute dtype, 2 or 4.
        window: tokens of a sliding window; None attends to the whole context.
    """

    hidden: int
    ffn: int
    q_width: int
    kv_width: int
    head_dim: int
    vocab: int
    element_bytes: int
    window: int | None = None


@dataclass(frozen=True)
class Dequantized:
    """Matrices that are dequantized before the multiply: elements of the largest of each place, or 0.

    Attributes:
        attention: of Q, K, V and output.
        ffn: of gate, up and down.
        head: of the output head.
        group: elements that share a scale, the fewest of any matrix; 0 where scales are negligible.
        zero_points: whether a group has one, fp32 like its scale while it lasts.
        code_bytes: bytes an element that unpacked codes take while they last: 1 for integers below
            8 bits; 0 for int8, which need no unpacking, and NF4, whose bytes are looked up in pairs.
    """

    attention: int = 0
    ffn: int = 0
    head: int = 0
    group: int = 0
    zero_points: bool = False
    code_bytes: int = 0


@dataclass(frozen=True)
class Load:
    """What runs at once.

    Attributes:
        batch: sequences.
        tokens: of a chunk; 1 in decode.
        context: tokens of a sequence when it ends.
        kv_bits: bits of a cached element.
    """

    batch: int
    tokens: int
    context: int
    kv_bits: int


class Term(NamedTuple):
    """One tensor, or several of a kind, and its bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Phase:
    """A moment of the forward pass and what is alive in it."""

    name: str
    terms: tuple[Term, ...]

    @property
    def total(self) -> int:
        return sum(term.nbytes for term in self.terms)


def workspace_bytes(
    dims: Dimensions, matrices: Dequantized, batch: int, context: int, chunk: int, kv_bits: int
) -> int:
    """Return the peak over prefill in chunks of at most `chunk` tokens, and decode."""
    return peak(dims, matrices, Load(batch, min(chunk, context), context, kv_bits)).total


def peak(dims: Dimensions, matrices: Dequantized, load: Load) -> Phase:
    """Return the largest phase of one forward pass."""
    return max(phases(dims, matrices, load), key=lambda phase: phase.total)


def phases(dims: Dimensions, matrices: Dequantized, load: Load) -> tuple[Phase, ...]:
    """Return every phase of one forward pass, each with what lives through the whole pass."""
    resident = _resident(dims, load)
    made = (
        _mask(dims, load),
        _norm(dims, load),
        _rotation(dims, load),
        _attention(dims, load),
        _attention_output(dims, matrices, load),
        _up(dims, matrices, load),
        _gated(dims, load),
        _down(dims, matrices, load),
        _logits(dims, matrices, load),
    )
    return tuple(Phase(phase.name, (*resident, *phase.terms)) for phase in made)


def dequantize_bytes(elements: int, matrices: Dequantized) -> int:
    """Return the bytes alive while a matrix of `elements` is dequantized.

    Unpacked codes, the fp32 values, scales and zero points, and two bytes an element more: first an
    index or padded codes, then the copy rounded to the compute dtype.
    """
    groups = ceil_div(elements, matrices.group) if matrices.group else 0
    scales = FP32 * groups * (2 if matrices.zero_points else 1)
    return elements * (matrices.code_bytes + FP32 + 2) + scales


def _resident(dims: Dimensions, load: Load) -> tuple[Term, ...]:
    """Token ids; the residual; the last chunk's final states, held until this one's replace them;
    cosines and sines, fp32 while they are made; the mask."""
    states = _states(dims, load)
    chunked = load.context > load.tokens > 1
    return (
        Term("token ids", INT64 * load.batch * load.context),
        Term("residual", states),
        Term("last chunk's states", states if chunked else 0),
        Term("rope tables", 2 * FP32 * load.tokens * dims.head_dim),
        Term("mask", BOOL * _mask_elements(dims, load)),
    )


def _mask(dims: Dimensions, load: Load) -> Phase:
    """A rolling cache's mask is made from int64 distances and two bool comparisons."""
    elements = _mask_elements(dims, load) if _rolls(dims, load) else 0
    return Phase("mask", (Term("distances", INT64 * elements), Term("comparisons", 2 * BOOL * elements)))


def _norm(dims: Dimensions, load: Load) -> Phase:
    """RMSNorm: x and the normed x in fp32, the latter rounded, the product with the weight; and the
    normed states of before, held until these replace them. fp32 needs no copies to convert."""
    e, n = dims.element_bytes, load.batch * load.tokens * dims.hidden
    wide, rounded = (2 * FP32 * n, e * n) if e < FP32 else (FP32 * n, 0)
    return Phase(
        "norm",
        (
            Term("normed states of before", e * n),
            Term("fp32 copies", wide),
            Term("rounded", rounded),
            Term("normed states", e * n),
        ),
    )


def _rotation(dims: Dimensions, load: Load) -> Phase:
    """RoPE: the projection, x * cos, the swapped halves and their product with sin; K beside rotated Q."""
    n = dims.element_bytes * load.batch * load.tokens
    widest = max(4 * dims.q_width, dims.q_width + 4 * dims.kv_width)
    return Phase(
        "rotation", (Term("normed states", _states(dims, load)), Term("projections and products", n * widest))
    )


def _attention(dims: Dimensions, load: Load) -> Phase:
    """Fused attention: its output, fp32 log-sum-exp, and the bool mask made additive (and inverted)."""
    additive = (dims.element_bytes + BOOL) * _mask_elements(dims, load)
    heads = dims.q_width // dims.head_dim
    return Phase(
        "attention",
        (
            *_queries_and_keys(dims, load),
            Term("unpacked KV codes", _cached_elements(dims, load) if load.kv_bits < 8 else 0),
            Term("additive mask", additive),
            Term("attention output", _queries(dims, load)),
            Term("log-sum-exp", FP32 * load.batch * load.tokens * heads),
        ),
    )


def _attention_output(dims: Dimensions, matrices: Dequantized, load: Load) -> Phase:
    """The output projection, with Q, K and V still alive and the heads laid side by side in a copy."""
    return Phase(
        "attention output",
        (
            *_queries_and_keys(dims, load),
            Term("attention output, twice", 2 * _queries(dims, load)),
            Term("linear", _linear(matrices.attention, matrices, _states(dims, load), dims)),
        ),
    )


def _up(dims: Dimensions, matrices: Dequantized, load: Load) -> Phase:
    """The up projection beside silu(gate)."""
    wide = _wide(dims, load)
    return Phase(
        "up",
        (
            Term("normed states", _states(dims, load)),
            Term("silu(gate)", wide),
            Term("linear", _linear(matrices.ffn, matrices, wide, dims)),
        ),
    )


def _gated(dims: Dimensions, load: Load) -> Phase:
    """silu(gate), up and their product."""
    wide = _wide(dims, load)
    return Phase("gated", (Term("normed states", _states(dims, load)), Term("gate, up, product", 3 * wide)))


def _down(dims: Dimensions, matrices: Dequantized, load: Load) -> Phase:
    """The down projection beside its input."""
    states = _states(dims, load)
    return Phase(
        "down",
        (
            Term("normed states", states),
            Term("product", _wide(dims, load)),
            Term("linear", _linear(matrices.ffn, matrices, states, dims)),
        ),
    )


def _logits(dims: Dimensions, matrices: Dequantized, load: Load) -> Phase:
    """The head on the last position alone, in the compute dtype and again in fp32."""
    e, elements = dims.element_bytes, load.batch * dims.vocab
    return Phase(
        "logits",
        (
            Term("final states", _states(dims, load)),
            Term("logits", _linear(matrices.head, matrices, e * elements, dims)),
            Term("fp32 logits", FP32 * elements if e < FP32 else 0),
        ),
    )


def _linear(elements: int, matrices: Dequantized, output: int, dims: Dimensions) -> int:
    """Return what a linear adds to its input: dequantizing its matrix, or multiplying with it."""
    dequantizing = dequantize_bytes(elements, matrices)
    return max(dequantizing, dims.element_bytes * elements + output)


def _queries_and_keys(dims: Dimensions, load: Load) -> tuple[Term, ...]:
    """What attention holds: Q, K and V of this chunk, and the cached K and V where these are no views.

    A cache in another dtype than the compute dtype is converted, one layer at a time. A rolling one is
    joined with the chunk's K and V into a copy.
    """
    e = dims.element_bytes
    converted = e * _cached_elements(dims, load) if load.kv_bits != 8 * e else 0
    joined = 0
    if _rolls(dims, load) and load.tokens > 1:
        joined = 2 * e * load.batch * _keys(dims, load) * dims.kv_width
    return (
        Term("normed states", _states(dims, load)),
        Term("q, k, v", e * load.batch * load.tokens * (dims.q_width + 2 * dims.kv_width)),
        Term("converted KV", converted),
        Term("joined KV", joined),
    )


def _states(dims: Dimensions, load: Load) -> int:
    return dims.element_bytes * load.batch * load.tokens * dims.hidden


def _queries(dims: Dimensions, load: Load) -> int:
    return dims.element_bytes * load.batch * load.tokens * dims.q_width


def _wide(dims: Dimensions, load: Load) -> int:
    return dims.element_bytes * load.batch * load.tokens * dims.ffn


def _rolls(dims: Dimensions, load: Load) -> bool:
    return dims.window is not None and dims.window < load.context


def _cached_elements(dims: Dimensions, load: Load) -> int:
    """Return the elements of one layer's cached K and V."""
    slots = load.context if dims.window is None else min(dims.window, load.context)
    return 2 * load.batch * slots * dims.kv_width


def _keys(dims: Dimensions, load: Load) -> int:
    """Return S: the whole context, or a window's tokens before the chunk and the chunk."""
    if dims.window is None or not _rolls(dims, load):
        return load.context
    return min(dims.window, load.context - load.tokens) + load.tokens


def _mask_elements(dims: Dimensions, load: Load) -> int:
    """Return T times S where a mask is made: for chunks after the first, and for rolling caches."""
    needed = load.tokens > 1 and (load.context > load.tokens or _rolls(dims, load))
    return load.tokens * _keys(dims, load) if needed else 0
