"""The layers on a CUDA GPU: prompts, and one token of each sequence, captured in one CUDA graph.

`kernels/triton/step.py` does what `Decoder.forward` does, with the same roundings, in ten kernels a layer; attention
of a prompt is that of `attention.py`. For one token of one sequence in bfloat16, and matrices that
`kernels/triton/row.py` takes, these are seven: products norm what they read, and add to the residual stream; a norm's
factor is rounded once less then. On a Hopper each of the seven begins while the one ahead still runs, and a product
asks for its first tiles meanwhile.

A graph launches all of them at once: one by one that would take longer than they run. It belongs to a cache, reads
where the token stands from device memory, and goes when the cache does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from quantkit.config import ModelConfig
from quantkit.errors import is_device_out_of_memory
from quantkit.kernels import ops
from quantkit.kernels.triton import TiledWeight
from quantkit.models.attention import Attention
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
_ANGLE_POSITIONS = 4096  # of RoPE, computed at once
_WARM_UPS = 2  # runs before the capture: they compile, and let libraries allocate what a capture could not


@dataclass(frozen=True)
class Layers:
    """A model as tokens run through it; `attention` is the path of prompts."""

    config: ModelConfig
    embedding: torch.Tensor
    blocks: Sequence[Block]
    norm: torch.Tensor
    head: Linear
    frequencies: torch.Tensor  # of RoPE, float32 (head_dim / 2,)
    attention: str

    @cached_property
    def largest(self) -> int:
        """Elements of a block's largest matrix as a checkpoint has it: so much is dequantized at once."""
        return max(spec.elements for spec in self.config.tensors if spec.is_block_linear)


