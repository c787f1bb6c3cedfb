"""The CUDA kernels compiled ahead of time, without a GPU: registers, spills and the width of loads."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import torch

from quantkit.kernels.triton.layout import Tiles, tiles
from quantkit.kernels.triton.tuning import FAMILIES, Batch
from quantkit.schemes import SCHEMES
from quantkit.tensor import empty_quantized
from tests.kernels.ptx_launch import TYPES, translate
from tests.paths import ROOT

SHARED_BYTES = {
    75: 65_536,
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}  # a program's; CUDA's guide, table of capabilities
TESTED = {
    "kernels.py": ("vector_kernel", "batch_kernel", "dequantize_kernel", "sum_kernel"),
    "row_kernels.py": ("row_kernel",),
}
# of Mistral-7B: (N, K), and whether `row_kernel` takes it as two halves, norms x, or adds to a stream
LAYER = {
    "qkv": ((6144, 4096), False, True, False),
    "o": ((4096, 4096), False, False, True),
    "gate_up": ((28672, 4096), True, True, False),
    "down": ((4096, 14336), False, False, True),
}
SHAPES = ((4096, 14336), (1000, 576))  # (N, K): of Mistral-7B's down_proj, and ragged
QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.quantized]


@dataclass(frozen=True)
class Compiled:
    """What came out of the compiler for one kernel, and what went in."""

    constants: dict[str, Any]
    shared_bytes: int
    layouts: str  # Triton's GPU dialect
    instructions: list[str]  # machine code, without operands
    usage: dict[str, int]  # registers and bytes, as cuobjdump calls them

    def count(self, start: str) -> int:
        return sum(instruction.startswith(start) for instruction in self.instructions)


def cases(
    capabilities: Iterable[int], schemes: Iterable[str], shapes: Iterable[tuple[int, int]]
) -> Iterator[Any]:
    """Yield kernel, capability, scheme, shape and rows of x for every launch of these."""
    for capability, scheme, shape in itertools.product(capabilities, schemes, shapes):
        kind = tiles(empty_quantized((8, 128), SCHEMES[scheme], torch.bfloat16, "cpu")).kind
        limits = [batch.limit for batch in FAMILIES[capability].batches.get(kind, ())]
        rows = [("vector_kernel", 1), ("dequantize_kernel", 65)]
        rows += [("batch_kernel", count) for count in (sorted({16, *limits}) if limits else [])]
        for kernel, count in rows:
            name = f"sm_{capability}-{scheme}-{shape[0]}x{shape[1]}-{kernel}-{count}"
            yield pytest.param(kernel, capability, scheme, shape, count, id=name)


@pytest.fixture(autouse=True)
def _triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from quantkit.kernels.triton import launch

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("kernel", "capability", "scheme", "shape", "rows"),
    cases([90], ["int8", "int4-g128", "int4-g32-asym", "nf4-dq"], SHAPES[:1]),
)
def test_hopper(kernel: str, capability: int, scheme: str, shape: tuple[int, int], rows: int) -> None:
    check(kernel, capability, scheme, shape, rows, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "capability", "scheme", "shape", "rows"), cases(FAMILIES, QUANTIZED, SHAPES[:1])
)
def test_every_family(kernel: str, capability: int, scheme: str, shape: tuple[int, int], rows: int) -> None:
    check(kernel, capability, scheme, shape, rows, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "capability", "scheme", "shape", "rows"), cases([80, 90, 100], QUANTIZED, SHAPES[1:])
)
def test_ragged_and_float16(
    kernel: str, capability: int, scheme: str, shape: tuple[int, int], rows: int
) -> None:
    check(kernel, capability, scheme, shape, rows, torch.float16)


def check(
    kernel: str, capability: int, scheme: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    matrix = tiles(empty_quantized(shape, SCHEMES[scheme], dtype, "cpu"))
    found = compiled(kernel, capability, matrix, rows, dtype)
    assert found.usage["STACK"] == found.usage["LOCAL"] == 0, "registers spill"
    assert not found.count("STL")
    assert not found.count("LDL")
    static = found.usage["SHARED"]
    assert found.shared_bytes + static <= SHARED_BYTES[capability]
    if kernel == "batch_kernel":
        copy = "LDGSTS.E.BYPASS.128" if found.constants["SPLIT_TILES"] > 1 else "LDG.E.128"  # without a loop
        assert found.count(copy) >= 1, "the codes are not copied 16 bytes at a time"
        assert found.count("HGMMA") + found.count("HMMA") + found.count("UTCHMMA") >= 1
        through_shared = r"convert_layout .*x(bf16|f16), #blocked\d*> -> tensor<.*dot_op"
        assert not re.search(through_shared, found.layouts), (
            "weights are not unpacked where they are multiplied"
        )
    else:
        threads = 32 * found.constants["num_warps"]
        wide = found.constants["BLOCK_N"] * 64 // (16 * threads) * found.constants.get("UNROLL", 1)
        assert found.count("LDG.E.128") >= wide, "the codes are not loaded 16 bytes at a time"
    if kernel == "vector_kernel":  # the sum over a row's threads alone leaves the registers
        assert found.count("BAR") <= 1
        assert "convert_layout" not in found.layouts.partition("tt.reduce")[0]


LARGE = Batch(512, rows=256, warps=16, stages=3, programs=132, lines=128, scaled=True)


@pytest.mark.parametrize("scheme", ["int4-g128", "int4-g32", "nf4"])
def test_scales_meet_weights_in_registers(scheme: str) -> None:
    check_scaled(scheme, LARGE, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["int4-g128", "int4-g64", "int4-g32", "nf4"])
@pytest.mark.parametrize(
    "batch",
    [replace(LARGE, warps=8), replace(LARGE, rows=128, warps=8), replace(LARGE, lines=64)],
    ids=["8-warps", "128-rows", "64-lines"],
)
def test_other_launches_with_scaled_weights(batch: Batch, scheme: str, dtype: torch.dtype) -> None:
    check_scaled(scheme, batch, dtype)


def check_scaled(scheme: str, batch: Batch, dtype: torch.dtype) -> None:
    matrix = tiles(empty_quantized((28672, 4096), SCHEMES[scheme], dtype, "cpu"))
    found = compiled("batch_kernel", 90, matrix, 512, dtype, batch)
    assert found.constants["SCALED"]
    assert found.usage["STACK"] == found.usage["LOCAL"] == 0, "registers spill"
    assert found.shared_bytes + found.usage["SHARED"] <= SHARED_BYTES[90]
    assert found.count("HGMMA") > 0
    assert found.count("LDGSTS.E") > found.count("LDGSTS.E.BYPASS.128") > 0, (
        "scales are not copied ahead of time"
    )
    # the result's, to be stored; a weight's would go through shared memory
    assert found.layouts.count("ttg.convert_layout") <= 1


def test_the_second_pass_compiles_for_every_family() -> None:
    from quantkit.kernels.triton import kernels, launch

    types = {"parts": "*fp32", "bias": None, "out": "*bf16", "count": "i32", "N": "i32"}
    constants = launch.sum_constants(8, bias=False)
    for capability in FAMILIES:
        found = build(kernels.sum_kernel, capability, types, constants, {"count": 4096, "N": 4096})
        assert found.usage["STACK"] == found.usage["LOCAL"] == 0
        assert found.count("LDG.E.128") == 8


@pytest.mark.parametrize("matrix", LAYER)
@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "nf4"])
def test_one_row_on_hopper(scheme: str, matrix: str) -> None:
    check_row(scheme, matrix, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("matrix", LAYER)
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g64"])
def test_one_row_of_other_groups(scheme: str, matrix: str) -> None:
    check_row(scheme, matrix, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "nf4"])
def test_one_row_of_float16(scheme: str) -> None:
    check_row(scheme, "qkv", torch.float16)


def check_row(scheme: str, name: str, dtype: torch.dtype) -> None:
    shape, halves, normed, residual = LAYER[name]
    matrix = tiles(empty_quantized(shape, SCHEMES[scheme], dtype, "cpu"))
    found = compiled_row(matrix, dtype, halves, normed, residual)
    assert found.usage["STACK"] == found.usage["LOCAL"] == 0, "registers spill"
    assert found.shared_bytes + found.usage["SHARED"] <= 48 << 10, "it would have to be asked for"
    copies = found.count("LDGSTS.E.BYPASS") if found.constants["STAGES"] else found.count("LDG.E.NA.128")
    assert copies >= 2 * found.constants["TILES"] * found.constants["PARTS"], (
        "16 bytes are not loaded at a time"
    )
    products = 2 * 16 // matrix.bits * found.constants["TILES"] * found.constants["PARTS"]
    assert found.count("HMMA") >= products
    before_the_sums = found.layouts.partition("tt.reduce")[0]
    assert "local_alloc" not in before_the_sums, "words move through shared memory"


def test_no_kernel_is_without_a_test() -> None:
    folder = ROOT / "quantkit" / "kernels" / "triton"
    launched = (folder / "launch.py").read_text() + (folder / "row.py").read_text()
    for file, tested in TESTED.items():
        source = ast.parse((folder / file).read_text())
        functions = [node.name for node in source.body if isinstance(node, ast.FunctionDef)]
        assert {name for name in functions if not name.startswith("_")} == set(tested)
        assert all(f"kernels.{name}," in launched for name in tested)


def compiled_row(matrix: Tiles, dtype: torch.dtype, halves: bool, normed: bool, residual: bool) -> Compiled:
    """Compile `row_kernel` as `row.py` would launch it on a Hopper."""
    from quantkit.kernels.triton import row, row_kernels

    squares = 256 if normed else 0
    constants = row.constants(matrix, halves) | {
        "SQUARES": squares,
        "SQUARES_BLOCK": squares,
        "RESIDUAL": residual,
    }
    types = {
        "x": TYPES[dtype],
        "squares": "*fp32" if normed else None,
        "codes": "*i32",
        "scales": TYPES[matrix.scales.dtype],
        "codebook": "*fp32" if matrix.nf4 else None,
        "bias": None,
        "out": TYPES[dtype],
        "norm": TYPES[dtype] if residual else None,
        "out_weighted": TYPES[dtype] if residual else None,
        "out_squares": "*fp32" if residual else None,
        **dict.fromkeys(("N", "K", "tiles"), "i32"),
        "eps": "fp32",
    }
    numbers = {
        "N": matrix.rows,
        "K": matrix.cols,
        "tiles": matrix.codes.shape[0],
    }
    return build(row_kernels.row_kernel, 90, types, constants, numbers)


def compiled(
    kernel: str, capability: int, matrix: Tiles, rows: int, dtype: torch.dtype, batch: Batch | None = None
) -> Compiled:
    """Compile a kernel as `launch.py` would launch it on a GPU of this capability, or as `batch` says."""
    from quantkit.kernels.triton import kernels, launch

    chosen = FAMILIES[capability]
    if kernel == "vector_kernel":
        constants = launch.vector_constants(matrix, chosen) | {"BIAS": False}
    elif kernel == "batch_kernel":
        batch = batch or chosen.batch(matrix.kind, rows)
        assert batch is not None
        constants = launch.batch_constants(matrix, batch, rows, dtype) | {"BIAS": False}
    else:
        constants = launch.dequantize_constants(matrix, chosen)
    split = constants.get("SPLIT_TILES", matrix.codes.shape[0]) < matrix.codes.shape[0]
    types = {
        "x": TYPES[dtype],
        "codes": "*i32",
        "scales": TYPES[matrix.scales.dtype],
        "zeros": None if matrix.zeros is None else "*i32",
        "nested": None if matrix.nested_scales is None else "*fp32",
        "offset": None if matrix.nested_offset is None else "*fp32",
        "codebook": "*fp32" if matrix.nf4 else None,
        "dynamic_map": None if matrix.nested_scales is None else "*fp32",
        "bias": None,
        "out": "*fp32" if split else TYPES[dtype],
        **dict.fromkeys(("power", "M", "N", "K", "tiles", "start", "stop"), "i32"),
    }
    numbers = {
        "power": kernels.POWER,
        "M": rows,
        "N": matrix.rows,
        "K": matrix.cols,
        "tiles": matrix.codes.shape[0],
        "start": 0,
        "stop": matrix.rows,
    }
    return build(getattr(kernels, kernel), capability, types, constants, numbers)


def build(
    function: Any,
    capability: int,
    types: dict[str, str | None],
    constants: dict[str, Any],
    numbers: dict[str, int],
) -> Compiled:
    constants = constants | {"EARLY": FAMILIES[capability].early}
    absent = {name: None for name, kind in types.items() if kind is None}
    taken = {name: kind for name, kind in types.items() if kind is not None and name not in constants}
    # what the launcher finds of real tensors and numbers
    even = {name for name, kind in taken.items() if kind.startswith("*") or numbers.get(name, 1) % 16 == 0}
    result = translate(function, capability, taken, absent | constants, even)
    return Compiled(
        constants=constants,
        shared_bytes=result.metadata.shared,
        layouts=result.asm["ttgir"],
        instructions=disassembled(result.asm["cubin"]),
        usage=usage(result.asm["cubin"]),
    )


def tool(name: str, cubin: bytes, *arguments: str) -> str:
    """Return what one of the tools in Triton's wheel says of machine code."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [program, *arguments, file.name], capture_output=True, text=True, check=True
        ).stdout


def disassembled(cubin: bytes) -> list[str]:
    return re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", tool("nvdisasm", cubin), re.MULTILINE
    )


def usage(cubin: bytes) -> dict[str, int]:
    line = tool("cuobjdump", cubin, "-res-usage").strip().splitlines()[-1]
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
