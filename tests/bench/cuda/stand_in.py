"""A device on the CPU in place of a GPU: graphs are calls, the clock is the host's, kernels are the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from quantkit.bench.cuda.device import Place
from quantkit.bench.cuda.results import CudaLimits, Gpu, Method
from quantkit.config import ModelConfig

Name = TypeVar("Name")
Run = Callable[[], object]

TINY = ModelConfig(
    name="smollm2-135m", architecture="llama", vocab_size=96, hidden_size=128, intermediate_size=256, n_layers=2,
    n_heads=4, n_kv_heads=2, head_dim=32, max_context=512, rope_theta=1e4, norm_eps=1e-5, dtype="bf16",
)  # fmt: skip
LIMITS = CudaLimits(bytes_per_s=4e12, read_bytes_per_s=4.4e12, flops_per_s=7e14)
METHOD = Method(
    seed=0, rounds=3, away_bytes=0, passes=2, short_rows=4, copy_bytes=1 << 20, product=(64, 64, 64),
    decode_rounds=2, prefill_rounds=2, compile_s=0.0,
)  # fmt: skip


class StandIn:
    """A device as `quantkit.bench.cuda` knows one; `graphs` counts those made, `compiled` the jobs done."""

    backend = "reference"

    def __init__(self, memory_bytes: int = 140 << 30) -> None:
        self.torch_device = torch.device("cpu")
        self.memory_bytes, self.graphs, self.compiled = memory_bytes, 0, 0

    def describe(self) -> Gpu:
        return Gpu(
            name="NVIDIA H200", capability="9.0", tuning="Tuning(640)", multiprocessors=132, l2_bytes=60 << 20,
            memory_bytes=self.memory_bytes, cuda="12.9", torch="2.11.0", triton="3.6.0", quantkit="0.1.0",
            backend=self.backend, peers={"bitsandbytes": "0.50.2"}, settings={"driver": "580.1"},
        )  # fmt: skip

    def compile(self, jobs: Sequence[Run]) -> None:
        for job in jobs:
            job()
            self.compiled += 1

    def graph(self, run: Run) -> Run:
        run()
        self.graphs += 1
        return run

    def alternate(self, runs: Mapping[Name, Run], rounds: int) -> dict[Name, list[float]]:
        for run in runs.values():
            run()
        times: dict[Name, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        return times

    def release(self) -> None:
        pass


def place(device: StandIn) -> Place:
    """Return where and how tests measure."""
    return Place(device, device.describe(), LIMITS, METHOD)
