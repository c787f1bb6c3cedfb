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
under way: to registers, or with STAGES to as many slots of shared memory. x goes through shared memory, where every
lane finds its part.

RMSNorm costs no kernel of its own. What writes a residual stream writes it also times the weight of the norm that
follows, and adds up its squares: a product with the one is divided by the root of the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.kernels.triton import row_ptx
from quantkit.kernels.triton.kernels import POWER, _values, _write_table
from quantkit.kernels.triton.layout import SPAN, TILE
from quantkit.kernels.triton.row_ptx import BLOCK
from quantkit.kernels.triton.step_kernels import _rounded, _silu_times

_TILE = tl.constexpr(TILE)
_SPAN = tl.constexpr(SPAN)
_BLOCK = tl.constexpr(BLOCK)
_LANES = tl.constexpr(32)
_CHUNK = tl.constexpr(16)  # bytes that a thread loads at once
_BLOCK_BYTES = tl.constexpr(4 * BLOCK * TILE)  # of a tile in all rows of a product
_POWER = tl.constexpr(POWER)
_LOAD_WORDS = tl.constexpr(row_ptx.load_words())
_COPY_WORDS = tl.constexpr(row_ptx.copy_words())
_COPY_X = tl.constexpr(row_ptx.copy_x())
_COMMIT = tl.constexpr(row_ptx.COMMIT)
_STORE_X = tl.constexpr(row_ptx.store_x())
_SHARED_WORDS = tl.constexpr(row_ptx.shared_words())
_SHARED_X = tl.constexpr(row_ptx.shared_x())
_PAUSE = tl.constexpr(row_ptx.PAUSE)
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
def _run(text: tl.constexpr, lane: tl.tensor) -> None:
    """Run instructions that take a number and give one that means nothing."""
    tl.inline_asm_elementwise(text, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _words_at(address: tl.tensor, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return a tuple of four words of a row of a tile, and of four of the eighth row below."""
    if INTERPRET:
        found: tl.tensor = ()
        for w in tl.static_range(8):
            found += (tl.load(address + w // 4 * (_BLOCK // 2) * _TILE + w % 4),)
    else:
        found = tl.inline_asm_elementwise(
            _LOAD_WORDS, "=r,=r,=r,=r,=r,=r,=r,=r,l", [address], is_pure=False, pack=1,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        )  # fmt: skip
    return found


@triton.jit
def _pairs_at(address: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Return a tuple of four words that hold eight 16-bit values from an address on, 0 where that is not inside."""
    words = address.to(tl.pointer_type(tl.int32))
    found = tl.load(words[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0)
    even, odd = tl.split(tl.reshape(found, (address.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _pause(lane: tl.tensor, INTERPRET: tl.constexpr) -> None:
    """Let the lanes of a warp see what the others stored, and keep the loads before this from being put off.

    The assembler else puts loads off until they are needed, to save registers.
    """
    if not INTERPRET:
        _run(_PAUSE, lane)


@triton.jit
def _low(pair: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return the first value of a pair in float32."""
    if dtype == tl.bfloat16:
        value = (pair << 16).to(tl.float32, bitcast=True)
    else:
        value = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


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
def _first_tile(step: tl.tensor, lane: tl.tensor, TILES: tl.constexpr, WARPS: tl.constexpr) -> tl.tensor:
    """Return the first tile of a lane's warp in a step; the others of that step are WARPS apart."""
    return step * TILES * WARPS + lane // _LANES


@triton.jit
def _place(
    codes: tl.tensor, row: tl.tensor, below: tl.tensor, tile: tl.tensor, lane: tl.tensor, N: tl.tensor,
    tiles: tl.tensor,
    EVEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return where a lane's words of a tile begin, so many rows below its row; those of the last tile beyond it."""
    there = tile if EVEN else tl.minimum(tile, tiles - 1)
    return codes + (there * N + row + below) * _TILE + 4 * (lane % 4)


@triton.jit
def _share(
    first: tl.tensor, begin: tl.constexpr, lane: tl.tensor,
    PER: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return which chunk of a step's x a lane brings, of those from `begin` on, and the column where it starts."""
    chunk = tl.minimum(begin + lane % _LANES, TILES * PER * 4 - 1)
    return chunk, ((first + chunk // (4 * PER) * WARPS) * 4 * PER + chunk % (4 * PER)) * (_CHUNK // 2)


@triton.jit
def _slot(
    slot: tl.tensor, lane: tl.tensor,
    PER: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the byte of shared memory where the words of a warp's slot begin, and where its x does."""
    WORDS: tl.constexpr = TILES * PARTS * _BLOCK_BYTES if STAGES > 0 else 0
    words = (slot * WARPS + lane // _LANES) * (WORDS + TILES * PER * 4 * _CHUNK)
    return words, words + WORDS


@triton.jit
def _copy(
    x: tl.tensor, codes: tl.tensor, row: tl.tensor, apart: tl.tensor, step: tl.tensor, lane: tl.tensor, N: tl.tensor,
    K: tl.tensor, tiles: tl.tensor,
    PER: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy the words and x of a step, if there is such a one, to its slot."""
    if not INTERPRET:
        words, share = _slot(step % STAGES, lane, PER, PARTS, TILES, WARPS, STAGES)
        if step < STEPS:
            first = _first_tile(step, lane, TILES, WARPS)
            for t in tl.static_range(TILES):
                for part in tl.static_range(PARTS):
                    tl.inline_asm_elementwise(
                        _COPY_WORDS, "=r,l,r",
                        [
                            _place(codes, row, part * apart, first + t * WARPS, lane, N, tiles, EVEN),
                            words + (t * PARTS + part) * _BLOCK_BYTES + lane % _LANES * _CHUNK,
                        ],
                        dtype=tl.int32, is_pure=False, pack=1,
                    )  # fmt: skip
            for begin in tl.static_range(0, TILES * PER * 4, _LANES):
                chunk, column = _share(first, begin, lane, PER, TILES, WARPS)
                there = column if EVEN else tl.minimum(column, K - _CHUNK // 2)
                tl.inline_asm_elementwise(
                    _COPY_X, "=r,l,r,r", [x + there, share + chunk * _CHUNK, (column < K).to(tl.int32)],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
        _run(_COMMIT, lane)


@triton.jit
def _words(
    codes: tl.tensor, row: tl.tensor, apart: tl.tensor, step: tl.tensor, lane: tl.tensor, N: tl.tensor,
    tiles: tl.tensor,
    EVEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tuple of the words of a step's tiles, eight for each part, from the matrix itself."""
    words: tl.tensor = ()
    for t in tl.static_range(TILES):
        tile = _first_tile(step, lane, TILES, WARPS) + t * WARPS
        for part in tl.static_range(PARTS):
            words += _words_at(_place(codes, row, part * apart, tile, lane, N, tiles, EVEN), INTERPRET)
    return words


@triton.jit
def _copied_words(at: tl.tensor, lane: tl.tensor, PARTS: tl.constexpr, TILES: tl.constexpr) -> tl.tensor:
    """Return a tuple of the words of a step's tiles, eight for each part, from the slot that begins at a byte."""
    words: tl.tensor = ()
    for block in tl.static_range(TILES * PARTS):
        words += tl.inline_asm_elementwise(
            _SHARED_WORDS, "=r,=r,=r,=r,=r,=r,=r,=r,r", [at + block * _BLOCK_BYTES + lane % _LANES * _CHUNK],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip
    return words


@triton.jit
def _factors(
    scales: tl.tensor, row: tl.tensor, apart: tl.tensor, step: tl.tensor, lane: tl.tensor, N: tl.tensor, K: tl.tensor,
    PER: tl.constexpr, SPANS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tuple of the scales of a step's tiles: of each group and part, those of both rows."""
    factors: tl.tensor = ()
    if GROUP > 0:
        for t in tl.static_range(TILES):
            tile = _first_tile(step, lane, TILES, WARPS) + t * WARPS
            for span in tl.static_range(PER // SPANS):
                column = (tile * PER + span * SPANS) * _SPAN
                group = (column if EVEN else tl.minimum(column, K - 1)) // GROUP
                for part in tl.static_range(PARTS):
                    for below in tl.static_range(0, _BLOCK, _BLOCK // 2):
                        factors += (tl.load(scales + group * N + row + part * apart + below).to(tl.float32),)
    return factors


@triton.jit
def _load_share(
    x: tl.tensor, step: tl.tensor, lane: tl.tensor, K: tl.tensor,
    PER: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tuple of the pairs of a step's x that a lane brings, 0 beyond K."""
    pairs: tl.tensor = ()
    for begin in tl.static_range(0, TILES * PER * 4, _LANES):
        _, column = _share(_first_tile(step, lane, TILES, WARPS), begin, lane, PER, TILES, WARPS)
        pairs += _pairs_at(x + column, column < K)
    return pairs


@triton.jit
def _store_share(
    pairs: tl.tensor, lane: tl.tensor,
    PER: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Put what a lane brings of x where the others of its warp find it."""
    if not INTERPRET:
        _, share = _slot(0, lane, PER, PARTS, TILES, WARPS, 0)
        _pause(lane, INTERPRET)  # what was there has been read
        for begin in tl.static_range(0, TILES * PER * 4, _LANES):
            chunk, _ = _share(0, begin, lane, PER, TILES, WARPS)
            tl.inline_asm_elementwise(
                _STORE_X, "=r,r,r,r,r,r",
                [
                    pairs[begin // _LANES * 4], pairs[begin // _LANES * 4 + 1], pairs[begin // _LANES * 4 + 2],
                    pairs[begin // _LANES * 4 + 3], share + chunk * _CHUNK,
                ],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def _x_of_span(
    x: tl.tensor, share: tl.tensor, step: tl.tensor, lane: tl.tensor, K: tl.tensor,
    t: tl.constexpr, i: tl.constexpr, PER: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tuple of the four pairs of x that meet span i of tile t."""
    if INTERPRET:
        column = ((_first_tile(step, lane, TILES, WARPS) + t * WARPS) * PER + i) * _SPAN + 8 * (lane % 4)
        found = _pairs_at(x + column, column < K)
    else:
        found = tl.inline_asm_elementwise(
            _SHARED_X, "=r,=r,=r,=r,r", [share + ((t * PER + i) * 4 + lane % 4) * _CHUNK],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def _multiply(
    words: tl.tensor, factors: tl.tensor, sums: tl.tensor, x: tl.tensor, share: tl.tensor, step: tl.tensor,
    lane: tl.tensor, K: tl.tensor, codebook: tl.tensor,
    dtype: tl.constexpr, PER: tl.constexpr, SPANS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr, NF4: tl.constexpr, INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return `sums`, two to a lane for each part, with a step's tiles."""
    GROUPS: tl.constexpr = PER // SPANS
    nought = tl.zeros(lane.shape, tl.float32)
    for t in tl.static_range(TILES):
        for span in tl.static_range(GROUPS):
            start: tl.tensor = (nought, nought, nought, nought)
            pairs: tl.tensor = ()
            for i in tl.static_range(span * SPANS, (span + 1) * SPANS):
                found = _x_of_span(x, share, step, lane, K, t, i, PER, TILES, WARPS, INTERPRET)
                start = _take_offset(found, start, i, dtype, BITS, NF4, INTERPRET)
                pairs += (found,)
            grown: tl.tensor = ()
            for part in tl.static_range(PARTS):
                added = start
                for i in tl.static_range(SPANS):
                    added = _add_span(
                        words, pairs[i], added, codebook, 8 * (t * PARTS + part), span * SPANS + i, dtype, BITS, NF4,
                        INTERPRET,
                    )  # fmt: skip
                above, below = added[0], added[2]
                if GROUP > 0:
                    above *= factors[2 * ((t * GROUPS + span) * PARTS + part)]
                    below *= factors[2 * ((t * GROUPS + span) * PARTS + part) + 1]
                grown += (sums[2 * part] + above, sums[2 * part + 1] + below)
            sums = grown
    return sums


@triton.jit
def row_kernel(
    x: tl.tensor, squares: tl.tensor, codes: tl.tensor, scales: tl.tensor, codebook: tl.tensor, bias: tl.tensor,
    out: tl.tensor, norm: tl.tensor, out_weighted: tl.tensor, out_squares: tl.tensor, blocks: tl.tensor, N: tl.tensor,
    K: tl.tensor, tiles: tl.tensor, eps: tl.tensor,
    BITS: tl.constexpr, NF4: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr, EVEN: tl.constexpr,
    SQUARES: tl.constexpr, SQUARES_BLOCK: tl.constexpr, GATED: tl.constexpr,
    RESIDUAL: tl.constexpr, INTERPRET: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr, WAIT: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply x (K,) by N rows: out (N,). A program takes each `num_programs`-th of `blocks`, 16 PARTS rows each.

    A warp's tiles are loaded in STEPS steps of TILES each. EVEN says that K is all of them.

    Args:
        squares: (SQUARES,), which add up to those of a residual stream that x is times a norm's weight, where SQUARES
            is not 0: then the product is divided by the root of their mean plus `eps`. SQUARES_BLOCK is the next power
            of two.
        out: where RESIDUAL, the product is added to what is there, and `out_weighted` (N,), that times `norm` (N,), and
            `out_squares` (blocks,) are written.
        GATED: the first half of the rows is the gate of the second, as two parts: out (N / 2,) is silu(gate) * up.
        SHARED: declares the shared memory.
        WAIT: waits for the slot that is STAGES - 1 behind the last one to be copied.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    PER: tl.constexpr = 16 // BITS
    LAST: tl.constexpr = STEPS - 1
    ROWS: tl.constexpr = _BLOCK if GATED else _BLOCK * PARTS  # from one block to the next
    lane = tl.arange(0, WARPS * _LANES)
    apart = N // 2 if GATED else _BLOCK
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
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block * ROWS + lane % _LANES // 4
        if STAGES > 0:
            for stage in tl.static_range(STAGES - 1):
                _copy(
                    x, codes, row, apart, stage, lane, N, K, tiles,
                    PER, EVEN, PARTS, TILES, WARPS, STEPS, STAGES, INTERPRET,
                )  # fmt: skip
        else:
            words = _words(codes, row, apart, 0, lane, N, tiles, EVEN, PARTS, TILES, WARPS, INTERPRET)
            pairs = _load_share(x, 0, lane, K, PER, TILES, WARPS)
        factors = _factors(scales, row, apart, 0, lane, N, K, PER, SPANS, GROUP, EVEN, PARTS, TILES, WARPS)
        # what the end needs is asked for before the sums
        factor = tl.full(element.shape, 1.0, tl.float32)
        if GROUP == 0:
            factor = tl.load(scales + block * ROWS + of_block).to(tl.float32)
        if SQUARES > 0:
            each = tl.arange(0, SQUARES_BLOCK)
            of_stream = tl.sum(tl.load(squares + each, mask=each < SQUARES, other=0.0), axis=0)
            factor *= tl.rsqrt(of_stream / K + eps)
        if bias is not None:
            added = tl.load(bias + block * ROWS + of_block).to(tl.float32)
        at = block * ROWS + of_result
        if RESIDUAL:
            before = tl.load(out + at).to(tl.float32)
            weight = tl.load(norm + at).to(tl.float32)

        sums: tl.tensor = ()
        for _ in tl.static_range(2 * PARTS):
            sums += (tl.zeros(lane.shape, tl.float32),)
        if STAGES > 0:
            for step in range(STEPS):
                if not INTERPRET:
                    _run(WAIT, lane)
                next_factors = _factors(
                    scales, row, apart, tl.minimum(step + 1, LAST), lane, N, K,
                    PER, SPANS, GROUP, EVEN, PARTS, TILES, WARPS,
                )  # fmt: skip
                _copy(
                    x, codes, row, apart, step + STAGES - 1, lane, N, K, tiles,
                    PER, EVEN, PARTS, TILES, WARPS, STEPS, STAGES, INTERPRET,
                )  # fmt: skip
                words_at, share = _slot(step % STAGES, lane, PER, PARTS, TILES, WARPS, STAGES)
                if INTERPRET:
                    words = _words(
                        codes, row, apart, step, lane, N, tiles, EVEN, PARTS, TILES, WARPS, INTERPRET
                    )
                else:
                    words = _copied_words(words_at, lane, PARTS, TILES)
                sums = _multiply(
                    words, factors, sums, x, share, step, lane, K, codebook,
                    dtype, PER, SPANS, GROUP, PARTS, TILES, WARPS, BITS, NF4, INTERPRET,
                )  # fmt: skip
                factors = next_factors
        else:
            _, share = _slot(0, lane, PER, PARTS, TILES, WARPS, STAGES)
            for step in range(LAST):
                _store_share(pairs, lane, PER, PARTS, TILES, WARPS, INTERPRET)
                next_words = _words(
                    codes, row, apart, step + 1, lane, N, tiles, EVEN, PARTS, TILES, WARPS, INTERPRET
                )
                next_factors = _factors(
                    scales, row, apart, step + 1, lane, N, K, PER, SPANS, GROUP, EVEN, PARTS, TILES, WARPS
                )
                pairs = _load_share(x, step + 1, lane, K, PER, TILES, WARPS)
                _pause(lane, INTERPRET)
                sums = _multiply(
                    words, factors, sums, x, share, step, lane, K, codebook,
                    dtype, PER, SPANS, GROUP, PARTS, TILES, WARPS, BITS, NF4, INTERPRET,
                )  # fmt: skip
                words, factors = next_words, next_factors
            _store_share(pairs, lane, PER, PARTS, TILES, WARPS, INTERPRET)
            _pause(lane, INTERPRET)
            sums = _multiply(
                words, factors, sums, x, share, LAST, lane, K, codebook,
                dtype, PER, SPANS, GROUP, PARTS, TILES, WARPS, BITS, NF4, INTERPRET,
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
