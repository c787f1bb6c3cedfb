"""Weights to codes and scales: `quantize` here, whole checkpoints in `convert`."""

from __future__ import annotations

import torch

from quantkit.errors import SchemeError
from quantkit.quantize import native
from quantkit.quantize.integer import quantize_integer
from quantkit.quantize.nf4 import quantize_nf4
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor


def quantize(weight: torch.Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantize a matrix.

    Args:
        weight: (N, K), any float dtype; computed in float32, in chunks, so that a matrix needs
            little memory beside itself.
        scheme: a quantized scheme.
        scale_dtype: dtype of integer scales; NF4 stores its own.

    Raises:
        SchemeError: the scheme is plain, or the tensor is no matrix.
    """
    if not scheme.quantized:
        raise SchemeError(f"{scheme.name} is not a quantized scheme")
    if weight.dim() != 2 or weight.numel() == 0:
        raise SchemeError(
            f"only a matrix with elements can be quantized, not a tensor of shape {tuple(weight.shape)}"
        )
    if native.handles(weight):
        return native.quantize(weight, scheme, scale_dtype)
    if scheme.method == "nf4":
        return quantize_nf4(weight, scheme)
    return quantize_integer(weight, scheme, scale_dtype)
