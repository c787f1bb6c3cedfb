"""The oracle: dequantize a matrix, then multiply. Plain torch on any device.

A matrix is dequantized in pieces, so that beside the result little else is ever alive.
`calculators/linear.py` lists these tensors in this order: change them together.
"""

from __future__ import annotations

import torch

from calculators.linear import PIECE_ELEMENTS, piece_rows
from quantkit.quantize.nf4 import NF4_CODEBOOK, dequantize_scales, dynamic_map_on
from quantkit.quantize.packing import unpack_zeros
from quantkit.quantize.tables import Table
from quantkit.tensor import QuantizedTensor


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the (N, K) matrix in `dtype`, computed in float32 and rounded once."""
    matrix = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if tensor.scheme.method == "nf4":
        _fill_nf4(matrix.view(-1), tensor)
    else:
        _fill_integer(matrix, tensor)
    return matrix


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for x (..., K), in x's dtype."""
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def _fill_integer(matrix: torch.Tensor, tensor: QuantizedTensor) -> None:
    """Write an integer matrix, some rows at a time; the last group of a row may be short."""
    rows, cols = tensor.shape
    scales = tensor.scales.float()  # (N, G)
    zeros = None if tensor.zeros is None else unpack_zeros(tensor.zeros, rows).float()
    group = tensor.scheme.group or cols
    whole = cols // group
    step = piece_rows(cols)
    for start in range(0, rows, step):
        at = slice(start, min(start + step, rows))
        values = _codes(tensor.codes[at], cols, tensor.scheme.bits)  # (n, K)
        for columns, groups in (
            (slice(0, whole * group), slice(0, whole)),
            (slice(whole * group, cols), slice(whole, None)),
        ):
            if columns.start < columns.stop:
                span = values[:, columns].unflatten(1, (-1, min(group, columns.stop - columns.start)))
                span.sub_(2 ** (tensor.scheme.bits - 1) if zeros is None else zeros[at, groups, None])
                span.mul_(scales[at, groups, None])
                del span
        matrix[at] = values
        del values


def _codes(packed: torch.Tensor, cols: int, bits: int) -> torch.Tensor:
    """Return the codes (n, K) as float32."""
    if bits == 8:
        return packed.float()
    values = torch.empty(packed.shape[0], cols, device=packed.device)
    values[:, ::2] = packed & 0xF
    values[:, 1::2] = packed[:, : cols // 2] >> 4
    return values


def _fill_nf4(flat: torch.Tensor, tensor: QuantizedTensor) -> None:
    """Write a flattened NF4 matrix, some blocks at a time; a piece begins with a nested block."""
    block = tensor.scheme.group
    for start in range(0, flat.numel(), PIECE_ELEMENTS):
        stop = min(start + PIECE_ELEMENTS, flat.numel())
        absmax = dequantize_scales(tensor, start // block, -(-stop // block))
        pairs = torch.nn.functional.embedding(
            tensor.codes[start // 2 : -(-stop // 2)].int(), _pairs(flat.device)
        )
        values = pairs.view(-1)[: stop - start]
        whole = values.numel() // block
        values[: whole * block].view(whole, block).mul_(absmax[:whole, None])
        if whole < absmax.numel():
            values[whole * block :].mul_(absmax[whole])
        flat[start:stop] = values
        del absmax, pairs, values


@Table
def _pairs(device: torch.device) -> torch.Tensor:
    """Return the two values of each of the 256 bytes: float32 (256, 2), the high nibble first."""
    codebook = torch.tensor(NF4_CODEBOOK)
    return torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1).to(device)


def forget_tables(device: torch.device) -> None:
    """Drop the code tables kept on a device, so that the next use makes them again: none may be in use."""
    _pairs.forget(device)
    dynamic_map_on.forget(device)
