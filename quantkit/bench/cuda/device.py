"""The GPU as `bench cuda` sees it: what it is, graphs of launches, and events that time them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

import torch

from quantkit import __version__
from quantkit.bench.cuda.results import CudaLimits, Gpu, Method
from quantkit.kernels import ops
from quantkit.kernels.triton.tuning import tuning

Name = TypeVar("Name")
Run = Callable[[], object]

_MOST_PROCESSES = 16
_LEAD_IN = 8  # times the second-level cache: what is read before each timed run
_PEERS = ("bitsandbytes",)


class Device(Protocol):
    """What `bench cuda` needs of a device; tests have one that is none.

    Attributes:
        torch_device: where tensors lie.
        backend: of `ops.BACKENDS`, what runs quantkit's matrices.
    """

    torch_device: torch.device
    backend: str

    def describe(self) -> Gpu:
        """Return what it is."""

    def compile(self, jobs: Sequence[Run]) -> None:
        """Do what can be pickled, at once and for its compiled kernels alone: what fails is left for later."""

    def graph(self, run: Run) -> Run:
        """Return what launches again all that `run` launches, at the speed of the device."""

    def alternate(self, runs: Mapping[Name, Run], rounds: int) -> dict[Name, list[float]]:
        """Return the seconds of every run in each round: all are called in turn, and once before, untimed."""

    def release(self) -> None:
        """Give back memory that nothing holds."""


@dataclass(frozen=True)
class Place:
    """Where and how all is measured: the device, what it is, what it can do, and the method."""

    device: Device
    gpu: Gpu
    limits: CudaLimits
    method: Method


class Cuda:
    """The first CUDA GPU.

    Raises:
        BackendError: there is none, or Triton's kernels cannot run on it.
    """

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", 0)
        self.backend = ops.choose_backend("triton", self.torch_device)
        torch.cuda.set_device(self.torch_device)
        cache = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
        self._side = torch.cuda.Stream()  # one alone: cuBLAS keeps a workspace for each
        self._lead_in = torch.zeros(_LEAD_IN * cache // 4, device=self.torch_device)

    def describe(self) -> Gpu:
        """Return what it is."""
        import triton

        properties = torch.cuda.get_device_properties(self.torch_device)
        return Gpu(
            name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            tuning=str(tuning(10 * properties.major + properties.minor)),
            multiprocessors=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            memory_bytes=properties.total_memory,
            cuda=str(torch.version.cuda),
            torch=torch.__version__,
            triton=str(triton.__version__),
            quantkit=__version__,
            backend=self.backend,
            peers=_versions(),
            settings=_settings(str(getattr(properties, "uuid", ""))),
        )

    def compile(self, jobs: Sequence[Run]) -> None:
        """Do jobs in other processes, which leave the compiled kernels in Triton's cache on disk.

        What fails there will fail here again, where its reason is recorded.
        """
        workers = max(1, min(len(jobs), os.cpu_count() or 1, _MOST_PROCESSES))
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            wait([pool.submit(job) for job in jobs])

    def graph(self, run: Run) -> Run:
        """Return the replay of a CUDA graph; `run` is called before, too, for what only a first call does."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._side):
                run()
        finally:
            torch.cuda.set_stream(current)  # which a capture that fails leaves changed
        return graph.replay

    def alternate(self, runs: Mapping[Name, Run], rounds: int) -> dict[Name, list[float]]:
        """Return the seconds of every run in each round, by events.

        Before each run the GPU reads a buffer that its caches do not hold: nothing useful stays there, and the host
        has launched the run before it can begin.
        """
        for run in runs.values():
            run()
        times: dict[Name, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            events = []
            for name, run in runs.items():
                self._lead_in.sum()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                events.append((name, start, end))
            torch.cuda.synchronize()
            for name, start, end in events:
                times[name].append(1e-3 * start.elapsed_time(end))
        return times

    def release(self) -> None:
        """Give back what the allocator has cached."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PEERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _settings(uuid: str) -> dict[str, str]:
    """Return driver, largest clocks and power limit of the GPU with this UUID; nothing where there is no NVML."""
    try:
        import pynvml as nvml
    except ImportError:
        return {}
    try:
        nvml.nvmlInit()
        handle = _handle(nvml, uuid)
        return {
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "largest SM clock": f"{nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM):,} MHz",
            "largest memory clock": f"{nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM):,} MHz",
            "power limit": f"{nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000:,.0f} W",
        }
    except nvml.NVMLError as error:
        return {"NVML": str(error)}


def _handle(nvml: Any, uuid: str) -> Any:
    """Return NVML's handle of a GPU; it may count them otherwise than CUDA does."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    same = [handle for handle in handles if uuid and uuid in _text(nvml.nvmlDeviceGetUUID(handle))]
    return (same or handles)[0]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
