"""Bytes of a weight matrix in a packing: codes, scales, zero points, nested scales.

A matrix is (N, K): N output rows, K input columns. Integer packings group K along each row;
NF4 groups the flattened row-major matrix, so a block may run over the end of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from calculators.units import bits_to_bytes, ceil_div

WORD_BITS = 32  # zero points are packed into 32-bit words, as compressed-tensors stores them


@dataclass(frozen=True)
class Packing:
    """How one matrix lies in memory.

    Attributes:
        code_bits: bits of a code, or of an element where the matrix is not quantized.
        group: elements that share a scale; 0 means a whole row.
        flat: groups run over the flattened matrix instead of along each row.
        scale_bits: bits of a scale; 0 where there is none.
        zero_bits: bits of a zero point; 0 where there is none.
        nested_group: scales that share a nested scale; 0 where scales are stored as they are.
        nested_bits: bits of a nested scale, and of the one offset of the matrix.
    """

    code_bits: int
    group: int = 0
    flat: bool = False
    scale_bits: int = 0
    zero_bits: int = 0
    nested_group: int = 0
    nested_bits: int = 32


@dataclass(frozen=True)
class MatrixBytes:
    """Bytes of one matrix, by part. Constant code tables are not counted: they exist once."""

    codes: int
    scales: int = 0
    zeros: int = 0
    nested: int = 0
    nested_offset: int = 0

    @property
    def parts(self) -> tuple[int, ...]:
        """Bytes of each tensor there is, in the order of `QuantizedTensor`'s fields."""
        all_parts = (self.codes, self.scales, self.zeros, self.nested, self.nested_offset)
        return tuple(part for part in all_parts if part)

    @property
    def total(self) -> int:
        return sum(self.parts)


def plain_bytes(elements: int, bits: int) -> int:
    """Return the bytes of `elements` unquantized values of `bits` bits."""
    return bits_to_bytes(elements * bits)


def matrix_bytes(rows: int, cols: int, packing: Packing) -> MatrixBytes:
    """Return the bytes of a (rows, cols) matrix in `packing`.

    A row of codes begins on a byte; the last group of a row, or of a flat matrix, may be short.
    """
    if packing.scale_bits == 0:
        return MatrixBytes(codes=plain_bytes(rows * cols, packing.code_bits))
    if packing.flat:
        codes = bits_to_bytes(rows * cols * packing.code_bits)
        n_scales = ceil_div(rows * cols, packing.group)
    else:
        codes = rows * bits_to_bytes(cols * packing.code_bits)
        n_scales = rows * groups_per_row(cols, packing)
    nested = nested_offset = 0
    if packing.nested_group:
        nested = bits_to_bytes(ceil_div(n_scales, packing.nested_group) * packing.nested_bits)
        nested_offset = bits_to_bytes(packing.nested_bits)
    return MatrixBytes(
        codes=codes,
        scales=bits_to_bytes(n_scales * packing.scale_bits),
        zeros=_zero_point_bytes(rows, cols, packing),
        nested=nested,
        nested_offset=nested_offset,
    )


def packing_formula(rows: int, cols: int, packing: Packing) -> str:
    """Return in words how the bytes of a (rows, cols) matrix come about."""
    parts = [f"{rows:,} x {cols:,} x {packing.code_bits} bits"]
    if packing.scale_bits:
        scales = (
            ceil_div(rows * cols, packing.group) if packing.flat else rows * groups_per_row(cols, packing)
        )
        parts.append(f"{scales:,} scales x {packing.scale_bits} bits")
        if packing.zero_bits:
            parts.append(f"{scales:,} zero points x {packing.zero_bits} bits")
        if packing.nested_group:
            nested = ceil_div(scales, packing.nested_group)
            parts.append(f"{nested:,} nested scales x {packing.nested_bits} bits + an offset")
    return " + ".join(parts)


def groups_per_row(cols: int, packing: Packing) -> int:
    """Return the scales that one row of `cols` elements has."""
    return ceil_div(cols, packing.group) if packing.group else 1


def _zero_point_bytes(rows: int, cols: int, packing: Packing) -> int:
    if not packing.zero_bits:
        return 0
    words = ceil_div(rows * packing.zero_bits, WORD_BITS)
    return words * (WORD_BITS // 8) * groups_per_row(cols, packing)
