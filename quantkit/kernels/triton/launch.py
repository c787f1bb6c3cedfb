"""Which kernel runs for how many rows, and with what. Importing this imports Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton

from calculators.units import ceil_div
from quantkit.kernels.triton import kernels, row, unpack_ptx
from quantkit.kernels.triton.arguments import INTERPRETED as INTERPRETED
from quantkit.kernels.triton.arguments import (
    grant_shared,
    matrix_arguments,
    matrix_constants,
    stored,
    tuned,
)
from quantkit.kernels.triton.launching import launch
from quantkit.kernels.triton.layout import SPAN, Tiles
from quantkit.kernels.triton.tuning import Batch, Tuning

SUM_BLOCK = 512  # sums a program of `sum_kernel`
_SMALLEST_BLOCK = 8  # rows of x that the tensor cores take
_PIECE_ROWS = 64  # of a matrix, of which a piece has a multiple


def linear(
    x: torch.Tensor, matrix: Tiles, bias: torch.Tensor | None, most: int | None = None
) -> torch.Tensor:
    """Return x @ W.T + bias for contiguous x (M, K), in x's dtype.

    Args:
        x: as above.
        matrix: W.
        bias: (N,) or None.
        most: elements that are dequantized at once, where they are; None for the whole matrix.
    """
    with torch.cuda.device_of(x):
        if x.shape[0] == 0:
            return x.new_empty(0, matrix.rows)
        if takes(x, matrix):
            return _total(_parts(x, matrix, bias), bias, x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        pieces = 1 if most is None else ceil_div(matrix.rows * matrix.cols, most)
        if pieces == 1:
            return torch.nn.functional.linear(x, dequantize(matrix, x.dtype), bias)
        out = x.new_empty(x.shape[0], matrix.rows)
        step = ceil_div(matrix.rows, pieces * _PIECE_ROWS) * _PIECE_ROWS
        for start in range(0, matrix.rows, step):
            rows = slice(start, min(start + step, matrix.rows))
            weight = dequantize(matrix, x.dtype, rows)
            if bias is None:
                torch.mm(x, weight.T, out=out[:, rows])
            else:
                torch.addmm(bias[rows], x, weight.T, out=out[:, rows])
            del weight
        return out


def dequantize(matrix: Tiles, dtype: torch.dtype, rows: slice | None = None) -> torch.Tensor:
    """Return the (N, K) matrix, or some rows of it, in `dtype`, computed in float32 and rounded once."""
    chosen = tuned(matrix.codes.device)
    start, stop = (0, matrix.rows) if rows is None else (rows.start, rows.stop)
    out = torch.empty(stop - start, matrix.cols, dtype=stored(dtype), device=matrix.codes.device)
    with torch.cuda.device_of(out):
        launch(
            kernels.dequantize_kernel,
            (ceil_div(stop - start, chosen.dequantize_rows), matrix.codes.shape[0]),
            (
                *matrix_arguments(matrix, torch.float32),
                kernels.POWER,
                out,
                matrix.rows,
                matrix.cols,
                start,
                stop,
            ),
            dequantize_constants(matrix, chosen),
        )
    return out.to(dtype)


def dequantize_constants(matrix: Tiles, chosen: Tuning) -> dict[str, Any]:
    """Return the compile-time arguments of `dequantize_kernel`; product and sum stay apart, as in the reference."""
    return matrix_constants(matrix) | {
        "FLAT": matrix.flat,
        "EVEN": matrix.cols % matrix.tile_cols == 0,
        "BLOCK_N": chosen.dequantize_rows,
        "num_warps": chosen.dequantize_warps,
        "enable_fp_fusion": False,
    }


def vector_constants(matrix: Tiles, chosen: Tuning) -> dict[str, Any]:
    """Return the compile-time arguments of `vector_kernel`."""
    split_tiles = _split_tiles(matrix, chosen.vector_rows, chosen.vector_unroll, chosen.vector_programs)
    return matrix_constants(matrix) | {
        "EVEN": matrix.cols % (matrix.tile_cols * split_tiles) == 0,
        "SPLIT_TILES": split_tiles,
        "BLOCK_N": chosen.vector_rows,
        "UNROLL": chosen.vector_unroll,
        "num_warps": chosen.vector_warps,
    }


def batch_constants(matrix: Tiles, batch: Batch, lines: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the compile-time arguments of `batch_kernel` for so many rows of x in a dtype."""
    block = min(batch.lines, max(_SMALLEST_BLOCK, triton.next_power_of_2(lines)))
    split_tiles = _split_tiles(matrix, batch.rows, 1, batch.programs // ceil_div(lines, block))
    return matrix_constants(matrix) | {
        "EVEN": matrix.cols % (matrix.tile_cols * split_tiles) == 0,
        "SPLIT_TILES": split_tiles,
        "BLOCK_N": batch.rows,
        "BLOCK_M": block,
        "num_warps": batch.warps,
        "num_stages": batch.stages,
        **_unpacking(matrix, batch.scaled, dtype),
    }


def _unpacking(matrix: Tiles, scaled: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Return those that say how `batch_kernel` unpacks, and whether scales meet the weights there."""
    scaled = scaled and _scales_meet(matrix, dtype)
    scales = matrix.tile_cols // SPAN // matrix.spans if scaled else 0
    return {
        "SCALED": scaled,
        "UNPACK": unpack_ptx.nf4(dtype, scales)
        if matrix.nf4
        else unpack_ptx.integers(matrix.bits, dtype, scales),
        "FROM": unpack_ptx.constraints(matrix.bits, scales, "f" if matrix.nf4 else "r"),
    }


def _scales_meet(matrix: Tiles, dtype: torch.dtype) -> bool:
    """Whether a matrix's scales lie as `unpack_ptx` takes them."""
    if matrix.group == 0 or matrix.zeros is not None or matrix.nested_scales is not None:
        return False
    return matrix.nf4 or (matrix.scales.dtype == dtype and matrix.rows % 2 == 0)


def sum_constants(splits: int, bias: bool) -> dict[str, Any]:
    """Return the compile-time arguments of `sum_kernel`."""
    return {"SPLITS": splits, "BIAS": bias, "BLOCK": SUM_BLOCK, "enable_fp_fusion": True}


def parts(x: torch.Tensor, matrix: Tiles, most: int | None = None) -> torch.Tensor:
    """Return x @ W.T without a bias as parts (splits, M, N), which add up in their order.

    Args:
        x: (M, K), contiguous, M > 0.
        matrix: W.
        most: as in `linear`.

    Returns:
        float32, or one part in x's dtype.
    """
    with torch.cuda.device_of(x):
        return _parts(x, matrix, None) if takes(x, matrix) else linear(x, matrix, None, most)[None]


def by_batch(x: torch.Tensor, matrix: Tiles, bias: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """Return what `linear` does, by one launch of `batch_kernel`, for x (M, K) of 16 bits."""
    with torch.cuda.device_of(x):
        return _total(_batch(x, matrix, bias, batch), bias, x.dtype)


def _parts(x: torch.Tensor, matrix: Tiles, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the parts; a single one has the bias already."""
    if row.takes_x(x, matrix):
        return row.product(x, matrix, bias)[None]
    chosen = tuned(x.device)
    half = x.dtype in (torch.bfloat16, torch.float16)
    batch = chosen.batch(matrix.kind, x.shape[0])
    if x.shape[0] == 1 and (matrix.kind in chosen.vector or not half or batch is None):
        return _vector(x, matrix, bias, chosen)
    assert batch is not None
    return _batch(x, matrix, bias, batch)


def takes(x: torch.Tensor, matrix: Tiles) -> bool:
    """Whether a kernel multiplies x (M, K) by the codes themselves."""
    if matrix.flat:
        return False
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.shape[0] == 1 or (half and tuned(x.device).batch(matrix.kind, x.shape[0]) is not None)


def _vector(x: torch.Tensor, matrix: Tiles, bias: torch.Tensor | None, chosen: Tuning) -> torch.Tensor:
    constants = vector_constants(matrix, chosen)
    out = _sums(x, matrix, constants["SPLIT_TILES"])
    single = out.shape[0] == 1
    arguments = (
        x, *matrix_arguments(matrix, torch.float32), kernels.POWER, bias if single else None, out,
        matrix.rows, matrix.cols, matrix.codes.shape[0],
    )  # fmt: skip
    constants["BIAS"] = bias is not None and single
    grid = ceil_div(matrix.rows, chosen.vector_rows), out.shape[0]
    launch(kernels.vector_kernel, grid, arguments, constants)
    return out


def _batch(x: torch.Tensor, matrix: Tiles, bias: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    constants = batch_constants(matrix, batch, x.shape[0], x.dtype)
    out = _sums(x, matrix, constants["SPLIT_TILES"])
    grid = ceil_div(matrix.rows, batch.rows), out.shape[0], ceil_div(x.shape[0], constants["BLOCK_M"])
    single = out.shape[0] == 1
    arguments = (
        x, *matrix_arguments(matrix, x.dtype), bias if single else None, out,
        x.shape[0], matrix.rows, matrix.cols, matrix.codes.shape[0],
    )  # fmt: skip
    constants["BIAS"] = bias is not None and single
    launch(kernels.batch_kernel, grid, arguments, constants, grant_shared if matrix.nf4 else None)
    return out


def _split_tiles(matrix: Tiles, block: int, step: int, programs: int) -> int:
    """Return the tiles of one split, a multiple of `step`: about `programs` run, with as much to do where possible."""
    tiles = matrix.codes.shape[0]
    splits = max(1, ceil_div(programs, ceil_div(matrix.rows, block)))
    least = ceil_div(ceil_div(tiles, splits), step) * step
    return next((size for size in range(least, 2 * least, step) if tiles % size == 0), least)


def _sums(x: torch.Tensor, matrix: Tiles, split_tiles: int) -> torch.Tensor:
    """Return (splits, M, N) of unset values: the result itself where K is not split."""
    splits = ceil_div(matrix.codes.shape[0], split_tiles)
    dtype = stored(x.dtype) if splits == 1 else torch.float32
    return torch.empty(splits, x.shape[0], matrix.rows, dtype=dtype, device=x.device)


def _total(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return (M, N): the sum of parts (splits, M, N) and the bias, which a single part has already."""
    if parts.shape[0] == 1:
        return parts[0].to(dtype)
    out = torch.empty(parts.shape[1:], dtype=stored(dtype), device=parts.device)
    launch(
        kernels.sum_kernel,
        (ceil_div(out.numel(), SUM_BLOCK),),
        (parts, bias, out, out.numel(), out.shape[1]),
        sum_constants(parts.shape[0], bias is not None),
    )
    return out.to(dtype)
