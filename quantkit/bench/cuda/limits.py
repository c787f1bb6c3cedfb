"""What a GPU can do at most: copy and read its memory, and multiply bfloat16 matrices by torch."""

from __future__ import annotations

from statistics import median

import torch

from calculators.units import GIB, MIB
from quantkit.bench.cuda.device import Device, Run
from quantkit.bench.cuda.results import CudaLimits

BUFFER_BYTES, QUICK_BUFFER_BYTES = 4 * GIB, 16 * MIB
SIDE, QUICK_SIDE = 8192, 256  # of the product's square matrices
_ROUNDS, _QUICK_ROUNDS = 15, 2


def measure(device: Device, quick: bool) -> CudaLimits:
    """Return the medians of a copy, a sum and a product of random matrices."""
    nbytes, side = (QUICK_BUFFER_BYTES, QUICK_SIDE) if quick else (BUFFER_BYTES, SIDE)
    source = torch.ones(nbytes // 4, device=device.torch_device)
    target = torch.empty_like(source)
    x, weight = (torch.randn(side, side, device=device.torch_device).bfloat16() for _ in range(2))
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "read": source.sum,
        "product": lambda: torch.nn.functional.linear(x, weight),
    }
    times = device.alternate(runs, _QUICK_ROUNDS if quick else _ROUNDS)
    copied, read, multiplied = (median(times[name]) for name in runs)
    return CudaLimits(2 * nbytes / copied, nbytes / read, 2 * side**3 / multiplied)
