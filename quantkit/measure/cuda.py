"""Measurements on a GPU: jobs go to fresh processes, results become a record's rows beside the estimates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from math import ceil
from typing import Any

from calculators.fit import FITS, NO, band_bytes
from calculators.hardware import Platform, find_gpu, platform_of
from quantkit.calibration import calibrated
from quantkit.config import ModelConfig
from quantkit.errors import BackendError
from quantkit.estimate import Estimator, Workload
from quantkit.fit import longest_context
from quantkit.measure.cells import WHOLE, Cell, estimated, jobs, joined
from quantkit.schemes import get_scheme

Launch = Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]]


@dataclass
class Measurement:
    """What a series of jobs found.

    Attributes:
        device: the GPU, its driver and libraries.
        method: how the device's bytes were found.
        attention: the path that ran.
        rows: of the record, one for each cell that ran.
        failures: cells that did not, each with its error in a line.
    """

    device: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    attention: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)


def launch(job: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Run a job in a process of its own and yield its results as they come."""
    command = [sys.executable, "-m", "quantkit.measure.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        json.dump(job, worker.stdin)
        worker.stdin.close()
        for line in worker.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if worker.returncode:
        yield {"error": f"the process ended with {worker.returncode}"}


@contextmanager
def holding_all_but(leave_bytes: int) -> Iterator[None]:
    """Have another process hold the GPU's memory but `leave_bytes`.

    Raises:
        BackendError: it cannot.
    """
    command = [sys.executable, "-m", "quantkit.measure.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            json.dump({"leave_bytes": leave_bytes}, holder.stdin)
            holder.stdin.close()
            said = json.loads(holder.stdout.readline() or '{"error": "the process ended without a word"}')
            if "error" in said:
                raise BackendError(f"no process could hold all but {leave_bytes:,} bytes: {said['error']}")
            yield
        finally:
            holder.terminate()


def measure(
    config: ModelConfig,
    jobs: Sequence[Mapping[str, Any]],
    progress: Callable[[int], None],
    start: Launch = launch,
    save: Callable[[Measurement], None] | None = None,
) -> Measurement:
    """Run jobs one after another; a process that dies fails its own cells and no other.

    Args:
        config: the model.
        jobs: as `cells.jobs` makes them.
        progress: is told how many cells have ended.
        start: runs one job and yields its results.
        save: is given what there is after each job.

    Raises:
        BackendError: the first process cannot use the device at all.
    """
    found = Measurement()
    for job in jobs:
        cells = [Cell(**cell) for cell in job["cells"]]
        left = dict(enumerate(cells))
        error = "the process ended without a word"
        measured: dict[int, dict[str, int]] = {}
        for result in start(job):
            if "loaded" in result:
                found.device, found.method = dict(result["loaded"]), str(result["method"])
                found.attention = str(result["attention"])
            elif "cell" in result:
                cell = left.pop(result["cell"])
                if "measured" in result:
                    measured[result["cell"]] = dict(result["measured"])
                else:
                    found.failures.append({**asdict(cell), "error": result["error"]})
                progress(1)
            elif left and error.startswith("the process"):
                error = result["error"]
        if left and not found.device:
            raise BackendError(error)
        found.failures += [{**asdict(cell), "error": error} for cell in left.values()]
        progress(len(left))
        beside = estimated(config, (cells[number] for number in measured), platform(found.device))
        pairs = zip(measured.items(), beside, strict=True)
        found.rows += [joined(cells[number], sizes, estimate) for (number, sizes), estimate in pairs]
        if save:
            save(found)
    return found


def platform(device: Mapping[str, Any]) -> Platform:
    """Return what is known of a device that measured: by a calibration here, a record, what others say, or a guess."""
    try:
        gpu = find_gpu(device["name"])
    except ValueError:
        return platform_of(None)
    return calibrated(gpu.name, platform_of(gpu, device["torch"]))


def verdicts(
    config: ModelConfig,
    model: str,
    schemes: Sequence[str],
    memories: Sequence[int],
    attention: str,
    known: Platform,
    start: Launch = launch,
    holding: Callable[[int], AbstractContextManager[None]] = holding_all_but,
) -> list[dict[str, Any]]:
    """Try verdicts on a card of which another process holds all but some bytes.

    For each memory and scheme: the longest context with the verdict `fits` must run; one whose need is 5%
    beyond the tight band must not.

    Returns:
        A row for each trial: scheme, memory_bytes, context, expected (`fits` or `no`), ran, and the error.
    """
    rows = []
    for memory, scheme in product(memories, schemes):
        for context, expected in _trials(config, scheme, memory, known):
            cell = Cell(scheme, 16, context, own_process=True)
            [job] = jobs(model, [cell], attention)
            with holding(memory):
                results = list(start(job))
            errors = [str(result["error"]) for result in results if "error" in result]
            rows.append(
                {
                    "scheme": scheme,
                    "memory_bytes": memory,
                    "context": context,
                    "expected": expected,
                    "ran": any("measured" in result for result in results),
                    "error": errors[0] if errors else None,
                }
            )
    return rows


def _trials(config: ModelConfig, scheme: str, memory: int, known: Platform) -> list[tuple[int, str]]:
    """Return the contexts to try, and the verdict on each."""
    estimator = Estimator(config, get_scheme(scheme), platform=known)
    longest = longest_context(estimator, Workload(1), memory)
    beyond = ceil(1.05 * (memory + band_bytes(memory)))
    low, high = 1, WHOLE  # the least context that needs as much
    while low < high:
        middle = (low + high) // 2
        if estimator.estimate(Workload(middle)).total_bytes >= beyond:
            high = middle
        else:
            low = middle + 1
    return [(longest, FITS), (low, NO)] if longest else [(1, NO)]


def outside_bytes(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the most that a process took beyond what its allocator had reserved."""
    return max(row["measured"]["device_bytes"] - row["measured"]["reserved_bytes"] for row in rows)
