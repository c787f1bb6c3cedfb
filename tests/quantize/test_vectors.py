"""int8 and int4 vectors of a KV cache: never worse than absmax, and every edge of the number range."""

from __future__ import annotations

import math

import pytest
import torch

import quantkit.quantize.vectors as vectors
from quantkit.quantize.packing import unpack_low_first
from quantkit.quantize.vectors import dequantize_vectors, head_rotation, quantize_vectors

HEADS = [(8, 0), (64, 0), (64, 32), (80, 16), (96, 0), (128, 32)]
by_bits = pytest.mark.parametrize("bits", [8, 4])
by_head = pytest.mark.parametrize(("head_dim", "group"), HEADS)


def restored(
    values: torch.Tensor, bits: int, group: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    codes, scales = quantize_vectors(values, bits, group, torch.float16)
    return dequantize_vectors(codes, scales, bits, torch.empty(values.shape, dtype=dtype))


def absmax_restored(values: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The plain scheme: absmax / (2**(bits - 1) - 1), rounded to float16."""
    top = 2 ** (bits - 1) - 1
    groups = values.double().unflatten(-1, (-1, group or values.shape[-1]))
    scales = (groups.abs().amax(-1, keepdim=True) / top).half().double()
    return ((groups / scales).nan_to_num().round().clamp(-top, top) * scales).flatten(-2)


def squared_errors(values: torch.Tensor, other: torch.Tensor, group: int) -> torch.Tensor:
    return (
        (values.double() - other.double()).square().unflatten(-1, (-1, group or values.shape[-1])).sum(dim=-1)
    )


def samples(head_dim: int) -> torch.Tensor:
    """(5, 40, head_dim): normal, heavy-tailed, one channel that stands out, all of one sign, sparse."""
    torch.manual_seed(head_dim)
    normal = torch.randn(5, 40, head_dim)
    normal[1] *= normal[1].square()
    normal[2, :, 3] += 30
    normal[3].abs_()
    normal[4] *= torch.rand(40, head_dim) < 0.2
    normal[4, :, 0] += 1e-3
    return normal


@by_bits
@by_head
@pytest.mark.parametrize("magnitude", [1e-2, 1.0, 1e3])
def test_no_group_is_worse_than_absmax(bits: int, head_dim: int, group: int, magnitude: float) -> None:
    values = samples(head_dim) * magnitude
    ours = squared_errors(values, restored(values, bits, group), group)
    theirs = squared_errors(values, absmax_restored(values, bits, group), group)
    # the search is made in float32: it may mistake what differs by its rounding
    assert (ours <= theirs * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("bits", "head_dim", "gain_db"), [(8, 8, 2.0), (8, 128, 0.3), (4, 8, 1.4), (4, 128, 1.2)]
)
def test_the_search_gains_over_absmax(bits: int, head_dim: int, gain_db: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(4000, head_dim)
    ours = squared_errors(values, restored(values, bits), 0).sum().item()
    theirs = squared_errors(values, absmax_restored(values, bits, 0), 0).sum().item()
    assert 10 * math.log10(theirs / ours) >= gain_db


@by_bits
@by_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_strides(bits: int, head_dim: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 7, 3, head_dim).to(dtype).transpose(1, 2)  # as a projection gives them
    codes, scales = quantize_vectors(values, bits, group, torch.float16)
    assert (codes.dtype, codes.shape) == (torch.uint8, (2, 3, 7, head_dim * bits // 8))
    assert (scales.dtype, scales.shape) == (torch.float16, (2, 3, 7, head_dim // (group or head_dim)))
    same = quantize_vectors(values.contiguous(), bits, group, torch.float16)
    assert torch.equal(codes, same[0])
    assert torch.equal(scales, same[1])


@by_bits
@by_head
def test_meta_tensors_give_the_shapes(bits: int, head_dim: int, group: int) -> None:
    values = torch.empty(2, 3, 5, head_dim, dtype=torch.bfloat16, device="meta")
    codes, scales = quantize_vectors(values, bits, group, torch.float16)
    assert codes.shape == (2, 3, 5, head_dim * bits // 8)
    assert scales.shape == (2, 3, 5, head_dim // (group or head_dim))
    assert dequantize_vectors(codes, scales, bits, values) is values


@by_bits
def test_pieces_change_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = samples(64).view(1, 5, 40, 64)
    whole = quantize_vectors(values, bits, 32, torch.float16)
    monkeypatch.setattr(vectors, "piece_tokens", lambda elements: 7)
    pieces = quantize_vectors(values, bits, 32, torch.float16)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@by_bits
@pytest.mark.parametrize("shape", [(2, 3, 0, 64), (0, 3, 4, 64)])
def test_no_tokens(bits: int, shape: tuple[int, ...]) -> None:
    codes, scales = quantize_vectors(torch.empty(shape), bits, 0, torch.float16)
    assert codes.shape == (*shape[:-1], 64 * bits // 8)
    assert scales.shape == (*shape[:-1], 1)
    assert dequantize_vectors(codes, scales, bits, torch.empty(shape)).shape == shape


def test_int4_lies_low_nibble_first() -> None:
    values = torch.tensor([[-8.0, 7.0, 3.0, 0.0, 1.0, -2.0, -8.0, 5.0]])
    codes, scales = quantize_vectors(values, 4, 0, torch.float16)
    assert scales.item() == 1.0
    assert (unpack_low_first(codes, 8).int() - 8).tolist() == values.int().tolist()


@by_bits
@by_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_once_into_a_strided_view(
    bits: int, head_dim: int, group: int, dtype: torch.dtype
) -> None:
    values = samples(head_dim)
    codes, scales = quantize_vectors(values, bits, group, torch.float16)
    exact = dequantize_vectors(codes, scales, bits, torch.empty(values.shape))
    slab = torch.full((5, 50, head_dim), 77.0, dtype=dtype)
    dequantize_vectors(codes, scales, bits, slab[:, 4:44])
    assert torch.equal(slab[:, 4:44], exact.to(dtype))
    assert (slab[:, :4] == 77).all()
    assert (slab[:, 44:] == 77).all()


@by_bits
def test_zeros_stay_zeros(bits: int) -> None:
    assert not restored(torch.zeros(2, 3, 16, dtype=torch.bfloat16), bits, 8).any()


@by_bits
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_comes_back_as_nan_in_its_group_alone(
    bits: int, bad: float, dtype: torch.dtype
) -> None:
    values = samples(64)[0].to(dtype)
    expected = restored(values, bits, 16)
    values[5, 20] = bad
    expected[5, 16:32] = math.nan
    assert torch.equal(restored(values, bits, 16).nan_to_num(1e9), expected.nan_to_num(1e9))


@by_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_greatest_numbers_saturate(bits: int, dtype: torch.dtype) -> None:
    greatest = torch.finfo(dtype).max
    values = torch.tensor([[greatest, -greatest, 1e7, 0.0]], dtype=dtype)
    limit = 65504 * 2 ** (bits - 1)
    out = restored(values, bits, dtype=dtype).float()
    assert out.isfinite().all()
    assert (out.abs() <= limit * (1 + 2**-8)).all()
    assert (out[0, :2] * values[0, :2].sign() >= limit * (1 - 2.0 ** (1 - bits)) * (1 - 2**-8)).all()
    assert out[0, 3] == 0


@by_bits
@pytest.mark.parametrize("magnitude", [1e-4, 1e-6, 1e-8, 1e-30, 1e-42])
def test_tiny_vectors_lose_at_most_a_subnormal_scale(bits: int, magnitude: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(50, 16) * magnitude
    absmax = values.abs().amax(dim=-1, keepdim=True)
    # a step, at most absmax / 6 wide with int4, and cut off above 9.5 of them; half of float16's least scale
    step = {8: 1 / 121, 4: 1 / 4}[bits] * absmax
    assert ((restored(values, bits) - values).abs() <= step + 2.0**-24 * 2 ** (bits - 1)).all()


@pytest.mark.parametrize("head_dim", [8, 15, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_keeps_every_product(head_dim: int, dtype: torch.dtype) -> None:
    queries, keys = head_rotation(head_dim, dtype, "cpu")
    assert torch.equal(queries.double() @ keys.double().T, torch.eye(head_dim).double())


@by_bits
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_the_rotation_tames_a_channel_that_stands_out(bits: int, head_dim: int) -> None:
    torch.manual_seed(0)
    keys = torch.randn(500, head_dim)
    keys[:, 3] += 30
    rotation, back = head_rotation(head_dim, torch.float32, "cpu")[::-1]
    turned = restored(keys @ rotation, bits) @ back.T
    plain = squared_errors(keys, restored(keys, bits), 0).sum()
    assert squared_errors(keys, turned, 0).sum() < plain / 3
