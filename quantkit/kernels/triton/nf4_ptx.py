"""PTX that unpacks two words of NF4 codes into pairs of 16-bit values, in registers and without a branch.

A 16-entry table of bytes is two halves of 8, and `prmt` looks four codes up in one half at once. So for four codes
and each byte of a value: one look-up in either half by the codes' low three bits, then one that takes, for each code,
the half its fourth bit names. At the end the values of both words that belong to one place are paired: elements that
are neighbours along K share a register, as the tensor cores take them.

    word 0:  codes 7 ... 1 0  ─┐
    word 1:  codes 7 ... 1 0  ─┴─>  8 registers, register i = (value of code i of word 1, of word 0)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantkit.quantize.nf4 import NF4_CODEBOOK

CONSTRAINTS = ",".join(["=r"] * 8 + ["r"] * 2)
_OUTPUTS = 8


def unpack(dtype: torch.dtype) -> str:
    """Return the instructions: $0 to $7 become the pairs in a 16-bit `dtype`, from the words $8 and $9."""
    lines = [".reg .b32 half, low, pick, a, b, bytes0, bytes1, first<4>, second<4>;"]
    for word, pairs in ((_OUTPUTS, "first"), (_OUTPUTS + 1, "second")):
        for half in range(2):
            lines += [
                f"shr.u32 half, ${word}, {16 * half};",
                "and.b32 low, half, 0x7777;",  # a set fourth bit would make prmt copy signs
                "shr.u32 pick, half, 1;",
                "and.b32 pick, pick, 0x4444;",
                "or.b32 pick, pick, 0x3210;",
            ]
            for byte, table in enumerate(_tables(dtype)):
                lines += [
                    f"prmt.b32 a, {table[0]:#x}, {table[1]:#x}, low;",
                    f"prmt.b32 b, {table[2]:#x}, {table[3]:#x}, low;",
                    f"prmt.b32 bytes{byte}, a, b, pick;",
                ]
            lines += [
                f"prmt.b32 {pairs}{2 * half}, bytes0, bytes1, 0x5140;",
                f"prmt.b32 {pairs}{2 * half + 1}, bytes0, bytes1, 0x7362;",
            ]
    lines += [
        f"prmt.b32 ${i}, first{i // 2}, second{i // 2}, {0x7632 if i % 2 else 0x5410:#x};"
        for i in range(_OUTPUTS)
    ]
    return "\n".join(["{", *lines, "}"])


def _tables(dtype: torch.dtype) -> Iterator[list[int]]:
    """Yield, for the low and the high byte of the 16 values, four words of four entries each."""
    bits = torch.tensor(NF4_CODEBOOK).to(dtype).view(torch.int16).tolist()
    for shift in (0, 8):
        entries = [(value >> shift) & 0xFF for value in bits]
        yield [int.from_bytes(bytes(entries[at : at + 4]), "little") for at in range(0, 16, 4)]
