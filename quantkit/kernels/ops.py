"""The one dispatch point of quantized linears: choose a backend, prepare weights for it, validate and run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch

from quantkit.errors import BackendError
from quantkit.kernels import native, reference, triton
from quantkit.kernels.native import Arena, PackedWeight
from quantkit.kernels.triton import TiledWeight
from quantkit.tensor import QuantizedTensor

DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("triton", "native", "reference")
OLDEST_CAPABILITY = (7, 5)  # of a GPU that Triton's kernels run on

Prepared = QuantizedTensor | PackedWeight | TiledWeight


def choose_device(name: str = "auto") -> str:
    """Return `cpu` or `cuda`; `auto` is a GPU where PyTorch sees one.

    Raises:
        BackendError: `cuda` is asked for and there is none, or the name is unknown.
    """
    if name not in DEVICES:
        raise BackendError(f"unknown device {name!r}; known are {', '.join(DEVICES)}")
    visible = torch.cuda.is_available()
    if name == "cuda" and not visible:
        raise BackendError(f"no CUDA GPU is visible to PyTorch {torch.__version__}: take the cpu")
    return "cuda" if visible and name != "cpu" else "cpu"


def device_name(device: str) -> str:
    """Return `cpu`, or what a GPU calls itself."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def choose_backend(name: str = "auto", device: torch.device | str = "cpu") -> str:
    """Return the backend that `name` means on a device; `auto` takes the fastest there is.

    Raises:
        BackendError: the backend is unknown, or cannot run there.
    """
    device = torch.device(device)
    if name == "auto":
        return _fastest(device)
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known are auto, {', '.join(BACKENDS)}")
    if name == "native":
        if device.type != "cpu":
            raise BackendError(f"the native backend runs on a CPU, not on {device}")
        native.require()
    if name == "triton":
        lacking = _triton_lacks(device)
        if lacking:
            raise BackendError(f"the triton backend cannot run on {device}: {lacking}")
    return name


def _fastest(device: torch.device) -> str:
    if device.type == "cpu":
        if native.extension() is not None:
            return "native"
        _say_once(
            "The CPU kernels are not built: the slow reference runs. Install quantkit where there is a C++ compiler."
        )
    if device.type == "cuda":
        lacking = _triton_lacks(device)
        if lacking is None:
            return "triton"
        _say_once(f"The CUDA kernels cannot run on {device}, so the slow reference does: {lacking}.")
    return "reference"


def _triton_lacks(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot run on a device, None where they can."""
    if device.type != "cuda":
        return "it needs a CUDA GPU"
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to PyTorch"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "PyTorch was built for ROCm, and the kernels hold instructions of NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        found, oldest = (".".join(map(str, each)) for each in (capability, OLDEST_CAPABILITY))
        return f"its compute capability is {found}, and the kernels need {oldest}"
    return triton.cannot_start()


def decodes(device: torch.device) -> bool:
    """Whether the CUDA kernels run a whole decoded token on a device: a GPU with tensor cores for bfloat16."""
    if device.type == "cpu":  # Triton's interpreter
        launch = triton.launcher() if os.environ.get("TRITON_INTERPRET") == "1" else None
        return launch is not None and launch.INTERPRETED
    return _triton_lacks(device) is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _say_once(line: str) -> None:
    logging.getLogger("quantkit").warning(line)


def prepare(weight: QuantizedTensor, backend: str, arena: Arena | None = None) -> Prepared:
    """Return a matrix as `backend` runs it; what that backend cannot take stays as it is, for the reference.

    Matrices of one model share an arena.
    """
    if backend == "triton" and triton.packs(weight.scheme, weight.shape):
        return triton.pack([weight])
    if backend == "native" and native.packs(weight.scheme, weight.shape[1]):
        return native.pack([weight], arena)
    return weight


def fuse(
    weights: Sequence[QuantizedTensor],
    backend: str,
    arena: Arena | None = None,
    device: torch.device | str | None = None,
) -> Prepared | None:
    """Return matrices of one K as one below the other, None where `backend` cannot.

    They may lie on the host: each goes to `device`, None meaning where it is, when it is its turn to be repacked.
    """
    if backend == "triton" and triton.fusable(weights):
        return triton.pack(weights, device)
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
    if isinstance(weight, TiledWeight):
        return triton.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for x (..., K) and a plain (N, K) matrix."""
    if native.takes_plain(x, weight):
        return native.plain_linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
