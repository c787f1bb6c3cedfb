"""What a launch over a repacked matrix needs, whichever kernel runs. Importing this imports Triton."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
import triton

from quantkit.errors import BackendError
from quantkit.kernels.triton import kernels
from quantkit.kernels.triton.layout import Tiles
from quantkit.kernels.triton.tuning import FAMILIES, HOPPER, Tuning, tuning
from quantkit.quantize.nf4 import NF4_CODEBOOK, dynamic_map_on

INTERPRETED = not isinstance(kernels.vector_kernel, triton.JITFunction)  # TRITON_INTERPRET was set at import
UNASKED_SHARED = 48 << 10  # bytes that a kernel may use
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_GRANTED: set[int] = set()  # kernels


def matrix_arguments(matrix: Tiles, codebook: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """Return the arguments that describe a matrix, NF4's values rounded to the dtype `codebook`."""
    return (
        matrix.codes,
        matrix.scales,
        matrix.zeros,
        matrix.nested_scales,
        matrix.nested_offset,
        codebook_on(matrix.codes.device, codebook) if matrix.nf4 else None,
        dynamic_map_on(matrix.codes.device) if matrix.nested_scales is not None else None,
    )


@lru_cache
def codebook_on(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the 16 values of NF4 rounded to `dtype`, as float32; on a device they are made once."""
    return torch.tensor(NF4_CODEBOOK).to(dtype).float().to(device)


def matrix_constants(matrix: Tiles) -> dict[str, Any]:
    """Return the compile-time arguments that describe a matrix of any kind."""
    return plain_constants(matrix) | {
        "ZEROS": matrix.zeros is not None,
        "NESTED": matrix.nested_scales is not None,
    }


def plain_constants(matrix: Tiles) -> dict[str, Any]:
    """Return those that describe one without zero points and nested scales."""
    return {
        "BITS": matrix.bits,
        "NF4": matrix.nf4,
        "GROUP": matrix.group,
        "SPANS": matrix.spans,
        "INTERPRET": INTERPRETED,
        "enable_fp_fusion": True,  # said, because Triton's default changes
    }


def stored(dtype: torch.dtype) -> torch.dtype:
    """Return what a kernel writes: the interpreter cannot round to bfloat16, so torch does it afterwards."""
    return torch.float32 if INTERPRETED else dtype


@lru_cache
def tuned(device: torch.device) -> Tuning:
    """Return the launches on a device."""
    if device.type != "cuda":
        return FAMILIES[HOPPER]  # the interpreter
    major, minor = torch.cuda.get_device_capability(device)
    return tuning(10 * major + minor)


def begins_early(device: torch.device) -> bool:
    """Whether a kernel can begin on a device before the one ahead of it has ended."""
    return tuned(device).early and not INTERPRETED


def early(begins: bool) -> dict[str, Any]:
    """Return the arguments of a kernel that begins before the one ahead of it has ended, or does not."""
    return {"EARLY": begins, "launch_pdl": begins}


def grant_shared(compiled: Any) -> None:
    """Let a compiled kernel with a table of its own in shared memory be launched.

    A kernel may use 48 KiB without asking. Triton asks where its own share, `metadata.shared`, is more, and does not
    count the table.
    """
    shared = compiled.metadata.shared
    _ = compiled.run  # loads the kernel
    if shared > UNASKED_SHARED or compiled.function in _GRANTED:
        return
    failed = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(
        ctypes.c_void_p(compiled.function), _MAX_DYNAMIC_SHARED, shared
    )
    if failed:
        raise BackendError(f"CUDA grants no {shared:,} bytes of shared memory to a kernel (error {failed})")
    _GRANTED.add(compiled.function)
