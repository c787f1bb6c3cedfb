"""PTX that unpacks a word of codes into pairs of 16-bit values, in registers and without a branch.

Register i of the result holds code i of the word's low half and, above it, code i of its high half: columns that are
neighbours along K share a register, as the tensor cores take them (`layout.py` draws where they lie).

- Integers: a mask lays the bits of two codes into the mantissas of two values of a power of two, of which one fused
  multiply-add subtracts the power and the symmetric zero point. bfloat16 has 7 bits of mantissa: the eighth bit of an
  int8 code chooses between two powers to subtract. All of that is exact.
- NF4: a table in shared memory holds the pair of values of every byte, so of two codes. Each lane of a warp has a
  table of its own in a bank of its own, so that no two lanes wait for each other: 32 KiB, which each program writes
  before it begins. That takes half a look-up and one other instruction a weight; `prmt`, which looks four bytes up in a
  table of eight, would take 2.6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

AND_OR, _AND_XOR = 0xEA, 0x6A  # of `lop3`: (a & b) | c and (a & b) ^ c
_FORM = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_POWER = {torch.bfloat16: 128.0, torch.float16: 1024.0}  # its mantissa counts in ones
_TABLE, _LANES, _ENTRIES = "quantkit_nf4_table", 32, 256
LEAST_THREADS = 64  # that write the table
TABLE_BYTES = 4 * _LANES * _ENTRIES
CONSTRAINTS = {bits: ",".join(["=r"] * (16 // bits) + ["r"]) for bits in (4, 8)}
TABLE_CONSTRAINTS = "=r,l"  # nothing, and the codebook's address


def integers(bits: int, dtype: torch.dtype) -> str:
    """Return the instructions for symmetric integers: $0, $1, ... become pairs in a 16-bit `dtype`, from one word."""
    lines = [".reg .b32 shifted, one, offset;", *integer_start(bits, dtype)]
    for i in range(16 // bits):
        lines += integer(f"${i}", f"${16 // bits}", bits, dtype, i)
    return "\n".join(["{", *lines, "}"])


def nf4() -> str:
    """Return the instructions for NF4: $0 to $3 become pairs, from the word $4, by the table that was written."""
    lines = [".reg .b32 at, bank, table;", *NF4_START]
    for byte in range(4):
        lines += nf4_pair(f"${byte}", "$4", byte)
    return "\n".join(["{", *lines, "}"])


def nf4_table(dtype: torch.dtype) -> str:
    """Return the instructions that write the table of pairs in `dtype`, from the codebook at $1; $0 means nothing.

    All threads of a program run it, LEAST_THREADS or more: thread t writes rows t, t + threads, ... The chunks of a row
    are written from another one on by each lane, so that stores meet different banks. The variable is declared outside
    of the braces, for whatever comes later in the kernel.
    """
    lines = [
        ".reg .b32 row, low, high, pair, at, chunk, threads;",
        ".reg .b64 from;",
        ".reg .f32 first, second;",
        ".reg .pred inside;",
        "mov.u32 row, %tid.x;",
        "mov.u32 threads, %ntid.x;",
    ]
    for _ in range(_ENTRIES // LEAST_THREADS):
        lines += [f"setp.lt.u32 inside, row, {_ENTRIES};", "and.b32 low, row, 15;", "shr.u32 high, row, 4;"]
        for code, value in (("low", "first"), ("high", "second")):
            lines += [f"mad.wide.u32 from, {code}, 4, $1;", f"@inside ld.global.nc.f32 {value}, [from];"]
        lines += [
            f"cvt.rn.{_FORM[dtype]}.f32 pair, second, first;",
            f"mov.u32 at, {_TABLE};",
            f"mad.lo.u32 at, row, {4 * _LANES}, at;",
            "and.b32 chunk, row, 7;",
            "shl.b32 chunk, chunk, 4;",
        ]
        for _ in range(4 * _LANES // 16):
            lines += [
                "add.u32 low, at, chunk;",
                "@inside st.shared.v4.b32 [low], {pair, pair, pair, pair};",
                "add.u32 chunk, chunk, 16;",
                f"and.b32 chunk, chunk, {4 * _LANES - 1};",
            ]
        lines += ["add.u32 row, row, threads;"]
    lines += ["bar.sync 0;", "mov.u32 $0, 0;"]
    declared = f".shared .align 128 .b8 {_TABLE}[{TABLE_BYTES}];"
    return "\n".join([declared, "{", *lines, "}"])


NF4_START = ("mov.u32 bank, %laneid;", "shl.b32 bank, bank, 2;", f"mov.u32 table, {_TABLE};")


def nf4_pair(pair: str, word: str, byte: int) -> Iterator[str]:
    """Yield the instructions that look up the pair of one byte, in a table whose rows have 128 bytes.

    NF4_START comes before; they use the register `at`.
    """
    shift = 8 * byte - 7
    yield f"shr.u32 at, {word}, {shift};" if shift > 0 else f"shl.b32 at, {word}, {-shift};"
    yield f"lop3.b32 at, at, {(_ENTRIES - 1) * 4 * _LANES:#x}, bank, {AND_OR:#x};"
    yield "add.u32 at, at, table;"
    yield f"ld.shared.b32 {pair}, [at];"


def _folded(bits: int, dtype: torch.dtype) -> bool:
    """Whether the highest bit of a code has no place in the mantissa."""
    return (1 << bits) > _POWER[dtype]


def integer_start(bits: int, dtype: torch.dtype) -> Iterator[str]:
    """Yield the instructions that `integer` needs before: they set registers `one` and `offset`."""
    yield f"mov.b32 one, {twice(1.0, dtype):#x};"
    if not _folded(bits, dtype):
        yield f"mov.b32 offset, {twice(-(_POWER[dtype] + (1 << (bits - 1))), dtype):#x};"


def integer(pair: str, word: str, bits: int, dtype: torch.dtype, i: int) -> Iterator[str]:
    """Yield the instructions that make code i of both halves of a word a pair; they use the register `shifted`."""
    power, mask = _POWER[dtype], (1 << bits) - 1
    shifted = word
    if i:
        yield f"shr.u32 shifted, {word}, {bits * i};"
        shifted = "shifted"
    if _folded(bits, dtype):  # less 256 where the bit is 0, less 128 where it is 1
        highest = ((mask >> 1) + 1) * 0x10001
        yield f"lop3.b32 offset, {shifted}, {highest:#x}, {twice(-2 * power, dtype):#x}, {_AND_XOR:#x};"
        mask >>= 1
    yield f"lop3.b32 {pair}, {shifted}, {mask * 0x10001:#x}, {twice(power, dtype):#x}, {AND_OR:#x};"
    yield f"fma.rn.{_FORM[dtype]} {pair}, {pair}, one, offset;"


def twice(value: float, dtype: torch.dtype) -> int:
    """Return the bits of a register that holds a value of `dtype` twice."""
    bits = int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF
    return bits * 0x10001
