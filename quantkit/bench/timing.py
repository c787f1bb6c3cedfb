"""Runs in alternation: what is compared is timed within milliseconds of each other, round after round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

Name = TypeVar("Name")

MOST_ROUNDS = 200


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least so many rounds, and then until so many seconds have passed."""

    rounds: int
    seconds: float


def alternate(
    runs: Mapping[Name, Callable[[int], object]], effort: Effort, pause_s: float = 0.0
) -> dict[Name, list[float]]:
    """Return the seconds of every run, lists of one length: each is called in turn, once a round.

    Args:
        runs: called with the number of the round, so that they can take other memory each time; the first
            round is not timed.
        effort: how many rounds.
        pause_s: wait so long before each run, for threads of another process to stop spinning.
    """
    for run in runs.values():
        run(0)
    times: dict[Name, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + effort.seconds
    for turn in range(1, MOST_ROUNDS + 1):
        for name, run in runs.items():
            time.sleep(pause_s)
            start = time.perf_counter()
            run(turn)
            times[name].append(time.perf_counter() - start)
        if turn >= effort.rounds and time.perf_counter() >= end:
            break
    return times


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of runs that came in one round."""
    return median(above / below for above, below in zip(numerators, denominators, strict=True))
