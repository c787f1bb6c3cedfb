"""A preallocated KV cache, in one slab: plain, int8 or int4, rolling where the model has a window.

Shapes: B batch, T tokens of this call, C slots, S keys attended to.
Codes of 8 and 4 bits carry a 16-bit scale for each token and head, and only the layer at hand is
ever dequantized.
"""

from __future__ import annotations

import torch

from quantkit.config import ModelConfig
from quantkit.errors import QuantkitError
from quantkit.quantize.packing import pack_low_first, unpack_low_first


class KVCache:
    """Keys and values of `batch` sequences that advance together.

    Args:
        config: the model.
        batch: sequences.
        max_tokens: tokens each sequence will reach; a sliding window W needs at most W slots.
        dtype: compute dtype, in which keys and values come and go.
        bits: 32, 16, 8 or 4 bits an element; None stores the compute dtype.
        device: where the slab lies.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        dtype: torch.dtype,
        bits: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        window = config.sliding_window
        self.rolling = window is not None and window < max_tokens
        self.slots = min(window, max_tokens) if window is not None else max_tokens
        self.max_tokens, self.length, self._dtype = max_tokens, 0, dtype
        self.bits = bits or dtype.itemsize * 8
        half = dtype if dtype.itemsize == 2 else torch.bfloat16
        stored = {32: torch.float32, 16: half}.get(self.bits, torch.uint8)
        width = config.head_dim if self.bits >= 16 else config.head_dim * self.bits // 8
        shape = (config.n_layers, 2, batch, config.n_kv_heads, self.slots)
        self._slab = torch.zeros(*shape, width, dtype=stored, device=device)
        self._scales = torch.zeros(shape, dtype=half, device=device) if self.bits < 16 else None

    @property
    def nbytes(self) -> int:
        """Bytes of the slab and its scales."""
        return self._slab.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def check_room(self, tokens: int) -> None:
        """Raise QuantkitError if `tokens` more do not fit."""
        if self.length + tokens > self.max_tokens:
            raise QuantkitError(
                f"the cache was made for {self.max_tokens:,} tokens; {self.length:,} are in it and {tokens:,} more came"
            )

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of T new tokens and return those they may attend to.

        Args:
            layer: index of the decoder layer.
            k: (B, n_kv_heads, T, head_dim), rotated already.
            v: likewise.

        Returns:
            Keys and values (B, n_kv_heads, S, head_dim), in the order of `mask`'s columns.
        """
        tokens = k.shape[2]
        if not self.rolling:
            self._store(layer, k, v, slice(self.length, self.length + tokens))
            return self._load(layer, self.length + tokens)
        if tokens == 1:
            slot = self.length % self.slots
            self._store(layer, k, v, slice(slot, slot + 1))
            return self._load(layer, min(self.length + 1, self.slots))
        past_k, past_v = self._load(layer, min(self.length, self.slots))
        keys, values = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        kept = min(tokens, self.slots)
        positions = torch.arange(self.length + tokens - kept, self.length + tokens, device=k.device)
        self._store(layer, k[:, :, -kept:], v[:, :, -kept:], positions % self.slots)
        return keys, values

    def mask(self, tokens: int) -> torch.Tensor | None:
        """Return which keys each of the next `tokens` sees: bool (T, S), or None where the answer is plain.

        None means every key for a single token, and the causal triangle for the first chunk.
        """
        if tokens == 1 or (self.length == 0 and not self.rolling):
            return None
        device = self._slab.device
        queries = torch.arange(self.length, self.length + tokens, device=device)
        if not self.rolling:
            keys = torch.arange(self.length + tokens, device=device)
            return keys <= queries[:, None]
        filled = torch.arange(min(self.length, self.slots), device=device)
        past = self.length - 1 - (self.length - 1 - filled) % self.slots  # latest position in each slot
        distance = queries[:, None] - torch.cat((past, queries))
        return (distance >= 0) & (distance < self.slots)

    def advance(self, tokens: int) -> None:
        """Count `tokens` as cached, after every layer has stored them."""
        self.length += tokens

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor, at: slice | torch.Tensor) -> None:
        for index, values in enumerate((k, v)):
            if self._scales is None:
                self._slab[layer, index, :, :, at] = values.to(self._slab.dtype)
            else:
                codes, scales = _quantize_vectors(values, self.bits, self._scales.dtype)
                self._slab[layer, index, :, :, at] = codes
                self._scales[layer, index, :, :, at] = scales

    def _load(self, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        stored = self._slab[layer, :, :, :, :count]
        if self._scales is None:
            k, v = stored.to(self._dtype).unbind()
            return k, v
        codes = unpack_low_first(stored, stored.shape[-1] * 2) if self.bits == 4 else stored
        values = codes.to(self._dtype).sub_(2 ** (self.bits - 1))
        k, v = values.mul_(self._scales[layer, :, :, :, :count, None].to(self._dtype)).unbind()
        return k, v


def _quantize_vectors(
    values: torch.Tensor, bits: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 codes (..., head_dim * bits / 8) and scales (...) of vectors (..., head_dim)."""
    top = 2 ** (bits - 1) - 1
    limits = torch.finfo(scale_dtype)
    values = values.float()
    scales = (values.abs().amax(dim=-1) / top).clamp(limits.smallest_normal, limits.max).to(scale_dtype)
    codes = (values / scales.float()[..., None]).round_().clamp_(-top, top).add_(top + 1).to(torch.uint8)
    return (pack_low_first(codes) if bits == 4 else codes), scales
