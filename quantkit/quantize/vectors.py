"""int8 and int4 vectors of a KV cache: symmetric codes, and a scale for each vector or group of its elements.

value = scale * (code - 2**(bits - 1)). The scale carries a sign, so that the element furthest from zero
lies on the negative side, which has one code more. Several scales around the one that just spans the
group are tried, rounded to the dtype they are stored in, and the one of least squared error is kept.

int4 lies as in `packing.py`, the even element in the low nibble.
"""

from __future__ import annotations

import torch

from calculators.caching import KV_SCALES_TRIED, piece_tokens
from quantkit.quantize.integer import smallest_scale

# The furthest element is KV_SCALES_TRIED different numbers of steps from zero. With int8 each brings the others
# elsewhere between two codes, which pays most for short vectors; the few largest would cut off more than
# rounding loses. With int4, cutting off (more than 8 steps) and wider steps pay in turn.
MOST_STEPS = {8: 128.0, 4: 9.5}
STEPS_APART = {8: 1.0, 4: 0.5}


def quantize_vectors(
    values: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8 (..., T, head_dim * bits / 8), and scales (..., T, head_dim / group).

    The squared error of a group never exceeds that of absmax / (2**(bits - 1) - 1) stored in `scale_dtype`.
    Magnitudes beyond 2**(bits - 1) times the greatest finite scale saturate (float16 scales: 8.4e6 with
    int8, 5.2e5 with int4). A group with a NaN or an infinity comes back as NaN throughout.

    Args:
        values: (..., T, head_dim) of any float dtype and strides.
        bits: 8 or 4.
        group: elements that share a scale; 0 is the whole head.
        scale_dtype: dtype in which scales are stored.
    """
    groups = values.unflatten(-1, (-1, group or values.shape[-1]))  # (..., T, G, g)
    scales = _best_scales(groups, bits, scale_dtype)  # (..., T, G, 1)
    codes = values.new_empty((*values.shape[:-1], values.shape[-1] * bits // 8), dtype=torch.uint8)
    for at in _pieces(groups, 1):
        _write_codes(codes[..., at, :], groups[..., at, :, :], scales[..., at, :, :], bits)
    return codes, scales[..., 0].to(scale_dtype)


def dequantize_vectors(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, out: torch.Tensor
) -> torch.Tensor:
    """Write the values of codes and scales into `out` (..., head_dim), of any float dtype, and return it."""
    if bits == 4:
        out[..., ::2] = codes & 0xF
        out[..., 1::2] = codes >> 4
    else:
        out.copy_(codes)
    groups = out.unflatten(-1, (scales.shape[-1], -1))
    groups.sub_(2 ** (bits - 1)).mul_(scales[..., None])
    return out


def _best_scales(groups: torch.Tensor, bits: int, scale_dtype: torch.dtype) -> torch.Tensor:
    """Return, in float32 (..., T, G, 1), the storable scale that loses least of each of groups (..., T, G, g)."""
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    away = (low + high).neg_()  # signed against the furthest element
    peak = torch.maximum(high, low.neg_())
    numbers = torch.arange(KV_SCALES_TRIED, dtype=torch.float32, device=groups.device)
    steps = numbers.mul_(-STEPS_APART[bits]).add_(MOST_STEPS[bits])
    scales = peak / steps.view(-1, *(1,) * groups.ndim)
    scales.clamp_(smallest_scale(scale_dtype), torch.finfo(scale_dtype).max)
    scales = scales.to(scale_dtype).float().copysign_(away)  # (KV_SCALES_TRIED, ..., T, G, 1)
    best = _errors(groups, scales, bits).argmin(dim=0, keepdim=True)
    return scales.gather(0, best)[0].add_(peak.mul_(0))  # adds 0, or NaN where the group is not finite


def _errors(groups: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the root of the squared error of each group under each of scales (KV_SCALES_TRIED, ..., T, G, 1)."""
    inverse, errors = scales.reciprocal(), torch.empty_like(scales)
    pieces = _pieces(groups, 2 * KV_SCALES_TRIED)
    *others, _, n_groups, group = groups.shape
    longest = pieces[0].stop if pieces else 0
    exact, lost = torch.empty(
        2, KV_SCALES_TRIED, *others, longest, n_groups, group, device=groups.device, dtype=torch.float32
    )
    for at in pieces:
        length = at.stop - at.start
        x, loss = exact[..., :length, :, :], lost[..., :length, :, :]
        torch.mul(groups[..., at, :, :], inverse[..., at, :, :], out=x)
        torch.round(x, out=loss).clamp_(*_range(bits)).sub_(x)
        torch.linalg.vector_norm(loss, dim=-1, keepdim=True, out=errors[..., at, :, :])
    return errors.mul_(scales).abs_()


def _write_codes(out: torch.Tensor, groups: torch.Tensor, scales: torch.Tensor, bits: int) -> None:
    """Write the codes of groups (..., G, g) into uint8 (..., G * g * bits / 8)."""
    lowest, highest = _range(bits)
    codes = (groups * scales.reciprocal()).round_().clamp_(lowest, highest).sub_(lowest).flatten(-2)
    if bits == 4:  # two nibbles make a byte as exactly in float32
        codes = codes[..., ::2].add_(codes[..., 1::2], alpha=16)
    out.copy_(codes)


def _range(bits: int) -> tuple[int, int]:
    """Return the least and the greatest code, about zero."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _pieces(groups: torch.Tensor, copies: int) -> list[slice]:
    """Cut T of groups (..., T, G, g) so that `copies` in float32 of a piece stay within the memory allowed."""
    tokens = groups.shape[-3]
    elements = copies * (groups.numel() // max(1, tokens))
    step = piece_tokens(max(1, elements))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def head_rotation(
    head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Q and K, each (head_dim, head_dim), such that (q @ Q) . (k @ K) = q . k for every q and k.

    Both are Hadamard matrices, as QuaRot rotates keys with (https://arxiv.org/abs/2404.00456): an element
    that stands out in every key is spread over all, and what a scale for the whole head loses shrinks. A
    head that is no power of two is rotated in blocks of its greatest power of two. Entries are 0 or
    powers of two, hence exact: where the order's root is irrational, Q is twice K.
    """
    order = head_dim & -head_dim
    block = torch.ones(1, 1)
    while block.shape[0] < order:
        block = torch.cat((torch.cat((block, block), dim=1), torch.cat((block, -block), dim=1)))
    rotation = torch.block_diag(*[block] * (head_dim // order))
    queries, keys = (rotation * factor for factor in rotation_factors(order))
    return queries.to(device, dtype), keys.to(device, dtype)


def rotation_factors(order: int) -> tuple[float, float]:
    """Return what the Hadamard matrix of that order is multiplied by for queries, and for keys."""
    doublings = order.bit_length() - 1
    return 0.5 ** (doublings // 2), 0.5 ** (doublings - doublings // 2)
