"""What storing and reading a KV cache asks of the allocator.

Mirrors `quantkit/models/kv_cache.py` and `quantkit/quantize/vectors.py`.
"""

from __future__ import annotations

from calculators.allocator import Block
from calculators.linear import PIECE_ELEMENTS
from calculators.tape import FP32, HALF, INT64, Tape

KV_SCALES_TRIED = 8  # for each group of a quantized key or value


def piece_tokens(elements: int) -> int:
    """Return the cached tokens that are dequantized at once, each of `elements` in one layer."""
    return max(1, PIECE_ELEMENTS // elements)


def attended(tape: Tape, tokens: int, length: int) -> int:
    """Return S, the keys that the next `tokens` attend to after `length` cached ones."""
    if tape.rolls and tokens == 1:
        return min(length + 1, tape.slots)
    return min(length, tape.slots) + tokens


def extend(tape: Tape, length: int) -> tuple[Block | None, ...]:
    """Store this chunk's keys and values; return what was joined to attend to."""
    tokens, rolls = tape.letters["T"], tape.rolls
    joined: tuple[Block | None, ...] = ()
    if rolls and tokens > 1 and length:
        _load(tape, min(length, tape.slots))
        joined = (
            tape.new("joined keys", "B S N D", tape.element_bytes),
            tape.new("joined values", "B S N D", tape.element_bytes),
        )
    _store(tape)
    if not (rolls and tokens > 1):
        _load(tape, tape.letters["S"])
    return joined


def _store(tape: Tape) -> None:
    """Quantize this chunk's keys, then its values; plain ones are copied into the slab."""
    if tape.cache.bits < 16:
        for _ in range(2):
            _quantize_vectors(tape, min(tape.letters["T"], tape.slots))


def _quantize_vectors(tape: Tape, tokens: int) -> None:
    """Codes and scales of some tokens' vectors."""
    cache, letters = tape.cache, tape.letters
    heads, head_dim = letters["B"] * letters["N"], letters["D"]
    groups = heads * tokens * (head_dim // (cache.group or head_dim))
    best = _best_scales(tape, groups, heads * head_dim, tokens)
    codes = tape.take("new codes", heads, tokens, head_dim * cache.bits // 8)
    step = piece_tokens(heads * head_dim)
    tape.in_pieces(tokens, step, lambda piece: _write_codes(tape, groups // tokens * piece, heads * piece))
    scales = tape.take("new scales", groups, HALF)
    tape.drop(best)
    tape.drop(codes, scales)


def _best_scales(tape: Tape, groups: int, token: int, tokens: int) -> Block | None:
    """The scale that loses least of each group, among several; `token` is the elements of a token."""
    e, take, drop, tried = tape.element_bytes, tape.take, tape.drop, KV_SCALES_TRIED
    extremes = [take(name, groups, e) for name in ("minima", "maxima", "signs", "peaks")]
    steps = take("steps", tried, FP32)
    wide = take("scales in float32", tried, groups, FP32)
    stored = take("scales as stored", tried, groups, HALF)
    scales = take("scales in float32", tried, groups, FP32)
    drop(stored)
    drop(wide)
    inverse, errors = take("inverse scales", tried, groups, FP32), take("errors", tried, groups, FP32)
    longest = min(tokens, piece_tokens(2 * tried * token))
    drop(take("vectors in steps, and what rounding loses", 2, tried, longest, token, FP32))
    drop(inverse)
    index = take("best of those tried", groups, INT64)
    drop(errors)
    best = take("best scales", groups, FP32)
    drop(*extremes, steps, scales, index)
    return best


def _write_codes(tape: Tape, groups: int, vectors: int) -> None:
    inverse = tape.take("inverse scales", groups, FP32)
    codes = tape.take("codes in float32", vectors, tape.letters["D"], FP32)
    tape.drop(inverse)
    tape.drop(codes)


def _load(tape: Tape, count: int) -> None:
    """Dequantize a layer's cache into the scratch, piece by piece."""
    if tape.cache.bits < 16:
        token = token_elements(tape)
        step = piece_tokens(token)
        tape.in_pieces(count, step, lambda tokens: _dequantize_vectors(tape, tokens * token))


def token_elements(tape: Tape) -> int:
    """Return the elements of one token's keys and values in one layer."""
    letters = tape.letters
    return 2 * letters["B"] * letters["N"] * letters["D"]


def _dequantize_vectors(tape: Tape, elements: int) -> None:
    """Nibbles are taken out of their bytes, the low ones first; whole bytes are converted in place."""
    if tape.cache.bits < 8:
        tape.drop(tape.take("low nibbles", elements // 2))
        tape.drop(tape.take("high nibbles", elements // 2))
