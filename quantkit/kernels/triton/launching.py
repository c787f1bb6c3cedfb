"""Launching a kernel again without what Triton does for it each time. Importing this imports Triton.

Triton binds a launch's arguments by name, finds what to compile for, and looks that up: three quarters of what a launch
takes on the host, where a prompt of some hundred tokens waits for it. What it compiles for are the types of arguments,
numbers that are 1, and pointers and numbers divisible by 16. A launch that is like an earlier one in all of that goes
to the compiled kernel at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

from quantkit.errors import BackendError, is_device_out_of_memory

_LONGEST = 200  # characters of what Triton says, whose reason comes last
_ALIGNMENT = 16  # bytes, and what a number is divisible by
_INT32_BITS, _INT64_BITS = 31, 63
_LAUNCHED: dict[Any, tuple[Any, tuple[Any, ...]]] = {}  # compiled kernels and their constants, in order


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    prepare: Callable[[Any], None] | None = None,
) -> None:
    """Do `kernel[grid](*arguments, **constants)` on the current device.

    Args:
        kernel: of `triton.jit`, whose compile-time arguments come last.
        grid: programs along up to three axes.
        arguments: tensors, numbers or None, in order.
        constants: compile-time arguments and options by name; they can be hashed.
        prepare: what is done with the compiled kernel before its first launch.

    Raises:
        BackendError: Triton cannot compile it for this GPU.
    """
    if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter
        kernel[grid](*arguments, **constants)
        return
    key = kernel, torch.cuda.current_device(), tuple(map(_kind, arguments)), tuple(constants.items())
    found = _LAUNCHED.get(key)
    if found is None:
        try:
            compiled = _compile(kernel, grid, arguments, constants)
            if prepare is not None:
                prepare(compiled)
            kernel[grid](*arguments, **constants)
        except triton.TritonError as error:
            said = " ".join(str(error).split())
            raise BackendError(
                f"Triton {triton.__version__} cannot compile {kernel.__name__} for this GPU: {said[-_LONGEST:]}; "
                "load the model with backend='reference' to do without"
            ) from error
        _LAUNCHED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return
    compiled, last = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *last)


def _compile(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Mapping[str, Any]
) -> Any:
    """Return the compiled kernel; its passes raise RuntimeErrors where they fail."""
    try:
        return kernel.warmup(*arguments, grid=grid, **constants)
    except RuntimeError as error:
        if is_device_out_of_memory(error):
            raise
        raise triton.TritonError(str(error)) from error


def _kind(argument: Any) -> Any:
    """Return what Triton compiles a kernel for, of one argument."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT == 0
    if isinstance(argument, int):
        bits = argument.bit_length()
        return argument == 1, argument % _ALIGNMENT == 0, bits > _INT32_BITS, bits > _INT64_BITS
    return None if argument is None else type(argument)
