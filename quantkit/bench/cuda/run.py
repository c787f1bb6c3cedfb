"""One benchmark on a GPU: what is asked for, and all of it run, with what there is handed on as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantkit.bench.cuda import kernels, limits, models
from quantkit.bench.cuda.device import Device, Place, Run
from quantkit.bench.cuda.models import GRID, QUICK_GRID, Grid
from quantkit.bench.cuda.results import CudaBench, Decode, Failure, Finding, Gpu, Method, Prefill, Repeat
from quantkit.bench.results import Cell
from quantkit.bench.shapes import matrices, rows_of_x, shapes
from quantkit.config import ModelConfig
from quantkit.schemes import QuantScheme

SEED = 0
_AWAY = 4  # times the second-level cache: what the copies of a matrix take at least
_PLACES = {Cell: "cells", Prefill: "prefills", Decode: "decodes", Repeat: "repeats", Failure: "failures"}


@dataclass(frozen=True)
class Plan:
    """What to run beside the GPU's own limits, which the rest is held to.

    Attributes:
        schemes: the precisions.
        kernels: whether one layer's matrices are run.
        models: shapes to run whole, in bf16, too; empty for none.
        quick: a small run that only shows that everything works.
    """

    schemes: tuple[QuantScheme, ...]
    kernels: bool
    models: tuple[ModelConfig, ...]
    quick: bool = False

    @property
    def grid(self) -> Grid:
        """What every whole model runs."""
        return QUICK_GRID if self.quick else GRID

    @property
    def steps(self) -> int:
        """About how many times `run` tells of progress."""
        cells = len(self.schemes) * len(matrices(shapes(self.quick))) * len(rows_of_x(self.quick))
        each = [len(self.grid.prompts) + len(self.grid.settings(scheme)) for scheme in self.schemes]
        plain = len(self.grid.prompts) + len(self.grid.batches) * len(self.grid.contexts)
        return self.kernels * cells + len(self.models) * (plain + sum(each))


def run(
    plan: Plan, device: Device, progress: Callable[[int], None], save: Callable[[CudaBench], None]
) -> CudaBench:
    """Measure the GPU, compile what the plan needs, then run it.

    Args:
        plan: what to run.
        device: where.
        progress: is told of each step.
        save: is given all there is, each time that something new is there.
    """
    torch.manual_seed(SEED)
    gpu = device.describe()
    known = limits.measure(device, plan.quick)
    device.release()
    config, rows = shapes(plan.quick), rows_of_x(plan.quick)
    method = _method(plan.quick, gpu)
    notes = _Notes(CudaBench("cuda", plan.quick, False, gpu, known, method, config.name), progress, save)
    notes.change()
    start = time.perf_counter()
    device.compile(_jobs(plan, device, gpu))
    notes.change(method=replace(method, compile_s=time.perf_counter() - start))
    place = Place(device, gpu, known, method)
    if plan.kernels:
        notes.take(kernels.measure(config, plan.schemes, rows, place))
    for model in plan.models:
        cells = notes.found.cells if model == config else ()
        for scheme in models.with_plain(plan.schemes):
            notes.take(models.measure(model, scheme, plan.grid, place, cells))
            device.release()
    notes.change(finished=True)
    return notes.found


class _Notes:
    """What was found so far, handed on with each change."""

    def __init__(
        self, found: CudaBench, progress: Callable[[int], None], save: Callable[[CudaBench], None]
    ) -> None:
        self.found, self._progress, self._save = found, progress, save

    def change(self, **fields: Any) -> None:
        self.found = replace(self.found, **fields)
        self._save(self.found)

    def take(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            place = _PLACES[type(finding)]
            self.change(**{place: (*getattr(self.found, place), finding)})
            self._progress(isinstance(finding, Cell | Prefill | Decode))


def _method(quick: bool, gpu: Gpu) -> Method:
    side = limits.QUICK_SIDE if quick else limits.SIDE
    return Method(
        seed=SEED,
        rounds=2 if quick else 9,
        away_bytes=0 if quick else _AWAY * gpu.l2_bytes,
        passes=1 if quick else 4,
        short_rows=kernels.SHORT_ROWS,
        copy_bytes=2 * (limits.QUICK_BUFFER_BYTES if quick else limits.BUFFER_BYTES),
        product=(side, side, side),
        decode_rounds=1 if quick else 3,
        prefill_rounds=1 if quick else 5,
        compile_s=0.0,
    )


def _jobs(plan: Plan, device: Device, gpu: Gpu) -> list[Run]:
    found: list[Run] = []
    for config in plan.models:  # the longest first
        found += models.jobs(config, plan.schemes, plan.grid, device, gpu)
    if plan.kernels:
        found += kernels.jobs(shapes(plan.quick), plan.schemes, rows_of_x(plan.quick), device)
    return found
