"""The extension quantizes and measures as torch does, for every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantkit.kernels import native as kernels
from quantkit.kernels.reference import dequantize
from quantkit.quantize import native, quantize
from quantkit.quantize.error import squares
from quantkit.quantize.integer import quantize_integer
from quantkit.quantize.nf4 import quantize_nf4
from quantkit.schemes import SCHEMES, QuantScheme, int_scheme, nf4_scheme
from quantkit.tensor import QuantizedTensor
from tests.quantize.matrices import mixed, randn

pytestmark = [
    pytest.mark.skipif(kernels.extension() is None, reason="the extension is not built"),
    pytest.mark.usefixtures("isa"),
]

ODD_GROUPS = [int_scheme(4, 0, True), int_scheme(4, 24, False), int_scheme(4, 7, True), nf4_scheme(4096)]
QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.quantized] + ODD_GROUPS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


MATRICES: dict[str, Callable[[], torch.Tensor]] = {
    "random": lambda: randn(96, 640) * 0.02,
    "ragged": lambda: randn(37, 301),
    "odd": lambda: randn(3, 7),
    "one-element": lambda: randn(1, 1),
    "all-zero": lambda: torch.zeros(9, 128),
    "positive": lambda: randn(8, 256).abs() + 1,
    "halves": lambda: torch.arange(-256, 256).view(4, 128) / 2,  # between codes
    "denormal": lambda: randn(8, 128) * 1e-40,
    "greatest": lambda: torch.full((4, 128), 3e38) * randn(4, 128).sign(),
    # down to scales that are subnormal in float16
    "quiet": lambda: randn(64, 256) * torch.logspace(-7, -2, 64)[:, None],
    "mixed": mixed,
}


def by_torch(weight: torch.Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    if scheme.method == "nf4":
        return quantize_nf4(weight, scheme)
    return quantize_integer(weight, scheme, scale_dtype)


def parts(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Return the bytes of all parts."""
    named = {
        name: getattr(tensor, name) for name in ("codes", "scales", "zeros", "nested_scales", "nested_offset")
    }
    return {name: part.reshape(-1).view(torch.uint8) for name, part in named.items() if part is not None}


def group_errors(weight: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Return each group's squared error (N, G) in units of its largest weight."""
    group = tensor.scheme.group or weight.shape[1]
    padding = (0, -weight.shape[1] % group)
    values = torch.nn.functional.pad(weight.double(), padding).view(weight.shape[0], -1, group)
    lost = torch.nn.functional.pad(weight.double() - dequantize(tensor).double(), padding).view_as(values)
    return (lost / values.abs().amax(-1, keepdim=True).clamp(min=1e-300)).square().sum(-1)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_the_same_codes_and_scales(scheme: QuantScheme, matrix: str) -> None:
    """Bit for bit; where int4 keeps another scale of those it tries, one that loses the same up to rounding."""
    for dtype in DTYPES:
        weight = MATRICES[matrix]().to(dtype).nan_to_num()  # float16: what is too large becomes its largest
        for scale_dtype in DTYPES:
            ours, theirs = quantize(weight, scheme, scale_dtype), by_torch(weight, scheme, scale_dtype)
            assert parts(ours).keys() == parts(theirs).keys()
            if scheme.bits == 4 and scheme.method == "int" and not torch.equal(ours.scales, theirs.scales):
                torch.testing.assert_close(
                    group_errors(weight, ours), group_errors(weight, theirs), rtol=1e-5, atol=0
                )
                continue
            for name, part in parts(ours).items():
                assert torch.equal(part, parts(theirs)[name]), name


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_neither_threads_nor_pieces_change_a_bit(scheme: QuantScheme) -> None:
    weight = randn(70, 1200).bfloat16()
    one = quantize(weight, scheme, torch.bfloat16)
    lost = native.squares(weight, one)
    torch.set_num_threads(3)
    three = quantize(weight, scheme, torch.bfloat16)
    assert all(torch.equal(part, parts(three)[name]) for name, part in parts(one).items())
    assert native.squares(weight, three) == lost


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_the_same_squares(scheme: QuantScheme, matrix: str) -> None:
    for dtype in DTYPES:
        weight = MATRICES[matrix]().to(dtype).nan_to_num()
        stored = by_torch(weight, scheme, torch.bfloat16)
        assert native.squares(weight, stored) == pytest.approx(
            squares(weight, stored), rel=1e-12, nan_ok=True
        )


def test_what_it_cannot_read_goes_to_torch() -> None:
    weight = randn(16, 64)
    assert native.handles(weight)
    for other in (weight.double(), weight.T, weight.to("meta")):
        assert not native.handles(other)
    assert torch.equal(
        quantize(weight.T, SCHEMES["nf4"], torch.float32).codes,
        quantize(weight.T.contiguous(), SCHEMES["nf4"], torch.float32).codes,
    )


def test_a_parameter_is_read_without_its_gradient() -> None:
    weight = torch.nn.Parameter(randn(16, 64))
    assert torch.equal(
        quantize(weight, SCHEMES["int8"], torch.float32).codes,
        quantize(weight.data, SCHEMES["int8"], torch.float32).codes,
    )


ARGUMENTS = {
    "values": torch.zeros(6, 40),
    "kind": "int4",
    "group": 16,
    "codes": torch.zeros(6, 20, dtype=torch.uint8),
    "scales": torch.zeros(6, 3),
    "zeros": None,
    "threads": 1,
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"values": torch.zeros(6, 40, dtype=torch.int8)}, "values has the wrong dtype"),
        ({"values": torch.zeros(40, 6).T}, "values is not contiguous"),
        ({"values": torch.zeros(240)}, "values must be a matrix"),
        ({"values": torch.zeros(0, 40)}, "values must be a matrix"),
        ({"kind": "int5"}, "kind is 'int5'"),
        ({"group": 0}, "group is 0"),
        ({"codes": torch.zeros(6, 20)}, "codes has the wrong dtype"),
        ({"codes": torch.zeros(6, 21, dtype=torch.uint8)}, "codes has 126 elements, not 120"),
        ({"scales": torch.zeros(6, 2)}, "scales has 12 elements, not 18"),
        ({"scales": torch.zeros(6, 3).double()}, "scales has the wrong dtype"),
        ({"kind": "nf4", "scales": torch.zeros(15).bfloat16()}, "scales has the wrong dtype"),
        ({"group": 1 << 40}, "group is 1099511627776"),
        ({"kind": "nf4", "group": 15, "scales": torch.zeros(16)}, "group is 15"),
        ({"zeros": torch.zeros(6, 3)}, "zeros has the wrong dtype"),
        ({"zeros": torch.zeros(6, 2, dtype=torch.uint8)}, "zeros has 12 elements"),
        (
            {"kind": "int8", "codes": torch.zeros(240, dtype=torch.uint8), "zeros": torch.zeros(18)},
            "zeros: only int4",
        ),
        ({"threads": 0}, "threads must be"),
    ],
)
def test_bad_arguments(changed: dict[str, object], words: str) -> None:
    module, good = kernels.require(), ARGUMENTS | {"factors": (1.0,)}
    module.quantize(**good)
    module.squares(**ARGUMENTS)
    with pytest.raises(ValueError, match=words):
        module.quantize(**good | changed)
    with pytest.raises(ValueError, match=words):
        module.squares(**ARGUMENTS | changed)


@pytest.mark.parametrize("factors", [(), (1.0, -1.0), (torch.inf,), (torch.nan,)])
def test_bad_factors(factors: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="factors must"):
        kernels.require().quantize(**ARGUMENTS, factors=factors)
