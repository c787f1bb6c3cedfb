"""The one dispatch point of quantized linears: choose a backend, prepare weights for it, validate and run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch

from quantkit.errors import BackendError
from quantkit.kernels import native, reference
from quantkit.kernels.native import Arena, PackedWeight
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

BACKENDS = ("native", "reference")

Prepared = QuantizedTensor | PackedWeight


def choose_backend(name: str = "auto", device: torch.device | str = "cpu") -> str:
    """Return the backend that `name` means on a device; `auto` takes the fastest there is.

    Raises:
        BackendError: the backend is unknown, or cannot run there.
    """
    on_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        if on_cpu and native.extension() is None:
            _say_once()
        return "native" if on_cpu and native.extension() is not None else "reference"
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known are auto, {', '.join(BACKENDS)}")
    if name == "native":
        if not on_cpu:
            raise BackendError(f"the native backend runs on a CPU, not on {device}")
        native.require()
    return name


@lru_cache
def _say_once() -> None:
    logging.getLogger("quantkit").warning(
        "The CPU kernels are not built: the slow reference runs. Install quantkit where there is a C++ compiler."
    )


def repacks(scheme: QuantScheme, cols: int, backend: str) -> bool:
    """Whether `prepare` copies matrices of `cols` columns, so that the memory they lie in may be used again."""
    return backend == "native" and native.packs(scheme, cols)


def prepare(weight: QuantizedTensor, backend: str, arena: Arena | None = None) -> Prepared:
    """Return a matrix as `backend` runs it; what that backend cannot take stays as it is, for the reference.

    Matrices of one model share an arena.
    """
    return native.pack([weight], arena) if repacks(weight.scheme, weight.shape[1], backend) else weight


def fuse(weights: Sequence[QuantizedTensor], backend: str, arena: Arena | None = None) -> PackedWeight | None:
    """Return matrices of one K as one below the other, None where `backend` cannot."""
    return native.pack(weights, arena) if backend == "native" and native.fusable(weights) else None


def linear(x: torch.Tensor, weight: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
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
    if isinstance(weight, PackedWeight):
        return native.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for x (..., K) and a plain (N, K) matrix."""
    if native.takes_plain(x, weight):
        return native.plain_linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
