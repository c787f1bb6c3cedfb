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

_AND_OR, _AND_XOR = 0xEA, 0x6A  # of `lop3`: (a & b) | c and (a & b) ^ c
_FORM = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_POWER = {torch.bfloat16: 128.0, torch.float16: 1024.0}  # its mantissa counts in ones
_TABLE, _LANES, _ENTRIES = "quantkit_nf4_table", 32, 256
LEAST_THREADS = 64  # that write the table
CONSTRAINTS = {bits: ",".join(["=r"] * (16 // bits) + ["r"]) for bits in (4, 8)}
TABLE_CONSTRAINTS = "=r,l"  # nothing, and the codebook's address


def integers(bits: int, dtype: torch.dtype) -> str:
    """Return the instructions for symmetric integers: $0, $1, ... become pairs in a 16-bit `dtype`, from one word."""
    return "\n".join(["{", *_integers(bits, dtype), "}"])


def nf4() -> str:
    """Return the instructions for NF4: $0 to $3 become pairs, from the word $4, by the table that was written."""
    lines = [
        ".reg .b32 at, bank, table;",
        "mov.u32 bank, %laneid;",
        "shl.b32 bank, bank, 2;",
        f"mov.u32 table, {_TABLE};",
    ]
    for byte in range(4):  # to the place of a row's number, the table's rows having 128 bytes
        shift = 8 * byte - 7
        lines += [
            f"shr.u32 at, $4, {shift};" if shift > 0 else f"shl.b32 at, $4, {-shift};",
            f"lop3.b32 at, at, {(_ENTRIES - 1) * 4 * _LANES:#x}, bank, {_AND_OR:#x};",
            "add.u32 at, at, table;",
            f"ld.shared.b32 ${byte}, [at];",
        ]
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
    declared = f".shared .align 128 .b8 {_TABLE}[{4 * _LANES * _ENTRIES}];"
    return "\n".join([declared, "{", *lines, "}"])


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


def _twice(value: float, dtype: torch.dtype) -> int:
    """Return the bits of a register that holds a value of `dtype` twice."""
    bits = int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF
    return bits * 0x10001
