"""PTX that unpacks a word of codes into pairs of 16-bit values, in registers and without a branch.

Register i of the result holds code i of the word's low half and, above it, code i of its high half: columns that are
neighbours along K share a register, as the tensor cores take them (`layout.py` draws where they lie).

- Integers: a mask lays the bits of two codes into the mantissas of two values of a power of two, of which one fused
  multiply-add subtracts the power and the symmetric zero point. bfloat16 has 7 bits of mantissa: the eighth bit of an
  int8 code chooses between two powers to subtract. All of that is exact.
- NF4: `prmt` looks four codes up in a table of 8 bytes at once. The 16 values are two such tables for each of their
  two bytes: so for four codes and each byte, one look-up in either half by the codes' low three bits, then one that
  takes, for each code, the half that its fourth bit names. The halves' codes lie in turns, so that the looked-up bytes
  of a pair are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantkit.quantize.nf4 import NF4_CODEBOOK

_AND_OR, _AND_XOR = 0xEA, 0x6A  # of `lop3`: (a & b) | c and (a & b) ^ c
_FORM = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_POWER = {torch.bfloat16: 128.0, torch.float16: 1024.0}  # its mantissa counts in ones


def constraints(bits: int) -> str:
    """Return the constraints of the operands: 16 / bits registers out, one word in."""
    return ",".join(["=r"] * (16 // bits) + ["r"])


def unpack(kind: str, dtype: torch.dtype) -> str:
    """Return the instructions for codes of a kind (`int8`, `int4`, `nf4`) as values of a 16-bit `dtype`."""
    lines = _nf4(dtype) if kind == "nf4" else _integers(4 if kind == "int4" else 8, dtype)
    return "\n".join(["{", *lines, "}"])


def _integers(bits: int, dtype: torch.dtype) -> Iterator[str]:
    """Yield the instructions for symmetric integers."""
    count, power = 16 // bits, _POWER[dtype]
    shifted = f"${count}"
    whole = (1 << bits) - 1
    folded = whole >= power  # the highest bit has no place in the mantissa
    mask = whole >> 1 if folded else whole
    yield ".reg .b32 shifted, one, offset;"
    yield f"mov.b32 one, {_twice(1.0, dtype):#x};"
    if not folded:
        yield f"mov.b32 offset, {_twice(-(power + (1 << (bits - 1))), dtype):#x};"
    for i in range(count):
        if i:
            yield f"shr.u32 shifted, ${count}, {bits * i};"
            shifted = "shifted"
        if folded:  # less 256 where the bit is 0, less 128 where it is 1
            yield (
                f"lop3.b32 offset, {shifted}, {(mask + 1) * 0x10001:#x}, {_twice(-2 * power, dtype):#x}, {_AND_XOR:#x};"
            )
        yield f"lop3.b32 ${i}, {shifted}, {mask * 0x10001:#x}, {_twice(power, dtype):#x}, {_AND_OR:#x};"
        yield f"fma.rn.{_FORM[dtype]} ${i}, ${i}, one, offset;"


def _nf4(dtype: torch.dtype) -> Iterator[str]:
    """Yield the instructions for NF4, its values rounded to `dtype`."""
    yield ".reg .b32 low, pick, a, b, bytes0, bytes1;"
    yield "and.b32 low, $4, 0x77777777;"  # a set fourth bit would make prmt copy signs
    yield "shr.u32 pick, $4, 1;"
    yield f"lop3.b32 pick, pick, 0x44444444, 0x32103210, {_AND_OR:#x};"
    for half in range(2):
        if half:
            yield "shr.u32 low, low, 16;"
            yield "shr.u32 pick, pick, 16;"
        for byte, table in enumerate(_tables(dtype)):
            yield f"prmt.b32 a, {table[0]:#x}, {table[1]:#x}, low;"
            yield f"prmt.b32 b, {table[2]:#x}, {table[3]:#x}, low;"
            yield f"prmt.b32 bytes{byte}, a, b, pick;"
        yield f"prmt.b32 ${2 * half}, bytes0, bytes1, 0x5140;"
        yield f"prmt.b32 ${2 * half + 1}, bytes0, bytes1, 0x7362;"


def _twice(value: float, dtype: torch.dtype) -> int:
    """Return the bits of a register that holds a value of `dtype` twice."""
    bits = int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF
    return bits * 0x10001


def _tables(dtype: torch.dtype) -> Iterator[list[int]]:
    """Yield, for the low and the high byte of the 16 values, four words of four entries each."""
    bits = torch.tensor(NF4_CODEBOOK).to(dtype).view(torch.int16).tolist()
    for shift in (0, 8):
        entries = [(value >> shift) & 0xFF for value in bits]
        yield [int.from_bytes(bytes(entries[at : at + 4]), "little") for at in range(0, 16, 4)]
