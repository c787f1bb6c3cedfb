"""The closed form against the real decoder on `meta`: every request counted, allocated and reserved alike."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from calculators.hardware import ASSUMED_PLATFORM, Platform
from quantkit.config import ModelConfig
from quantkit.estimate import Estimator, Workload
from quantkit.measure.trace import LIKE_FIRST, Traced, trace
from quantkit.presets import PRESETS
from quantkit.schemes import SCHEMES, plan_weights
from tests.checkpoints import tiny_config

MISTRAL = "mistral-7b-instruct-v0.2"
MATH = replace(ASSUMED_PLATFORM, attention="math")
EXPANDABLE = replace(ASSUMED_PLATFORM, expandable_segments=True)
WHOLE = 1 << 20


def check(
    config: ModelConfig,
    scheme: str,
    workload: Workload,
    platform: Platform = ASSUMED_PLATFORM,
    layers: int | None = 2,
    sampled: bool = True,
) -> Traced:
    """Trace a run and hold the closed form to it, to the byte."""
    if layers:
        config = replace(config, n_layers=layers)
    traced = trace(config, SCHEMES[scheme], workload, platform, sampled=sampled)
    estimator = Estimator(config, SCHEMES[scheme], platform=platform)
    peaks = estimator.peaks(workload, sampled)
    held = estimator.weights_bytes + traced.kv_cache_bytes + platform.workspace.nbytes
    assert estimator.weights_bytes == traced.weights_bytes
    assert estimator.estimate(workload).kv_cache_bytes == traced.kv_cache_bytes
    assert peaks.requested - held == traced.activations_bytes
    assert peaks.allocated == traced.allocated_bytes
    assert peaks.reserved == traced.reserved_bytes
    assert peaks.loaded == traced.load_reserved_bytes
    return traced


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str) -> None:
    check(PRESETS[MISTRAL], scheme, Workload(8192))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name: str) -> None:
    check(PRESETS[name], "nf4-dq", Workload(4096, batch=4, kv_bits=8))


@pytest.mark.parametrize("chunk", [512, 2048, WHOLE])
@pytest.mark.parametrize("context", [1, 2, 1000, 8192])
@pytest.mark.parametrize(("kv_bits", "kv_group", "batch"), [(16, 0, 1), (8, 0, 4), (4, 32, 1), (32, 0, 2)])
@pytest.mark.parametrize("name", [MISTRAL, "mistral-7b-v0.1"])
def test_contexts_chunks_and_caches(
    name: str, kv_bits: int, kv_group: int, batch: int, context: int, chunk: int
) -> None:
    workload = Workload(context, batch, kv_bits, kv_group, chunk)
    check(PRESETS[name], "bf16", workload)


@pytest.mark.parametrize(
    "platform", [ASSUMED_PLATFORM, MATH, EXPANDABLE], ids=["flash", "math", "expandable"]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "scheme", "kv_bits"),
    [
        ("mistral-7b-v0.1", "int4-g128", 4),  # a window, and a rolling cache
        ("llama-2-7b", "int4-g64-asym", 8),  # as many key heads as query heads
        ("qwen2.5-7b", "nf4", 16),  # biases
        ("smollm2-135m", "int4-g128", 16),  # a tied head, groups that do not divide
        ("llama-3.1-8b", "fp32", 16),  # no flash attention in float32
    ],
)
def test_every_chunk_of_every_path(
    name: str, scheme: str, kv_bits: int, batch: int, platform: Platform
) -> None:
    check(PRESETS[name], scheme, Workload(5000, batch, kv_bits, prefill_chunk=1024), platform, sampled=False)


@pytest.mark.parametrize("sm_count", [24, 132, 188])
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_chunks_that_flash_attention_splits(kv_bits: int, sm_count: int) -> None:
    """The number of splits changes with the keys, so that a long prompt has chunks of several kinds."""
    platform = replace(ASSUMED_PLATFORM, sm_count=sm_count)
    check(PRESETS[MISTRAL], "bf16", Workload(4000, 1, kv_bits, prefill_chunk=64), platform, sampled=False)


@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_all_layers(scheme: str) -> None:
    check(PRESETS[MISTRAL], scheme, Workload(5000), layers=None, sampled=False)


def test_two_layers_tell_what_all_do() -> None:
    shallow = trace(PRESETS[MISTRAL], SCHEMES["bf16"], Workload(8192), layers=2, sampled=True)
    deep = trace(PRESETS[MISTRAL], SCHEMES["bf16"], Workload(8192), sampled=False)
    assert shallow.activations_bytes == deep.activations_bytes


@pytest.mark.parametrize("scheme", ["bf16", "int4-g32-asym", "nf4-dq"])
def test_unlike_layers_and_ragged_shapes(scheme: str) -> None:
    config = tiny_config(
        hidden_size=200, intermediate_size=330, n_heads=5, n_kv_heads=1, head_dim=40, n_layers=4
    )
    plan = plan_weights(config, SCHEMES[scheme], exclude=["model.layers.2.*"])
    workload = Workload(333, 2, 8, prefill_chunk=100)
    traced = trace(config, SCHEMES[scheme], workload, plan=plan)
    peaks = Estimator(config, SCHEMES[scheme], plan).peaks(workload)
    assert (peaks.allocated, peaks.reserved) == (traced.allocated_bytes, traced.reserved_bytes)


def test_events_pair_up_and_loading_takes_the_weights_and_no_more() -> None:
    config = replace(PRESETS[MISTRAL], n_layers=2)
    traced = trace(config, SCHEMES["nf4-dq"], Workload(1024))
    alive: dict[int, int] = {}
    for event in traced.events:
        if event.action == "alloc":
            assert event.number not in alive
            alive[event.number] = event.nbytes
        else:
            assert alive.pop(event.number) == event.nbytes
    kept = traced.weights_bytes + traced.kv_cache_bytes + ASSUMED_PLATFORM.workspace.nbytes
    assert sum(alive.values()) >= kept
    first_free = next(i for i, event in enumerate(traced.events) if event.action == "free")
    before = [event.nbytes for event in traced.events[:first_free]]
    assert traced.weights_bytes in itertools.accumulate(
        before
    )  # the weights come first, and nothing else goes


@pytest.mark.parametrize("operator", LIKE_FIRST)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_what_is_taken_to_be_like_its_first_argument_is(operator: Any, dtype: torch.dtype) -> None:
    packed = torch.empty(6, 10, dtype=dtype, device="meta")[:, :5]
    real, taken = operator(packed, 4), packed.clone()
    assert (real.shape, real.dtype, real.stride()) == (taken.shape, taken.dtype, taken.stride())
    assert real.untyped_storage().nbytes() == taken.untyped_storage().nbytes()


GRID = list(
    itertools.product(
        {(replace(config, name=""),): name for name, config in PRESETS.items()}.values(),
        SCHEMES,
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), GRID)
def test_the_grid(name: str, scheme: str) -> None:
    config = replace(PRESETS[name], n_layers=2)
    for context, kv_bits, batch in itertools.product(
        (1024, 2048, 4096, 8192, 16384, 32768), (16, 8, 4), (1, 4)
    ):
        for chunk in {min(chunk, context) for chunk in (512, 2048, WHOLE)}:  # from there on all are the same
            check(config, scheme, Workload(context, batch, kv_bits, prefill_chunk=chunk))
