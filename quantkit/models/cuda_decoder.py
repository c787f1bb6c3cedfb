"""Decoding on a CUDA GPU: one token of each sequence through all layers, captured in one CUDA graph.

`kernels/triton/step.py` does what `Decoder.forward` does, with the same roundings, in ten kernels a layer. For one
sequence in bfloat16, and matrices that `kernels/triton/row.py` takes, these are seven: products norm what they read,
and add to the residual stream; a norm's factor is rounded once less then. On a Hopper each of the seven begins while
the one ahead still runs, and a product asks for its first tiles meanwhile.

A graph launches all of them at once: one by one that would take longer than they run. It belongs to a cache, reads
where the token stands from device memory, and goes when the cache does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from quantkit.config import ModelConfig
from quantkit.kernels import ops
from quantkit.kernels.triton import TiledWeight
from quantkit.models.kv_cache import KVCache
from quantkit.models.linear import Block, Fused, Linear
from quantkit.models.rope import rope_angles

if TYPE_CHECKING:
    from quantkit.kernels.triton import row
    from quantkit.kernels.triton.layout import Tiles
    from quantkit.kernels.triton.step import Parts

MOST_SEQUENCES = 64
_HALVES = (torch.bfloat16, torch.float16)
_SMALLEST_GROUP = (
    8  # elements that share a scale of the cache, a power of two, so that no word of codes has two
)
_WARM_UPS = 2  # runs before the capture: they compile, and let libraries allocate what a capture could not


@dataclass(frozen=True)
class Layers:
    """A model as a token runs through it."""

    config: ModelConfig
    embedding: torch.Tensor
    blocks: Sequence[Block]
    norm: torch.Tensor
    head: Linear
    frequencies: torch.Tensor  # of RoPE, float32 (head_dim / 2,)


class CudaDecoder:
    """The tokens of every cache in use; made by `of`."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._tokens: WeakKeyDictionary[KVCache, Token] = WeakKeyDictionary()

    @classmethod
    def of(cls, layers: Layers, dtype: torch.dtype) -> CudaDecoder | None:
        """Return None where the kernels cannot run this model.

        They take 16-bit dtypes, and linears that are plain or lie in the layout of the CUDA kernels.
        """
        linears = [linear for block in layers.blocks for linear in _linears(block)]
        if dtype in _HALVES and all(map(_taken, linears)) and ops.decodes(layers.embedding.device):
            return cls(layers)
        return None

    def takes(self, ids: torch.Tensor, cache: KVCache) -> bool:
        """Whether ids (B, T) are one token of each sequence of `cache`, and its elements are plain or codes."""
        slab, scales = cache.stored
        stored = cache.plain is not None
        if scales is not None:
            stored = cache.group == 0 or (
                cache.group >= _SMALLEST_GROUP and cache.group & (cache.group - 1) == 0
            )
        return stored and ids.shape == (slab.shape[2], 1) and len(ids) <= MOST_SEQUENCES

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one token of each sequence, which `cache` then holds too, without waiting for the device.

        Args:
            ids: (B, 1), that `takes` accepts.
            cache: one with room.

        Returns:
            The final, normed states (B, hidden) and the logits (B, vocab), in the compute dtype. The next token of
            this cache overwrites both.
        """
        with torch.cuda.device_of(self._layers.embedding):
            token = self._tokens.get(cache)
            if token is None:
                token = self._tokens[cache] = Token(self._layers, cache)
            outputs = token(ids, cache.length)
        cache.advance(1)
        return outputs


class Token:
    """One token of each sequence of one cache. It holds the cache's memory, not the cache, which may so end first."""

    def __init__(self, layers: Layers, cache: KVCache) -> None:
        from quantkit.kernels.triton.arguments import begins_early
        from quantkit.kernels.triton.step import Slab, Step

        config, dtype = layers.config, layers.embedding.dtype
        slab, scales = cache.stored
        device, batch, half = slab.device, slab.shape[2], config.head_dim // 2
        self._layers = layers
        self._by_rows = dtype == torch.bfloat16 and all(
            _takes_row(block, batch, dtype, device) for block in layers.blocks
        )
        self._ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._stands_at = 0  # what `_position` holds
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tried = not slab.is_cuda  # Triton's interpreter has no graphs
        self._outputs: tuple[torch.Tensor, torch.Tensor] | None = None
        angles = rope_angles(layers.frequencies, 0, cache.max_tokens, dtype)
        cosines, sines = (each[:, 0, :half].contiguous() for each in angles)
        self._step = Step(
            batch, config.n_heads, config.n_kv_heads, config.head_dim, cache.slots, cache.bits,
            0 if scales is None else scales.shape[-1], dtype, cosines, sines, self._position,
            self._by_rows and begins_early(device),
        )  # fmt: skip
        self._slabs = []
        for layer in range(config.n_layers):
            keys, values = slab[layer]
            key_scales, value_scales = (None, None) if scales is None else scales[layer]
            self._slabs.append(Slab(keys, values, key_scales, value_scales, cache.bits))

    def __call__(self, ids: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states and logits of ids (B, 1) at a position."""
        self._ids.copy_(ids[:, 0])
        self._stand_at(position)
        if not self._tried:
            self._capture()
            self._stand_at(position)
        if self._graph is None:
            self._outputs = self._run()
        else:
            self._graph.replay()
        self._stands_at = position + 1
        assert self._outputs is not None
        return self._outputs

    def _stand_at(self, position: int) -> None:
        if self._stands_at != position:
            self._position.fill_(position)
            self._stands_at = position

    def _capture(self) -> None:
        """Warm up, which writes only where this token will, and capture."""
        self._tried = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
                self._position.sub_(1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._outputs = self._run()
            self._graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            logging.getLogger("quantkit").warning(
                "No CUDA graph could be captured, so each kernel is launched by itself: %s", reason
            )

    def _run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the token in `_ids` at `_position`, and advance that."""
        h = self._row() if self._by_rows else self._wide()
        self._position.add_(1)
        return h, self._layers.head(h)

    def _row(self) -> torch.Tensor:
        """Run the layers with norms, SwiGLU and residual sums as parts of the products."""
        from quantkit.kernels.triton import row, step

        layers, eps = self._layers, self._layers.config.norm_eps
        x = F.embedding(self._ids, layers.embedding)  # (B, hidden)
        stream: torch.Tensor | row.Stream = step.norm(x, None, layers.blocks[0].attention_norm, eps)
        following = [*(block.attention_norm for block in layers.blocks[1:]), layers.norm]
        for block, slab, next_norm in zip(layers.blocks, self._slabs, following, strict=True):
            assert isinstance(block.qkv, Fused)
            q, k, v = _split(step.Parts(row.product(stream, *_tiles(block.qkv))[None]), block.qkv.rows)
            out = self._step.attention(self._step.heads(q, k, v, slab), slab)
            stream = row.add_product(out, *_tiles(block.o), x, block.ffn_norm, eps)
            wide = row.gated(stream, *_tiles(block.gate_up))
            stream = row.add_product(wide, *_tiles(block.down), x, next_norm, eps)
        return step.norm(x, None, layers.norm, eps)

    def _wide(self) -> torch.Tensor:
        """Run the layers, whatever their linears are."""
        from quantkit.kernels.triton import step

        layers, eps = self._layers, self._layers.config.norm_eps
        x = F.embedding(self._ids, layers.embedding)  # (B, hidden)
        following = [*(block.attention_norm for block in layers.blocks[1:]), layers.norm]
        h = step.norm(x, None, layers.blocks[0].attention_norm, eps)
        for block, slab, next_norm in zip(layers.blocks, self._slabs, following, strict=True):
            q, k, v = _parts(h, block.qkv)
            out = self._step.attention(self._step.heads(q, k, v, slab), slab)
            h = step.norm(x, _product(out, block.o), block.ffn_norm, eps)
            gate, up = _parts(h, block.gate_up)
            wide = step.swiglu(gate, up, x.dtype)
            h = step.norm(x, _product(wide, block.down), next_norm, eps)
        return h


def _takes_row(block: Block, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a block's linears lie in four matrices that the row kernel takes, gate and up halves of one."""
    from quantkit.kernels.triton import row

    if not (isinstance(block.qkv, Fused) and isinstance(block.gate_up, Fused)):
        return False
    halves = block.gate_up.linear
    gate, up = block.gate_up.rows
    return gate == up and all(
        isinstance(linear.weight, TiledWeight)
        and row.takes(linear.weight.tiles, batch, dtype, device, linear is halves)
        for linear in (block.qkv.linear, block.o, halves, block.down)
    )


def _tiles(linear: Linear | Fused | tuple[Linear, ...]) -> tuple[Tiles, torch.Tensor | None]:
    """Return the matrix and the bias of a linear that `_takes_row` found."""
    whole = linear.linear if isinstance(linear, Fused) else linear
    assert isinstance(whole, Linear)
    assert isinstance(whole.weight, TiledWeight)
    return whole.weight.tiles, whole.bias


def _linears(block: Block) -> list[Linear]:
    qkv = [block.qkv.linear] if isinstance(block.qkv, Fused) else [*block.qkv]
    gate_up = [block.gate_up.linear] if isinstance(block.gate_up, Fused) else [*block.gate_up]
    return [*qkv, block.o, *gate_up, block.down]


def _taken(linear: Linear) -> bool:
    weight = linear.weight
    return isinstance(weight, torch.Tensor) or (isinstance(weight, TiledWeight) and not weight.tiles.flat)


def _parts(x: torch.Tensor, linears: Fused | Sequence[Linear]) -> list[Parts]:
    """Return x (B, K) times each matrix, not added up yet; those of a fused one are views."""

    if not isinstance(linears, Fused):
        return [_product(x, linear) for linear in linears]
    return _split(_product(x, linears.linear), linears.rows)


def _split(whole: Parts, rows: Sequence[int]) -> list[Parts]:
    """Return the parts of matrices that lie below each other, so many rows each, as views."""
    from quantkit.kernels.triton.step import Parts

    sums = whole.sums.split(rows, dim=2)
    biases = [None] * len(sums) if whole.bias is None else whole.bias.split(rows)
    return [Parts(*pair) for pair in zip(sums, biases, strict=True)]


def _product(x: torch.Tensor, linear: Linear) -> Parts:
    from quantkit.kernels.triton import launch
    from quantkit.kernels.triton.step import Parts

    if isinstance(linear.weight, TiledWeight):
        return Parts(launch.parts(x, linear.weight.tiles), linear.bias)
    return Parts(linear(x)[None])  # cuBLAS adds the bias itself
