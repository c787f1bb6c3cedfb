"""Decoding on a CPU: one token of one sequence through all layers in one call of the extension.

`kernels/native/decode.inl` does what `Decoder.forward` does, without an operator for each step; small models
spend most of a token's time between operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quantkit.config import ModelConfig
from quantkit.kernels import native
from quantkit.kernels.native import PackedWeight
from quantkit.models.kv_cache import KVCache
from quantkit.models.linear import Block, Fused, Linear

_VECTOR = 16  # hidden sizes and heads must be multiples of it


class NativeDecoder:
    """The layers as the extension holds them; made by `of`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def of(
        cls, config: ModelConfig, blocks: Sequence[Block], norm: torch.Tensor, dtype: torch.dtype
    ) -> NativeDecoder | None:
        """Return None where the extension cannot run this model: it takes bfloat16 and packed matrices only."""
        sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
        if dtype != torch.bfloat16 or any(size % _VECTOR for size in sizes) or not all(map(_packed, blocks)):
            return None
        model = native.require().Model(
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            eps=config.norm_eps,
            norm=norm,
        )
        for block in blocks:
            assert isinstance(block.qkv, Fused)
            assert isinstance(block.gate_up, Fused)
            model.add_layer(
                attention_norm=block.attention_norm,
                qkv=_matrix(block.qkv.linear),
                o=_matrix(block.o),
                ffn_norm=block.ffn_norm,
                gate_up=_matrix(block.gate_up.linear),
                down=_matrix(block.down),
            )
        return cls(model)

    @staticmethod
    def takes(x: torch.Tensor, cache: KVCache) -> bool:
        """Whether x (B, T, hidden) is one token of one sequence, and the cache holds plain bfloat16."""
        return x.shape[:2] == (1, 1) and cache.plain is not None

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Return the final, normed state (1, 1, hidden) of x, which `cache` then holds too.

        Args:
            x: (1, 1, hidden), the token's embedding.
            cos: (1, 1, head_dim), of its position.
            sin: likewise.
            cache: one that `takes` accepts, with room.
        """
        assert cache.plain is not None
        states = torch.empty_like(x)
        threads = torch.get_num_threads()
        self._model.run(x, cos, sin, cache.plain, cache.next_slot, cache.keys(1), states, threads)
        cache.advance(1)
        return states


def _packed(block: Block) -> bool:
    return (
        isinstance(block.qkv, Fused)
        and isinstance(block.gate_up, Fused)
        and all(
            isinstance(linear.weight, PackedWeight)
            for linear in (block.qkv.linear, block.o, block.gate_up.linear, block.down)
        )
    )


def _matrix(linear: Linear) -> Any:
    weight, module = linear.weight, native.require()
    assert isinstance(weight, PackedWeight)
    bias = None if linear.bias is None else linear.bias.float()
    return module.Matrix(weight.kernel_layout, weight.data, bias)
