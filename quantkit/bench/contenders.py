"""Ways to multiply by one matrix, each with copies of its own: none is in a cache when it is used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Contender:
    """One way to multiply by a matrix: `multiply(x, weight)` for each of its copies of the weight."""

    copies: Sequence[Any]
    multiply: Callable[[torch.Tensor, Any], torch.Tensor]

    def run(self, x: torch.Tensor, turn: int) -> torch.Tensor:
        """Return x @ W.T by the copy whose turn it is."""
        return self.multiply(x, self.copies[turn % len(self.copies)])


def rotating(
    make: Callable[[], Any], away_bytes: int, multiply: Callable[[torch.Tensor, Any], torch.Tensor]
) -> Contender:
    """Return a contender with as many copies of a weight as take `away_bytes`; a weight knows its bytes."""
    first = make()
    count = max(2, -(-away_bytes // first.nbytes))
    return Contender([first, *(make() for _ in range(count - 1))], multiply)
