"""What a linear layer asks of the allocator: its matrix dequantized piece by piece, and the product.

Mirrors `quantkit/kernels/reference.py`.
"""

from __future__ import annotations

from calculators.allocator import Block
from calculators.tape import FP32, INT32, Matrix, Tape
from calculators.units import ceil_div
from calculators.weights import Packing, groups_per_row

PIECE_ELEMENTS = 1 << 22  # a matrix, or a layer's cache, is dequantized so many elements at a time
_ZEROS_PER_WORD = 8
_NF4_TABLE_BYTES = 256 * 2 * FP32  # both values of each byte
_NESTED_TABLE_BYTES = 256 * FP32


def piece_rows(cols: int) -> int:
    """Return the rows of a matrix that are dequantized at once."""
    return max(1, PIECE_ELEMENTS // cols)


def linear(tape: Tape, matrix: Matrix, name: str, shape: str) -> Block | None:
    dequantized = _dequantize(tape, matrix) if matrix.quantized else None
    out = tape.new(name, shape, tape.element_bytes)
    tape.workspace()
    tape.drop(dequantized)
    return out


def _dequantize(tape: Tape, matrix: Matrix) -> Block | None:
    """A matrix in the compute dtype, filled piece by piece."""
    packing = matrix.packing
    out = tape.take("dequantized matrix", matrix.rows, matrix.cols, tape.element_bytes)
    if packing.flat:
        elements = matrix.rows * matrix.cols
        tape.in_pieces(elements, PIECE_ELEMENTS, lambda count: _nf4_piece(tape, packing, count))
        return out
    groups = groups_per_row(matrix.cols, packing)
    scales = None
    if packing.scale_bits < 32:
        scales = tape.take("scales in float32", matrix.rows, groups, FP32)
    zeros = _zeros(tape, matrix.rows, groups) if packing.zero_bits else None
    tape.in_pieces(matrix.rows, piece_rows(matrix.cols), lambda rows: _integer_rows(tape, matrix, rows))
    tape.drop(scales, zeros)
    return out


def _integer_rows(tape: Tape, matrix: Matrix, rows: int) -> None:
    values = tape.take("codes in float32", rows, matrix.cols, FP32)
    if matrix.packing.code_bits < 8:
        tape.drop(tape.take("low nibbles", rows, ceil_div(matrix.cols, 2)))
        tape.drop(tape.take("high nibbles", rows, matrix.cols // 2))
    tape.drop(values)


def _zeros(tape: Tape, rows: int, groups: int) -> Block | None:
    """The zero points of a matrix, unpacked and in float32."""
    take, drop = tape.take, tape.drop
    words = ceil_div(rows, _ZEROS_PER_WORD)
    packed = words, groups, INT32
    columns = take("zero points by column", *packed) if groups > 1 and words > 1 else None
    low, high = take("low zero points", *packed), take("high zero points", *packed)
    unpacked = take("zero points", 2, *packed)
    drop(low, high)
    turned = unpacked
    if groups > 1:
        turned = take("zero points by row", rows, groups)
        drop(columns, unpacked)
    zeros = take("zero points in float32", rows, groups, FP32)
    drop(turned)
    return zeros


def _nf4_piece(tape: Tape, packing: Packing, count: int) -> None:
    take, drop = tape.take, tape.drop
    blocks, pairs = ceil_div(count, packing.group), ceil_div(count, 2)
    absmax = None
    if packing.nested_group:
        codes = take("codes of scales", blocks, INT32)
        tape.keep("table of nested scales", _NESTED_TABLE_BYTES)
        absmax = take("scales in float32", blocks, FP32)
        drop(codes)
    indices = take("bytes as indices", pairs, INT32)
    tape.keep("table of NF4 pairs", _NF4_TABLE_BYTES)
    values = take("values in float32", pairs, 2, FP32)
    drop(indices)
    drop(absmax, values)
