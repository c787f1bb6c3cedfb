"""One process's share of a measurement: a model is built once, then each cell is run on it.

A job comes as a JSON object on stdin, results go as JSON objects, one a line, to stdout: `{"loaded": …}`
once, then for every cell `{"cell": number, "measured": …}` or `{"cell": number, "error": one line}`.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import QuantkitError, is_device_out_of_memory
from quantkit.estimate import attention_path
from quantkit.measure.cells import Cell
from quantkit.measure.device import CudaDevice, Device
from quantkit.measure.trace import build, run
from quantkit.models.decoder import Decoder
from quantkit.presets import PRESETS
from quantkit.schemes import QuantScheme, get_scheme, plan_weights
from quantkit.tensor import QuantizedTensor

_HOLD_STEP = 2 << 20  # bytes: what the driver gives out at least
Emit = Callable[[Mapping[str, Any]], None]


def work(job: Mapping[str, Any], device: Device, emit: Emit) -> None:
    """Measure the cells of one job.

    Args:
        job: `model`, a preset's name or a checkpoint's path; `cells`, all of one scheme; `attention`.
        device: where it runs.
        emit: takes each result.
    """
    cells = [Cell(**cell) for cell in job["cells"]]
    context_bytes = device.process_bytes()
    device.begin()
    decoder = _decoder(job["model"], get_scheme(cells[0].scheme), job["attention"], device.torch_device)
    load_peak = device.peak_allocated()
    emit({"loaded": device.describe(), "method": device.method, "attention": decoder.attention})
    for number, cell in enumerate(cells):
        try:
            measured = _measure(decoder, cell, device)
        except (RuntimeError, QuantkitError) as error:
            if not _is_a_reason(error):
                raise
            emit({"cell": number, "error": " ".join(str(error).split())})
            continue
        measured |= {"context_bytes": context_bytes, "load_peak_bytes": load_peak}
        emit({"cell": number, "measured": measured})


def _measure(decoder: Decoder, cell: Cell, device: Device) -> dict[str, int]:
    """Run one cell; what an earlier one cached is given back first."""
    device.begin()
    cache = decoder.new_cache(cell.batch, cell.context, cell.kv_bits, cell.kv_group)
    vocab, place = decoder.config.vocab_size, device.torch_device
    ids = torch.randint(vocab, (cell.batch, cell.context), device=place)
    run(decoder, ids, cache, cell.prefill_chunk)
    allocated, weights = device.peak_allocated(), decoder.weights_bytes
    return {
        "allocated_bytes": allocated,
        "reserved_bytes": device.peak_reserved(),
        "device_bytes": device.process_bytes(),
        "weights_bytes": weights,
        "kv_cache_bytes": cache.nbytes,
        "other_bytes": allocated - weights - cache.nbytes,
    }


def _decoder(model: str, scheme: QuantScheme, attention: str, device: torch.device) -> Decoder:
    """Return the model of a checkpoint, or random weights of a preset's shapes: memory is the same."""
    if model not in PRESETS:
        from quantkit.formats.checkpoint import open_checkpoint
        from quantkit.models.loader import load

        checkpoint = open_checkpoint(Path(model))
        plan = {} if checkpoint.schemes else plan_weights(checkpoint.config, scheme)
        return load(checkpoint, scheme.dtype, plan, device, attention, backend="reference")
    config = PRESETS[model]
    path = attention if device.type == "cpu" else attention_path(config, scheme, attention)
    decoder = build(config, scheme, plan_weights(config, scheme), path, device)
    for weight in decoder.weights.values():
        if isinstance(weight, torch.Tensor):
            _fill(weight)
        elif isinstance(weight, QuantizedTensor):
            for part in weight.parts().values():
                _fill(part)
    return decoder


def _fill(part: torch.Tensor) -> None:
    """Put something harmless into a tensor, in place."""
    if part.is_floating_point():
        part.normal_(std=0.02)
    else:
        part.random_(0, 256)


def _is_a_reason(error: Exception) -> bool:
    """Whether an error says why something cannot be measured; any other is a fault."""
    return isinstance(error, QuantkitError) or is_device_out_of_memory(error)


def _print(result: Mapping[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def hold(leave_bytes: int, device: Device, emit: Emit) -> list[torch.Tensor]:
    """Take so much of the device that `leave_bytes` are left, say so, and return what was taken.

    Raises:
        QuantkitError: less is free already.
    """
    taken = []
    while (excess := device.free_bytes() - leave_bytes) >= _HOLD_STEP:
        taken.append(
            torch.empty(excess // _HOLD_STEP * _HOLD_STEP, dtype=torch.uint8, device=device.torch_device)
        )
    if excess < 0:
        raise QuantkitError(f"only {device.free_bytes():,} bytes are free, fewer than {leave_bytes:,}")
    emit({"held": sum(part.nbytes for part in taken), "free": device.free_bytes()})
    return taken


def main() -> int:
    """Read a job from stdin, and do it: measure cells and print the results, or hold memory until terminated."""
    try:
        job = json.load(sys.stdin)
        if "leave_bytes" in job:
            taken = hold(job["leave_bytes"], CudaDevice(), _print)
            while taken:
                signal.pause()
        else:
            work(job, CudaDevice(), _print)
    except (RuntimeError, QuantkitError) as error:
        if not _is_a_reason(error):
            raise
        _print({"error": " ".join(str(error).split())})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
