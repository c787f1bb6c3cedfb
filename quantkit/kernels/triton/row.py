"""The launch of a matrix times one row of x, with what comes before and after. Importing this imports Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from calculators.units import ceil_div
from quantkit.kernels.triton import row_kernels, row_ptx
from quantkit.kernels.triton.arguments import (
    UNASKED_SHARED,
    begins_early,
    codebook_on,
    early,
    plain_constants,
    stored,
    tuned,
)
from quantkit.kernels.triton.launching import launch
from quantkit.kernels.triton.layout import SPAN, TILE, Tiles
from quantkit.kernels.triton.row_ptx import BLOCK
from quantkit.kernels.triton.tuning import Row
from quantkit.kernels.triton.unpack_ptx import LEAST_THREADS, TABLE_BYTES

_CHUNK = 8  # elements of x that are loaded at once, from a multiple of so many
_ELEMENT_BYTES = 2  # of x
_TRITONS_BYTES = 4 << 10  # of shared memory, for its sums over warps, at most
_LANES, _MOST_WARPS = 32, 8  # of a warp and of a program


@dataclass(frozen=True)
class Stream:
    """A residual stream as the norm behind it takes it; `add_product` writes it.

    Attributes:
        weighted: (1, hidden), times the norm's weight.
        squares: float32, sums that add up to that of the stream's squares.
        eps: what the norm adds to their mean.
    """

    weighted: torch.Tensor
    squares: torch.Tensor
    eps: float


def takes(matrix: Tiles, lines: int, dtype: torch.dtype, device: torch.device, halves: bool = False) -> bool:
    """Whether a matrix, or one of two halves, is multiplied by so many rows of x in this dtype here."""
    return (
        lines == 1
        and dtype in (torch.bfloat16, torch.float16)
        and _launch_of(matrix, device, halves) is not None
        and matrix.rows % (2 * BLOCK) == 0
        and matrix.cols % _CHUNK == 0
        and matrix.nested_scales is None
        and not matrix.flat
    )


def takes_x(x: torch.Tensor, matrix: Tiles) -> bool:
    """Whether `product` multiplies contiguous x (M, K): so many rows, and where they lie."""
    aligned = x.data_ptr() % (_CHUNK * x.element_size()) == 0
    return aligned and takes(matrix, x.shape[0], x.dtype, x.device)


def product(x: torch.Tensor | Stream, matrix: Tiles, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias (1, N) for x (1, K), or for a stream once it is normed."""
    like = x.weighted if isinstance(x, Stream) else x
    out = torch.empty(1, matrix.rows, dtype=stored(like.dtype), device=like.device)
    _launch(x, matrix, bias, out)
    return out.to(like.dtype)


def gated(x: Stream, matrix: Tiles, bias: torch.Tensor | None) -> torch.Tensor:
    """Return silu(gate) * up (1, N / 2), of a matrix of two halves and a stream once it is normed."""
    like = x.weighted
    out = torch.empty(1, matrix.rows // 2, dtype=stored(like.dtype), device=like.device)
    _launch(x, matrix, bias, out, halves=True)
    return out.to(like.dtype)


def add_product(
    x: torch.Tensor,
    matrix: Tiles,
    bias: torch.Tensor | None,
    onto: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> Stream:
    """Add x @ W.T + bias to a residual stream (1, N) in place, and return that for the norm of this weight (N,)."""
    weighted = torch.empty_like(onto)
    squares = torch.empty(matrix.rows // (BLOCK * _chosen(matrix, halves=False).parts), device=x.device)
    _launch(x, matrix, bias, onto, norm, weighted, squares)
    return Stream(weighted, squares, eps)


def constants(matrix: Tiles, halves: bool) -> dict[str, Any]:
    """Return the compile-time arguments of `row_kernel` that belong to the matrix."""
    chosen = _chosen(matrix, halves)
    parts = 2 if halves else chosen.parts
    count, slots = matrix.codes.shape[0], max(chosen.stages, 1)
    tile_bytes, tiles = matrix.tile_cols * _ELEMENT_BYTES, chosen.tiles // parts
    groups = matrix.tile_cols // SPAN // matrix.spans if matrix.group else 0
    if chosen.stages:
        tile_bytes += parts * BLOCK * (4 * TILE + groups * matrix.scales.element_size())
    else:
        tiles //= max(1, groups)  # their scales take registers
    unasked = UNASKED_SHARED - _TRITONS_BYTES - (TABLE_BYTES if matrix.nf4 else 0)
    room = unasked // (slots * tile_bytes)  # tiles at once
    warps = LEAST_THREADS // _LANES if matrix.nf4 else 1
    while warps * matrix.rows // (BLOCK * parts) < chosen.warps and 2 * warps <= min(_MOST_WARPS, room):
        warps *= 2
    each = ceil_div(count, warps)
    most = min(each, max(1, tiles), room // warps)
    assert most > 0, f"{chosen} needs more shared memory than there is"
    held = next(size for size in range(most, 0, -1) if each % size == 0)
    if 2 * held < most:  # rather a last step that is not full
        held = ceil_div(each, ceil_div(each, most))
    steps = ceil_div(each, held)
    return plain_constants(matrix) | {
        "EVEN": count == warps * held * steps and matrix.cols == count * matrix.tile_cols,
        "GATED": halves,
        "PARTS": parts,
        "WARPS": warps,
        "TILES": held,
        "STEPS": steps,
        "STAGES": chosen.stages,
        "SHARED": row_ptx.declare_shared(slots * warps * held * tile_bytes),
        "WAIT": row_ptx.wait(chosen.stages) if chosen.stages else "",
        "num_warps": warps,
        "num_stages": 1,
        "maxnreg": chosen.registers,
    }


def _launch_of(matrix: Tiles, device: torch.device, halves: bool) -> Row | None:
    launches = tuned(device).halves if halves else tuned(device).rows
    return next((each for each in launches.get(matrix.kind, ()) if matrix.rows <= each.most_rows), None)


def _chosen(matrix: Tiles, halves: bool) -> Row:
    chosen = _launch_of(matrix, matrix.codes.device, halves)
    assert chosen is not None, "`takes` refuses this matrix"
    return chosen


def _launch(
    x: torch.Tensor | Stream,
    matrix: Tiles,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    norm: torch.Tensor | None = None,
    weighted: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    halves: bool = False,
) -> None:
    stream = x if isinstance(x, Stream) else None
    like = x.weighted if isinstance(x, Stream) else x
    fixed = constants(matrix, halves)
    given = (
        like, None if stream is None else stream.squares, matrix.codes, matrix.scales,
        codebook_on(like.device, like.dtype) if matrix.nf4 else None, bias, out, norm, weighted, squares,
        matrix.rows, matrix.cols, matrix.codes.shape[0], 0.0 if stream is None else stream.eps,
    )  # fmt: skip
    summed = 0 if stream is None else stream.squares.numel()
    fixed |= {
        "SQUARES": summed,
        "SQUARES_BLOCK": triton.next_power_of_2(summed),
        "RESIDUAL": squares is not None,
        **early(begins_early(like.device)),
    }
    launch(row_kernels.row_kernel, (matrix.rows // (BLOCK * fixed["PARTS"]),), given, fixed)
