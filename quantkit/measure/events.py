"""The allocator's own events of a run, to hold a trace to: recorded on a GPU, compared anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch

from calculators.allocator import ROUND
from quantkit.config import ModelConfig
from quantkit.estimate import Workload, attention_path
from quantkit.kernels.reference import forget_tables
from quantkit.measure.cuda import platform
from quantkit.measure.device import CudaDevice, Device
from quantkit.measure.trace import Event, build, run, trace
from quantkit.schemes import QuantScheme, get_scheme, plan_weights

_MOST_EVENTS = 1_000_000


def record_small_runs(config: ModelConfig, schemes: Sequence[str]) -> dict[str, Any]:
    """Record two layers of a model at each scheme on the GPU: loading, three chunks and a decoded token.

    Returns:
        `device`, and under `runs` scheme, workload, peaks, events and the first difference from the trace.

    Raises:
        BackendError: there is no GPU.
    """
    device = CudaDevice()
    config, runs = replace(config, n_layers=2), []
    for name, kv_bits in product(schemes, (16, 8)):
        workload = Workload(1300, 1, kv_bits, prefill_chunk=512)
        forget_tables(device.torch_device)
        device.begin()
        start_recording()
        allocated, reserved = _small_run(config, get_scheme(name), workload, device)
        events = recorded()
        traced = trace(config, get_scheme(name), workload, platform(device.describe()))
        runs.append(
            {
                "model": config.name,
                "layers": config.n_layers,
                "scheme": name,
                "workload": asdict(workload),
                "allocated_bytes": allocated,
                "reserved_bytes": reserved,
                "traced_allocated_bytes": traced.allocated_bytes,
                "traced_reserved_bytes": traced.reserved_bytes,
                "difference": first_difference(events, traced.events),
                "events": [[event.action, event.number, event.nbytes] for event in events],
            }
        )
    return {"device": device.describe(), "runs": runs}


def _small_run(
    config: ModelConfig, scheme: QuantScheme, workload: Workload, device: Device
) -> tuple[int, int]:
    """Return the peaks of allocated and reserved."""
    place = device.torch_device
    path = attention_path(config, scheme, "flash")
    decoder = build(config, scheme, plan_weights(config, scheme), path, place)
    cache = decoder.new_cache(workload.batch, workload.context, workload.kv_bits)
    ids = torch.zeros(workload.batch, workload.context, dtype=torch.int64, device=place)
    run(decoder, ids, cache, workload.prefill_chunk)
    return device.peak_allocated(), device.peak_reserved()


def start_recording() -> None:
    """Let PyTorch note every request to its CUDA allocator, without stacks."""
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=_MOST_EVENTS)


def recorded() -> list[Event]:
    """Stop recording and return what was requested and released since `start_recording`, in order."""
    entries = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    return from_snapshot(entries)


def from_snapshot(entries: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Return a snapshot's requests and releases, each tensor with the number of its request."""
    events: list[Event] = []
    alive: dict[int, Event] = {}
    for entry in entries:
        if entry["action"] == "alloc":
            alive[entry["addr"]] = Event("alloc", len(events), int(entry["size"]))
            events.append(alive[entry["addr"]])
        elif entry["action"] == "free_requested" and entry["addr"] in alive:
            request = alive.pop(entry["addr"])
            events.append(Event("free", request.number, request.nbytes))
    return events


def first_difference(ours: Sequence[Event], theirs: Sequence[Event]) -> str | None:
    """Return where two runs differ, in a line; None where they ask for the same.

    Sizes are compared as the allocator rounds them. What is released between two requests may come in
    any order, and after the last one whenever recording stops: it makes no difference to the allocator.
    """
    lines = _normal(ours), _normal(theirs)
    for index, (a, b) in enumerate(zip(*lines, strict=False)):
        if a != b:
            return f"event {index}: {a[0]} of {a[1]:,} bytes here, {b[0]} of {b[1]:,} bytes there"
    if len(lines[0]) != len(lines[1]):
        return f"{len(lines[0]):,} events here, {len(lines[1]):,} there; those they share are the same"
    return None


def _normal(events: Sequence[Event]) -> list[tuple[str, int, int]]:
    """Return action, rounded size and the request's rank up to the last request, releases between two sorted."""
    ranks: dict[int, int] = {}
    lines: list[tuple[str, int, int]] = []
    released: list[tuple[str, int, int]] = []
    for event in events:
        size = -(-event.nbytes // ROUND) * ROUND
        if event.action == "alloc":
            lines += sorted(released)
            released = []
            ranks[event.number] = len(ranks)
            lines.append(("alloc", size, ranks[event.number]))
        else:
            released.append(("free", size, ranks[event.number]))
    return lines
