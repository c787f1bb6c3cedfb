"""How far estimates are from what was measured: pure arithmetic on pairs of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calculators.units import MIB

Pair = tuple[int, int]  # measured, estimated

# The share of the measured value that an estimate may miss it by; for what is neither weights nor cache
# the larger of that and some bytes, since little of it may be there.
BARS = {"allocated_bytes": 0.01, "reserved_bytes": 0.02, "device_bytes": 0.03, "other_bytes": 0.05}
OTHER_FLOOR = 16 * MIB


@dataclass(frozen=True)
class Errors:
    """Errors of one quantity over some cells, as shares of the measured value.

    Attributes:
        cells: how many.
        mean_absolute: mean of |error|.
        largest: the error that is furthest from 0, with its sign.
        mean_signed: mean error; above 0 where estimates are too high.
        missed: cells that miss the bar.
    """

    cells: int
    mean_absolute: float
    largest: float
    mean_signed: float
    missed: int


def relative_error(measured: int, estimated: int) -> float:
    """Return the error as a share of the measured value, above 0 where the estimate is too high."""
    return (estimated - measured) / measured


def misses(quantity: str, measured: int, estimated: int) -> bool:
    """Tell whether an estimate misses the bar of its quantity."""
    allowed = BARS[quantity] * measured
    if quantity == "other_bytes":
        allowed = max(allowed, OTHER_FLOOR)
    return abs(estimated - measured) > allowed


def errors(quantity: str, pairs: Sequence[Pair]) -> Errors | None:
    """Return the errors of one quantity, None where there is no cell."""
    if not pairs:
        return None
    found = [relative_error(*pair) for pair in pairs]
    return Errors(
        cells=len(found),
        mean_absolute=sum(map(abs, found)) / len(found),
        largest=max(found, key=abs),
        mean_signed=sum(found) / len(found),
        missed=sum(misses(quantity, *pair) for pair in pairs),
    )
