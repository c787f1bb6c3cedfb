"""Bytes of a KV cache: keys and values of every layer, for every cached token.

A token takes, in each layer and for K and V each, `n_kv_heads` vectors of `head_dim` codes;
below 16 bits each vector carries one 16-bit scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from calculators.units import bits_to_bytes

SCALE_BITS = 16


@dataclass(frozen=True)
class KVLayout:
    """Shape of the cache for one token.

    Attributes:
        layers: decoder layers.
        n_kv_heads: key/value heads; fewer than query heads under grouped-query attention.
        head_dim: elements of a head.
        bits: bits of an element: 32, 16, 8 or 4.
    """

    layers: int
    n_kv_heads: int
    head_dim: int
    bits: int

    @property
    def vector_bytes(self) -> int:
        """Bytes of one head's key, or value, with its scale."""
        scale = SCALE_BITS if self.bits < 16 else 0
        return bits_to_bytes(self.head_dim * self.bits) + bits_to_bytes(scale)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one sequence takes over all layers."""
        return 2 * self.layers * self.n_kv_heads * self.vector_bytes

    def describe(self) -> str:
        """Return the layout in words."""
        if self.bits >= 16:
            return f"{self.bits}-bit elements"
        return f"int{self.bits} codes with a 16-bit scale for each token and head"


def cached_tokens(context: int, window: int | None) -> int:
    """Return the tokens a cache holds: a sliding window of W tokens keeps the last W."""
    return context if window is None else min(context, window)


def kv_cache_bytes(layout: KVLayout, context: int, batch: int = 1, window: int | None = None) -> int:
    """Return the bytes of a cache preallocated for `batch` sequences of `context` tokens."""
    return batch * cached_tokens(context, window) * layout.token_bytes
