"""The CUDA kernels against the oracle: on a GPU, or on a CPU in Triton's interpreter.

`test_triton.py` runs this file by `cases.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from quantkit.kernels import ops, reference
from quantkit.kernels import triton as kernels
from quantkit.kernels.triton import launch
from quantkit.kernels.triton.tuning import FAMILIES, Batch
from quantkit.quantize import quantize
from quantkit.quantize.nf4 import NF4_CODEBOOK
from quantkit.schemes import SCHEMES, QuantScheme, int_scheme, nf4_scheme
from quantkit.tensor import QuantizedTensor
from tests.kernels.cases import DEVICE

QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.quantized]
ODD_GROUPS = [
    int_scheme(4, 0, True),
    int_scheme(4, 0, False),
    int_scheme(4, 96, True),
    int_scheme(4, 256, False),
    nf4_scheme(128, True),
]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # relative, to nearest
SMALLEST = {torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float32: 0.0}  # half the step of subnormals
# (N, K): one of each, whole tiles, K not split and split, ragged to all sides, blocks of NF4 across rows or not
CASES = [
    ((1, 8), (1, 2)),
    ((16, 256), (1, 2, 3, 7, 16, 33, 64, 65)),
    ((70, 192), (1, 3, 65)),
    ((9, 301), (1, 7)),
    ((24, 640), (1, 16)),
]


def random_matrix(
    scheme: QuantScheme, shape: tuple[int, int], scales: torch.dtype, seed: int = 0
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator) + 0.01
    return quantize(torch.randn(shape, generator=generator) * rows, scheme, scales).to(DEVICE)


def random_x(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)


def bound(weight: QuantizedTensor, x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return how far each result may be from `exact`: (M, N) float64.

    Sums round in float32, the result once to x's dtype. On top comes what a path rounds to that dtype: NF4's
    codebook where it is multiplied in 16 bits, the matrix for many rows or where blocks of NF4 run across rows.
    """
    matrix = reference.dequantize(weight).double()
    magnitude = x.double().abs() @ matrix.abs().T
    terms = weight.shape[1] + 8
    allowed = terms * 2.0**-24 * magnitude
    nf4 = weight.scheme.method == "nf4"
    if not nf4 and not weight.scheme.symmetric:  # sums are taken before zero points
        spread = 16 * weight.scales.double().amax() * x.double().abs().sum(dim=-1, keepdim=True)
        allowed = allowed + terms * 2.0**-24 * spread
    allowed = allowed + ROUNDING[x.dtype] * exact.abs() + SMALLEST[x.dtype]
    flat = nf4 and weight.shape[1] % weight.scheme.group != 0
    if flat or x.shape[0] > 64 or (x.shape[0] > 1 and x.dtype == torch.float32):
        allowed = allowed + ROUNDING[x.dtype] * magnitude
        allowed = allowed + SMALLEST[x.dtype] * x.double().abs().sum(dim=-1, keepdim=True)
    elif nf4 and x.dtype != torch.float32:
        allowed = allowed + codebook_rounding(x.dtype) * magnitude
    return allowed + 1e-30


def codebook_rounding(dtype: torch.dtype) -> float:
    """Return the greatest relative error of NF4's values in a dtype."""
    codebook = torch.tensor([value for value in NF4_CODEBOOK if value], dtype=torch.float64)
    return ((codebook.to(dtype) - codebook) / codebook).abs().max().item()


def check(weight: QuantizedTensor, x: torch.Tensor, found: torch.Tensor) -> None:
    exact = x.double() @ reference.dequantize(weight).double().T
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= bound(weight, x, exact)).all(), (weight.shape, x.shape, x.dtype)


@pytest.mark.parametrize("scheme", QUANTIZED + ODD_GROUPS, ids=lambda scheme: scheme.name)
def test_every_shape_meets_the_oracle(scheme: QuantScheme) -> None:
    scales = itertools.cycle((torch.bfloat16, torch.float16, torch.float32))
    dtypes = itertools.cycle((torch.bfloat16, torch.float16))
    for shape, rows in CASES:
        weight = random_matrix(scheme, shape, next(scales))
        packed = ops.prepare(weight, "triton")
        assert isinstance(packed, kernels.TiledWeight)
        for count in rows:
            x = random_x(count, shape[1], next(dtypes))
            check(weight, x, ops.linear(x, packed))
        next(dtypes)  # so that the next shape begins with the other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_dtypes_of_x_at_any_rows(dtype: torch.dtype) -> None:
    weight = random_matrix(SCHEMES["int4-g128-asym"], (40, 320), torch.bfloat16)
    packed = ops.prepare(weight, "triton")
    for rows in (1, 2, 33):
        x = random_x(rows, 320, dtype)
        check(weight, x, ops.linear(x, packed))


