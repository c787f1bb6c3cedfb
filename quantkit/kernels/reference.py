"""The oracle: dequantize a matrix, then multiply. Plain torch on any device."""

from __future__ import annotations

from functools import lru_cache

import torch

from quantkit.quantize.nf4 import NF4_CODEBOOK, dequantize_scales
from quantkit.quantize.packing import unpack_low_first, unpack_zeros
from quantkit.tensor import QuantizedTensor


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the (N, K) matrix in `dtype`, computed in float32 and rounded once."""
    if tensor.scheme.method == "nf4":
        return _dequantize_nf4(tensor, dtype)
    return _dequantize_integer(tensor, dtype)


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for x (..., K), in x's dtype."""
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def _dequantize_integer(tensor: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    rows, cols = tensor.shape
    bits = tensor.scheme.bits
    codes = unpack_low_first(tensor.codes, cols) if bits == 4 else tensor.codes
    group = tensor.scheme.group or cols
    scales = tensor.scales.float()  # (N, G)
    if tensor.zeros is None:
        offsets = torch.full((1, 1), 2.0 ** (bits - 1), device=tensor.device)
    else:
        offsets = unpack_zeros(tensor.zeros, rows).float()
    short = -cols % group
    values = torch.nn.functional.pad(codes, (0, short)).float().view(rows, -1, group)
    values.sub_(offsets.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
    return values.view(rows, -1)[:, :cols].to(dtype)


def _dequantize_nf4(tensor: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    rows, cols = tensor.shape
    pairs = _nf4_pairs(tensor.device)[tensor.codes.int()].flatten()[: rows * cols]
    absmax = dequantize_scales(tensor)
    block = tensor.scheme.group
    whole = pairs.numel() // block
    pairs[: whole * block].view(whole, block).mul_(absmax[:whole, None])
    if whole < absmax.numel():
        pairs[whole * block :].mul_(absmax[whole])
    return pairs.view(rows, cols).to(dtype)


@lru_cache
def _nf4_pairs(device: torch.device) -> torch.Tensor:
    """Return the two values of each of the 256 bytes: float32 (256, 2), the high nibble first."""
    codebook = torch.tensor(NF4_CODEBOOK, device=device)
    return torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1)
