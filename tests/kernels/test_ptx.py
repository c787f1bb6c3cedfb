"""The kernels' PTX followed on the CPU: what a GPU would do, but for the order of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from quantkit.kernels import reference
from quantkit.kernels import triton as kernels
from quantkit.kernels.triton.layout import Tiles
from quantkit.kernels.triton.tuning import FAMILIES, Batch
from quantkit.quantize import quantize
from quantkit.schemes import SCHEMES, QuantScheme
from tests.kernels.ptx_launch import followed
from tests.kernels.ptx_machine import APART, IN_STEP, Order, Program, run
from tests.kernels.test_triton_compile import LARGE

QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.quantized]
# of results in bfloat16: 2**-9 each, but for codes' and scales' roundings; what is computed otherwise is 1 away
RELATIVE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def _triton(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from quantkit.kernels.triton import launch

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def case(
    scheme: QuantScheme, shape: tuple[int, int], lines: int, dtype: torch.dtype
) -> tuple[Tiles, torch.Tensor, torch.Tensor]:
    """Return a matrix, x and their product in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(shape, generator=generator), scheme, dtype)
    x = torch.randn(lines, shape[1], generator=generator).to(dtype)
    return kernels.pack([weight]).tiles, x, x.double() @ reference.dequantize(weight).double().T


def in_every(
    orders: Sequence[Order],
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    work: Callable[[], torch.Tensor],
) -> tuple[torch.Tensor, list[str]]:
    """Return a result that does not depend on the order, and which kernels ran."""
    found = []
    for order in orders:
        with followed(monkeypatch, capability, order) as names:
            found.append(work())
    assert all(torch.equal(each, found[0]) for each in found), "something is not waited for"
    return found[0], names


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def check_batch(
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    scheme: str,
    batch: Batch,
    lines: int,
    shape: tuple[int, int] = (256, 512),
    dtype: torch.dtype = torch.bfloat16,
    orders: Sequence[Order] = IN_STEP,
) -> None:
    from quantkit.kernels.triton import launch

    matrix, x, exact = case(SCHEMES[scheme], shape, lines, dtype)
    found, names = in_every(orders, monkeypatch, capability, lambda: launch.by_batch(x, matrix, None, batch))
    assert names[0] == "batch_kernel"
    assert distance(found, exact) <= RELATIVE[dtype]


@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "int4-g32", "nf4"])
def test_large_tiles_on_hopper(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_batch(monkeypatch, 90, scheme, replace(LARGE, programs=1), 100, orders=[*IN_STEP, *APART])


@pytest.mark.parametrize(
    ("scheme", "lines"), [("int8", 100), ("int4-g128", 60), ("int4-g32-asym", 30), ("nf4-dq", 100)]
)
def test_todays_tiles_on_hopper(scheme: str, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _, _ = case(SCHEMES[scheme], (8, 128), 1, torch.bfloat16)
    batch = FAMILIES[90].batch(matrix.kind, lines)
    assert batch is not None
    batch = replace(batch, programs=1)  # so that there is a loop
    check_batch(monkeypatch, 90, scheme, batch, lines, (200, 640), orders=[IN_STEP[0], *APART])


@pytest.mark.parametrize(
    ("capability", "scheme", "lines"),
    [(80, "int4-g128", 16), (86, "nf4", 7), (89, "int8", 16), (120, "int4-g64", 16)],
)
def test_small_tiles_on_other_gpus(
    capability: int, scheme: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = FAMILIES[capability].batches["nf4"][0]
    orders = [IN_STEP[0], *APART]
    check_batch(monkeypatch, capability, scheme, replace(batch, programs=2), lines, (100, 384), orders=orders)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_every_tile(
    capability: int, scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, _, _ = case(SCHEMES[scheme], (8, 128), 1, dtype)
    for batch in FAMILIES[capability].batches[matrix.kind]:
        for tried in (replace(batch, programs=1), replace(batch, scaled=True)):
            check_batch(monkeypatch, capability, scheme, tried, batch.limit, (130, 448), dtype)


@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "int4-g32", "nf4"])
def test_one_row_on_hopper(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.kernels.triton import row

    matrix, x, exact = case(SCHEMES[scheme], (128, 1536), 1, torch.bfloat16)
    assert row.takes_x(x, matrix)
    found, names = in_every([*IN_STEP, *APART], monkeypatch, 90, lambda: row.product(x, matrix))
    assert names == ["row_kernel"]
    assert distance(found, exact) <= RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("scheme", ["int8", "int4-g32-asym", "nf4-dq"])
def test_vectors_and_whole_matrices(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.kernels.triton import launch

    weight = quantize(torch.randn(100, 192), SCHEMES[scheme], torch.bfloat16)
    matrix = kernels.pack([weight]).tiles
    x = torch.randn(1, 192)
    exact = x.double() @ reference.dequantize(weight).double().T
    found, names = in_every(IN_STEP, monkeypatch, 80, lambda: launch.linear(x, matrix, None))
    assert names[0] == "vector_kernel"
    assert distance(found, exact) <= 1e-6
    plain, names = in_every(IN_STEP, monkeypatch, 80, lambda: launch.dequantize(matrix, torch.bfloat16))
    assert names == ["dequantize_kernel"]
    assert torch.equal(plain, reference.dequantize(weight, torch.bfloat16))


HEADER = ".visible .entry small(\n\t.param .u64 .ptr .global .align 1 small_param_0\n)\n.reqntid 32\n{\n"
SMALL = """
	mov.u32 %r1, %tid.x;
	shl.b32 %r2, %r1, 2;
	ld.param.b64 %rd1, [small_param_0];
	mad.wide.u32 %rd2, %r1, 4, %rd1;
	mov.b32 %r3, global_smem;
	add.s32 %r4, %r3, %r2;
	cp.async.ca.shared.global [%r4 + 0], [%rd2 + 0], 0x4, 4;
	cp.async.commit_group;
	WAIT
	ld.shared.b32 %r5, [%r4];
	add.f32 %r6, %r5, 0f3F800000;
	setp.lt.u32 %p1, %r1, 16;
	@%p1 st.global.b32 [%rd2 + 128], %r6;
	ret;
}
"""


def small(text: str, copies_late: bool) -> list[float]:
    memory = torch.arange(64.0)
    run(
        Program(".extern .shared .align 16 .b8 global_smem[];\n" + HEADER + text),
        (1, 1, 1),
        [memory],
        Order(copies_late),
    )
    return memory.tolist()


def test_the_machine_tells_a_copy_that_is_not_waited_for() -> None:
    right = [*map(float, range(32)), *(at + 1.0 for at in range(16)), *map(float, range(48, 64))]
    waited = SMALL.replace("WAIT", "cp.async.wait_group 0;")
    assert [small(waited, late) for late in (False, True)] == [right, right]
    missing = SMALL.replace("WAIT", "")
    assert small(missing, copies_late=False) == right
    assert small(missing, copies_late=True)[32:48] != right[32:48]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("@%p1 bra $L__end;\n$L__end:", "threads of one program part"),
        ("@%p1 ret;", "threads of one program part"),
        ("tcgen05.ld.sync %r7, [%r4];", "does not know tcgen05"),
        ("ld.global.b32 %r7, [%rd2 + 4096];", "outside of global memory"),
        ("add.s32 %r7, %r99, 1;", "nothing has written %r99"),
    ],
)
def test_the_machine_refuses_what_it_cannot_follow(line: str, message: str) -> None:
    text = SMALL.replace("WAIT", "").replace("\tret;", f"\t{line}\n\tret;")
    with pytest.raises(AssertionError, match=message):
        small(text, copies_late=False)