class CudaDecoder:
    """What runs for every cache in use; made by `of`."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._runs: WeakKeyDictionary[KVCache, Run] = WeakKeyDictionary()

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
        """Whether ids (B, T) are tokens that `prompt` runs, or `token` where T = 1."""
        slab, scales = cache.stored
        stored = cache.plain is not None
        if scales is not None:
            stored = cache.group == 0 or (
                cache.group >= _SMALLEST_GROUP and cache.group & (cache.group - 1) == 0
            )
        batch, tokens = ids.shape
        if tokens == 1:
            fits = batch <= MOST_SEQUENCES
        else:  # of a rolling cache, those that overwrite none
            fits = tokens > 1 and (not cache.rolling or cache.length + tokens <= cache.slots)
        return stored and batch == slab.shape[2] and fits

    @torch.inference_mode()
    def prompt(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Run ids (B, T), which `cache` then holds too, and return their final, normed states (B, T, hidden).

        Args:
            ids: that `takes` accepts, T > 1.
            cache: one with room.
        """
        with torch.cuda.device_of(self._layers.embedding):
            states = self._run(cache).prompt(ids, cache)
        cache.advance(ids.shape[1])
        return states

    @torch.inference_mode()
    def token(self, ids: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one token of each sequence, which `cache` then holds too, without waiting for the device.

        Args:
            ids: (B, 1), that `takes` accepts.
            cache: one with room.

        Returns:
            The final, normed states (B, hidden) and the logits (B, vocab), in the compute dtype. The next token of
            this cache overwrites both. Graphs share a workspace of cuBLAS: tokens of different caches must
            run on one stream.
        """
        with torch.cuda.device_of(self._layers.embedding):
            outputs = self._run(cache).token(ids, cache.length)
        cache.advance(1)
        return outputs

    def _run(self, cache: KVCache) -> Run:
        run = self._runs.get(cache)
        if run is None:
            run = self._runs[cache] = Run(self._layers, cache)
        return run


class Run:
    """The tokens of one cache. It holds the cache's memory, not the cache, which may so end first."""

    def __init__(self, layers: Layers, cache: KVCache) -> None:
        from quantkit.kernels.triton.arguments import begins_early
        from quantkit.kernels.triton.step import Slab, Step

        config, dtype = layers.config, layers.embedding.dtype
        slab, scales = cache.stored
        device, batch = slab.device, slab.shape[2]
        self._layers = layers
        self._by_rows = dtype == torch.bfloat16 and all(
            _takes_row(block, batch, dtype, device) for block in layers.blocks
        )
        self._ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._stands_at: int | None = 0  # what `_position` holds, None where a token failed
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = _captures(device)
        self._outputs: tuple[torch.Tensor, torch.Tensor] | None = None
        cosines, sines = _half_angles(layers.frequencies, cache.max_tokens, dtype)
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

    def prompt(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Return the states (B, T, hidden) of ids (B, T), whose keys and values `cache` has room for."""
        layers, config = self._layers, self._layers.config
        batch, tokens = ids.shape
        count = cache.keys(tokens)
        attention = Attention(layers.attention, tokens, count, None, ids.device)
        self._stand_at(cache.length)

        def attend(layer: int, q: Parts, k: Parts, v: Parts) -> torch.Tensor:
            queries = self._step.heads(q, k, v, self._slabs[layer])
            keys, values = cache.held(layer, count)
            return attention(queries.view(batch, tokens, config.n_heads, -1), keys, values).flatten(0, 1)

        x = F.embedding(ids.flatten(), layers.embedding)  # (B T, hidden)
        return _wide(layers, x, attend).view(batch, tokens, -1)

    def token(self, ids: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states and logits of ids (B, 1) at a position."""
        self._ids.copy_(ids[:, 0])
        self._stand_at(position)
        self._stands_at = None  # until all of the token is run: it may fail after `_position` advanced
        if self._graph is None and self._captures is not None and not self._captures.failed:
            self._capture(self._captures)
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

    def _capture(self, captures: _Captures) -> None:
        """Warm up, which writes only where this token will, and capture."""
        with captures.alone:
            current, side = torch.cuda.current_stream(), captures.stream
            if captures.failed:  # while this one waited
                return
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UPS):
                        self._run()
                        self._position.sub_(1)
            finally:  # what it launched before it failed, too, runs before anything else
                current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    self._outputs = self._run()
                self._graph = graph
            except RuntimeError as error:
                if is_device_out_of_memory(error):
                    raise
                captures.failed = True
                reason = " ".join(str(error).split())
                logging.getLogger("quantkit").warning(
                    "No CUDA graph could be captured, so each kernel is launched by itself: %s", reason
                )
            finally:
                torch.cuda.set_stream(current)  # which a capture that fails leaves changed

    def _run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the token in `_ids` at `_position`, and advance that."""
        if self._by_rows:
            h = self._row()
        else:
            h = _wide(self._layers, F.embedding(self._ids, self._layers.embedding), self._attend)
        self._position.add_(1)
        return h, self._layers.head(h)

    def _row(self) -> torch.Tensor:
        """Run the layers with norms, SwiGLU and residual sums as parts of the products."""
        from quantkit.kernels.triton import row, step

        layers, eps = self._layers, self._layers.config.norm_eps
        x = F.embedding(self._ids, layers.embedding)  # (B, hidden)
        stream: torch.Tensor | row.Stream = step.norm(x, None, layers.blocks[0].attention_norm, eps)
        following = [*(block.attention_norm for block in layers.blocks[1:]), layers.norm]
        for layer, (block, next_norm) in enumerate(zip(layers.blocks, following, strict=True)):
            assert isinstance(block.qkv, Fused)
            q, k, v = _split(step.Parts(row.product(stream, *_tiles(block.qkv))[None]), block.qkv.rows)
            out = self._attend(layer, q, k, v)
            stream = row.add_product(out, *_tiles(block.o), x, block.ffn_norm, eps)
            wide = row.gated(stream, *_tiles(block.gate_up))
            stream = row.add_product(wide, *_tiles(block.down), x, next_norm, eps)
        return step.norm(x, None, layers.norm, eps)

    def _attend(self, layer: int, q: Parts, k: Parts, v: Parts) -> torch.Tensor:
        slab = self._slabs[layer]
        return self._step.attention(self._step.heads(q, k, v, slab), slab)


class _Captures:
    """What the graphs of a device share when they are captured.

    Attributes:
        stream: one for all of them, since cuBLAS keeps a workspace for each that it has seen.
        alone: held by the one that captures.
        failed: whether one could not be captured, but for a lack of memory, which may pass. CUDA may leave much behind
            then, so no other is tried.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.alone = Lock()
        self.failed = False


@lru_cache
def _captures(device: torch.device) -> _Captures | None:
    """Return what graphs of a device share; Triton's interpreter has none."""
    return _Captures(device) if device.type == "cuda" else None


def _half_angles(
    frequencies: torch.Tensor, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines (T, head_dim / 2) of RoPE, computed in float32 some positions at a time."""
    cosines, sines = (frequencies.new_empty(tokens, len(frequencies), dtype=dtype) for _ in range(2))
    for start in range(0, tokens, _ANGLE_POSITIONS):
        piece = slice(start, min(start + _ANGLE_POSITIONS, tokens))
        cos, sin = rope_angles(frequencies, start, piece.stop - start, dtype)
        cosines[piece], sines[piece] = cos[:, 0, : len(frequencies)], sin[:, 0, : len(frequencies)]
    return cosines, sines


def _wide(
    layers: Layers, x: torch.Tensor, attend: Callable[[int, Parts, Parts, Parts], torch.Tensor]
) -> torch.Tensor:
    """Run x (R, hidden) through the layers, whatever their linears are, and return the normed states.

    `attend` takes a layer's number, queries, keys and values; x is overwritten. Tensors are released where they were
    last used: of a prompt they are large.
    """
    from quantkit.kernels.triton import step

    eps = layers.config.norm_eps
    following = [*(block.attention_norm for block in layers.blocks[1:]), layers.norm]
    h = step.norm(x, None, layers.blocks[0].attention_norm, eps)
    for layer, (block, next_norm) in enumerate(zip(layers.blocks, following, strict=True)):
        q, k, v = _parts(h, block.qkv, layers.largest)
        del h
        out = attend(layer, q, k, v)
        del q, k, v
        h = step.norm(x, _product(out, block.o, layers.largest), block.ffn_norm, eps)
        del out
        gate, up = _parts(h, block.gate_up, layers.largest)
        del h
        wide = step.swiglu(gate, up, x.dtype)
        del gate, up
        h = step.norm(x, _product(wide, block.down, layers.largest), next_norm, eps)
        del wide
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


def _parts(x: torch.Tensor, linears: Fused | Sequence[Linear], most: int) -> list[Parts]:
    """Return x (R, K) times each matrix, not added up yet; those of a fused one are views."""
    if not isinstance(linears, Fused):
        return [_product(x, linear, most) for linear in linears]
    return _split(_product(x, linears.linear, most), linears.rows)


def _split(whole: Parts, rows: Sequence[int]) -> list[Parts]:
    """Return the parts of matrices that lie below each other, so many rows each, as views."""
    from quantkit.kernels.triton.step import Parts

    sums = whole.sums.split(rows, dim=2)
    biases = [None] * len(sums) if whole.bias is None else whole.bias.split(rows)
    return [Parts(*pair) for pair in zip(sums, biases, strict=True)]


def _product(x: torch.Tensor, linear: Linear, most: int) -> Parts:
    from quantkit.kernels.triton import launch
    from quantkit.kernels.triton.step import Parts

    if isinstance(linear.weight, TiledWeight):
        return Parts(launch.parts(x, linear.weight.tiles, most), linear.bias)
    return Parts(linear(x)[None])  # cuBLAS adds the bias itself
