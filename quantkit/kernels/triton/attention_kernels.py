"""Attention of one new token to a KV cache, for CUDA and for Triton's interpreter. Importing this imports Triton.

The keys of a head are split among programs, each of which takes all query heads that share them; a second kernel
adds what the splits found, in their order. How many keys there are is read from device memory: the grid belongs to
the cache, and programs beyond the last key end at once.

Keys and values of 8 and 4 bits are read as they lie, in words of PER codes: code i of word j is element PER j + i.
So the head is multiplied in PER pieces, element i of every word, and nothing is moved between unpacking and the
tensor cores. Scales meet the scores, and the probabilities, where a head has one; where it has several, and for the
values in float16, whose range would not do, each element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.triton.step_kernels import _LOG2_E, _POWER, _POWER_BITS, _product, _rounded


@triton.jit
def _piece(
    words: tl.tensor, i: tl.constexpr, scale: tl.tensor, dtype: tl.constexpr, BITS: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return code i of each word less its zero point, times `scale` where there is one, as `dtype` holds it."""
    if BITS == 16:
        piece = words
    else:
        code = (words.to(tl.int32) >> (BITS * i)) & ((1 << BITS) - 1)
        # the float32 2**23 + code, from which its zero point is taken exactly
        value = (code | _POWER_BITS).to(tl.float32, bitcast=True) - (_POWER + (1 << (BITS - 1)))
        if scale is not None:
            value = _rounded(value * scale, dtype, INTERPRET)
        piece = value if INTERPRET else value.to(dtype)
    return piece


@triton.jit
def attention_kernel(
    queries: tl.tensor, keys: tl.tensor, values: tl.tensor, key_scales: tl.tensor, value_scales: tl.tensor,
    position: tl.tensor, sums: tl.tensor, stats: tl.tensor, slots: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Attend to one split of the keys of one KV head of one sequence. Program (split, B * KV heads).

    HEADS query heads share it, ROWS is the tensor cores' least or more; a head of WIDTH elements is WORDS words,
    padded to a power of two, of PER elements, and has GROUPS scales. `scale` is that of the scores.

    Writes sums (B * KV heads, splits, HEADS, WIDTH), relative to the greatest score, and stats (B * KV heads,
    splits, 2, ROWS): that score, as a power of two, and the sum of the weights.
    """
    dtype: tl.constexpr = queries.dtype.element_ty
    REAL: tl.constexpr = WIDTH // PER
    SCALED: tl.constexpr = GROUPS > 0
    EACH_KEY: tl.constexpr = GROUPS > 1
    EACH_VALUE: tl.constexpr = GROUPS > 1 or (GROUPS > 0 and dtype == tl.float16)
    split, splits, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    count = tl.minimum(tl.load(position).to(tl.int32) + 1, slots)
    span = tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK
    first = split * span
    if first >= count:
        return
    last = tl.minimum(first + span, count)

    rows = tl.arange(0, ROWS)
    inside = rows < HEADS
    words = tl.arange(0, WORDS)
    whole = words < REAL
    query = queries + (head * HEADS + rows[:, None]) * WIDTH + words[None, :] * PER
    pieces: tl.tensor = ()
    for i in tl.static_range(PER):
        pieces += (tl.load(query + i, mask=inside[:, None] & whole[None, :], other=0.0),)
    base = head.to(tl.int64) * slots
    keys += base * REAL
    values += base * REAL
    if SCALED:
        key_scales += base * GROUPS
        value_scales += base * GROUPS
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    found: tl.tensor = ()
    for _ in tl.static_range(PER):
        found += (tl.zeros((ROWS, WORDS), tl.float32),)

    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < last
        key_words = tl.load(
            keys + at[None, :] * REAL + words[:, None], mask=there[None, :] & whole[:, None], other=0
        )
        value_words = tl.load(
            values + at[:, None] * REAL + words[None, :], mask=there[:, None] & whole[None, :], other=0
        )
        key_scale = None
        value_scale = None
        if EACH_KEY:
            key_scale = tl.load(
                key_scales + at[None, :] * GROUPS + words[:, None] // (REAL // GROUPS),
                mask=there[None, :] & whole[:, None], other=0.0,
            ).to(tl.float32)  # fmt: skip
        if EACH_VALUE:
            value_scale = tl.load(
                value_scales + at[:, None] * GROUPS + words[None, :] // (REAL // GROUPS),
                mask=there[:, None] & whole[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
        factor = tl.full((BLOCK,), scale, tl.float32)
        if SCALED and not EACH_KEY:
            factor *= tl.load(key_scales + at, mask=there, other=0.0).to(tl.float32)
        scores = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(PER):
            piece = _piece(key_words, i, key_scale, dtype, BITS, INTERPRET)
            scores += _product(pieces[i], piece, dtype, INTERPRET)
        scores = tl.where(there[None, :], scores * factor[None, :] * _LOG2_E, float("-inf"))
        above = tl.maximum(greatest, tl.max(scores, axis=1))
        shrunk = tl.exp2(greatest - above)
        weight = tl.exp2(scores - above[:, None])
        weights = weights * shrunk + tl.sum(weight, axis=1)
        greatest = above
        if SCALED and not EACH_VALUE:
            weight *= tl.load(value_scales + at, mask=there, other=0.0).to(tl.float32)[None, :]
        weight = _rounded(weight, dtype, INTERPRET).to(dtype)
        grown: tl.tensor = ()
        for i in tl.static_range(PER):
            piece = _piece(value_words, i, value_scale, dtype, BITS, INTERPRET)
            grown += (found[i] * shrunk[:, None] + _product(weight, piece, dtype, INTERPRET),)
        found = grown

    place = head * splits + split
    tl.store(stats + (place * 2) * ROWS + rows, greatest)
    tl.store(stats + (place * 2 + 1) * ROWS + rows, weights)
    out = sums + (place * HEADS + rows[:, None]).to(tl.int64) * WIDTH + words[None, :] * PER
    for i in tl.static_range(PER):
        tl.store(out + i, found[i], mask=inside[:, None] & whole[None, :])


@triton.jit
def combine_kernel(
    sums: tl.tensor, stats: tl.tensor, position: tl.tensor, out: tl.tensor, slots: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Add the splits of one query head: out (B, all heads, WIDTH). Program (head of the group, B * KV heads).

    SPLITS is the power of two from `splits` on, BLOCK that of `attention_kernel`.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    row, head = tl.program_id(0), tl.program_id(1)
    count = tl.minimum(tl.load(position).to(tl.int32) + 1, slots)
    span = tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK
    split = tl.arange(0, SPLITS)
    ran = split * span < count
    columns = tl.arange(0, BLOCK_WIDTH)
    whole = columns < WIDTH
    place = head * splits + split
    greatest = tl.load(stats + place * 2 * ROWS + row, mask=ran, other=float("-inf"))
    weights = tl.load(stats + (place * 2 + 1) * ROWS + row, mask=ran, other=0.0)
    at = (place * HEADS + row).to(tl.int64)[:, None] * WIDTH + columns[None, :]
    found = tl.load(sums + at, mask=ran[:, None] & whole[None, :], other=0.0)
    shares = tl.exp2(greatest - tl.max(greatest, axis=0))
    total = tl.sum(found * shares[:, None], axis=0) / tl.sum(weights * shares, axis=0)
    tl.store(out + (head * HEADS + row) * WIDTH + columns, _rounded(total, dtype, INTERPRET), mask=whole)
