"""One benchmark: what is asked for, and all of it run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calculators.units import format_bytes
from quantkit.bench import kernels, machine, models
from quantkit.bench.results import Bench, Cell, ModelRun
from quantkit.bench.shapes import matrices, rows_of_x, shapes
from quantkit.bench.timing import Effort
from quantkit.config import ModelConfig
from quantkit.errors import BackendError
from quantkit.estimate import Estimator
from quantkit.schemes import QuantScheme


@dataclass(frozen=True)
class Plan:
    """What to run beside the machine's own limits, which the rest is held to.

    Attributes:
        schemes: the precisions.
        kernels: whether one layer's matrices are run.
        models: shapes to run whole; empty for none.
        quick: a small run that only shows that everything works.
        llama: an interpreter that has `llama_cpp`, to run the models beside; None for none.
        folder: where a file for it is written for the time being; None for the system's.
    """

    schemes: tuple[QuantScheme, ...]
    kernels: bool
    models: tuple[ModelConfig, ...]
    quick: bool = False
    llama: str | None = None
    folder: Path | None = None

    @property
    def steps(self) -> int:
        """How many times `run` tells of progress."""
        cells = len(self.schemes) * len(matrices(shapes(self.quick))) * len(rows_of_x(self.quick))
        return 1 + self.kernels * cells + len(self.models) * len(self.schemes)


def run(plan: Plan, progress: Callable[[int], None]) -> Bench:
    """Measure the machine, then what the plan asks for; `progress` is told of each step.

    Raises:
        BackendError: the CPU kernels are not built, a model is larger than the memory, or llama.cpp is asked for
            and cannot run.
    """
    here, config = machine.describe(), shapes(plan.quick)
    _check_room(plan, here.memory_bytes)
    if plan.llama:
        from quantkit.bench.llama import Llama

        with Llama(plan.llama):  # a wrong interpreter is told of at once
            pass
    limits, roof = machine.measure(plan.quick)
    progress(1)
    cells: tuple[Cell, ...] = ()
    runs: tuple[ModelRun, ...] = ()
    if plan.kernels:
        effort = Effort(2, 0.0) if plan.quick else Effort(7, 0.7)
        away = 0 if plan.quick else machine.uncached_bytes()
        cells = tuple(
            kernels.measure(config, plan.schemes, rows_of_x(plan.quick), roof, effort, away, progress)
        )
    if plan.models:
        effort = Effort(1, 0.0) if plan.quick else Effort(5, 15.0)
        length = models.QUICK_LENGTH if plan.quick else models.LENGTH
        runs = tuple(
            models.measure(
                plan.models, plan.schemes, length, roof.memory, effort, plan.llama, plan.folder, progress
            )
        )
    return Bench(plan.quick, here, limits, config.name, cells, runs)


def _check_room(plan: Plan, memory_bytes: int) -> None:
    """Refuse a model whose weights do not fit, twice where llama.cpp holds them, too."""
    for config in plan.models:
        for scheme in plan.schemes:
            need = Estimator(config, scheme).weights_bytes * (2 if plan.llama else 1)
            if need > memory_bytes:
                raise BackendError(
                    f"{config.name} at {scheme.name} needs {format_bytes(need)} for weights, and this machine has "
                    f"{format_bytes(memory_bytes)}: choose others by --model and --scheme"
                )
