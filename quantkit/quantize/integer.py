"""int8 and group-wise int4, symmetric and asymmetric: affine codes as compressed-tensors stores them.

W = scale * (code - zero). Symmetric codes are centred on 2**(bits - 1); asymmetric groups store
their zero point. Codes are found with the scale as it is stored, rounded to the checkpoint's dtype.
"""

from __future__ import annotations

import torch

from calculators.units import bits_to_bytes, ceil_div
from quantkit.quantize.packing import pack_low_first, pack_zeros
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

# Factors on the absmax scale that int4 tries for each group. 1 comes first, and a later one must
# lose strictly less to replace it, so a group is never worse than plain absmax.
INT4_SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 1.03, 1.07)
_CHUNK_ELEMENTS = 1 << 20


def quantize_integer(weight: torch.Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantize a (N, K) matrix of any float dtype; the last group of a row may be short.

    Args:
        weight: the matrix.
        scheme: an `int` scheme.
        scale_dtype: dtype in which scales are stored.
    """
    rows, cols = weight.shape
    n_groups = ceil_div(cols, scheme.group or cols)
    codes = torch.empty(rows, bits_to_bytes(cols * scheme.bits), dtype=torch.uint8)
    scales = torch.empty(rows, n_groups, dtype=scale_dtype)
    zeros = torch.empty(rows, n_groups, dtype=torch.uint8)
    step = max(1, _CHUNK_ELEMENTS // cols)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        codes[piece], scales[piece], zeros[piece] = _quantize_rows(weight[piece].float(), scheme, scale_dtype)
    packed_zeros = None if scheme.symmetric else pack_zeros(zeros)
    return QuantizedTensor(scheme, (rows, cols), codes, scales, zeros=packed_zeros)


def _quantize_rows(
    rows: torch.Tensor, scheme: QuantScheme, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed codes, scales (n, G) and unpacked uint8 zero points (n, G) of float32 rows (n, K)."""
    n, cols = rows.shape
    group = scheme.group or cols
    padded = torch.nn.functional.pad(rows, (0, -cols % group))
    groups = padded.view(n, -1, group)  # (n, G, g); padding zeros change neither extremes nor error
    if scheme.symmetric:
        codes, scales, zeros = _best_symmetric(groups, scheme.bits, scale_dtype)
    else:
        codes, scales, zeros = _best_asymmetric(groups, scheme.bits, scale_dtype)
    flat = codes.reshape(n, -1)[:, :cols]
    return (pack_low_first(flat) if scheme.bits == 4 else flat.contiguous()), scales, zeros


def _best_symmetric(
    groups: torch.Tensor, bits: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8: absmax / 127, codes -127..127, and -128 where that scale is stored coarsely.

    int4: absmax / 7.5 or what loses less, codes -8..7.
    """
    centre = 2 ** (bits - 1)
    zeros = torch.full(groups.shape[:2], centre, dtype=torch.uint8)
    absmax = groups.abs().amax(dim=-1, keepdim=True)
    if bits == 8:
        scale = _storable(absmax / 127, scale_dtype)
        codes = (groups / scale).round_().clamp_(-128, 127).add_(centre).to(torch.uint8)
        return codes, scale.squeeze(-1).to(scale_dtype), zeros
    return *_search(groups, absmax / (centre - 0.5), zeros, bits, scale_dtype), zeros


def _best_asymmetric(
    groups: torch.Tensor, bits: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spread 2**bits codes from the least to the greatest value, zero always among them."""
    top = 2**bits - 1
    low = groups.amin(dim=-1, keepdim=True).clamp_(max=0)
    high = groups.amax(dim=-1, keepdim=True).clamp_(min=0)
    scale = _storable((high - low) / top, scale_dtype)
    zeros = (-low / scale).round_().clamp_(0, top).squeeze(-1).to(torch.uint8)
    return *_search(groups, scale, zeros, bits, scale_dtype), zeros


def _search(
    groups: torch.Tensor, base: torch.Tensor, zeros: torch.Tensor, bits: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (n, G, g) and scales (n, G): for each group the factor on `base` that loses least."""
    zero = zeros.unsqueeze(-1).float()
    lowest, highest = -zero, 2**bits - 1 - zero
    best_error = torch.full_like(base, torch.inf)
    best_scale = unit = _storable(base, scale_dtype)
    for factor in INT4_SHRINK:
        scale = _storable(base * factor, scale_dtype)
        exact = groups / scale
        # In units of the absmax scale, so that squares of tiny or huge weights stay within float32.
        distance = torch.clamp(exact.round(), lowest, highest).sub_(exact)
        error = distance.square_().sum(dim=-1, keepdim=True) * (scale / unit).square()
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    codes = torch.clamp((groups / best_scale).round_(), lowest, highest).add_(zero).to(torch.uint8)
    return codes, best_scale.squeeze(-1).to(scale_dtype)


def _storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 scales to what `dtype` stores."""
    return scale.clamp(smallest_scale(dtype), torch.finfo(dtype).max).to(dtype).float()


def smallest_scale(dtype: torch.dtype) -> float:
    """Return the smallest scale that is stored in a dtype: its smallest number that is normal in float32.

    Those of float16 go down to its subnormals: quiet weights keep their resolution, and so do quiet vectors of a
    cache, as attention sinks have.
    """
    limits = torch.finfo(dtype)
    return max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
