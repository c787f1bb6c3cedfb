"""What is measured: cells of scheme, cache, context, batch and chunk, and the estimate beside each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from calculators.hardware import Platform
from quantkit.config import ModelConfig
from quantkit.estimate import PREFILL_CHUNK, Estimator, MemoryEstimate, Workload, kv_layout
from quantkit.schemes import get_scheme

if TYPE_CHECKING:
    from quantkit.measure.trace import Traced

SCHEMES = ("bf16", "int8", "int4-g128", "int4-g64", "int4-g32", "nf4", "nf4-dq")
KV_BITS = (16, 8, 4)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
HELD_OUT = (3072, 6144, 12288, 24576)  # never used to fit anything
WHOLE = 1 << 20  # a chunk that takes every prompt at once


@dataclass(frozen=True)
class Cell:
    """One run to measure.

    Attributes:
        scheme: the precision's name.
        kv_bits: of a cached element.
        context: tokens of a sequence.
        batch: sequences.
        prefill_chunk: tokens of the prompt that run at once.
        kv_group: elements of a head that share a scale of the cache; 0 is the whole head.
        own_process: measured in a process of its own, where nothing ran before.
    """

    scheme: str
    kv_bits: int
    context: int
    batch: int = 1
    prefill_chunk: int = PREFILL_CHUNK
    kv_group: int = 0
    own_process: bool = False

    @property
    def workload(self) -> Workload:
        return Workload(self.context, self.batch, self.kv_bits, self.kv_group, self.prefill_chunk)

    @property
    def held_out(self) -> bool:
        """Whether the context is one that nothing was fitted to."""
        return self.context & (self.context - 1) != 0

    def describe(self) -> str:
        """Return the cell in a few words."""
        return f"{self.scheme}, {self.context:,} tokens, batch {self.batch}, KV {self.kv_bits} bits"


def full_grid() -> list[Cell]:
    """Return all that the published records hold: every precision, context and cache, some batches and chunks."""
    cells = [
        Cell(scheme, kv_bits, context)
        for scheme in SCHEMES
        for kv_bits in KV_BITS
        for context in sorted((*CONTEXTS, *HELD_OUT))
    ]
    for scheme in SCHEMES:
        cells += [Cell(scheme, 16, context, batch=4) for context in (4096, 8192)]
        cells += [Cell(scheme, 16, 8192, prefill_chunk=chunk) for chunk in (512, WHOLE)]
    return cells


def product_of(
    schemes: Sequence[str],
    contexts: Sequence[int],
    kv_bits: Sequence[int],
    batches: Sequence[int],
    chunks: Sequence[int],
    kv_group: int = 0,
) -> list[Cell]:
    """Return every combination, each once; nothing of a kind means its default."""
    combinations = product(
        schemes or SCHEMES,
        kv_bits or KV_BITS,
        contexts or CONTEXTS,
        batches or (1,),
        chunks or (PREFILL_CHUNK,),
    )
    return list(dict.fromkeys(Cell(*one, kv_group=kv_group if one[1] < 16 else 0) for one in combinations))


def check(config: ModelConfig, cells: Sequence[Cell]) -> None:
    """Raise a QuantkitError where a cell cannot be run: unknown scheme, or a group that no head has."""
    for cell in cells:
        kv_layout(config, get_scheme(cell.scheme), cell.kv_bits, cell.kv_group)


def quick_grid() -> list[Cell]:
    """Return the few cells that tell most, for a minute or two."""
    few = [Cell(scheme, 16, context) for scheme in ("bf16", "int4-g128") for context in (1024, 6144)]
    return [*few, Cell("nf4", 8, 6144)]


def repeats(cells: Sequence[Cell], count: int) -> list[Cell]:
    """Return up to `count` cells, spread over all, to be run again in processes of their own."""
    count = min(count, len(cells))
    chosen = (cells[index * len(cells) // count] for index in range(count))
    return [Cell(**{**asdict(cell), "own_process": True}) for cell in chosen]


def jobs(model: str, cells: Sequence[Cell], attention: str) -> list[dict[str, Any]]:
    """Return the jobs of some cells: a process for each scheme, and for each cell that wants its own."""
    shared: dict[str, list[Cell]] = {}
    alone = [[cell] for cell in cells if cell.own_process]
    for cell in cells:
        if not cell.own_process:
            shared.setdefault(cell.scheme, []).append(cell)
    groups = [*shared.values(), *alone]
    return [
        {"model": model, "attention": attention, "cells": [asdict(cell) for cell in group]}
        for group in groups
    ]


def estimated(config: ModelConfig, cells: Iterable[Cell], platform: Platform) -> list[dict[str, int]]:
    """Return the estimate of each cell under the names that its measurement has."""
    known: dict[str, Estimator] = {}
    found = []
    for cell in cells:
        if cell.scheme not in known:
            known[cell.scheme] = Estimator(config, get_scheme(cell.scheme), platform=platform)
        estimator = known[cell.scheme]
        found.append(_named(estimator.estimate(cell.workload), platform, estimator.loaded_bytes))
    return found


def _named(entry: MemoryEstimate, platform: Platform, load_peak: int) -> dict[str, int]:
    held = entry.weights_bytes + entry.kv_cache_bytes
    return {
        "allocated_bytes": entry.allocated_bytes,
        "reserved_bytes": entry.reserved_bytes,
        "device_bytes": entry.total_bytes,
        "context_bytes": platform.context.nbytes,
        "load_peak_bytes": load_peak,
        "weights_bytes": entry.weights_bytes,
        "kv_cache_bytes": entry.kv_cache_bytes,
        "other_bytes": entry.allocated_bytes - held,
    }


def traced(found: Traced) -> dict[str, int]:
    """Return a trace under the names of a measurement; what only a device has is left out."""
    return {
        "allocated_bytes": found.allocated_bytes,
        "reserved_bytes": found.reserved_bytes,
        "load_peak_bytes": found.load_allocated_bytes,
        "weights_bytes": found.weights_bytes,
        "kv_cache_bytes": found.kv_cache_bytes,
        "other_bytes": found.allocated_bytes - found.weights_bytes - found.kv_cache_bytes,
    }


def joined(cell: Cell, measured: dict[str, int], beside: dict[str, int]) -> dict[str, Any]:
    """Return a row of the record: the cell, what was measured, and the estimate of the same quantities."""
    fields = {**asdict(cell), "held_out": cell.held_out}
    return {
        **fields,
        "measured": measured,
        "estimated": {name: size for name, size in beside.items() if name in measured},
    }
