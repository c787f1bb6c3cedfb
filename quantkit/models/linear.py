"""A linear layer whose matrix is plain or quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.kernels import ops
from quantkit.tensor import QuantizedTensor


@dataclass(frozen=True)
class Linear:
    """y = x @ W.T + bias, with W (N, K) plain or quantized and bias (N,) or None."""

    weight: torch.Tensor | QuantizedTensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, QuantizedTensor):
            return ops.linear(x, self.weight, self.bias)
        return torch.nn.functional.linear(x, self.weight, self.bias)
