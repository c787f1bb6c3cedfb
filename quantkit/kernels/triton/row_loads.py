"""What a product of one row of x needs, brought to where it is multiplied. Importing this imports Triton.

`row_kernels.py` has how its lanes share the work. A step's words and scales go from the matrix to registers, or are
copied to a slot of shared memory; x always goes by shared memory, where every lane finds its part. What is loaded is
not touched before it is multiplied: nothing then waits for it, and the next step's loads have all of this step's time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.triton import row_ptx
from quantkit.kernels.triton.layout import SPAN, TILE
from quantkit.kernels.triton.row_ptx import BLOCK

_TILE = tl.constexpr(TILE)
_SPAN = tl.constexpr(SPAN)
_BLOCK = tl.constexpr(BLOCK)
_LANES = tl.constexpr(32)
_CHUNK = tl.constexpr(16)  # bytes that a thread loads at once
_BLOCK_BYTES = tl.constexpr(4 * BLOCK * TILE)  # of a tile in all rows of a product
_LOAD_WORDS = tl.constexpr(row_ptx.load_words())
_LOAD_16 = tl.constexpr(row_ptx.load(16))
_LOAD_32 = tl.constexpr(row_ptx.load(32))
_COPY_WORDS = tl.constexpr(row_ptx.copy_words())
_COPY_CHUNK = tl.constexpr(row_ptx.copy_chunk())
_COMMIT = tl.constexpr(row_ptx.COMMIT)
_STORE_X = tl.constexpr(row_ptx.store_x())
_SHARED_WORDS = tl.constexpr(row_ptx.shared_words())
_SHARED_16 = tl.constexpr(row_ptx.shared_scales(16))
_SHARED_32 = tl.constexpr(row_ptx.shared_scales(32))
_SHARED_X = tl.constexpr(row_ptx.shared_x())
_PAUSE = tl.constexpr(row_ptx.PAUSE)


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
def _scale_at(address: tl.tensor, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return the bits of a scale in a word: a conversion would wait for the load."""
    HALF: tl.constexpr = address.dtype.element_ty.primitive_bitwidth == 16
    if INTERPRET:
        word = tl.load(address.to(tl.pointer_type(tl.int16 if HALF else tl.int32))).to(tl.int32)
    else:
        word = tl.inline_asm_elementwise(
            _LOAD_16 if HALF else _LOAD_32, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    return word


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
def _factors(
    scales: tl.tensor, row: tl.tensor, apart: tl.tensor, step: tl.tensor, lane: tl.tensor, N: tl.tensor, K: tl.tensor,
    PER: tl.constexpr, SPANS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, INTERPRET: tl.constexpr,
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
                        factors += (_scale_at(scales + group * N + row + part * apart + below, INTERPRET),)
    return factors


@triton.jit
def _share(
    first: tl.tensor, begin: tl.constexpr, lane: tl.tensor,
    PER: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return which chunk of a step's x a lane brings, of those from `begin` on, and the column where it starts."""
    chunk = tl.minimum(begin + lane % _LANES, TILES * PER * 4 - 1)
    return chunk, ((first + chunk // (4 * PER) * WARPS) * 4 * PER + chunk % (4 * PER)) * (_CHUNK // 2)


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
def _slot(
    slot: tl.tensor, lane: tl.tensor,
    PER: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
    SCALES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the byte of shared memory where the words of a warp's slot begin, where its x does, and its SCALES."""
    WORDS: tl.constexpr = TILES * PARTS * _BLOCK_BYTES if STAGES > 0 else 0
    X: tl.constexpr = TILES * PER * 4 * _CHUNK
    words = (slot * WARPS + lane // _LANES) * (WORDS + X + SCALES * _CHUNK)
    return words, words + WORDS, words + (WORDS + X)


@triton.jit
def _store_share(
    pairs: tl.tensor, lane: tl.tensor,
    PER: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Put what a lane brings of x where the others of its warp find it."""
    if not INTERPRET:
        _, share, _ = _slot(0, lane, PER, PARTS, TILES, WARPS, 0, 0)
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
def _copy_matrix(
    codes: tl.tensor, scales: tl.tensor, row: tl.tensor, apart: tl.tensor, step: tl.tensor, lane: tl.tensor,
    N: tl.tensor, K: tl.tensor, tiles: tl.tensor,
    PER: tl.constexpr, SPANS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, SCALES: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy the words and scales of a step, if there is such a one, to its slot."""
    if not INTERPRET:
        words, _, factors = _slot(step % STAGES, lane, PER, PARTS, TILES, WARPS, STAGES, SCALES)
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
            GROUPS: tl.constexpr = PER // SPANS
            EACH: tl.constexpr = (
                scales.dtype.element_ty.primitive_bitwidth // 8
            )  # chunks of a group of a block
            for begin in tl.static_range(0, SCALES, _LANES):
                chunk = tl.minimum(begin + lane % _LANES, SCALES - 1)
                span = chunk // (EACH * PARTS)
                column = ((first + span // GROUPS * WARPS) * PER + span % GROUPS * SPANS) * _SPAN
                group = (column if EVEN else tl.minimum(column, K - 1)) // GROUP
                upper = row - lane % _LANES // 4 + chunk // EACH % PARTS * apart
                at = group * N + upper + chunk % EACH * (_CHUNK // EACH)
                tl.inline_asm_elementwise(
                    _COPY_CHUNK, "=r,l,r,r", [scales + at, factors + chunk * _CHUNK, tl.full(lane.shape, 1, tl.int32)],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip


@triton.jit
def _copy_x(
    x: tl.tensor, step: tl.tensor, lane: tl.tensor, K: tl.tensor,
    PER: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, SCALES: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy the x of a step, if there is such a one, to its slot, with which the slot is complete."""
    if not INTERPRET:
        _, share, _ = _slot(step % STAGES, lane, PER, PARTS, TILES, WARPS, STAGES, SCALES)
        if step < STEPS:
            first = _first_tile(step, lane, TILES, WARPS)
            for begin in tl.static_range(0, TILES * PER * 4, _LANES):
                chunk, column = _share(first, begin, lane, PER, TILES, WARPS)
                there = column if EVEN else tl.minimum(column, K - _CHUNK // 2)
                tl.inline_asm_elementwise(
                    _COPY_CHUNK, "=r,l,r,r", [x + there, share + chunk * _CHUNK, (column < K).to(tl.int32)],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
        _run(_COMMIT, lane)


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
def _copied_factors(at: tl.tensor, lane: tl.tensor, COUNT: tl.constexpr, EACH: tl.constexpr) -> tl.tensor:
    """Return a tuple of COUNT scales of both rows, from the byte where those of a slot begin."""
    factors: tl.tensor = ()
    for i in tl.static_range(COUNT):
        factors += tl.inline_asm_elementwise(
            _SHARED_16 if EACH == 2 else _SHARED_32, "=r,=r,r", [at + (i * _BLOCK + lane % _LANES // 4) * EACH],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    return factors


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
