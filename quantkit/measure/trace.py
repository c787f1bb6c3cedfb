"""The real decoder on `meta` tensors, every allocation and release followed through the allocator's rules.

No GPU and no memory are needed: a tensor on `meta` has a size and a lifetime, and the code that makes and
drops it is the code that runs on a GPU. What kernels take inside themselves is added: cuBLAS's workspace, and
what FlashAttention splits its keys into.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calculators.allocator import Block, CachingAllocator
from calculators.flash import Call, accumulators
from calculators.hardware import ASSUMED_PLATFORM, Platform
from calculators.peak import chunks, prompt_tokens
from quantkit.config import ModelConfig
from quantkit.estimate import Workload, attention_path, compute_dtype
from quantkit.kernels.reference import forget_tables
from quantkit.models.decoder import Decoder
from quantkit.models.kv_cache import KVCache
from quantkit.models.loader import TORCH_DTYPES
from quantkit.schemes import QuantScheme, plan_weights
from quantkit.tensor import QuantizedTensor, empty_quantized

# integer operators with a number: results are like the first argument, and their code for `meta` is slow
LIKE_FIRST = (torch.ops.aten.__and__.Scalar, torch.ops.aten.__rshift__.Scalar)
MATRIX_PRODUCTS = ("aten::linear", "aten::mm", "aten::bmm", "aten::addmm", "aten::matmul")
FLASH = "aten::_flash_attention_forward"


@dataclass(frozen=True)
class Event:
    """One request to the allocator, or its release: `alloc` or `free`, a tensor's number, its bytes."""

    action: str
    number: int
    nbytes: int


@dataclass(frozen=True)
class Traced:
    """Bytes that a traced run took.

    Attributes:
        weights_bytes: of all tensors of the model.
        kv_cache_bytes: of the cache.
        activations_bytes: all else at its largest, as requested, cuBLAS's workspace not counted.
        allocated_bytes: peak of `torch.cuda.memory_allocated`.
        reserved_bytes: peak of `torch.cuda.memory_reserved`.
        load_allocated_bytes: allocated once the weights are loaded.
        load_reserved_bytes: reserved then.
        events: every request and release, in order.
    """

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    load_allocated_bytes: int
    load_reserved_bytes: int
    events: Sequence[Event] = field(repr=False)


