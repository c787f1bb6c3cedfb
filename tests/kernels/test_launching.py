"""Which compiled kernel a launch goes to: the one that Triton would choose, by a driver that launches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from quantkit.errors import BackendError  # noqa: E402
from quantkit.kernels.triton.launching import launch  # noqa: E402

GRID = (3, 2)
WORDS = torch.zeros(64, dtype=torch.int32)


@triton.jit
def a_kernel(
    x: tl.tensor, y: tl.tensor, count: tl.tensor, eps: tl.tensor, SIZE: tl.constexpr, SECOND: tl.constexpr
) -> None:
    tl.store(x, count + eps + SIZE)


class Driver:
    """A Hopper of which nothing but its name is there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """What Triton would compile, by its signature, and how it was launched."""

    function, packed_metadata = 0, None
    launched: Any = None

    def __init__(self, source: Any, **options: Any) -> None:
        self.source, self.options = source, options

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *launched: Any) -> None:
        Compiled.launched = self, launched[:3], launched[-6:]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.run(*grid, *arguments)


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not isinstance(a_kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setattr(triton.compiler, "compile", Compiled)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    a_kernel.device_caches.clear()
    yield
    a_kernel.device_caches.clear()


def launches() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield arguments and constants that differ in what a kernel is compiled for, or only in values."""
    constants = {"SIZE": 8, "SECOND": True, "num_warps": 4, "enable_fp_fusion": True}
    for x in (WORDS, WORDS[1:], WORDS[4:], WORDS.float(), WORDS.view(torch.uint8)):
        yield (x, None, 7, 0.5), constants
    for y in (WORDS, WORDS[3:]):
        yield (WORDS, y, 7, 0.5), constants
    for count in (0, 1, 2, 15, 16, 17, 160, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**63):
        yield (WORDS, None, count, 0.5), constants
    for eps in (0.0, 1.0, 16.0):
        yield (WORDS, None, 7, eps), constants
    for changed in ({"SIZE": 9}, {"SECOND": False}, {"num_warps": 8}, {"SIZE": 1}):
        yield (WORDS, None, 7, 0.5), constants | changed


def test_a_launch_goes_where_triton_sends_it() -> None:
    for _ in range(2):
        for arguments, constants in launches():
            a_kernel[GRID](*arguments, **constants)
            expected = Compiled.launched
            launch(a_kernel, GRID, arguments, constants)
            kernel, grid, values = Compiled.launched
            assert kernel is expected[0], (arguments, constants)
            assert grid == (*GRID, 1)
            assert all(one is other for one, other in zip(values[:2], arguments[:2], strict=True))
            assert values[2:] == expected[2][2:] == (*arguments[2:], constants["SIZE"], constants["SECOND"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (triton.runtime.OutOfResources(1 << 20, 1 << 16, "shared memory"), "Required: 1048576"),
        (RuntimeError("PassManager::run failed"), "PassManager::run failed"),
    ],
    ids=["resources", "passes"],
)
def test_what_cannot_be_compiled_is_said(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(triton.compiler, "compile", refuse)
    with pytest.raises(
        BackendError, match=rf"cannot compile a_kernel .*{said}.*backend='reference'"
    ) as caught:
        launch(a_kernel, GRID, (WORDS, None, 5, 0.5), {"SIZE": 99, "SECOND": True, "enable_fp_fusion": True})
    assert "\n" not in str(caught.value)


def test_a_second_launch_passes_triton_by(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    constants = {"SIZE": 77, "SECOND": True, "enable_fp_fusion": True}
    launch(a_kernel, GRID, (WORDS, None, 5, 0.5), constants, prepared.append)
    first = Compiled.launched[0]
    assert prepared == [first]

    def refuse(*arguments: Any, **constants: Any) -> None:
        raise AssertionError("Triton was asked again")

    monkeypatch.setattr(a_kernel, "run", refuse)
    launch(a_kernel, GRID, (WORDS[8:], None, 6, 0.25), constants, prepared.append)
    assert Compiled.launched[0] is first
    assert prepared == [first]
    with pytest.raises(AssertionError, match="Triton was asked again"):
        launch(a_kernel, GRID, (WORDS[1:], None, 6, 0.25), constants)
