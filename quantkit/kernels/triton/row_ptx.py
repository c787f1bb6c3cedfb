"""PTX of `row_kernel`: loads, copies to shared memory, and products by tensor cores, each of one thread or warp.

`unpack_ptx.py` has how words become pairs. int4's codes are not brought to their values one by one: laid over a power
of two they come with that on top, and with their zero point; both are taken off as a multiple of the sum of x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantkit.kernels.triton.layout import TILE
from quantkit.kernels.triton.unpack_ptx import (
    AND_OR,
    NF4_START,
    integer,
    integer_start,
    nf4_pair,
    twice,
)

BLOCK = 16  # rows of the matrix in one product
SHARED = "quantkit_shared"
PAUSE = "bar.warp.sync -1;\nmov.b32 $0, $1;"
COMMIT = "cp.async.commit_group;\nmov.b32 $0, $1;"
_ROW_BYTES = 4 * TILE
_APART = BLOCK // 2 * _ROW_BYTES  # bytes from one to the other row of a lane, in memory and in a slot
_ZERO_POINT = 8
_FORM = {torch.bfloat16: "bf16", torch.float16: "f16"}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


def span_product(bits: int, nf4: bool, dtype: torch.dtype, i: int) -> str:
    """Return the instructions that add the product of a span to the sums $16 to $19: $0 to $3.

    $4 to $7 and $8 to $11 are words of two rows, of whose halves it is code `i`, and $12 to $15 are pairs of x. Two
    products of 16 columns each are made; within one, it does not matter which columns the machine takes them for.
    """
    lines = [".reg .b32 one, offset, shifted, at, bank, table, a<8>;"]
    if nf4:
        lines += NF4_START
    elif bits == 8:
        lines += integer_start(bits, dtype)
    for word in range(8):
        if nf4:
            lines += nf4_pair(f"a{word}", f"${4 + word}", i)
        elif bits == 4:
            lines += _raised(f"a{word}", f"${4 + word}", dtype, i)
        else:
            lines += integer(f"a{word}", f"${4 + word}", bits, dtype, i)
    return _two_products(dtype, lines, [f"a{word}" for word in range(8)], 12)


def span_offset(dtype: torch.dtype, i: int) -> str:
    """Return the instructions that take from the sums $8 to $11 what int4's codes `i` come with: $0 to $3.

    That is the sum of x, in pairs $4 to $7, times their power of two and zero point.
    """
    lines = [".reg .b32 offset;", f"mov.b32 offset, {twice(-offset(dtype, i), dtype):#x};"]
    return _two_products(dtype, lines, ["offset"] * 8, 4)


def offset(dtype: torch.dtype, i: int) -> float:
    """Return what int4's codes `i` come with in a product: a power of two, and the zero point."""
    return _place(dtype, i)[1] + _ZERO_POINT


def load_words() -> str:
    """Return the instructions that load words $0 to $3 of a row from $8, and $4 to $7 of the eighth below.

    They are read once: no cache near the threads keeps them.
    """
    load = "ld.global.L1::no_allocate.v4.b32"
    return f"{load} {{$0, $1, $2, $3}}, [$8];\n{load} {{$4, $5, $6, $7}}, [$8 + {_APART}];"


def load(bits: int) -> str:
    """Return the instructions that load so many bits, 16 or 32, from $1 to the low end of $0."""
    if bits == 16:
        return "{\n.reg .b16 half;\nld.global.b16 half, [$1];\ncvt.u32.u16 $0, half;\n}"
    return "ld.global.b32 $0, [$1];"


def declare_shared(size: int) -> str:
    """Return the instructions that declare a program's bytes of shared memory; $0 means nothing, here and below."""
    return f".shared .align 128 .b8 {SHARED}[{size}];\nmov.b32 $0, $1;"


def copy_words() -> str:
    """Return the instructions that begin to copy from $1 what `load_words` loads, to byte $2 and as far behind."""
    copy = "cp.async.cg.shared.global.L2::128B"
    return _at(
        "$2", f"{copy} [at], [$1], 16;", f"{copy} [at + {_APART}], [$1 + {_APART}], 16;", "mov.b32 $0, $2;"
    )


