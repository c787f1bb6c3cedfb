"""One row of x times a matrix, and what comes with it, against the oracle: on a GPU, or in Triton's interpreter.

`test_triton.py` runs this file by `cases.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from quantkit.kernels import ops, reference
from quantkit.kernels import triton as kernels
from quantkit.kernels.triton import row, row_ptx
from quantkit.kernels.triton.layout import Tiles
from quantkit.kernels.triton.tuning import FAMILIES, Row
from quantkit.schemes import SCHEMES, QuantScheme, int_scheme
from quantkit.tensor import QuantizedTensor
from tests.kernels.cases import DEVICE
from tests.kernels.triton_cases import ROUNDING, bound, random_matrix, random_x

TAKEN = [SCHEMES[name] for name in ("int8", "int4-g32", "int4-g64", "int4-g128", "nf4")]
ODD_GROUPS = [
    int_scheme(8, 64, True),
    int_scheme(4, 0, True),
    int_scheme(4, 96, True),
    int_scheme(4, 256, True),
]
# one tile; a last one that is half full; a last step that is not full; several steps
SHAPES = {
    (32, 128): torch.float16,
    (64, 576): torch.bfloat16,
    (32, 1152): torch.float16,
    (32, 2304): torch.bfloat16,
}
EPS = 1e-5


def matrix_of(weight: QuantizedTensor) -> Tiles:
    matrix = kernels.pack([weight]).tiles
    assert row.takes(matrix, 1, torch.bfloat16, matrix.codes.device)
    return matrix


def vector(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def allowed(weight: QuantizedTensor, x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return `bound`, and what int4's codes add that come with a power of two on top until their group is summed."""
    offset = torch.zeros_like(exact)
    if weight.scheme.bits == 4 and weight.scheme.method == "int":
        most = max(row_ptx.offset(x.dtype, i) for i in range(4))
        terms = (weight.scheme.group or x.shape[1]) / 16 + 16  # sums of a group, and those of 16 products
        scale = weight.scales.double().abs().amax(dim=1)
        offset = terms * 2.0**-23 * most * scale * x.double().abs().sum()
    return bound(weight, x, exact) + offset


def check(weight: QuantizedTensor, x: torch.Tensor, found: torch.Tensor) -> None:
    exact = x.double() @ reference.dequantize(weight).double().T
    assert found.dtype == x.dtype
    assert ((found.double() - exact).abs() <= allowed(weight, x, exact)).all(), (weight.shape, x.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", TAKEN + ODD_GROUPS, ids=lambda scheme: scheme.name)
def test_products_meet_the_oracle(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = random_matrix(scheme, shape, torch.bfloat16)
    matrix = matrix_of(weight)
    x = random_x(1, shape[1], SHAPES[shape])
    found = row.product(x, matrix)
    check(weight, x, found)
    assert torch.equal(row.product(x, matrix), found)


@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "nf4"])
@pytest.mark.parametrize(
    "launch",
    [
        Row(warps=1, tiles=2),
        Row(warps=1, tiles=4, parts=2),
        Row(warps=64, tiles=2, stages=2),
        Row(warps=64, tiles=2, parts=2, stages=3),
    ],
    ids=["a-warp", "a-warp-two-parts", "two-stages", "three-stages-two-parts"],
)
def test_every_launch_gives_the_same(launch: Row, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if launch.stages and scheme == "nf4":
        pytest.skip("its table leaves no room for slots of two warps")
    kinds = dict.fromkeys(FAMILIES[90].rows, (launch,))
    monkeypatch.setattr(row, "tuned", lambda device: replace(FAMILIES[90], rows=kinds, halves=kinds))
    weight = random_matrix(SCHEMES[scheme], (32, 1152), torch.bfloat16)
    matrix, x = matrix_of(weight), random_x(1, 1152, torch.bfloat16)
    check(weight, x, row.product(x, matrix))
    check_gated(weight, matrix, 1152)


def check_gated(weight: QuantizedTensor, matrix: Tiles, cols: int) -> None:
    stream, norm = vector(cols, torch.bfloat16, 1)[None], vector(cols, torch.bfloat16, 2).abs()
    weighted = stream * norm
    squares = stream.float().square().view(-1, 16).sum(dim=1)
    found = row.gated(row.Stream(weighted, squares, EPS), matrix, None)
    exact = weighted.double() @ reference.dequantize(weight).double().T
    factor = (squares.double().sum() / cols + EPS).rsqrt()
    gate, up = (exact * factor).chunk(2, dim=1)
    gate_error, up_error = (allowed(weight, weighted, exact) * factor).chunk(2, dim=1)
    # three roundings on the way, and the errors of both factors; silu is no steeper than 1.1
    expected = F.silu(gate) * up
    most = (
        3 * ROUNDING[torch.bfloat16] * expected.abs()
        + 1.1 * gate_error * up.abs()
        + up_error * F.silu(gate).abs()
    )
    assert ((found.double() - expected).abs() <= 1.01 * (most + 1.1 * gate_error * up_error)).all()


@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "nf4"])
def test_halves_of_a_normed_stream(scheme: str) -> None:
    weight = random_matrix(SCHEMES[scheme], (96, 576), torch.bfloat16)
    check_gated(weight, matrix_of(weight), 576)


