"""GPUs that people have, and what a process takes before it allocates its first tensor.

A card is sold in "GB" that mean about GiB. `usable_bytes` is what nvidia-smi reports as total memory; CUDA
reports somewhat less (an H100 of "80 GB": 79.19 GiB), and a display takes its share.
"""

from __future__ import annotations

from dataclasses import dataclass

from calculators.units import MIB

NVIDIA_SMI = "nvidia-smi --query-gpu=memory.total"


@dataclass(frozen=True)
class GPU:
    """One model of card.

    Attributes:
        name: as people call it.
        sold_gb: the figure on the box.
        usable_mib: MiB of memory that software can see.
        source: where `usable_mib` comes from.
    """

    name: str
    sold_gb: int
    usable_mib: int
    source: str = NVIDIA_SMI

    @property
    def usable_bytes(self) -> int:
        return self.usable_mib * MIB


GPUS = (
    GPU("RTX 4060", 8, 8188),
    GPU("RTX 3060", 12, 12288),
    GPU("RTX 4060 Ti 16GB", 16, 16380),
    GPU("RTX 4090", 24, 24564),
    GPU("RTX 3090", 24, 24576),
    GPU("RTX 5090", 32, 32607),
    GPU("A100 40GB", 40, 40960),
    GPU("L40S", 48, 46068),
    GPU("RTX 6000 Ada", 48, 49140),
    GPU("H100 80GB", 80, 81559),
    GPU("A100 80GB", 80, 81920),
    GPU("H200", 141, 143771),
)


@dataclass(frozen=True)
class Overhead:
    """Device memory that is neither weights, KV cache nor activations.

    Attributes:
        nbytes: its size.
        status: `assumed`, or `measured` on the device at hand.
        source: where the figure comes from.
    """

    nbytes: int
    status: str
    source: str


CUDA_CONTEXT = Overhead(
    512 * MIB,
    "assumed",
    "CUDA context 0.50 GiB (published: 0.51 GiB on H100, 414 MiB on A100 40GB, 426 MiB on RTX 6000 Ada)",
)
CUBLAS_WORKSPACE = Overhead(
    33_554_432,
    "assumed",
    "cuBLAS workspace 32 MiB (PyTorch's CublasHandlePool.cpp on sm_90; 8,519,680 B on older cards)",
)
ASSUMED_OVERHEAD = Overhead(
    CUDA_CONTEXT.nbytes + CUBLAS_WORKSPACE.nbytes,
    "assumed",
    f"{CUDA_CONTEXT.source} + {CUBLAS_WORKSPACE.source}",
)


@dataclass(frozen=True)
class Platform:
    """What a device and its libraries take, and how the runtime is set.

    Attributes:
        context: the CUDA context, outside the allocator.
        workspace: cuBLAS's workspace, a request to the allocator.
        attention: `flash` or `math`.
        expandable_segments: the allocator's setting.
    """

    context: Overhead
    workspace: Overhead
    attention: str = "flash"
    expandable_segments: bool = False


ASSUMED_PLATFORM = Platform(CUDA_CONTEXT, CUBLAS_WORKSPACE)
