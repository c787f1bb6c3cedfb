"""A preallocated KV cache, in one slab: plain, int8 or int4, rolling where the model has a window.

Shapes: B batch, T tokens of this call, C slots, S keys attended to.
Codes of 8 and 4 bits carry 16-bit scales. Where the stored dtype is not the compute dtype, the keys and
values of one layer at a time are converted, in pieces, into a scratch that lives as long as the cache:
it never grows, so it leaves no holes behind.
"""

from __future__ import annotations

import torch

from calculators.caching import piece_tokens
from calculators.kv_cache import check_group
from quantkit.config import ModelConfig
from quantkit.errors import QuantkitError
from quantkit.quantize.vectors import dequantize_vectors, head_rotation, quantize_vectors


class KVCache:
    """Keys and values of `batch` sequences that advance together.

    Args:
        config: the model.
        batch: sequences.
        max_tokens: tokens each sequence will reach; a sliding window W needs at most W slots.
        dtype: compute dtype, in which keys and values come and go.
        bits: 32, 16, 8 or 4 bits an element; None stores the compute dtype.
        device: where the slab lies.
        group: elements of a head that share a scale; 0 is the whole head.

    Attributes:
        hadamard: what queries and keys are multiplied by before they come here, each (head_dim, head_dim);
            None where the cache is not quantized.

    Raises:
        QuantkitError: the group does not divide the head.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        dtype: torch.dtype,
        bits: int | None = None,
        device: torch.device | str = "cpu",
        group: int = 0,
    ) -> None:
        try:
            check_group(config.head_dim, group)
        except ValueError as error:
            raise QuantkitError(str(error)) from None
        window, head_dim = config.sliding_window, config.head_dim
        self.rolling = window is not None and window < max_tokens
        self.slots = min(window, max_tokens) if window is not None else max_tokens
        self.max_tokens, self.length = max_tokens, 0
        self.bits, self.group = bits or dtype.itemsize * 8, group
        half = dtype if dtype.itemsize == 2 else torch.bfloat16
        stored = {32: torch.float32, 16: half}.get(self.bits, torch.uint8)
        width = head_dim if self.bits >= 16 else head_dim * self.bits // 8
        shape = (2, batch, config.n_kv_heads, self.slots)
        self._slab = torch.zeros(config.n_layers, *shape, width, dtype=stored, device=device)
        self._scales: torch.Tensor | None = None
        if self.bits < 16:
            scales = (config.n_layers, *shape, head_dim // (group or head_dim))
            self._scales = torch.zeros(scales, dtype=torch.float16, device=device)
        self._scratch: torch.Tensor | None = None
        if stored != dtype:
            self._scratch = torch.empty(*shape, head_dim, dtype=dtype, device=device)
        self.hadamard = head_rotation(head_dim, dtype, device) if self.bits < 16 else None

    @property
    def nbytes(self) -> int:
        """Bytes of the slab and its scales, without the scratch."""
        return self._slab.nbytes + (0 if self._scales is None else self._scales.nbytes)

    @property
    def plain(self) -> torch.Tensor | None:
        """All keys and values (n_layers, 2, B, n_kv_heads, slots, head_dim) where they lie in the compute dtype."""
        return self._slab if self._scratch is None else None

    @property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Elements or codes (n_layers, 2, B, n_kv_heads, slots, …), and float16 scales where it is quantized."""
        return self._slab, self._scales

    @property
    def next_slot(self) -> int:
        """Where the next token goes."""
        return self.length % self.slots

    def check_room(self, tokens: int) -> None:
        """Raise QuantkitError if `tokens` more do not fit."""
        if self.length + tokens > self.max_tokens:
            raise QuantkitError(
                f"the cache was made for {self.max_tokens:,} tokens; {self.length:,} are in it and {tokens:,} more came"
            )

    def keys(self, tokens: int) -> int:
        """Return S, the keys that `extend` gives for the next `tokens`."""
        if self.rolling and tokens == 1:
            return min(self.length + 1, self.slots)
        return min(self.length, self.slots) + tokens

    def window(self, tokens: int) -> int | None:
        """Return the window that a mask must impose on these keys, None where each sees all before it."""
        return self.slots if self.rolling and tokens > 1 else None

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of T new tokens and return those they may attend to.

        Args:
            layer: index of the decoder layer.
            k: (B, T, n_kv_heads, head_dim), with RoPE, and multiplied by `hadamard[1]` where there is one.
            v: likewise.

        Returns:
            Keys and values (B, n_kv_heads, S, head_dim), oldest first; for a single token of a rolling
            cache in any order.
        """
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.rolling and k.shape[2] > 1:
            keys, values = self._joined(layer, k, v)
            self._store(layer, k, v)
            return keys, values
        self._store(layer, k, v)
        return self.held(layer, self.keys(k.shape[2]))

    def held(self, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the first `count` slots of a layer hold: keys and values (B, n_kv_heads, count, head_dim)."""
        stored = self._load(layer, count)
        return stored[0], stored[1]

    def advance(self, tokens: int) -> None:
        """Count `tokens` as cached, after every layer has stored them."""
        self.length += tokens

    def _joined(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a rolling cache holds, oldest first, with the new tokens behind it, as copies."""
        if self.length == 0:
            return k, v
        past = self._load(layer, min(self.length, self.slots))
        oldest = self.length % self.slots if self.length > self.slots else 0
        pieces = (past[:, :, :, oldest:], past[:, :, :, :oldest])
        return (
            torch.cat((pieces[0][0], pieces[1][0], k), dim=2),
            torch.cat((pieces[0][1], pieces[1][1], v), dim=2),
        )

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        kept = min(k.shape[2], self.slots)
        start = (self.length + k.shape[2] - kept) % self.slots
        for place, vectors in enumerate((k[:, :, -kept:], v[:, :, -kept:])):
            self._store_vectors(layer, place, vectors, start)

    def _store_vectors(self, layer: int, place: int, vectors: torch.Tensor, start: int) -> None:
        """Put keys (place 0) or values (1) into the slots from `start` on, and on from the first one."""
        parts = [(self._slab, vectors)]
        if self._scales is not None:
            codes, scales = quantize_vectors(vectors, self.bits, self.group, self._scales.dtype)
            parts = [(self._slab, codes), (self._scales, scales)]
        before_end = min(vectors.shape[2], self.slots - start)
        for slab, new in parts:
            slots = slab[layer, place]
            slots[:, :, start : start + before_end] = new[:, :, :before_end]
            if new.shape[2] > before_end:
                slots[:, :, : new.shape[2] - before_end] = new[:, :, before_end:]

    def _load(self, layer: int, count: int) -> torch.Tensor:
        """Return keys and values (2, B, n_kv_heads, count, head_dim) of a layer in the compute dtype."""
        if self._scratch is None:
            return self._slab[layer, :, :, :, :count]
        step = piece_tokens(self._scratch[:, :, :, 0].numel())
        for start in range(0, count, step):
            at = slice(start, min(start + step, count))
            stored, out = self._slab[layer, :, :, :, at], self._scratch[:, :, :, at]
            if self._scales is None:
                out.copy_(stored)
            else:
                dequantize_vectors(stored, self._scales[layer, :, :, :, at], self.bits, out)
        return self._scratch[:, :, :, :count]
