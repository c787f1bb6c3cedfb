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

Scales may meet the values here; their product is rounded to 16 bits. Of each group of a word comes one scale: of NF4
as a float32, of integers the 32 bits in which it and that of the row beside it lie, an even row's in the lower half. A
lane tells by its own number which is its row's: of the rows that tensor cores take, lane n holds n // 4 and others that
are multiples of eight away.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

AND_OR, _AND_XOR = 0xEA, 0x6A  # of `lop3`: (a & b) | c and (a & b) ^ c
_FORM = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_POWER = {torch.bfloat16: 128.0, torch.float16: 1024.0}  # its mantissa counts in ones
_TABLE, _LANES, _ENTRIES = "quantkit_nf4_table", 32, 256
LEAST_THREADS = 64  # that write the table
TABLE_BYTES = 4 * _LANES * _ENTRIES
TABLE_CONSTRAINTS = "=r,l"  # nothing, and the codebook's address


@cache
def constraints(bits: int, scales: int = 0, scale: str = "r") -> str:
    """Return which registers the instructions take: results, a word, and each scale twice, once for each of a pair."""
    return ",".join(["=r"] * (16 // bits) + ["r"] + [scale] * 2 * scales)


@cache
def integers(bits: int, dtype: torch.dtype, scales: int = 0) -> str:
    """Return the instructions for symmetric integers: $0, $1, ... become pairs in a 16-bit `dtype`, from one word.

    Behind the word come the bits of so many scales, in `dtype`, for as many groups of the pairs.
    """
    per = 16 // bits
    lines = [".reg .b32 shifted, one, offset, turn, nothing;", *integer_start(bits, dtype)]
    if scales:
        lines += ["mov.u32 turn, %laneid;", "shl.b32 turn, turn, 2;", "and.b32 turn, turn, 16;"]
        lines += [f"mov.b32 nothing, {twice(-0.0, dtype):#x};"]  # capability 8.0 has no product without a sum
    for group in range(scales):
        scale = f"scale{group}"
        lines += [f".reg .b32 {scale};", f"shr.u32 {scale}, ${per + 1 + 2 * group}, turn;"]
        lines += [f"prmt.b32 {scale}, {scale}, {scale}, 0x1010;"]
    for i in range(per):
        lines += integer(f"${i}", f"${per}", bits, dtype, i)
        if scales:
            lines.append(f"fma.rn.{_FORM[dtype]} ${i}, ${i}, scale{i * scales // per}, nothing;")
    return "\n".join(["{", *lines, "}"])


@cache
def nf4(dtype: torch.dtype, scales: int = 0) -> str:
    """Return the instructions for NF4: $0 to $3 become pairs, from the word $4, by the table that was written.

    Behind the word come so many scales in float32, for as many groups of the pairs.
    """
    lines = [
        ".reg .b32 at, bank, table, wide;",
        ".reg .f32 first, second;",
        ".reg .b16 low, high;",
        *NF4_START,
    ]
    for byte in range(4):
        pair, scale = f"${byte}", f"${5 + 2 * (byte * scales // 4)}"
        lines += nf4_pair(pair, "$4", byte)
        if scales:
            lines += _widened(pair, dtype)
            lines += [f"mul.rn.f32 {value}, {value}, {scale};" for value in ("first", "second")]
            lines += [f"cvt.rn.{_FORM[dtype]}.f32 {pair}, second, first;"]
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


def _widened(pair: str, dtype: torch.dtype) -> list[str]:
    """Return the instructions that set registers `first` and `second` to a pair's values in float32."""
    if dtype == torch.float16:
        return [f"mov.b32 {{low, high}}, {pair};", "cvt.f32.f16 first, low;", "cvt.f32.f16 second, high;"]
    return [
        f"shl.b32 wide, {pair}, 16;",
        "mov.b32 first, wide;",
        f"and.b32 wide, {pair}, 0xffff0000;",
        "mov.b32 second, wide;",
    ]


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
