"""A quantized matrix times one row of x, for CUDA and for Triton's interpreter. Importing this imports Triton.

Memory is all that counts here, so a warp works by itself: what a thread loads, 16 bytes at a time, is what it hands to
the tensor cores, and no other thread sees it. Triton would lay out a product otherwise, so the kernel is written in
lanes: tensors are of one dimension and have an element for each thread, and the product is the machine's own, in PTX
(`row_ptx.py`).

A product takes 16 rows of the matrix by 32 columns, one span. The tensor cores would take eight rows of x, and are
given the same one eight times. Lane 4 g + q holds

    words      4 q to 4 q + 3 of a tile in rows g and g + 8
    x          columns 8 q to 8 q + 7, in four pairs
    sums       of rows g and g + 8, as the other three lanes of this g do

The warps of a program share its rows, and have each WARPS-th tile. While some tiles are multiplied, the next ones are
under way (`row_loads.py`).

RMSNorm costs no kernel of its own. What writes a residual stream writes it also times the weight of the norm that
follows, and adds up its squares: a product with the one is divided by the root of the other.

A kernel that begins EARLY asks for its first tiles while the one ahead still runs, and then waits for x. Its programs
go wherever there is room: how many a multiprocessor has room for, by registers and shared memory, should be how many it
is to get, or some get more than others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.kernels.triton import row_ptx
from quantkit.kernels.triton.kernels import POWER, _values, _write_table
from quantkit.kernels.triton.row_loads import (
    _BLOCK,
    _LANES,
    _copied_factors,
    _copied_words,
    _copy_matrix,
    _copy_x,
    _factors,
    _load_share,
    _pause,
    _run,
    _slot,
    _store_share,
    _words,
    _x_of_span,
)
from quantkit.kernels.triton.step_kernels import _rounded, _silu_times

_POWER = tl.constexpr(POWER)
# by the dtype and the kind of codes, four each
_PRODUCTS = tl.constexpr(
    tuple(
        row_ptx.span_product(bits, nf4, dtype, min(i, 16 // bits - 1))
        for dtype in (torch.bfloat16, torch.float16)
        for bits, nf4 in ((8, False), (4, False), (4, True))
        for i in range(4)
    )
)
_OFFSETS = tl.constexpr(
    tuple(row_ptx.span_offset(dtype, i) for dtype in (torch.bfloat16, torch.float16) for i in range(4))
)


@triton.jit
def _low(pair: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return the first value of a pair in float32."""
    if dtype == tl.bfloat16:
        value = (pair << 16).to(tl.float32, bitcast=True)
    else:
        value = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _scale(word: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return in float32 what `_scale_at` found."""
    return word.to(tl.float32, bitcast=True) if dtype == tl.float32 else _low(word, dtype)


@triton.jit
def _add_span(
    words: tl.tensor, pairs: tl.tensor, sums: tl.tensor, codebook: tl.tensor,
    FIRST: tl.constexpr, i: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr, NF4: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return `sums`, four to a lane, with code i of eight words from FIRST on times four pairs of x.

    The first two are of the upper row. The interpreter's lanes have what is theirs, the tensor cores' all of a row.
    """
    if INTERPRET:
        above, below = sums[0], sums[2]
        for w in tl.static_range(4):
            for side in tl.static_range(2):
                value = _low(pairs[w] if side == 0 else (pairs[w] >> 16) & 0xFFFF, dtype)
                zero: tl.constexpr = 1 << (BITS - 1)
                above += value * _values(
                    words[FIRST + w], i, side, zero, codebook, _POWER, BITS, NF4, INTERPRET
                )
                below += value * _values(
                    words[FIRST + 4 + w], i, side, zero, codebook, _POWER, BITS, NF4, INTERPRET
                )
        added: tl.tensor = (above, above, below, below)
    else:
        KIND: tl.constexpr = (0 if dtype == tl.bfloat16 else 3) + (2 if NF4 else (1 if BITS == 4 else 0))
        added = tl.inline_asm_elementwise(
            _PRODUCTS[4 * KIND + i], "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
            [
                words[FIRST], words[FIRST + 1], words[FIRST + 2], words[FIRST + 3],
                words[FIRST + 4], words[FIRST + 5], words[FIRST + 6], words[FIRST + 7],
                pairs[0], pairs[1], pairs[2], pairs[3], sums[0], sums[1], sums[2], sums[3],
            ],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return added


@triton.jit
def _take_offset(
    pairs: tl.tensor, sums: tl.tensor, i: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr, NF4: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return `sums` less four pairs of x times what int4's codes i come with on top."""
    if BITS == 4 and not NF4 and not INTERPRET:
        sums = tl.inline_asm_elementwise(
            _OFFSETS[(0 if dtype == tl.bfloat16 else 4) + i], "=f,=f,=f,=f,r,r,r,r,f,f,f,f",
            [pairs[0], pairs[1], pairs[2], pairs[3], sums[0], sums[1], sums[2], sums[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return sums


@triton.jit
def _multiply(
    words: tl.tensor, factors: tl.tensor, sums: tl.tensor, x: tl.tensor, share: tl.tensor, step: tl.tensor,
    lane: tl.tensor, K: tl.tensor, codebook: tl.tensor,
    dtype: tl.constexpr, SCALE: tl.constexpr, PER: tl.constexpr, SPANS: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr, NF4: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return `sums`, two to a lane for each part, with a step's tiles."""
    GROUPS: tl.constexpr = PER // SPANS
    nought = tl.zeros(lane.shape, tl.float32)
    for t in tl.static_range(TILES):
        for span in tl.static_range(GROUPS):
            nothing: tl.tensor = (nought, nought, nought, nought)
            off = nothing
            found: tl.tensor = ()
            for _ in tl.static_range(PARTS):
                found += (nothing,)
            for i in tl.static_range(span * SPANS, (span + 1) * SPANS):
                pairs = _x_of_span(x, share, step, lane, K, t, i, PER, TILES, WARPS, INTERPRET)
                off = _take_offset(pairs, off, i, dtype, BITS, NF4, INTERPRET)
                added: tl.tensor = ()
                for part in tl.static_range(PARTS):
                    added += (
                        _add_span(
                            words,
                            pairs,
                            found[part],
                            codebook,
                            8 * (t * PARTS + part),
                            i,
                            dtype,
                            BITS,
                            NF4,
                            INTERPRET,
                        ),
                    )
                found = added
            grown: tl.tensor = ()
            for part in tl.static_range(PARTS):
                above, below = found[part][0], found[part][2]
                if BITS == 4 and not NF4:
                    above, below = above + off[0], below + off[2]
                if GROUP > 0:
                    above *= _scale(factors[2 * ((t * GROUPS + span) * PARTS + part)], SCALE)
                    below *= _scale(factors[2 * ((t * GROUPS + span) * PARTS + part) + 1], SCALE)
                grown += (sums[2 * part] + above, sums[2 * part + 1] + below)
            sums = grown
    return sums


@triton.jit
def row_kernel(
    x: tl.tensor, squares: tl.tensor, codes: tl.tensor, scales: tl.tensor, codebook: tl.tensor, bias: tl.tensor,
    out: tl.tensor, norm: tl.tensor, out_weighted: tl.tensor, out_squares: tl.tensor, N: tl.tensor,
    K: tl.tensor, tiles: tl.tensor, eps: tl.tensor,
    BITS: tl.constexpr, NF4: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr, EVEN: tl.constexpr,
    SQUARES: tl.constexpr, SQUARES_BLOCK: tl.constexpr, GATED: tl.constexpr,
    RESIDUAL: tl.constexpr, INTERPRET: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr, WAIT: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply x (K,) by N rows: out (N,). A program has 16 PARTS of them.

    A warp's tiles are loaded in STEPS steps of TILES each. EVEN says that K is all of them.

    Args:
        squares: (SQUARES,), which add up to those of a residual stream that x is times a norm's weight, where SQUARES
            is not 0: then the product is divided by the root of their mean plus `eps`. SQUARES_BLOCK is the next power
            of two.
        out: where RESIDUAL, the product is added to what is there, and `out_weighted` (N,), that times `norm` (N,), and
            `out_squares` (programs,) are written.
        GATED: the first half of the rows is the gate of the second, as two parts: out (N / 2,) is silu(gate) * up.
        SHARED: declares the shared memory.
        WAIT: waits for the slot that is STAGES - 1 behind the last one to be copied.
        EARLY: it may begin before the kernel ahead has ended, and lets the next one do so. The matrix and `norm` are
            read before that kernel's results can be: neither may be among them.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    SCALE: tl.constexpr = scales.dtype.element_ty
    PER: tl.constexpr = 16 // BITS
    LAST: tl.constexpr = STEPS - 1
    EACH: tl.constexpr = SCALE.primitive_bitwidth // 8
    # chunks of a slot
    SCALES: tl.constexpr = TILES * (PER // SPANS) * PARTS * EACH if GROUP > 0 and STAGES > 0 else 0
    ROWS: tl.constexpr = _BLOCK if GATED else _BLOCK * PARTS  # from one block to the next
    lane = tl.arange(0, WARPS * _LANES)
    apart = N // 2 if GATED else _BLOCK
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if not INTERPRET:
        _run(SHARED, lane)
        if NF4:
            _write_table(codebook, dtype)
    # the sums of a block, one by one: element 2 PARTS lane + PARTS h + part is of row g + 8 h
    element = tl.arange(0, 2 * PARTS * _LANES)
    of_block = element // (8 * PARTS) + 8 * (element // PARTS % 2) + element % PARTS * apart
    if GATED:
        result = tl.arange(0, 2 * _LANES)
        of_result = result // 8 + 8 * (result % 2)
        once = result // 2 % 4 == 0  # of the four lanes that have it
    else:
        of_result = of_block
        once = element // (2 * PARTS) % 4 == 0
    block = tl.program_id(0)
    row = block * ROWS + lane % _LANES // 4
    if STAGES > 0:
        for stage in tl.static_range(STAGES - 1):
            _copy_matrix(
                codes, scales, row, apart, stage, lane, N, K, tiles,
                PER, SPANS, GROUP, EVEN, PARTS, TILES, WARPS, STEPS, STAGES, SCALES, INTERPRET,
            )  # fmt: skip
    else:
        words = _words(codes, row, apart, 0, lane, N, tiles, EVEN, PARTS, TILES, WARPS, INTERPRET)
        factors = _factors(
            scales, row, apart, 0, lane, N, K, PER, SPANS, GROUP, EVEN, PARTS, TILES, WARPS, INTERPRET
        )
    # what the end needs is asked for before the sums
    factor = tl.full(element.shape, 1.0, tl.float32)
    if GROUP == 0:
        factor = tl.load(scales + block * ROWS + of_block).to(tl.float32)
    at = block * ROWS + of_result
    if RESIDUAL:
        weight = tl.load(norm + at).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if STAGES > 0:
        for stage in tl.static_range(STAGES - 1):
            _copy_x(x, stage, lane, K, PER, EVEN, PARTS, TILES, WARPS, STEPS, STAGES, SCALES, INTERPRET)
    else:
        pairs = _load_share(x, 0, lane, K, PER, TILES, WARPS)
    if SQUARES > 0:
        each = tl.arange(0, SQUARES_BLOCK)
        of_stream = tl.sum(tl.load(squares + each, mask=each < SQUARES, other=0.0), axis=0)
        factor *= tl.rsqrt(of_stream / K + eps)
    if bias is not None:
        added = tl.load(bias + block * ROWS + of_block).to(tl.float32)
    if RESIDUAL:
        before = tl.load(out + at).to(tl.float32)

    sums: tl.tensor = ()
    for _ in tl.static_range(2 * PARTS):
        sums += (tl.zeros(lane.shape, tl.float32),)
    if STAGES > 0:
        for step in range(STEPS):
            if not INTERPRET:
                _run(WAIT, lane)
            _copy_matrix(
                codes, scales, row, apart, step + STAGES - 1, lane, N, K, tiles,
                PER, SPANS, GROUP, EVEN, PARTS, TILES, WARPS, STEPS, STAGES, SCALES, INTERPRET,
            )  # fmt: skip
            _copy_x(
                x,
                step + STAGES - 1,
                lane,
                K,
                PER,
                EVEN,
                PARTS,
                TILES,
                WARPS,
                STEPS,
                STAGES,
                SCALES,
                INTERPRET,
            )
            words_at, share, factors_at = _slot(step % STAGES, lane, PER, PARTS, TILES, WARPS, STAGES, SCALES)
            if INTERPRET:
                words = _words(codes, row, apart, step, lane, N, tiles, EVEN, PARTS, TILES, WARPS, INTERPRET)
                factors = _factors(
                    scales, row, apart, step, lane, N, K,
                    PER, SPANS, GROUP, EVEN, PARTS, TILES, WARPS, INTERPRET,
                )  # fmt: skip
            else:
                words = _copied_words(words_at, lane, PARTS, TILES)
                factors = _copied_factors(factors_at, lane, SCALES // EACH, EACH)
            sums = _multiply(
                words, factors, sums, x, share, step, lane, K, codebook,
                dtype, SCALE, PER, SPANS, GROUP, PARTS, TILES, WARPS, BITS, NF4, INTERPRET,
            )  # fmt: skip
    else:
        _, share, _ = _slot(0, lane, PER, PARTS, TILES, WARPS, STAGES, 0)
        for step in range(LAST):
            _store_share(pairs, lane, PER, PARTS, TILES, WARPS, INTERPRET)
            next_words = _words(
                codes, row, apart, step + 1, lane, N, tiles, EVEN, PARTS, TILES, WARPS, INTERPRET
            )
            next_factors = _factors(
                scales, row, apart, step + 1, lane, N, K,
                PER, SPANS, GROUP, EVEN, PARTS, TILES, WARPS, INTERPRET,
            )  # fmt: skip
            pairs = _load_share(x, step + 1, lane, K, PER, TILES, WARPS)
            _pause(lane, INTERPRET)
            sums = _multiply(
                words, factors, sums, x, share, step, lane, K, codebook,
                dtype, SCALE, PER, SPANS, GROUP, PARTS, TILES, WARPS, BITS, NF4, INTERPRET,
            )  # fmt: skip
            words, factors = next_words, next_factors
        _store_share(pairs, lane, PER, PARTS, TILES, WARPS, INTERPRET)
        _pause(lane, INTERPRET)
        sums = _multiply(
            words, factors, sums, x, share, LAST, lane, K, codebook,
            dtype, SCALE, PER, SPANS, GROUP, PARTS, TILES, WARPS, BITS, NF4, INTERPRET,
        )  # fmt: skip

    if INTERPRET:
        whole: tl.tensor = ()
        for i in tl.static_range(2 * PARTS):
            of_row = tl.sum(tl.reshape(sums[i], (WARPS * 8, 4)), axis=1)
            whole += (tl.reshape(tl.broadcast_to(of_row[:, None], (WARPS * 8, 4)), lane.shape),)
        sums = whole
    if PARTS == 1:
        of_lanes = tl.join(sums[0], sums[1])
    else:
        of_lanes = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3]))
    value = tl.sum(tl.reshape(of_lanes, (WARPS, 2 * PARTS * _LANES)), axis=0) * factor
    if bias is not None:
        value += added
    value = _rounded(value, dtype, INTERPRET)
    if GATED:
        gate, up = tl.split(tl.reshape(value, (2 * _LANES, 2)))
        value = _silu_times(gate, up, dtype, INTERPRET)
    if RESIDUAL:
        value = _rounded(before + value, dtype, INTERPRET)
        tl.store(out_weighted + at, _rounded(value * weight, dtype, INTERPRET), mask=once)
        tl.store(out_squares + block, tl.sum(tl.where(once, value * value, 0.0), axis=0))
    tl.store(out + at, value, mask=once)
