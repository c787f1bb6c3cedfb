"""Bytes of a KV cache: keys and values of every layer, for every cached token.

A token takes, in each layer and for K and V each, `n_kv_heads` vectors of `head_dim` codes;
below 16 bits each vector carries one 16-bit scale, or one for each group of its elements.
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
        group: elements of a head that share a scale; 0 is the whole head.

    Raises:
        ValueError: the group does not divide the head.
    """

    layers: int
    n_kv_heads: int
    head_dim: int
    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        check_group(self.head_dim, self.group)

    @property
    def code_bytes(self) -> int:
        """Bytes of one head's key, or value, without scales."""
        return bits_to_bytes(self.head_dim * self.bits)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one head's key, or value."""
        return self.head_dim // (self.group or self.head_dim) * SCALE_BITS // 8 if self.bits < 16 else 0

    @property
    def vector_formula(self) -> str:
        """How the bytes of one head's key, or value, come about."""
        codes = f"head_dim {self.head_dim} x {self.bits} bits"
        return f"({codes} + {self.scale_bytes * 8} bits of scales)" if self.scale_bytes else codes

    @property
    def vectors(self) -> int:
        """Keys and values of one token of one sequence, over all layers."""
        return 2 * self.layers * self.n_kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one sequence takes over all layers."""
        return self.vectors * (self.code_bytes + self.scale_bytes)

    def describe(self) -> str:
        """Return the layout in words."""
        if self.bits >= 16:
            return f"{self.bits}-bit elements"
        of = f"{self.group} elements of a token and head" if self.group else "token and head"
        return f"int{self.bits} codes with a 16-bit scale for each {of}"


def cached_tokens(context: int, window: int | None) -> int:
    """Return the tokens a cache holds: a sliding window of W tokens keeps the last W."""
    return context if window is None else min(context, window)


def kv_cache_bytes(layout: KVLayout, context: int, batch: int = 1, window: int | None = None) -> int:
    """Return the bytes of a cache preallocated for `batch` sequences of `context` tokens."""
    return sum(kv_cache_parts(layout, context, batch, window))


def kv_cache_parts(
    layout: KVLayout, context: int, batch: int = 1, window: int | None = None
) -> tuple[int, ...]:
    """Return the bytes of the cache's tensors: the slab of codes, and that of scales where there is one."""
    vectors = batch * cached_tokens(context, window) * layout.vectors
    parts = (vectors * layout.code_bytes, vectors * layout.scale_bytes)
    return parts if layout.scale_bytes else parts[:1]


def check_group(head_dim: int, group: int) -> None:
    """Raise ValueError where groups of `group` elements do not fill a head."""
    if group < 0 or (group and head_dim % group):
        raise ValueError(f"a KV group of {group} does not divide a head of {head_dim} elements")
