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

from quantkit.kernels.triton.step_kernels import _LOG2_E, _follow, _product, _rounded


def _nibbles(place: int, power: int) -> str:
    """Return PTX that lays the codes of two 16-bit words, $4, over floats of 16 whose bits are `power`, at `place`."""
    lines = [".reg .b32 moved;"]
    for i in range(4):
        shift = 4 * i - place
        lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 moved, $4, {abs(shift)};")
        mask, bits = 15 << place, (power << 16) | power
        lines.append(
            f"lop3.b32 ${i}, moved, {(mask << 16) | mask:#x}, {bits:#x}, 0xea;"
        )  # moved & mask | bits
    return "\n".join(["{", *lines, "}"])


_NIBBLES_BF16 = tl.constexpr(_nibbles(3, 0x4180))
_NIBBLES_FP16 = tl.constexpr(_nibbles(6, 0x4C00))
_NIBBLES_ZERO = tl.constexpr(16 + 8)  # of codes laid over a 16


@triton.jit
def _nibble_pieces(words: tl.tensor, dtype: tl.constexpr, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return a tuple of the four codes of each 16-bit word, each plus 16: one instruction for each, no conversion."""
    if INTERPRET:
        pieces: tl.tensor = ()
        for i in tl.static_range(4):
            pieces += (((words.to(tl.int32) >> (4 * i)) & 15).to(tl.float32) + 16,)
    elif dtype == tl.bfloat16:
        pieces = tl.inline_asm_elementwise(
            _NIBBLES_BF16, "=r,=r,=r,=r,r", [words], is_pure=True, pack=2,
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        )  # fmt: skip
    else:
        pieces = tl.inline_asm_elementwise(
            _NIBBLES_FP16, "=r,=r,=r,=r,r", [words], is_pure=True, pack=2,
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        )  # fmt: skip
    return pieces


@triton.jit
def _piece(
    words: tl.tensor, i: tl.constexpr, scale: tl.tensor, dtype: tl.constexpr, BITS: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return code i of each word less its zero point, times `scale` where there is one."""
    IN_MANTISSA: tl.constexpr = 23 // BITS  # so many codes need no shift
    PLACE: tl.constexpr = BITS * (i % IN_MANTISSA)
    SHIFT: tl.constexpr = BITS * (i // IN_MANTISSA) * IN_MANTISSA
    code = (words.to(tl.int32) >> SHIFT) & (((1 << BITS) - 1) << PLACE)
    # the float32 2**(23 - PLACE) + code, from which its zero point is taken exactly
    raised = (code | ((127 + 23 - PLACE) << 23)).to(tl.float32, bitcast=True)
    value = raised - ((1 << (23 - PLACE)) + (1 << (BITS - 1)))
    if scale is not None:
        value = _rounded(value * scale, dtype, INTERPRET)
    return value if INTERPRET else value.to(dtype)


@triton.jit
def _pieces(
    words: tl.tensor, scale: tl.tensor, dtype: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tuple of the PER elements of each word."""
    if BITS == 16:
        pieces: tl.tensor = (words,)
    else:
        pieces = ()
        for i in tl.static_range(PER):
            pieces += (_piece(words, i, scale, dtype, BITS, INTERPRET),)
    return pieces


@triton.jit
def attention_kernel(
    queries: tl.tensor, keys: tl.tensor, values: tl.tensor, key_scales: tl.tensor, value_scales: tl.tensor,
    position: tl.tensor, sums: tl.tensor, stats: tl.tensor, slots: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Attend to one split of the keys of one KV head of one sequence. Program (split, B * KV heads).

    HEADS query heads share it, ROWS is the tensor cores' least or more; a head of WIDTH elements is WORDS words,
    padded to a power of two, of PER elements, and has GROUPS scales. `scale` is that of the scores.

    Writes sums (B * KV heads, splits, HEADS, WIDTH), relative to the greatest score, and stats (B * KV heads,
    splits, 2, ROWS): that score, as a power of two, and the sum of the weights.
    """
    _follow(EARLY)
    dtype: tl.constexpr = queries.dtype.element_ty
    REAL: tl.constexpr = WIDTH // PER
    SCALED: tl.constexpr = GROUPS > 0
    EACH_KEY: tl.constexpr = GROUPS > 1
    EACH_VALUE: tl.constexpr = GROUPS > 1 or (GROUPS > 0 and dtype == tl.float16)
    NIBBLES: tl.constexpr = BITS == 4 and PER == 4  # codes come with another zero point, which meets the sums
    KEY_NIBBLES: tl.constexpr = NIBBLES and not EACH_KEY
    VALUE_NIBBLES: tl.constexpr = NIBBLES and not EACH_VALUE
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
    query_zero = tl.zeros((ROWS,), tl.float32)
    if KEY_NIBBLES:
        for i in tl.static_range(PER):
            query_zero += _NIBBLES_ZERO * tl.sum(pieces[i].to(tl.float32), axis=1)
    value_zero = tl.zeros((ROWS,), tl.float32)
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
        if KEY_NIBBLES:
            key_pieces = _nibble_pieces(key_words, dtype, INTERPRET)
            scores = tl.zeros((ROWS, BLOCK), tl.float32) - query_zero[:, None]
        else:
            key_pieces = _pieces(key_words, key_scale, dtype, BITS, PER, INTERPRET)
            scores = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(PER):
            scores += _product(pieces[i], key_pieces[i], dtype, INTERPRET)
        scores = tl.where(there[None, :], scores * factor[None, :] * _LOG2_E, float("-inf"))
        above = tl.maximum(greatest, tl.max(scores, axis=1))
        shrunk = tl.exp2(greatest - above)
        weight = tl.exp2(scores - above[:, None])
        weights = weights * shrunk + tl.sum(weight, axis=1)
        greatest = above
        if SCALED and not EACH_VALUE:
            weight *= tl.load(value_scales + at, mask=there, other=0.0).to(tl.float32)[None, :]
        weight = _rounded(weight, dtype, INTERPRET)
        if VALUE_NIBBLES:
            value_pieces = _nibble_pieces(value_words, dtype, INTERPRET)
            value_zero = value_zero * shrunk + _NIBBLES_ZERO * tl.sum(weight, axis=1)
        else:
            value_pieces = _pieces(value_words, value_scale, dtype, BITS, PER, INTERPRET)
        grown: tl.tensor = ()
        for i in tl.static_range(PER):
            added = _product(weight, value_pieces[i], dtype, INTERPRET)
            grown += (found[i] * shrunk[:, None] + added,)
        found = grown

    place = head * splits + split
    tl.store(stats + (place * 2) * ROWS + rows, greatest)
    tl.store(stats + (place * 2 + 1) * ROWS + rows, weights)
    out = sums + (place * HEADS + rows[:, None]).to(tl.int64) * WIDTH + words[None, :] * PER
    for i in tl.static_range(PER):
        tl.store(out + i, found[i] - value_zero[:, None], mask=inside[:, None] & whole[None, :])


@triton.jit
def combine_kernel(
    sums: tl.tensor, stats: tl.tensor, position: tl.tensor, out: tl.tensor, slots: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Add the splits of one query head: out (B, all heads, WIDTH). Program (head of the group, B * KV heads).

    SPLITS is the power of two from `splits` on, BLOCK that of `attention_kernel`.
    """
    _follow(EARLY)
    dtype: tl.constexpr = out.dtype.element_ty
    row, head = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    there = split < splits
    columns = tl.arange(0, BLOCK_WIDTH)
    whole = columns < WIDTH
    place = head * splits + split
    # all are loaded, what no program wrote as well, so that no load waits for the position
    greatest = tl.load(stats + place * 2 * ROWS + row, mask=there, other=0.0)
    weights = tl.load(stats + (place * 2 + 1) * ROWS + row, mask=there, other=0.0)
    at = (place * HEADS + row).to(tl.int64)[:, None] * WIDTH + columns[None, :]
    found = tl.load(sums + at, mask=there[:, None] & whole[None, :], other=0.0)
    count = tl.minimum(tl.load(position).to(tl.int32) + 1, slots)
    ran = split * (tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK) < count
    greatest = tl.where(ran, greatest, float("-inf"))
    weights = tl.where(ran, weights, 0.0)
    found = tl.where(ran[:, None], found, 0.0)
    shares = tl.exp2(greatest - tl.max(greatest, axis=0))
    total = tl.sum(found * shares[:, None], axis=0) / tl.sum(weights * shares, axis=0)
    tl.store(out + (head * HEADS + row) * WIDTH + columns, _rounded(total, dtype, INTERPRET), mask=whole)