@pytest.mark.parametrize("scheme", ["int8", "int4-g64", "nf4"])
def test_a_residual_stream_is_written_for_the_next_norm(scheme: str) -> None:
    weight = random_matrix(SCHEMES[scheme], (96, 320), torch.bfloat16)
    matrix, x = matrix_of(weight), random_x(1, 320, torch.bfloat16)
    norm, bias = vector(96, torch.bfloat16, 3), vector(96, torch.bfloat16, 4)
    stream = vector(96, torch.bfloat16, 5)[None]
    expected = stream + row.product(x, matrix, bias)  # rounded at the same places
    written = row.add_product(x, matrix, bias, stream, norm, EPS)
    assert torch.equal(stream, expected)
    assert torch.equal(written.weighted, expected * norm)
    torch.testing.assert_close(written.squares.sum(), expected.float().square().sum())
    normed = F.rms_norm(stream.double(), (96,), norm.double(), EPS)
    following = random_matrix(SCHEMES[scheme], (32, 96), torch.bfloat16) if scheme == "int8" else None
    if following is not None:
        found = row.product(written, matrix_of(following)).double()
        exact = normed @ reference.dequantize(following).double().T
        magnitude = normed.abs() @ reference.dequantize(following).double().abs().T
        assert ((found - exact).abs() <= 2 * ROUNDING[torch.bfloat16] * magnitude).all()


def test_x_that_lies_askew_goes_another_way() -> None:
    weight = random_matrix(SCHEMES["int8"], (32, 128), torch.bfloat16)
    matrix = matrix_of(weight)
    whole = random_x(1, 136, torch.bfloat16)
    assert row.takes_x(whole[:, 8:], matrix)
    askew = whole[:, 3:131]
    assert askew.is_contiguous()
    assert not row.takes_x(askew, matrix)
    check(weight, askew, ops.linear(askew, ops.prepare(weight, "triton")))


def test_what_is_not_taken() -> None:
    device = torch.device(DEVICE)

    def taken(name: str, shape: tuple[int, int], lines: int = 1, dtype: torch.dtype = torch.bfloat16) -> bool:
        matrix = kernels.pack([random_matrix(SCHEMES[name], shape, torch.bfloat16)]).tiles
        return row.takes(matrix, lines, dtype, device)

    assert taken("int8", (32, 64))
    assert not taken("int8", (32, 64), lines=2)
    assert not taken("int8", (32, 64), dtype=torch.float32)
    assert not taken("int8", (48, 64))  # rows
    assert not taken("int8", (32, 60))  # columns
    assert not taken("int4-g32-asym", (32, 64))
    assert not taken("nf4-dq", (32, 64))
    assert not taken("nf4", (32, 96))  # blocks run across rows
