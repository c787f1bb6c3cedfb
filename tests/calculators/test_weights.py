"""Bytes of a matrix, by hand."""

from __future__ import annotations

import pytest

from calculators.weights import MatrixBytes, Packing, matrix_bytes

INT8 = Packing(8, scale_bits=16)
G128 = Packing(4, 128, scale_bits=16)
NF4 = Packing(4, 64, flat=True, scale_bits=32)
NF4_DQ = Packing(4, 64, flat=True, scale_bits=8, nested_group=256)


@pytest.mark.parametrize(
    ("rows", "cols", "packing", "parts"),
    [
        (2, 3, Packing(16), MatrixBytes(12)),
        (4, 128, INT8, MatrixBytes(512, 8)),
        (4, 128, G128, MatrixBytes(256, 8)),
        (4, 129, G128, MatrixBytes(4 * 65, 16)),  # a row begins on a byte; the last group is short
        (1, 1, G128, MatrixBytes(1, 2)),
        (8, 256, Packing(4, 128, scale_bits=16, zero_bits=4), MatrixBytes(1024, 32, zeros=8)),
        (9, 256, Packing(4, 128, scale_bits=16, zero_bits=4), MatrixBytes(1152, 36, zeros=16)),
        (3, 43, NF4, MatrixBytes(65, 12)),  # 129 elements: blocks run over the ends of rows
        (64, 256, NF4_DQ, MatrixBytes(8192, 256, nested=4, nested_offset=4)),
        (64, 260, NF4_DQ, MatrixBytes(8320, 260, nested=8, nested_offset=4)),
        (0, 128, G128, MatrixBytes(0)),
    ],
)
def test_bytes_by_part(rows: int, cols: int, packing: Packing, parts: MatrixBytes) -> None:
    assert matrix_bytes(rows, cols, packing) == parts
    assert parts.total == sum(parts.parts)
    assert all(parts.parts)


def test_sixteen_bit_zero_points_cost_what_halving_the_group_does() -> None:
    zeros = Packing(4, 128, scale_bits=16, zero_bits=16)
    halved = Packing(4, 64, scale_bits=16)
    assert matrix_bytes(4096, 14336, zeros).total == matrix_bytes(4096, 14336, halved).total


@pytest.mark.parametrize("packing", [INT8, G128, NF4, NF4_DQ])
def test_bytes_grow_with_the_matrix(packing: Packing) -> None:
    sizes = [matrix_bytes(7, cols, packing).total for cols in range(1, 400)]
    assert sizes == sorted(sizes)
