"""Linear layers whose matrices are plain or quantized, and the block they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.kernels import ops

Weight = torch.Tensor | ops.Prepared


@dataclass(frozen=True)
class Linear:
    """y = x @ W.T + bias, with W (N, K) plain or quantized and bias (N,) or None."""

    weight: Weight
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, torch.Tensor):
            return ops.plain_linear(x, self.weight, self.bias)
        return ops.linear(x, self.weight, self.bias)

    @property
    def rows(self) -> int:
        """N."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Fused:
    """Several linears of one input whose matrices lie below each other in one of shape (sum of N, K).

    Attributes:
        linear: the one matrix.
        rows: N of each part.
    """

    linear: Linear
    rows: Sequence[int]

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each part's result (..., N), as views of one tensor."""
        return self.linear(x).split(self.rows, dim=-1)


@dataclass(frozen=True)
class Block:
    """The weights of one layer."""

    attention_norm: torch.Tensor
    qkv: Fused | tuple[Linear, Linear, Linear]
    o: Linear
    ffn_norm: torch.Tensor
    gate_up: Fused | tuple[Linear, Linear]
    down: Linear
