"""Quantization by the compiled extension: what torch computes in `integer.py`, `nf4.py` and `error.py`, in one pass.

int8 and NF4, double-quantized or not, give the same bits as torch. The search of int4 multiplies by
reciprocals and adds squares in another order: where two scales lose the same up to rounding, it may keep the other one.
"""

from __future__ import annotations

from typing import Any

import torch

from calculators.units import ceil_div
from quantkit.kernels import native as kernels
from quantkit.quantize.integer import INT4_SHRINK
from quantkit.quantize.nf4 import dequantize_scales, with_absmax
from quantkit.quantize.packing import pack_zeros, unpack_zeros
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor, empty_quantized

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def handles(weight: torch.Tensor) -> bool:
    """Whether the extension is there and reads this matrix as it lies."""
    ready = weight.device.type == "cpu" and weight.dtype in _DTYPES and weight.is_contiguous()
    return ready and not weight.is_neg() and kernels.extension() is not None


def squares(weight: torch.Tensor, stored: QuantizedTensor) -> tuple[float, float]:
    """Return sum w**2 and sum (w - restored)**2 of a matrix that `handles` accepts, in float64."""
    scales = dequantize_scales(stored) if stored.scheme.method == "nf4" else stored.scales
    zeros = None if stored.zeros is None else unpack_zeros(stored.zeros, weight.shape[0])
    found: tuple[float, float] = _call("squares", weight, stored.scheme, stored.codes, scales, zeros)
    return found


def quantize(weight: torch.Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantize a (N, K) matrix that `handles` accepts; see `quantkit.quantize.quantize`."""
    rows, cols = weight.shape
    if scheme.method == "nf4":
        codes = torch.empty(ceil_div(rows * cols, 2), dtype=torch.uint8)
        absmax = torch.empty(ceil_div(rows * cols, scheme.group), dtype=torch.float32)
        _call("quantize", weight, scheme, codes, absmax, None, ())
        return with_absmax(scheme, (rows, cols), codes, absmax)
    empty = empty_quantized((rows, cols), scheme, scale_dtype, "cpu")
    zeros = None if scheme.symmetric else torch.empty(empty.scales.shape, dtype=torch.uint8)
    _call("quantize", weight, scheme, empty.codes, empty.scales, zeros, INT4_SHRINK)
    packed_zeros = None if zeros is None else pack_zeros(zeros)
    return QuantizedTensor(scheme, (rows, cols), empty.codes, empty.scales, zeros=packed_zeros)


def _call(
    name: str,
    weight: torch.Tensor,
    scheme: QuantScheme,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *more: Any,
) -> Any:
    kind = scheme.method if scheme.method == "nf4" else f"int{scheme.bits}"
    group = scheme.group or weight.shape[1]
    function = getattr(kernels.require(), name)
    return function(weight.detach(), kind, group, codes, scales, zeros, *more, torch.get_num_threads())
