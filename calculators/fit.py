"""Verdicts on whether a need fits a memory, and solvers for the most that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from calculators.hardware import GPU, GPUS

ERROR_BAND = 0.03  # of the need: the error to which estimated device memory is held
_BEYOND = 0.02  # of what is left to search
FITS, TIGHT, NO = "fits", "tight", "no"


@dataclass(frozen=True)
class Verdict:
    """Bytes left over once a need and a reserve are taken from a memory.

    Attributes:
        margin_bytes: what is left; negative is what is missing.
        band_bytes: the error to which the need is known.
    """

    margin_bytes: int
    band_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, be it tight or not."""
        return self.margin_bytes >= 0

    @property
    def word(self) -> str:
        """`fits`; `tight` where what is left is less than the error; `no` where something is missing."""
        if not self.fits:
            return NO
        return FITS if self.margin_bytes >= self.band_bytes else TIGHT


def band_bytes(needed: int) -> int:
    """Return the error to which a need of `needed` bytes is known, rounded up."""
    return ceil(ERROR_BAND * needed)


def verdict(needed: int, memory: int, reserve: int = 0) -> Verdict:
    """Return how `needed` bytes fit `memory` of which `reserve` is kept free."""
    return Verdict(memory - reserve - needed, band_bytes(needed))


def smallest_card(
    needed: Callable[[GPU], int], reserve: int = 0, cards: Sequence[GPU] = GPUS
) -> tuple[GPU, Verdict] | None:
    """Return the card of least memory that holds what is needed on it beside `reserve`, and how it fits.

    Args:
        needed: bytes on a card; each has its own overhead and attention.
        reserve: bytes kept free.
        cards: those to choose from.

    Returns:
        None where none holds it.
    """
    for gpu in sorted(cards, key=lambda gpu: gpu.usable_bytes):
        found = verdict(needed(gpu), gpu.usable_bytes, reserve)
        if found.fits:
            return gpu, found
    return None


def spare_bytes(needed: int, memory: int) -> int:
    """Return what a need and its error leave of a memory: not negative where the verdict is `fits`."""
    return memory - needed - band_bytes(needed)


def longest(spare: Callable[[int], int], limit: int) -> int:
    """Return the largest n from 1 to `limit` with something to spare, 0 where there is none even for 1.

    Interpolates between an n that fits and one that does not, goes a little beyond so that both close in, and
    never needs more than a few evaluations above those of bisection (after the ITP method of Oliveira and
    Takahashi, https://doi.org/10.1145/3423597). Where `spare` falls steadily, n is the largest of all that
    fit; else it fits and n + 1 does not.

    Args:
        spare: what n leaves; it fits where that is not negative.
        limit: the largest n of interest.
    """
    if limit < 1 or (left := spare(1)) < 0:
        return 0
    if (missing := spare(limit)) >= 0:
        return limit
    low, high = 1, limit
    reach = 2.0 ** ((high - low).bit_length() + 1)
    while (width := high - low) > 1:
        middle, guess = (low + high) / 2, low + width * left / (left - missing)
        guess += _BEYOND * width * (1 if guess < middle else -1)
        reach /= 2
        slack = max(reach - width / 2, 0)  # of the pace of bisection
        n = round(min(max(guess, middle - slack), middle + slack))
        n = min(max(n, low + 1), high - 1)
        found = spare(n)
        if found >= 0:
            low, left = n, found
        else:
            high, missing = n, found
    return low


def decode_ceiling(bandwidth_gb_s: float, step_bytes: int, batch: int = 1) -> float:
    """Return the tokens per second that no decoder exceeds: each step reads `step_bytes` from memory.

    Args:
        bandwidth_gb_s: of the GPU, in 10**9 bytes per second.
        step_bytes: weights and cache that a step of all sequences must read.
        batch: sequences, each of which gains a token.
    """
    return batch * bandwidth_gb_s * 10**9 / step_bytes
