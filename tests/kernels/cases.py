"""Runs a file of cases in a process of its own, in Triton's interpreter or on a GPU.

Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.paths import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

in_the_interpreter_and_on_a_gpu = pytest.mark.parametrize(
    "device", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)]
)


def run_cases(file: str, device: str) -> subprocess.CompletedProcess[str]:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA GPU is visible to PyTorch")
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _patch_once() -> None:
    """Spare the interpreter a third of its time.

    It puts its own functions into triton.language when a kernel is launched, and takes them out when that ends. It puts
    them in again at every call of a function by the kernel, which is needed once at most: Triton's own functions look
    into triton.language.core, where they stay.
    """
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call, patched = InterpretedFunction.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self)
        return patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


if INTERPRETED:
    _patch_once()