class Tracer(TorchDispatchMode):
    """Follows storages on `meta` that are made under it.

    Args:
        platform: whose allocator, workspace and multiprocessors are modelled.
    """

    def __init__(self, platform: Platform) -> None:
        super().__init__()
        self.allocator = CachingAllocator(platform.expandable_segments)
        self.events: list[Event] = []
        self._workspace_bytes, self._sm_count = platform.workspace.nbytes, platform.sm_count
        self._has_workspace = False
        self._alive: dict[int, tuple[weakref.ref[Any], int, Block | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _writes(func):  # takes nothing, and there are no values to write
            return kwargs["out"] if kwargs and "out" in kwargs else args[0]
        out = args[0].clone() if func in LIKE_FIRST else func(*args, **(kwargs or {}))
        leaves = (out,) if isinstance(out, torch.Tensor) else tree_leaves(out)
        if func._schema.name == FLASH:
            self._see_all(leaves[:2])  # the result and its log-sum-exp
            parts = [self._take(nbytes) for nbytes in self._split(*args[:2])]
            self._see_all(leaves[2:])
            for number, block in parts:
                self._drop(number, block)
        else:
            self._see_all(leaves)
        if not self._has_workspace and func._schema.name in MATRIX_PRODUCTS:
            self._has_workspace = True
            self._take(self._workspace_bytes)
        return out

    def _split(self, q: torch.Tensor, keys: torch.Tensor) -> list[int]:
        """Return the bytes of what the splits of q (B, T, n_heads, D) and keys (B, S, n_kv_heads, D) go to."""
        batch, tokens, n_heads, head_dim = q.shape
        call = Call(batch, tokens, keys.shape[1], n_heads, keys.shape[2], head_dim)
        return [prod(factors) for _, factors in accumulators(call, self._sm_count)]

    def _see_all(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                self._see(leaf.untyped_storage())

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._alive and storage.nbytes():
            number, block = self._take(storage.nbytes())
            self._alive[key] = (weakref.ref(storage, lambda _: self._release(key)), number, block)

    def _take(self, nbytes: int) -> tuple[int, Block | None]:
        number = len(self.events)
        self.events.append(Event("alloc", number, nbytes))
        return number, self.allocator.malloc(nbytes)

    def _release(self, key: int) -> None:
        _, number, block = self._alive.pop(key)
        self._drop(number, block)

    def _drop(self, number: int, block: Block | None) -> None:
        self.events.append(Event("free", number, self.events[number].nbytes))
        self.allocator.free(block)


@cache
def _writes(func: Any) -> bool:
    """Whether an operator returns only the tensor it was given to write into."""
    aliases = [result.alias_info for result in func._schema.returns]
    return len(aliases) == 1 and aliases[0] is not None and aliases[0].is_write


def trace(
    config: ModelConfig,
    scheme: QuantScheme,
    workload: Workload,
    platform: Platform = ASSUMED_PLATFORM,
    plan: Mapping[str, QuantScheme] | None = None,
    layers: int | None = None,
    sampled: bool = False,
) -> Traced:
    """Load a model, fill a cache to the context and decode a token, all on `meta`.

    Args:
        config: the model.
        scheme: its precision.
        workload: what is run.
        platform: the attention that runs, and the allocator's settings.
        plan: the scheme of every quantized matrix; None means `plan_weights`' default.
        layers: run only the first so many; None runs all.
        sampled: of the prompt's chunks run only the first two and the last.
    """
    if layers is not None:
        config = replace(config, n_layers=layers)
    plan = plan_weights(config, scheme) if plan is None else plan
    forget_tables(torch.device("meta"))  # those that an earlier trace made are not this one's
    with torch.inference_mode(), Tracer(platform) as tracer:
        decoder = build(config, scheme, plan, attention_path(config, scheme, platform.attention), "meta")
        loaded = tracer.allocator.allocated, tracer.allocator.reserved
        cache = decoder.new_cache(workload.batch, workload.context, workload.kv_bits, workload.kv_group)
        ids = torch.zeros(workload.batch, workload.context, dtype=torch.int64, device="meta")
        run(decoder, ids, cache, workload.prefill_chunk, sampled)
    allocator = tracer.allocator
    held = decoder.weights_bytes + cache.nbytes + platform.workspace.nbytes
    return Traced(
        weights_bytes=decoder.weights_bytes,
        kv_cache_bytes=cache.nbytes,
        activations_bytes=allocator.peak_requested - held,
        allocated_bytes=allocator.peak_allocated,
        reserved_bytes=allocator.peak_reserved,
        load_allocated_bytes=loaded[0],
        load_reserved_bytes=loaded[1],
        events=tuple(tracer.events),
    )


def build(
    config: ModelConfig,
    scheme: QuantScheme,
    plan: Mapping[str, QuantScheme],
    attention: str,
    device: torch.device | str,
) -> Decoder:
    """Return a decoder with weights of the exact shapes and no values, made in the loader's order."""
    dtype = TORCH_DTYPES[compute_dtype(config, scheme)]
    stored = TORCH_DTYPES[config.dtype]
    weights: dict[str, torch.Tensor | QuantizedTensor] = {}
    for spec in config.tensors:
        planned = plan.get(spec.name)
        weights[spec.name] = (
            empty_quantized(spec.shape, planned, stored, device)
            if planned
            else torch.empty(spec.shape, dtype=dtype, device=device)
        )
    return Decoder(config, weights, dtype, attention, fused=False)


def run(decoder: Decoder, ids: torch.Tensor, cache: KVCache, chunk: int, sampled: bool = False) -> None:
    """Prefill all but the last of ids (B, context), then decode that one.

    `sampled` runs only the first two chunks and the last: the cache is told that the others have passed.
    """
    prompt = prompt_tokens(ids.shape[1])
    if sampled:
        states = None
        for tokens, length in chunks(prompt, chunk, sampled):
            cache.length = length
            states = decoder.forward(ids[:, length : length + tokens], cache)
        assert states is not None
        decoder.logits(states[:, -1])
        del states
    else:
        decoder.prefill(ids[:, :prompt], cache, chunk)
    if prompt < ids.shape[1]:
        decoder.logits(decoder.forward(ids[:, prompt:], cache)[:, -1])
