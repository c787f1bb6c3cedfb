"""What to say when a GPU's memory runs out: the estimate beside what there is, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from calculators.fit import verdict
from calculators.hardware import find_gpu, platform_of
from calculators.units import format_bytes
from quantkit.calibration import calibrated
from quantkit.config import ModelConfig
from quantkit.errors import DeviceMemoryError, is_device_out_of_memory
from quantkit.estimate import Estimator, Workload
from quantkit.fit import longest_context
from quantkit.schemes import QuantScheme, default_schemes, get_scheme


@contextmanager
def in_memory(
    config: ModelConfig, dtype: str, plan: Mapping[str, QuantScheme], workload: Workload
) -> Iterator[None]:
    """Load and run a model inside this, and a lack of GPU memory becomes one line.

    Args:
        config: the model.
        dtype: it computes in (`fp32`, `bf16`, `fp16`).
        plan: the scheme of every quantized matrix.
        workload: what is run.

    Raises:
        DeviceMemoryError: the GPU's memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_device_out_of_memory(error):
            raise
        scheme = next(iter(plan.values()), get_scheme(dtype))
        raise DeviceMemoryError(_line(config, scheme, plan, workload)) from None


def _line(
    config: ModelConfig, scheme: QuantScheme, plan: Mapping[str, QuantScheme], workload: Workload
) -> str:
    try:
        name, (free, total) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
    except RuntimeError:  # no memory for a context
        return f"out of memory before {config.name} was loaded: nvidia-smi shows what else takes the GPU's memory"
    try:
        platform = calibrated(name, platform_of(find_gpu(name)))
    except ValueError:
        platform = platform_of(None)
    # the estimate counts the context, which is there already, and what this process holds it may use again
    memory = free + torch.cuda.memory_reserved() + platform.context.nbytes
    estimator = Estimator(config, scheme, plan, platform=platform)
    needed = estimator.estimate(workload)
    said = (
        f"out of memory on {name}, where {format_bytes(memory)} of {format_bytes(total)} are to be had: "
        f"{config.name} as {scheme.name} with {workload.context:,} tokens, batch {workload.batch} and a "
        f"{needed.kv_bits}-bit KV cache takes {format_bytes(needed.total_bytes)} by the estimate"
    )
    longest = longest_context(estimator, workload, memory)
    fitting = [f"up to {longest:,} tokens"] if longest else []
    for other in default_schemes(config.dtype):
        found = Estimator(config, other, platform=platform).estimate(workload)
        if found.total_bytes < needed.total_bytes and verdict(found.total_bytes, memory).fits:
            fitting.append(other.name)
    return f"{said}; what would fit: {', '.join(fitting) or 'no context and no precision'}"
