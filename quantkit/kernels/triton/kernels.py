"""The kernels themselves, for CUDA and for Triton's interpreter. Importing this imports Triton.

M rows of x, N rows of the matrix, K columns. Along K the matrix is cut into tiles of `TILE` words, each word holding
two halves of PER = 16 / BITS codes; `layout.py` draws one. What one mask takes out of all halves of a row's tile are
`SPAN` neighbouring columns, so they meet SPAN neighbours of x and share a scale.

An integer code becomes a float32 without a conversion instruction: its bits are laid into the mantissa of a power of
two, which is subtracted together with the zero point. All of that is exact. The bits of the power come as an argument,
`POWER`: a mask and a value in a register make one instruction, where two constants would make two.

But for tensor cores, whose operands `unpack_ptx.py` makes, a code of NF4 indexes the codebook in global memory: 64
bytes, a line that stays in L1, where lanes that want the same entry share one access. Selecting among 16 constants
would take 15 instructions a weight. The load is written in PTX: for one of its own Triton chooses a layout, and
moves every operand to it through shared memory. The interpreter knows no PTX; INTERPRET takes the plain load.

Nothing depends on the order in which programs run: where K is split, sums go to a workspace, and `sum_kernel` adds
them in the order of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.kernels.triton import unpack_ptx
from quantkit.kernels.triton.layout import SPAN, TILE
from quantkit.schemes import NESTED_GROUP

_TILE = tl.constexpr(TILE)
_SPAN = tl.constexpr(SPAN)
_NESTED_GROUP = tl.constexpr(NESTED_GROUP)
POWER = (127 + 23) << 23  # bits of the float32 2**23
_POWER = tl.constexpr(POWER)
_TABLE_BF16, _TABLE_FP16 = (
    tl.constexpr(unpack_ptx.nf4_table(dtype)) for dtype in (torch.bfloat16, torch.float16)
)
_TO_TABLE = tl.constexpr(unpack_ptx.TABLE_CONSTRAINTS)


@triton.jit
def _values(
    words: tl.tensor, i: tl.constexpr, side: tl.constexpr, zero: tl.tensor, codebook: tl.tensor, power: tl.tensor,
    BITS: tl.constexpr, NF4: tl.constexpr, INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return code i of one half of each word: less its zero point in float32, or as the codebook has it."""
    # as `layout.place` has it
    at: tl.constexpr = 4 * (i // 2) + 2 * (i % 2) + side if NF4 else side * (16 // BITS) + i
    if NF4:
        entries = codebook + ((words >> (BITS * at)) & ((1 << BITS) - 1))
        if INTERPRET:
            found = tl.load(entries)
        else:
            found = tl.inline_asm_elementwise(
                "ld.global.nc.f32 $0, [$1];", "=f,l", [entries], dtype=tl.float32, is_pure=True, pack=1
            )
    else:
        MANTISSA: tl.constexpr = 23  # bits
        WITHOUT_SHIFT: tl.constexpr = MANTISSA // BITS  # so many codes lie in the mantissa's bits as they are
        PLACE: tl.constexpr = BITS * (at % WITHOUT_SHIFT)
        SHIFT: tl.constexpr = BITS * (at // WITHOUT_SHIFT) * WITHOUT_SHIFT
        code = (words >> SHIFT) & (((1 << BITS) - 1) << PLACE)
        # the float32 2**(23 - PLACE) + code
        raised = (code | (power - (PLACE << MANTISSA))).to(tl.float32, bitcast=True)
        found = raised - (zero + (1 << (MANTISSA - PLACE)))
    return found


@triton.jit
def _span(
    words: tl.tensor, i: tl.constexpr, zero: tl.tensor, codebook: tl.tensor, power: tl.tensor,
    BITS: tl.constexpr, NF4: tl.constexpr, INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return code i of both halves of each word, `_values` of SPAN neighbouring columns: float32 (n, SPAN)."""
    low = _values(words, i, 0, zero, codebook, power, BITS, NF4, INTERPRET)
    high = _values(words, i, 1, zero, codebook, power, BITS, NF4, INTERPRET)
    return tl.reshape(tl.join(low, high), (words.shape[0], _SPAN))


@triton.jit
def _zero(
    zeros: tl.tensor, rows: tl.tensor, group: tl.tensor, N: tl.tensor,
    BITS: tl.constexpr, ZEROS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the zero points of `rows` in a group: float32 of their shape, one constant where symmetric."""
    if ZEROS:
        words = tl.load(zeros + group * ((N + 7) // 8) + rows // 8)
        zero = ((words >> (4 * (rows % 8))) & 15).to(tl.float32)
    else:
        zero = 1 << (BITS - 1)
    return zero


@triton.jit
def _scale(
    scales: tl.tensor, nested: tl.tensor, offset: tl.tensor, dynamic_map: tl.tensor, at: tl.tensor,
    block: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the scales at `at` in float32; `block` is their index among the blocks of the flat matrix."""
    if NESTED:
        centred = tl.load(dynamic_map + tl.load(scales + at).to(tl.int32))
        scale = centred * tl.load(nested + block // _NESTED_GROUP) + tl.load(offset)
    else:
        scale = tl.load(scales + at).to(tl.float32)
    return scale


@triton.jit
def _group_scale(
    scales: tl.tensor, nested: tl.tensor, offset: tl.tensor, dynamic_map: tl.tensor, rows: tl.tensor,
    columns: tl.tensor, group: tl.tensor, N: tl.tensor, K: tl.tensor,
    GROUP: tl.constexpr, FLAT: tl.constexpr, NESTED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the scales of `rows` (n, 1) in a group, or, where blocks run across rows, of each of `columns` (1, k)."""
    if FLAT:
        block = tl.minimum(rows * K + columns, N * K - 1) // GROUP
        scale = _scale(scales, nested, offset, dynamic_map, block, block, NESTED)
    else:
        block = rows * (K // GROUP) + group
        scale = _scale(scales, nested, offset, dynamic_map, group * N + rows, block, NESTED)
    return scale


@triton.jit
def vector_kernel(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, zeros: tl.tensor, nested: tl.tensor,
    offset: tl.tensor, codebook: tl.tensor, dynamic_map: tl.tensor, power: tl.tensor, bias: tl.tensor,
    out: tl.tensor, N: tl.tensor, K: tl.tensor, tiles: tl.tensor,
    BITS: tl.constexpr, NF4: tl.constexpr, ZEROS: tl.constexpr, NESTED: tl.constexpr, GROUP: tl.constexpr,
    SPANS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, INTERPRET: tl.constexpr,
    SPLIT_TILES: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply x (K,) by BLOCK_N rows over SPLIT_TILES tiles: out (splits, N). Program (row block, split).

    GROUP is 0 where a row has one scale, SPANS the masks that share a scale.
    SPLIT_TILES is a multiple of UNROLL. EVEN says that K is whole splits; if not, x counts as 0 beyond its end.
    """
    PER: tl.constexpr = 16 // BITS
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, N - 1)[:, None]  # rows beyond N are computed as the last, and not stored
    words_at, span_at = tl.arange(0, _TILE), tl.arange(0, _SPAN)
    sums = tl.zeros((BLOCK_N, _SPAN), tl.float32)
    for first in range(0, SPLIT_TILES, UNROLL):
        for u in tl.static_range(UNROLL):
            tile = split * SPLIT_TILES + first + u
            there = tile if EVEN else tl.minimum(tile, tiles - 1)
            words = tl.load(codes + (there * N + inside) * _TILE + words_at[None, :])
            for span in tl.static_range(PER // SPANS):
                column = (tile * PER + span * SPANS) * _SPAN
                group = 0
                if GROUP > 0:
                    group = (column if EVEN else tl.minimum(column, K - 1)) // GROUP
                zero = _zero(zeros, inside, group, N, BITS, ZEROS)
                part = tl.zeros((BLOCK_N, _SPAN), tl.float32)
                for i in tl.static_range(span * SPANS, (span + 1) * SPANS):
                    columns = (tile * PER + i) * _SPAN + span_at
                    if EVEN:
                        x_i = tl.load(x + columns).to(tl.float32)
                    else:
                        x_i = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)
                    part += _span(words, i, zero, codebook, power, BITS, NF4, INTERPRET) * x_i[None, :]
                if GROUP > 0:
                    part *= _group_scale(
                        scales, nested, offset, dynamic_map, inside, 0, group, N, K, GROUP, False, NESTED
                    )
                sums += part
    total = tl.sum(sums, axis=1)
    if GROUP == 0:
        total *= tl.load(scales + tl.minimum(rows, N - 1)).to(tl.float32)
    if BIAS:
        total += tl.load(bias + tl.minimum(rows, N - 1)).to(tl.float32)
    tl.store(out + split * N + rows, total, mask=rows < N)


@triton.jit
def _write_table(codebook: tl.tensor, like: tl.constexpr) -> None:
    """Write the table of NF4's pairs, in which `_pieces` looks up, to shared memory."""
    tl.inline_asm_elementwise(
        _TABLE_BF16 if like == tl.bfloat16 else _TABLE_FP16, _TO_TABLE, [codebook],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _pieces(
    codes: tl.tensor, at: tl.tensor, factors: tl.tensor, codebook: tl.tensor, like: tl.constexpr,
    UNPACK: tl.constexpr, FROM: tl.constexpr, BITS: tl.constexpr, NF4: tl.constexpr, SPANS: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tuple of PER spans (n, SPAN) as the tensor cores take them: symmetric integers or NF4's values.

    The words from `at` (n, 1) on are loaded as halves, of which `unpack_ptx` makes pairs, times `factors`, of which
    there is one (n, 1) for SPANS spans, or none. Nothing else may meet them here, and what does must be loaded in the
    same turn of a loop: else Triton unpacks them in other registers than the tensor cores take, and moves each through
    shared memory.
    """
    PER: tl.constexpr = 16 // BITS
    if INTERPRET:
        words = tl.load(codes + at + tl.arange(0, _TILE)[None, :])
        pieces: tl.tensor = ()
        for i in tl.static_range(PER):
            piece = _span(words, i, 1 << (BITS - 1), codebook, _POWER, BITS, NF4, INTERPRET)
            if len(factors) > 0:
                piece *= factors[i // SPANS]
            pieces += (piece,)
    else:
        halves = tl.load(codes.to(tl.pointer_type(tl.int16)) + 2 * at + tl.arange(0, _SPAN)[None, :])
        taken: tl.tensor = (halves,)
        taken += factors
        if like == tl.bfloat16:
            if PER == 4:
                pieces = tl.inline_asm_elementwise(
                    UNPACK, FROM, taken, is_pure=True, pack=2,
                    dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                )  # fmt: skip
            else:
                pieces = tl.inline_asm_elementwise(
                    UNPACK, FROM, taken, is_pure=True, pack=2, dtype=(tl.bfloat16, tl.bfloat16)
                )
        else:
            if PER == 4:
                pieces = tl.inline_asm_elementwise(
                    UNPACK, FROM, taken, is_pure=True, pack=2,
                    dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                )  # fmt: skip
            else:
                pieces = tl.inline_asm_elementwise(
                    UNPACK, FROM, taken, is_pure=True, pack=2, dtype=(tl.float16, tl.float16)
                )
    return pieces


@triton.jit
def _factors(
    scales: tl.tensor, inside: tl.tensor, tile: tl.tensor, N: tl.tensor, K: tl.tensor,
    PER: tl.constexpr, SPANS: tl.constexpr, GROUP: tl.constexpr, NF4: tl.constexpr, INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tuple of what `unpack_ptx` takes as the scales (n, 1) of a tile's groups; those beyond K are the last.

    NF4's are float32. Of integers a load brings two neighbouring rows', since 16 bits cannot be copied ahead of time.
    """
    found: tl.tensor = ()
    for span in tl.static_range(PER // SPANS):
        at = tl.minimum((tile * PER + span * SPANS) * _SPAN, K - 1) // GROUP * N + inside
        if NF4 or INTERPRET:
            factor = tl.load(scales + at).to(tl.float32)
        else:
            factor = tl.load(scales.to(tl.pointer_type(tl.int32)) + at // 2)
        found += (factor,)
    return found


@triton.jit
def _tile_scales(
    scales: tl.tensor, nested: tl.tensor, offset: tl.tensor, dynamic_map: tl.tensor, inside: tl.tensor,
    tile: tl.tensor, N: tl.tensor, K: tl.tensor,
    PER: tl.constexpr, SPANS: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tuple of the scales (n, 1) of a tile's groups; those beyond K are the last."""
    found: tl.tensor = ()
    for span in tl.static_range(PER // SPANS):
        group = tl.minimum((tile * PER + span * SPANS) * _SPAN, K - 1) // GROUP
        found += (
            _group_scale(scales, nested, offset, dynamic_map, inside, 0, group, N, K, GROUP, False, NESTED),
        )
    return found


@triton.jit
def _finished(sums: tl.tensor, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return what was multiplied once it is there.

    A product of several warpgroups that Triton leaves unfinished from one turn of a loop to the next may still read x
    from shared memory where another warpgroup already copies the x of a later turn to.
    """
    if not INTERPRET:
        sums = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [sums], dtype=tl.float32, is_pure=False, pack=1
        )
    return sums


@triton.jit
def batch_kernel(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, zeros: tl.tensor, nested: tl.tensor,
    offset: tl.tensor, codebook: tl.tensor, dynamic_map: tl.tensor, bias: tl.tensor,
    out: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor, tiles: tl.tensor,
    BITS: tl.constexpr, NF4: tl.constexpr, ZEROS: tl.constexpr, NESTED: tl.constexpr, GROUP: tl.constexpr,
    SPANS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, INTERPRET: tl.constexpr,
    SPLIT_TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SCALED: tl.constexpr,
    UNPACK: tl.constexpr, FROM: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply BLOCK_M rows of x (M, K) by BLOCK_N rows over SPLIT_TILES tiles: out (splits, M, N).

    Program (row block, split, block of x's rows). The transposed product keeps the matrix in registers: unpacked
    there, it is the left operand of the tensor cores, in x's dtype. Integers lose nothing by that, since scales and
    zero points meet the float32 sums, zero points by way of the sums of x; NF4's values are rounded to x's dtype.
    A tile's scales are loaded while the one before is multiplied. SCALED says that they meet the weights instead, and
    are rounded with them: then there are no sums of a group by itself, and room for more rows. EVEN says that K is
    whole splits. The interpreter has no product of bfloat16: INTERPRET computes it in float32.
    """
    PER: tl.constexpr = 16 // BITS
    dtype: tl.constexpr = tl.float32 if INTERPRET else x.dtype.element_ty
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, N - 1)[:, None]
    lines = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    x_at = x + lines * K
    span_at = tl.arange(0, _SPAN)[:, None]
    ones = tl.full((BLOCK_N, _SPAN), 1.0, dtype)
    if NF4 and not INTERPRET:
        _write_table(codebook, dtype)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if GROUP > 0 and not SCALED:
        ahead = _tile_scales(
            scales, nested, offset, dynamic_map, inside, split * SPLIT_TILES, N, K, PER, SPANS, GROUP, NESTED
        )
    for step in range(SPLIT_TILES):
        tile = split * SPLIT_TILES + step
        there = tile if EVEN else tl.minimum(tile, tiles - 1)
        factors: tl.tensor = ()
        if SCALED:
            factors = _factors(scales, inside, tile, N, K, PER, SPANS, GROUP, NF4, INTERPRET)
        pieces = _pieces(
            codes, (there * N + inside) * _TILE, factors, codebook, dtype, UNPACK, FROM, BITS, NF4, SPANS,
            INTERPRET,
        )  # fmt: skip
        if GROUP > 0 and not SCALED:
            tile_scales = ahead
            ahead = _tile_scales(
                scales, nested, offset, dynamic_map, inside, tile + 1, N, K, PER, SPANS, GROUP, NESTED
            )
        for span in tl.static_range(PER // SPANS):
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if SCALED or (GROUP == 0 and not ZEROS):
                part = sums
            x_sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in tl.static_range(span * SPANS, (span + 1) * SPANS):
                columns = (tile * PER + i) * _SPAN + span_at
                mask = lines < M if EVEN else (lines < M) & (columns < K)
                x_i = tl.load(x_at + columns, mask=mask, other=0.0).to(dtype)
                part = tl.dot(pieces[i], x_i, part)
                if ZEROS:
                    x_sums = tl.dot(ones, x_i, x_sums)
            if ZEROS:
                group = 0
                if GROUP > 0:
                    group = tl.minimum((tile * PER + span * SPANS) * _SPAN, K - 1) // GROUP
                zero = _zero(zeros, inside, group, N, BITS, ZEROS)
                part -= (zero - (1 << (BITS - 1))) * x_sums
            if GROUP > 0 and not SCALED:
                sums += part * tile_scales[span]
            elif ZEROS:
                sums += part
            else:
                sums = _finished(part, INTERPRET)
    if GROUP == 0:
        sums *= tl.load(scales + inside).to(tl.float32)
    if BIAS:
        sums += tl.load(bias + inside).to(tl.float32)
    mask = (rows[:, None] < N) & (lines < M)
    tl.store(out + (split * M + lines) * N + rows[:, None], sums, mask=mask)


@triton.jit
def sum_kernel(
    parts: tl.tensor, bias: tl.tensor, out: tl.tensor, count: tl.tensor, N: tl.tensor,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Add parts (SPLITS, M, N), `count` = M N, in their order, and the bias: out (M, N)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * count + at, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=mask)


@triton.jit
def dequantize_kernel(
    codes: tl.tensor, scales: tl.tensor, zeros: tl.tensor, nested: tl.tensor, offset: tl.tensor,
    codebook: tl.tensor, dynamic_map: tl.tensor, power: tl.tensor, out: tl.tensor, N: tl.tensor,
    K: tl.tensor, start: tl.tensor, stop: tl.tensor,
    BITS: tl.constexpr, NF4: tl.constexpr, ZEROS: tl.constexpr, NESTED: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr, SPANS: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Write rows from `start` to `stop` in out's dtype: out (stop - start, K). Program (BLOCK_N rows, tile)."""
    PER: tl.constexpr = 16 // BITS
    tile = tl.program_id(1)
    lines = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    rows = start + lines
    inside = tl.minimum(rows, N - 1)
    span_at = tl.arange(0, _SPAN)[None, :]
    words = tl.load(codes + (tile * N + inside) * _TILE + tl.arange(0, _TILE)[None, :])
    for span in tl.static_range(PER // SPANS):
        column = (tile * PER + span * SPANS) * _SPAN
        group = 0
        if GROUP > 0:
            group = (column if EVEN else tl.minimum(column, K - 1)) // GROUP
        zero = _zero(zeros, inside, group, N, BITS, ZEROS)
        if GROUP > 0:
            scale = _group_scale(
                scales,
                nested,
                offset,
                dynamic_map,
                inside,
                column + span_at,
                group,
                N,
                K,
                GROUP,
                FLAT,
                NESTED,
            )
        else:
            scale = tl.load(scales + inside).to(tl.float32)
        for i in tl.static_range(span * SPANS, (span + 1) * SPANS):
            columns = (tile * PER + i) * _SPAN + span_at
            values = _span(words, i, zero, codebook, power, BITS, NF4, INTERPRET) * scale
            tl.store(out + lines * K + columns, values, mask=(rows < stop) & (columns < K))
