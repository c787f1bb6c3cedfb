"""Bit layouts: what goes in comes out, and golden bytes stay what they are."""

from __future__ import annotations

import json

import pytest
import torch

from quantkit.kernels.reference import dequantize
from quantkit.quantize import packing, quantize
from quantkit.schemes import SCHEMES
from tests.paths import ROOT

GOLDEN = json.loads((ROOT / "tests" / "goldens" / "packing.json").read_text())
QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.quantized]


def codes(shape: tuple[int, ...], seed: int = 0, below: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, below, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 7), (5, 8), (2, 33), (8, 128)], ids=str)
def test_low_nibble_first_round_trips(shape: tuple[int, int]) -> None:
    original = codes(shape)
    packed = packing.pack_low_first(original)
    assert packed.shape == (shape[0], (shape[1] + 1) // 2)
    assert torch.equal(packing.unpack_low_first(packed, shape[1]), original)


@pytest.mark.parametrize("row_bytes", [1, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_words_round_trip_and_pad_with_zeros(rows: int, row_bytes: int) -> None:
    original = codes((rows, row_bytes), below=256)
    words = packing.to_words(original)
    assert words.shape == (rows, -(-row_bytes // 4))
    assert torch.equal(packing.from_words(words, row_bytes), original)
    assert not words.view(torch.uint8)[:, row_bytes:].any()


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (8, 2), (9, 1), (64, 5)], ids=str)
def test_zero_points_round_trip(shape: tuple[int, int]) -> None:
    original = codes(shape)
    words = packing.pack_zeros(original)
    assert words.shape == (-(-shape[0] // 8), shape[1])
    assert torch.equal(packing.unpack_zeros(words, shape[0]), original)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65])
def test_high_nibble_first_pads_with_the_code_of_zero(count: int) -> None:
    original = codes((count,))
    packed = packing.pack_high_first(original)
    nibbles = torch.stack((packed >> 4, packed & 0xF), dim=1).flatten()
    assert torch.equal(nibbles[:count], original)
    assert (nibbles[count:] == packing.NF4_ZERO_CODE).all()


def golden_matrix() -> torch.Tensor:
    """Return 3 rows of 40 exact binary fractions, so that no platform rounds differently."""
    steps = (torch.arange(120) * 37 % 101 - 50).float()
    return (steps / 64).view(3, 40)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_bytes_are_those_of_the_golden(scheme: str) -> None:
    tensor = quantize(golden_matrix(), SCHEMES[scheme], torch.float32)
    found = {
        name: part.reshape(-1).view(torch.uint8).numpy().tobytes().hex()
        for name, part in tensor.parts().items()
    }
    assert found == GOLDEN[scheme]


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (3, 64), (5, 130), (9, 172)], ids=str)
def test_every_scheme_restores_every_shape_within_its_bits(scheme: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    restored = dequantize(quantize(weight, SCHEMES[scheme], torch.float32))
    assert restored.shape == shape
    # Half the widest step of NF4 is 0.152 of the absmax. int4 may clip an extreme where that loses less
    # in sum: with its smallest factor the top code stands for 0.73 * 7 / 7.5 = 0.68 of it.
    bound = {"int8": 0.004}.get(scheme, 0.32) * weight.abs().max()
    assert (restored - weight).abs().max() <= bound
