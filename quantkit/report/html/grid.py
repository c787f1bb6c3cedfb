"""What the page knows: every estimate of a grid, computed beforehand by the calculators.

The page adds numbers up and compares them; it computes no memory itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from calculators.fit import ERROR_BAND
from calculators.flash import Call, splits
from calculators.hardware import ASSUMED_PLATFORM, GPU, GPUS, Platform, platform_of
from quantkit.config import ModelConfig
from quantkit.estimate import PREFILL_CHUNK, Estimator, Workload
from quantkit.fit import cache_bytes, step_bytes
from quantkit.schemes import QuantScheme, default_schemes

KV_BITS = (16, 8, 4)
BATCHES = (1, 2, 4, 8)
_FINE, _COARSE, _FINE_UNTIL, _MOST = (
    1024,
    8192,
    32768,
    131072,
)  # tokens: steps of the slider, and where it ends


def contexts(config: ModelConfig) -> list[int]:
    """Return the contexts that can be chosen: every 1k to 32k, every 8k to 128k, none beyond the model's own.

    A model whose own is shorter than 1k has that one alone.
    """
    fine = range(_FINE, _FINE_UNTIL + 1, _FINE)
    coarse = range(_FINE_UNTIL + _COARSE, _MOST + 1, _COARSE)
    return [tokens for tokens in (*fine, *coarse) if tokens <= config.max_context] or [config.max_context]


def page_data(models: Sequence[ModelConfig], progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Return the grid of all models and the table of GPUs, as JSON values; `progress` is told of each model.

    `kinds` are the platforms that differ in what the allocator is asked for, the assumed one first; of a GPU
    `kind` is the index. A model's `cells` hold, for each kind, the bytes of activations and allocator of
    every scheme, KV precision, batch and context, in that order, the last running fastest.
    """
    gpus = [(gpu, platform_of(gpu)) for gpu in GPUS]
    split = any(_may_split(config) for config in models)
    examples: dict[tuple[object, ...], Platform] = {}
    for platform in (ASSUMED_PLATFORM, *(platform for _, platform in gpus)):
        examples.setdefault(_kind(platform, split), platform)
    kinds = list(examples)
    entries = []
    for config in models:
        entries.append(_model(config, list(examples.values())))
        if progress:
            progress(1)
    return {
        "error_band": ERROR_BAND,
        "prefill_chunk": PREFILL_CHUNK,
        "kv_bits": KV_BITS,
        "batches": BATCHES,
        "assumed": _overheads(ASSUMED_PLATFORM),
        "gpus": [_gpu(gpu, platform, kinds.index(_kind(platform, split))) for gpu, platform in gpus],
        "models": entries,
    }


def _kind(platform: Platform, split: bool) -> tuple[object, ...]:
    """Return all that requests hang on; where no chunk is split on any card, not on their multiprocessors."""
    sm_count = platform.sm_count if split and platform.attention == "flash" else None
    return platform.workspace.nbytes, platform.attention, sm_count


def _may_split(config: ModelConfig) -> bool:
    """Whether flash attention splits the shortest chunk of the page's contexts on the largest card."""
    call = Call(1, _FINE - 1, config.max_context, config.n_heads, config.n_kv_heads, config.head_dim)
    return splits(call, max(gpu.sm_count for gpu in GPUS)) > 1


def _overheads(platform: Platform) -> dict[str, Any]:
    parts = (platform.context, platform.workspace)
    return {
        "overhead_bytes": sum(part.nbytes for part in parts),
        "attention": platform.attention,
        "sources": [f"{part.source}: {part.status}" for part in parts],
    }


def _gpu(gpu: GPU, platform: Platform, kind: int) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "usable_bytes": gpu.usable_bytes,
        "usable_source": gpu.usable_source,
        "bandwidth_gb_s": gpu.bandwidth_gb_s,
        "kind": kind,
        **_overheads(platform),
    }


def _model(config: ModelConfig, platforms: Sequence[Platform]) -> dict[str, Any]:
    schemes, tokens = default_schemes(config.dtype), contexts(config)
    plain = Estimator(config, schemes[0])
    return {
        "name": config.name,
        "parameters": config.parameters,
        "max_context": config.max_context,
        "contexts": tokens,
        "schemes": [_scheme(config, scheme) for scheme in schemes],
        "kv_cache_bytes": [
            cache_bytes(plain, Workload(context, batch, kv_bits))
            for kv_bits in KV_BITS
            for batch in BATCHES
            for context in tokens
        ],
        "cells": [_cells(config, schemes, tokens, platform) for platform in platforms],
    }


def _scheme(config: ModelConfig, scheme: QuantScheme) -> dict[str, Any]:
    """A scheme's weights, and what of them decoding a token of each of so many sequences reads."""
    estimator = Estimator(config, scheme)
    loads = [Workload(1, batch) for batch in BATCHES]
    return {
        "name": scheme.name,
        "weights_bytes": estimator.weights_bytes,
        "read_bytes": [step_bytes(estimator, load) - cache_bytes(estimator, load) for load in loads],
    }


def _cells(
    config: ModelConfig, schemes: Sequence[QuantScheme], tokens: Sequence[int], platform: Platform
) -> dict[str, list[int]]:
    estimators = [Estimator(config, scheme, platform=platform) for scheme in schemes]
    entries = [
        estimator.estimate(Workload(context, batch, kv_bits))
        for estimator in estimators
        for kv_bits in KV_BITS
        for batch in BATCHES
        for context in tokens
    ]
    return {
        "activations_bytes": [entry.activations_bytes for entry in entries],
        "allocator_bytes": [entry.allocator_bytes for entry in entries],
    }
