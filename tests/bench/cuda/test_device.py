"""The device itself, where there is one: graphs that replay, events that tell time, limits that are plausible."""

from __future__ import annotations

import pytest
import torch

from quantkit.bench.cuda import limits
from quantkit.bench.cuda.device import Cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible to PyTorch"),
]


def test_a_graph_does_again_what_was_captured() -> None:
    device = Cuda()
    count = torch.zeros((), device="cuda")
    replay = device.graph(lambda: count.add_(1))
    assert int(count) == 1  # a capture launches nothing
    replay()
    assert int(count) == 2


def test_a_graph_that_fails_leaves_the_device_as_it_was() -> None:
    device, stream, calls = Cuda(), torch.cuda.current_stream(), []

    def second_fails() -> None:
        calls.append(torch.ones(8, device="cuda") * 2)
        if len(calls) == 2:
            raise ValueError("no second time")

    with pytest.raises(ValueError, match="no second time"):
        device.graph(second_fails)
    assert torch.cuda.current_stream() == stream
    calls.clear()
    device.release()
    device.graph(lambda: torch.ones(8, device="cuda") * 2)()


def test_longer_work_takes_longer() -> None:
    device = Cuda()
    small, large = (torch.zeros(count, device="cuda") for count in (1 << 20, 1 << 28))
    times = device.alternate({"small": small.zero_, "large": large.zero_}, rounds=5)
    assert [len(taken) for taken in times.values()] == [5, 5]
    assert 0 < max(times["small"]) < min(times["large"])


def test_the_gpu_and_its_limits() -> None:
    device = Cuda()
    gpu = device.describe()
    assert min(gpu.multiprocessors, gpu.l2_bytes, gpu.memory_bytes) > 0
    found = limits.measure(device, quick=False)
    assert 1e11 < found.bytes_per_s < 2e13
    assert found.bytes_per_s / 2 < found.read_bytes_per_s < 2 * found.bytes_per_s
    assert 1e13 < found.flops_per_s < 1e16
