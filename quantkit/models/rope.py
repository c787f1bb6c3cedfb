"""Rotary position embeddings, half-split: element i of a head pairs with i + head_dim / 2."""

from __future__ import annotations

import math

import torch

from quantkit.config import ModelConfig


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to x (B, T, heads, head_dim) in place, for cosines and sines (T, 1, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1).mul_(sin)
    return x.mul_(cos).add_(swapped)


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Return the float32 rotation per position of each pair, (head_dim / 2,).

    Llama-3 scaling leaves wavelengths shorter than the original context / high_freq_factor alone,
    divides those longer than it / low_freq_factor by `factor`, and blends between (Llama 3.1's
    `apply_scaling`, https://github.com/meta-llama/llama-models).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_divisors is not None:
        return frequencies / torch.tensor(config.rope_divisors)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def rope_angles(
    frequencies: torch.Tensor, start: int, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines (T, 1, head_dim) of positions from `start`, rounded to `dtype`."""
    positions = torch.arange(start, start + tokens, device=frequencies.device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).repeat(1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
