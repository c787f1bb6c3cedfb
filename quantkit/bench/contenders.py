"""Ways to multiply by one matrix, each with copies of its own: none is in a cache when it is used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.tensor import QuantizedTensor


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


def torch_int8(weight: QuantizedTensor, away_bytes: int) -> Contender:
    """Return torch's kernel for int8 with a scale for each row, which CPUs and GPUs have alike."""
    codes = (weight.codes ^ 0x80).view(torch.int8)  # from offset binary
    scales = weight.scales.view(-1)

    def multiply(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, copy, scales)

    return rotating(codes.clone, away_bytes, multiply)