@pytest.mark.parametrize("scheme", ["int8", "int4-g64", "int4-g32-asym", "nf4"])
def test_float32_keeps_its_precision(scheme: str) -> None:
    weight = random_matrix(SCHEMES[scheme], (20, 192), torch.float32)
    packed = ops.prepare(weight, "triton")
    for rows in (1, 3):
        x = random_x(rows, 192, torch.float32)
        check(weight, x, ops.linear(x, packed))


@pytest.mark.parametrize("scheme", QUANTIZED + ODD_GROUPS, ids=lambda scheme: scheme.name)
def test_dequantizing_gives_the_oracles_bits(scheme: QuantScheme) -> None:
    for shape, dtype in (((33, 192), torch.bfloat16), ((9, 301), torch.float16), ((5, 15), torch.float32)):
        weight = random_matrix(scheme, shape, torch.bfloat16)
        packed, expected = kernels.pack([weight]).tiles, reference.dequantize(weight, dtype)
        assert torch.equal(launch.dequantize(packed, dtype), expected)
        rows = slice(1, shape[0] - 1)
        assert torch.equal(launch.dequantize(packed, dtype, rows), expected[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "scheme", ["int8", "int4-g128", "int4-g64", "int4-g32", "int4-g128-asym", "nf4", "nf4-dq"]
)
def test_scales_meet_the_weights_where_they_can(scheme: str, dtype: torch.dtype) -> None:
    for shape, programs in (
        ((36, 640), 1),
        ((33, 192), 4),
    ):  # K whole or split; the last row without a neighbour
        weight, x = random_matrix(SCHEMES[scheme], shape, dtype), random_x(70, shape[1], dtype)
        batch = Batch(512, rows=64, warps=4, stages=3, programs=programs, lines=32, scaled=True)
        packed = kernels.pack([weight]).tiles
        found = launch.by_batch(x, packed, None, batch)
        exact = x.double() @ reference.dequantize(weight).double().T
        allowed = bound(weight, x, exact)
        if scheme == "nf4":
            allowed += codebook_rounding(dtype) * (
                x.double().abs() @ reference.dequantize(weight).double().abs().T
            )
        assert ((found.double() - exact).abs() <= allowed).all()
        assert torch.equal(launch.by_batch(x, packed, None, batch), found)


@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_multiply_piece_by_piece(bias: bool) -> None:
    weight, x = random_matrix(SCHEMES["int8"], (150, 96), torch.bfloat16), random_x(260, 96, torch.bfloat16)
    added = torch.randn(150, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    packed, given = kernels.pack([weight]).tiles, added if bias else None
    exact = x.double() @ reference.dequantize(weight).double().T + (added.double() if bias else 0.0)
    for most in (1, 64 * 96, 150 * 96 - 1, 150 * 96):
        error = (launch.linear(x, packed, given, most).double() - exact).abs()
        assert (error <= bound(weight, x, exact)).all()


@pytest.mark.parametrize("scheme", ["int8", "int4-g64-asym", "nf4-dq"])
def test_a_bias_whether_k_is_split_or_not(scheme: str) -> None:
    bias = torch.randn(33, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    for cols, rows in itertools.product((128, 640), (1, 6, 70)):
        weight = random_matrix(SCHEMES[scheme], (33, cols), torch.bfloat16)
        x = random_x(rows, cols, torch.bfloat16)
        exact = x.double() @ reference.dequantize(weight).double().T + bias.double()
        error = (ops.linear(x, ops.prepare(weight, "triton"), bias).double() - exact).abs()
        # beside what is without it, the bias is added once in float32
        assert (error <= bound(weight, x, exact) + 2.0**-23 * (exact.abs() + bias.double().abs())).all()


def test_leading_dimensions() -> None:
    packed = ops.prepare(random_matrix(SCHEMES["int4-g64"], (33, 128), torch.bfloat16), "triton")
    x = random_x(6, 128, torch.bfloat16)
    assert torch.equal(ops.linear(x.view(2, 3, 128), packed).view(6, 33), ops.linear(x, packed))
    assert torch.equal(ops.linear(x[0], packed), ops.linear(x[:1], packed)[0])


def test_no_rows_and_rows_that_do_not_lie_together() -> None:
    weight = random_matrix(SCHEMES["int4-g64"], (33, 128), torch.bfloat16)
    packed = ops.prepare(weight, "triton")
    assert ops.linear(torch.empty(2, 0, 128, dtype=torch.bfloat16, device=DEVICE), packed).shape == (2, 0, 33)
    strided = random_x(4, 256, torch.bfloat16)[:, ::2]
    check(weight, strided, ops.linear(strided, packed))


@pytest.mark.parametrize("scheme", ["int8", "int4-g64", "int4-g32-asym", "nf4"])
def test_matrices_below_each_other_are_one(scheme: str) -> None:
    parts = [random_matrix(SCHEMES[scheme], (rows, 192), torch.bfloat16, rows) for rows in (16, 8, 24)]
    fused = ops.fuse(parts, "triton")
    assert fused is not None
    assert fused.shape == (48, 192)
    assert fused.nbytes == sum(part.nbytes for part in parts)
    for rows in (1, 3):
        x = random_x(rows, 192, torch.bfloat16)
        apart = torch.cat([ops.linear(x, ops.prepare(part, "triton")) for part in parts], dim=-1)
        assert torch.equal(ops.linear(x, fused), apart)


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "nf4-dq"])
def test_runs_do_not_change_a_bit(scheme: str) -> None:
    packed = ops.prepare(random_matrix(SCHEMES[scheme], (24, 640), torch.bfloat16), "triton")
    for rows in (1, 5):
        x = random_x(rows, 640, torch.bfloat16)
        first = ops.linear(x, packed)
        assert all(torch.equal(ops.linear(x, packed), first) for _ in range(1 if DEVICE == "cpu" else 20))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is tested
def test_nan_and_infinity_come_through() -> None:
    for scheme, rows in itertools.product(("int8", "int4-g128", "int4-g64-asym", "nf4"), (1, 2)):
        packed = ops.prepare(random_matrix(SCHEMES[scheme], (16, 128), torch.bfloat16), "triton")
        x = random_x(rows, 128, torch.bfloat16)
        x[0, 5] = torch.nan
        found = ops.linear(x, packed)
        assert found[0].isnan().all()
        assert found[1:].isfinite().all()
        x[0, 5] = torch.inf
        assert not ops.linear(x, packed)[0].isfinite().any()


def test_the_operator_has_a_fake_that_compile_and_trace_see() -> None:
    matrix = kernels.pack([random_matrix(SCHEMES["nf4-dq"], (48, 128), torch.bfloat16)]).tiles
    parts = (matrix.codes, matrix.scales, matrix.zeros, matrix.nested_scales, matrix.nested_offset, None)
    arguments = (random_x(3, 128, torch.bfloat16), *parts, 48, 128, matrix.bits, matrix.group, matrix.nf4)
    torch.library.opcheck(torch.ops.quantkit.tiled_linear.default, arguments)
    on_meta = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in arguments]
    assert torch.ops.quantkit.tiled_linear(*on_meta).shape == (3, 48)


@pytest.mark.parametrize("capability", FAMILIES)
def test_the_launches_of_every_family(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = FAMILIES[capability]
    monkeypatch.setattr(launch, "tuned", lambda device: chosen)
    weight = random_matrix(SCHEMES["int4-g128-asym"], (40, 640), torch.bfloat16)
    packed = ops.prepare(weight, "triton")
    limits = [batch.limit for batch in chosen.batches.get("int4-asym", ())]
    assert limits == sorted(limits)
    for rows in (1, *limits):
        x = random_x(rows, 640, torch.float16)
        check(weight, x, ops.linear(x, packed))


def test_one_row_on_the_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    without = replace(FAMILIES[90], vector=frozenset())
    monkeypatch.setattr(launch, "tuned", lambda device: without)
    weight = random_matrix(SCHEMES["int4-g64"], (40, 320), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):  # float32 is none of theirs
        x = random_x(1, 320, dtype)
        check(weight, x, ops.linear(x, ops.prepare(weight, "triton")))
