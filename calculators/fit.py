"""Verdicts: whether a need fits a memory, and which card is the smallest that holds it."""

from __future__ import annotations

from dataclasses import dataclass

from calculators.hardware import GPU, GPUS


@dataclass(frozen=True)
class Verdict:
    """Bytes left over once a need and a reserve are taken from a memory; negative is what is missing."""

    margin_bytes: int

    @property
    def fits(self) -> bool:
        return self.margin_bytes >= 0


def verdict(needed: int, memory: int, reserve: int = 0) -> Verdict:
    """Return whether `needed` bytes fit `memory` of which `reserve` is kept free."""
    return Verdict(memory - reserve - needed)


def smallest_card(needed: int, reserve: int = 0) -> GPU | None:
    """Return the card of least memory that holds `needed` bytes beside `reserve`, None where none does."""
    fitting = [gpu for gpu in GPUS if verdict(needed, gpu.usable_bytes, reserve).fits]
    return min(fitting, key=lambda gpu: gpu.usable_mib, default=None)