def copy_chunk() -> str:
    """Return the instructions that begin to copy 16 bytes from $1 to byte $2, or as many zeros where $3 is 0."""
    lines = (".reg .b32 size;", "shl.b32 size, $3, 4;", "cp.async.ca.shared.global [at], [$1], 16, size;")
    return _at("$2", *lines, "mov.b32 $0, $2;")


def wait(stages: int) -> str:
    """Return the instructions that wait for the oldest of so many slots but one, and for the warp's other lanes."""
    return f"cp.async.wait_group {stages - 2};\n{PAUSE}"


def store_x() -> str:
    """Return the instructions that write words $1 to $4 to byte $5."""
    return _at("$5", "st.shared.v4.b32 [at], {$1, $2, $3, $4};", "mov.b32 $0, $5;")


def shared_words() -> str:
    """Return the instructions that read words $0 to $3 from byte $8, and $4 to $7 from as far behind."""
    return _at(
        "$8",
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [at];",
        f"ld.shared.v4.b32 {{$4, $5, $6, $7}}, [at + {_APART}];",
    )


def shared_x() -> str:
    """Return the instructions that read words $0 to $3 from byte $4."""
    return _at("$4", "ld.shared.v4.b32 {$0, $1, $2, $3}, [at];")


def shared_scales(bits: int) -> str:
    """Return the instructions that read a scale of so many bits, 16 or 32, from byte $2: $0, and the eighth behind."""
    apart = bits * BLOCK // 2 // 8
    if bits == 16:
        reads = [
            ".reg .b16 upper, lower;",
            "ld.shared.b16 upper, [at];",
            f"ld.shared.b16 lower, [at + {apart}];",
            "cvt.u32.u16 $0, upper;",
            "cvt.u32.u16 $1, lower;",
        ]
    else:
        reads = ["ld.shared.b32 $0, [at];", f"ld.shared.b32 $1, [at + {apart}];"]
    return _at("$2", *reads)


def _at(byte: str, *lines: str) -> str:
    """Return `lines` where `at` is the address of a byte of shared memory."""
    start = (".reg .b32 at;", f"mov.u32 at, {SHARED};", f"add.u32 at, at, {byte};")
    return "\n".join(["{", *start, *lines, "}"])


def _two_products(dtype: torch.dtype, lines: list[str], a: list[str], x: int) -> str:
    """Return `lines` and two products of pairs `a`, of four words of each row, x and sums from $x on."""
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{_FORM[dtype]}.{_FORM[dtype]}.f32"
    first, second = f"{{{a[0]}, {a[4]}, {a[1]}, {a[5]}}}", f"{{{a[2]}, {a[6]}, {a[3]}, {a[7]}}}"
    sums = ", ".join(f"${x + 4 + i}" for i in range(4))
    lines = [
        ".reg .f32 c<4>;",
        *lines,
        f"{product} {{c0, c1, c2, c3}}, {first}, {{${x}, ${x + 1}}}, {{{sums}}};",
        f"{product} {{$0, $1, $2, $3}}, {second}, {{${x + 2}, ${x + 3}}}, {{c0, c1, c2, c3}};",
    ]
    return "\n".join(["{", *lines, "}"])


def _place(dtype: torch.dtype, i: int) -> tuple[int, float]:
    """Return the bit of a mantissa where code i of int4 begins, and the power of two that makes that bit count 1.

    That is where it lies, unless some of it is beyond the mantissa; else as high as it can be.
    """
    mantissa = _MANTISSA[dtype]
    place = 4 * i if 4 * i + 4 <= mantissa else mantissa - 4
    return place, 2.0 ** (mantissa - place)


def _raised(pair: str, word: str, dtype: torch.dtype, i: int) -> Iterator[str]:
    """Yield the instructions that make code i of both halves of a word a pair, each plus its power of two."""
    place, power = _place(dtype, i)
    if 4 * i > place:
        yield f"shr.u32 shifted, {word}, {4 * i - place};"
        word = "shifted"
    yield f"lop3.b32 {pair}, {word}, {(15 << place) * 0x10001:#x}, {twice(power, dtype):#x}, {AND_OR:#x};"
