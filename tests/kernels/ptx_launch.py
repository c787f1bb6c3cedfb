"""Launches of this package's kernels that follow their PTX on the CPU, in place of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.kernels import ptx_machine

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
ALIGNMENT = 16
_COMPILED: dict[Any, ptx_machine.Program] = {}


@contextmanager
def followed(
    monkeypatch: pytest.MonkeyPatch, capability: int = 90, order: ptx_machine.Order = ptx_machine.IN_STEP[0]
) -> Iterator[list[str]]:
    """Have kernels of a capability followed on the CPU, for whatever launches them; yields the names of those."""
    from quantkit.kernels import ops
    from quantkit.kernels.triton import launch, row, step

    names: list[str] = []

    def follow(
        kernel: Any, grid: tuple[int, ...], arguments: Any, constants: Any, prepare: Any = None
    ) -> None:
        names.append(kernel.__name__)
        taken = [
            each for each, kind in zip(arguments, kinds(arguments), strict=True) if kind[0] != "constexpr"
        ]
        program = compiled(kernel, arguments, constants, capability)
        ptx_machine.run(program, (*grid, 1, 1)[:3], taken, order)

    with monkeypatch.context() as patched:
        for module in (launch, row, step):
            patched.setattr(module, "launch", follow)
        patched.setattr(ops, "decodes", lambda device: True)
        yield names


def compiled(kernel: Any, arguments: Any, constants: dict[str, Any], capability: int) -> ptx_machine.Program:
    """Return a kernel as Triton compiles it for such arguments."""
    found = kinds(arguments)
    key = kernel.__name__, tuple(found), tuple(constants.items()), capability
    if key not in _COMPILED:
        named = dict(zip(kernel.arg_names, zip(arguments, found, strict=True), strict=False))
        fixed = {name: each for name, (each, (kind, _)) in named.items() if kind == "constexpr"}
        types = {name: kind for name, (_, (kind, _)) in named.items() if kind != "constexpr"}
        even = {name for name, (_, (_, even)) in named.items() if even}
        result = translate(kernel, capability, types, fixed | constants, even)
        _COMPILED[key] = ptx_machine.Program(result.asm["ptx"])
    return _COMPILED[key]


def translate(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], even: set[str]
) -> Any:
    """Return what Triton compiles a kernel to.

    Args:
        kernel: of `triton.jit`.
        capability: of the GPU.
        types: of arguments by name.
        constants: other arguments by name, and options.
        even: names of arguments that are divisible by 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in names if name in even},
    )
    options = {name: constants[name] for name in OPTIONS if name in constants}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def kinds(arguments: Any) -> list[tuple[str, bool]]:
    """Return the type of each argument, and whether it is known to be divisible by 16."""
    found = []
    for each in arguments:
        if isinstance(each, torch.Tensor):
            found.append((TYPES[each.dtype], each.data_ptr() % ALIGNMENT == 0))
        elif each is None or each == 1:
            found.append(("constexpr", False))
        elif isinstance(each, int):
            found.append(("i32", each % ALIGNMENT == 0))
        else:
            found.append(("fp32", False))
    return found
