"""Matrices that more than one way of quantizing is tried on."""

from __future__ import annotations

import torch


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed() -> torch.Tensor:
    """Return rows of very different sizes, zero rows and single outliers among them."""
    weight = randn(70, 96) * torch.logspace(-30, 4, 70)[:, None]
    weight[::7] = 0
    weight[3, 5], weight[40, 95] = 1e4, -1e4
    return weight
