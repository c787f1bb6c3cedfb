"""The GPU as `measure` sees it: what it is, what the process takes of it, and the allocator's peaks."""

from __future__ import annotations

import gc
import os
from typing import Any, Protocol

import torch

from quantkit.errors import BackendError

BY_PROCESS, WHOLE_CARD = "nvml", "nvml, change of the whole card"


class Device(Protocol):
    """What `measure` needs of a device; tests have one that is none."""

    torch_device: torch.device
    method: str  # how `process_bytes` is found

    def describe(self) -> dict[str, Any]:
        """Return name, total_bytes, driver, cuda, torch, capability and cuBLAS's workspace_bytes."""

    def process_bytes(self) -> int:
        """Return the bytes that this process takes of the device, inside the allocator and outside."""

    def free_bytes(self) -> int:
        """Return what is free on the device."""

    def begin(self) -> None:
        """Give back what is cached, and let the peaks begin anew."""

    def peak_allocated(self) -> int:
        """Return the most that was allocated since `begin`."""

    def peak_reserved(self) -> int:
        """Return the most that was reserved since `begin`."""


class CudaDevice:
    """The first CUDA GPU. Construct it before anything else touches CUDA: it notes what is taken already.

    Raises:
        BackendError: there is no GPU, or NVML cannot be asked.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError(
                f"no CUDA GPU is visible to PyTorch {torch.__version__}: run this where there is one, or use --trace, "
                "which follows the same run without a GPU"
            )
        try:
            import pynvml
        except ImportError:
            raise BackendError("measuring needs NVML: pip install nvidia-ml-py") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise BackendError(
                f"NVML does not answer ({error}): is the driver's libnvidia-ml.so here?"
            ) from None
        before = {self._uuid(handle): self._used(handle) for handle in self._handles()}
        self.torch_device = torch.device("cuda", 0)
        torch.cuda.init()
        torch.cuda.synchronize(self.torch_device)  # makes the context
        self._handle = self._find()
        self._before = before[self._uuid(self._handle)]
        self.method = BY_PROCESS if self._own_bytes() is not None else WHOLE_CARD

    def describe(self) -> dict[str, Any]:
        """Return name, total_bytes, driver, cuda, torch, capability and cuBLAS's workspace_bytes."""
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": properties.name,
            "total_bytes": properties.total_memory,
            "driver": _text(self._nvml.nvmlSystemGetDriverVersion()),
            "cuda": str(torch.version.cuda),
            "torch": torch.__version__,
            "capability": f"{properties.major}.{properties.minor}",
            "workspace_bytes": self._workspace_bytes(),
        }

    def process_bytes(self) -> int:
        """Return what NVML says this process takes; where a container hides it, the card's change since the start."""
        torch.cuda.synchronize(self.torch_device)
        own = self._own_bytes() if self.method == BY_PROCESS else None
        return self._used(self._handle) - self._before if own is None else own

    def free_bytes(self) -> int:
        """Return what CUDA says is free."""
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def begin(self) -> None:
        """Give back what is cached, and let the peaks begin anew."""
        gc.collect()
        torch.cuda.synchronize(self.torch_device)
        torch._C._cuda_clearCublasWorkspaces()  # so that each run takes its own, as the first one does
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_allocated(self) -> int:
        """Return `torch.cuda.max_memory_allocated`."""
        torch.cuda.synchronize(self.torch_device)
        return torch.cuda.max_memory_allocated(self.torch_device)

    def peak_reserved(self) -> int:
        """Return `torch.cuda.max_memory_reserved`."""
        torch.cuda.synchronize(self.torch_device)
        return torch.cuda.max_memory_reserved(self.torch_device)

    def _workspace_bytes(self) -> int:
        """Return what the first matrix product takes beside its result."""
        self.begin()
        square = torch.zeros(64, 64, dtype=torch.bfloat16, device=self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        result = square @ square
        taken = torch.cuda.memory_allocated(self.torch_device) - before - result.nbytes
        del result, square
        self.begin()
        return taken

    def _handles(self) -> list[Any]:
        return [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]

    def _find(self) -> Any:
        """Return NVML's handle of the device that is CUDA's first; the two may count differently."""
        wanted = str(torch.cuda.get_device_properties(self.torch_device).uuid).removeprefix("GPU-")
        handles = self._handles()
        same = [handle for handle in handles if self._uuid(handle) == wanted]
        if same or len(handles) == 1:
            return (same or handles)[0]
        raise BackendError(
            f"NVML knows no GPU {wanted}, which PyTorch runs on; set CUDA_VISIBLE_DEVICES to one GPU"
        )

    def _uuid(self, handle: Any) -> str:
        return _text(self._nvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-")

    def _used(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def _own_bytes(self) -> int | None:
        """Return what NVML lists for this process, None where it lists it not or without a size."""
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        sizes = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        return int(sizes[0]) if sizes and sizes[0] else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
