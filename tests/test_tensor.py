"""An empty quantized matrix has the parts of one that was quantized."""

from __future__ import annotations

import pytest
import torch

from calculators.weights import matrix_bytes
from quantkit.quantize import quantize
from quantkit.schemes import SCHEMES, QuantScheme
from quantkit.tensor import empty_quantized


@pytest.mark.parametrize("shape", [(64, 256), (9, 130), (1, 1), (3, 43), (300, 64)])
@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES.values() if scheme.quantized], ids=lambda scheme: scheme.name
)
def test_parts_are_those_of_a_quantized_matrix(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    made = quantize(torch.randn(shape), scheme, torch.bfloat16)
    empty = empty_quantized(shape, scheme, torch.bfloat16, "meta")
    assert list(empty.parts()) == list(made.parts())
    for name, part in made.parts().items():
        assert (empty.parts()[name].shape, empty.parts()[name].dtype) == (part.shape, part.dtype)
    sizes = matrix_bytes(*shape, scheme.packing("bf16")).parts
    assert sizes == tuple(part.nbytes for part in made.parts().values())
