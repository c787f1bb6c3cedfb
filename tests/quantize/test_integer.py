"""int8 and int4: codes packed as compressed-tensors packs them, scales never worse than absmax."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from quantkit.formats.compressed_tensors import to_parts
from quantkit.kernels.reference import dequantize
from quantkit.quantize import quantize
from quantkit.quantize.packing import unpack_low_first, unpack_zeros
from quantkit.schemes import SCHEMES, QuantScheme
from quantkit.tensor import QuantizedTensor
from tests.quantize.matrices import randn

helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")

NAMES = [name for name, scheme in SCHEMES.items() if scheme.method == "int"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


MATRICES: dict[str, Callable[[], torch.Tensor]] = {
    "random": lambda: randn(40, 256),
    "one-row": lambda: randn(1, 128),
    "odd-rows": lambda: randn(13, 384),
    "all-zero": lambda: torch.zeros(9, 128),
    "constant": lambda: torch.full((8, 128), 0.3),
    "negative-constant": lambda: torch.full((8, 128), -0.3),
    "denormal": lambda: randn(8, 128) * 1e-40,
    "outlier": lambda: randn(8, 256) + 100 * (torch.arange(256) == 77),
    "quiet": lambda: randn(64, 256) * torch.logspace(-7, -2, 64)[:, None],
    "mixed": lambda: randn(24, 256) * torch.logspace(-30, 4, 24)[:, None],
}
RAGGED: dict[str, Callable[[], torch.Tensor]] = {
    "short-last-group": lambda: randn(5, 172),
    "shorter-than-a-group": lambda: randn(3, 20),
    "odd-columns": lambda: randn(4, 33),
}


def plain_codes(tensor: QuantizedTensor) -> torch.Tensor:
    """Return the uint8 codes (N, K), one a byte."""
    return unpack_low_first(tensor.codes, tensor.shape[1]) if tensor.scheme.bits == 4 else tensor.codes


def grouped_error(weight: torch.Tensor, restored: torch.Tensor, group: int) -> torch.Tensor:
    """Return the squared error of each group (N, G); a short last group is padded with zeros."""
    difference = torch.nn.functional.pad(weight.double() - restored.double(), (0, -weight.shape[1] % group))
    return difference.view(weight.shape[0], -1, group).square().sum(-1)


def absmax_restored(weight: torch.Tensor, scheme: QuantScheme, dtype: torch.dtype) -> torch.Tensor:
    """Return what plain absmax makes of a matrix: the range spread over all codes, no search."""
    group = scheme.group or weight.shape[1]
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).view(weight.shape[0], -1, group)
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    if scheme.symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / (127 if scheme.bits == 8 else 7.5)
        low, high, zero = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1, torch.zeros(1)
    else:
        least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale, low, high = (most - least) / 15, 0, 15
        zero = (-least / scale.clamp(min=smallest).to(dtype).float()).round().clamp(0, 15)
    scale = scale.clamp(min=smallest).to(dtype).float()
    codes = ((groups / scale).round() + zero).clamp(low, high)
    return ((codes - zero) * scale).view(weight.shape[0], -1)[:, : weight.shape[1]]


@pytest.mark.parametrize("matrix", [*MATRICES, *RAGGED])
@pytest.mark.parametrize("name", NAMES)
def test_words_are_what_the_package_packs_from_the_same_codes(name: str, matrix: str) -> None:
    weight = (MATRICES | RAGGED)[matrix]()
    scheme = SCHEMES[name]
    tensor = quantize(weight, scheme, torch.float32)
    parts = to_parts("w", tensor)
    centred = (plain_codes(tensor).int() - 2 ** (scheme.bits - 1)).to(torch.int8)
    assert torch.equal(parts["w_packed"], helpers.pack_to_int32(centred, scheme.bits))
    assert parts["w_shape"].tolist() == list(weight.shape)
    assert ("w_zero_point" in parts) == (not scheme.symmetric)
    if tensor.zeros is not None:
        zeros = (unpack_zeros(tensor.zeros, weight.shape[0]).int() - 8).to(torch.int8)
        assert torch.equal(parts["w_zero_point"], helpers.pack_to_int32(zeros, scheme.bits, packed_dim=0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", NAMES)
def test_the_package_decompresses_to_the_same_values(name: str, matrix: str, dtype: str) -> None:
    """Equal bit for bit: both multiply the centred code by the stored scale in the scale's dtype."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = MATRICES[matrix]().to(DTYPES[dtype])
    scheme = SCHEMES[name]
    tensor = quantize(weight, scheme, DTYPES[dtype])
    arguments = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group else "channel",
        group_size=scheme.group or None,
    )
    state = {key.replace("w_", "weight_"): part for key, part in to_parts("w", tensor).items()}
    theirs = PackedQuantizationCompressor.decompress(
        state, QuantizationScheme(targets=["Linear"], weights=arguments)
    )
    assert torch.equal(dequantize(tensor, DTYPES[dtype]), theirs["weight"])


@pytest.mark.parametrize(("matrix", "dtype"), itertools.product([*MATRICES, *RAGGED, "huge"], DTYPES))
@pytest.mark.parametrize("name", NAMES)
def test_no_group_is_worse_than_plain_absmax(name: str, matrix: str, dtype: str) -> None:
    huge = 1e4 if dtype == "fp16" else 1e25
    weight = randn(8, 128) * huge if matrix == "huge" else (MATRICES | RAGGED)[matrix]()
    weight = weight.to(DTYPES[dtype]).float()
    scheme = SCHEMES[name]
    group = scheme.group or weight.shape[1]
    ours = grouped_error(weight, dequantize(quantize(weight, scheme, DTYPES[dtype])), group)
    plain = grouped_error(weight, absmax_restored(weight, scheme, DTYPES[dtype]), group)
    # Candidates are compared by sums in float32, these in float64: 1e-5 covers 128 roundings of 2**-24.
    assert (ours <= plain * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    tensor = quantize(torch.zeros(9, 128), SCHEMES[name], torch.float16)
    assert torch.isfinite(tensor.scales).all()
    assert not dequantize(tensor).any()


def test_the_search_gains_on_normal_weights() -> None:
    weight, scheme = randn(256, 512), SCHEMES["int4-g128"]
    ours = grouped_error(weight, dequantize(quantize(weight, scheme, torch.float32)), 128).sum()
    plain = grouped_error(weight, absmax_restored(weight, scheme, torch.float32), 128).sum()
    assert ours < 0.95 * plain
