"""NF4 and its double quantization: every bit as bitsandbytes has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantkit.kernels.reference import dequantize
from quantkit.quantize import quantize
from quantkit.quantize.nf4 import NF4_CODEBOOK, dynamic_map
from quantkit.schemes import SCHEMES
from tests.quantize.matrices import mixed, randn

functional = pytest.importorskip("bitsandbytes.functional")


def halfway() -> torch.Tensor:
    """Return values that lie on the midpoints between codes, and one step to either side."""
    codebook = torch.tensor(NF4_CODEBOOK)
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    infinity = torch.tensor(torch.inf)
    values = torch.cat((midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity)))
    return torch.cat((values, torch.ones(64 - len(values)))).repeat(4, 1) * torch.tensor(
        [[1.0], [0.5], [3.0], [0.7]]
    )


MATRICES: dict[str, Callable[[], torch.Tensor]] = {
    "random": lambda: randn(256, 320),
    "many-blocks": lambda: randn(257, 640, seed=1) * 0.02,
    "constant": lambda: torch.full((32, 64), 0.3),
    "negative-constant": lambda: torch.full((17, 64), -0.3),
    "all-zero": lambda: torch.zeros(48, 64),
    "tiny": lambda: randn(32, 128) * 1e-30,
    "denormal": lambda: randn(32, 128) * 1e-40,
    "denormal-and-normal": lambda: torch.cat((randn(4, 64) * 1e-41, randn(4, 64))),
    "huge": lambda: randn(16, 64) * 1e3,
    "ragged": lambda: randn(7, 33),
    "odd": lambda: randn(3, 7),
    "one-element": lambda: randn(1, 1),
    "one-row": lambda: randn(1, 4096),
    "short-zero-tail": lambda: torch.cat((randn(64), torch.zeros(9)))[None],
    "mixed": mixed,
    "halfway": halfway,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_codes_and_absmax_are_bit_identical(matrix: str, dtype: str) -> None:
    weight = MATRICES[matrix]().to(DTYPES[dtype])
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    ours = quantize(weight, SCHEMES["nf4"], DTYPES[dtype])
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.scales.view(torch.int32), state.absmax.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_nested_statistics_are_bit_identical(matrix: str, dtype: str) -> None:
    weight = MATRICES[matrix]().to(DTYPES[dtype])
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize(weight, SCHEMES["nf4-dq"], DTYPES[dtype])
    assert ours.nested_scales is not None
    assert ours.nested_offset is not None
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.nested_scales.view(torch.int32), state.state2.absmax.view(torch.int32))
    assert torch.equal(ours.nested_offset.view(torch.int32), state.offset.view(torch.int32))


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("matrix", ["random", "ragged", "mixed", "all-zero"])
def test_dequantized_values_are_equal(matrix: str, scheme: str) -> None:
    weight = MATRICES[matrix]().reshape(1, -1)  # one row: on CPU the package misplaces blocks that cross rows
    nested = SCHEMES[scheme].nested
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    restored = functional.dequantize_4bit(codes, state)
    assert torch.equal(dequantize(quantize(weight, SCHEMES[scheme], torch.float32)), restored)


def test_tables_are_the_packages() -> None:
    assert torch.equal(torch.tensor(NF4_CODEBOOK), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), functional.create_dynamic_map(signed=True))
