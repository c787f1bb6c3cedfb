"""The one dispatch point of quantized linears: validate, choose a backend, run it."""

from __future__ import annotations

import torch

from quantkit.errors import BackendError
from quantkit.kernels import reference
from quantkit.tensor import QuantizedTensor

BACKENDS = ("reference",)


def choose_backend(name: str = "auto") -> str:
    """Return the backend that `name` means here; `auto` takes the fastest there is.

    Raises:
        BackendError: the backend is unknown.
    """
    if name == "auto":
        return BACKENDS[0]
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known are auto, {', '.join(BACKENDS)}")
    return name


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for x (..., K) and a quantized (N, K) matrix, in x's dtype.

    Raises:
        BackendError: x is no floating-point tensor, or its K or device is not the matrix's.
    """
    if not x.is_floating_point():
        raise BackendError(f"x is {x.dtype}; a linear needs float32, bfloat16 or float16")
    if x.shape[-1] != weight.shape[1]:
        raise BackendError(f"x has K = {x.shape[-1]}, the matrix has K = {weight.shape[1]}")
    if x.device != weight.device:
        raise BackendError(f"x is on {x.device}, the matrix on {weight.device}; move one of them")
    return reference.linear(x, weight, bias)
