"""Estimates of Mistral-7B to the byte, traps that others fall into, and what must grow with what."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from calculators.allocator import LARGE_SEGMENT
from calculators.hardware import ASSUMED_PLATFORM
from calculators.weights import matrix_bytes
from quantkit.config import ModelConfig
from quantkit.errors import ConfigError
from quantkit.estimate import (
    Estimator,
    MemoryEstimate,
    Workload,
    estimate,
    explain,
    kv_layout,
    weight_bytes,
)
from quantkit.presets import PRESETS
from quantkit.schemes import SCHEMES, plan_weights
from tests.checkpoints import tiny_config

MISTRAL = PRESETS["mistral-7b-instruct-v0.2"]
WEIGHTS = {
    "fp32": 28_966_928_384,
    "bf16": 14_483_464_192,
    "fp16": 14_483_464_192,
    "int8": 7_506_894_848,
    "int4-g128": 4_123_533_312,
    "int4-g64": 4_232_585_216,
    "int4-g32": 4_450_689_024,
    "int4-g128-asym": 4_150_796_288,
    "int4-g64-asym": 4_287_111_168,
    "int4-g32-asym": 4_559_740_928,
    "nf4": 4_450_689_024,
    "nf4-dq": 4_125_238_144,
}


def estimated(config: ModelConfig, scheme: str, context: int = 4096, **workload: int) -> MemoryEstimate:
    return estimate(config, SCHEMES[scheme], Workload(context, **workload))


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_of_mistral_to_the_byte(name: str) -> None:
    assert estimated(MISTRAL, name).weights_bytes == WEIGHTS[name]


@pytest.mark.parametrize(
    ("kv_bits", "size"), [(None, 4_294_967_296), (16, 4_294_967_296), (8, 2_181_038_080), (4, 1_107_296_256)]
)
def test_kv_cache_of_mistral_to_the_byte(kv_bits: int | None, size: int) -> None:
    entry = estimate(MISTRAL, SCHEMES["int4-g128"], Workload(32 * 1024, kv_bits=kv_bits))
    assert entry.kv_cache_bytes == size
    assert entry.kv_bits == (kv_bits or 16)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_the_sum_of_every_matrix(name: str) -> None:
    scheme = SCHEMES[name]
    config = PRESETS["smollm2-135m"]
    plan = plan_weights(config, scheme, indivisible="int8")
    total = 0
    for spec in config.tensors:
        if spec.name in plan:
            rows, cols = spec.shape
            total += matrix_bytes(rows, cols, plan[spec.name].packing("bf16")).total
        else:
            total += spec.elements * (4 if name == "fp32" else 2)
    assert weight_bytes(config, scheme, plan) == total


def test_half_a_byte_a_parameter_is_the_wrong_answer() -> None:
    naive = MISTRAL.parameters // 2
    assert naive == 3_620_866_048
    assert 1 - naive / WEIGHTS["int4-g128"] == pytest.approx(0.122, abs=5e-4)
    assert 1 - naive / WEIGHTS["nf4"] == pytest.approx(0.186, abs=5e-4)


def test_embedding_head_and_norms_keep_their_bits() -> None:
    kept = 2 * (2 * 131_072_000 + 266_240)
    assert kept == 524_820_480
    with_head = plan_weights(MISTRAL, SCHEMES["int8"], include=["lm_head"])
    saved = WEIGHTS["int8"] - weight_bytes(MISTRAL, SCHEMES["int8"], with_head)
    assert saved == 131_072_000 - 2 * 32000


def test_a_window_bounds_v01_alone() -> None:
    bounded = estimated(PRESETS["mistral-7b-v0.1"], "bf16", 32768)
    assert bounded.kv_cache_bytes == 131_072 * 4096
    assert estimated(MISTRAL, "bf16", 32768).kv_cache_bytes == 131_072 * 32768


def test_a_tied_head_and_an_odd_head_dim() -> None:
    tied = tiny_config(tie_embeddings=True)
    assert (
        estimated(tiny_config(), "bf16").weights_bytes - estimated(tied, "bf16").weights_bytes == 96 * 128 * 2
    )
    wide = tiny_config(head_dim=64)
    assert (
        kv_layout(wide, SCHEMES["bf16"]).token_bytes
        == 2 * kv_layout(tiny_config(), SCHEMES["bf16"]).token_bytes
    )


def test_the_cache_takes_the_compute_dtype() -> None:
    config = tiny_config(dtype="fp32")
    found = {name: estimated(config, name).kv_bits for name in ("fp32", "bf16", "int8", "nf4")}
    assert found == {"fp32": 32, "bf16": 16, "int8": 32, "nf4": 32}
    assert estimated(config, "nf4", kv_bits=8).kv_bits == 8


def test_scales_of_an_fp32_checkpoint_are_fp32() -> None:
    half, full = tiny_config(dtype="bf16"), tiny_config(dtype="fp32")
    rows = sum(spec.shape[0] for spec in full.tensors if spec.is_block_linear)
    kept = sum(spec.elements for spec in full.tensors if not spec.is_block_linear)
    difference = estimated(full, "int8").weights_bytes - estimated(half, "int8").weights_bytes
    assert difference == 2 * (rows + kept)


def test_the_total_is_its_parts_and_what_the_device_gives() -> None:
    entry = estimated(MISTRAL, "int4-g128", 32768)
    requested = entry.weights_bytes + entry.kv_cache_bytes + entry.activations_bytes
    assert entry.total_bytes == requested + entry.allocator_bytes + entry.overhead_bytes
    context, workspace = ASSUMED_PLATFORM.context.nbytes, ASSUMED_PLATFORM.workspace.nbytes
    assert entry.overhead_bytes == context + workspace
    assert entry.total_bytes == entry.reserved_bytes + context
    assert requested + workspace <= entry.allocated_bytes <= entry.reserved_bytes
    assert all(isinstance(part, int) and part > 0 for part in (requested, entry.allocator_bytes))


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("scheme", ["bf16", "int4-g64-asym", "nf4-dq"])
def test_an_explanation_adds_up_to_the_estimate(scheme: str, kv_bits: int) -> None:
    workload = Workload(6000, 2, kv_bits)
    entry = estimate(MISTRAL, SCHEMES[scheme], workload)
    terms = explain(MISTRAL, SCHEMES[scheme], workload)
    assert sum(term.nbytes for term in terms) == entry.total_bytes
    sizes = {
        component: sum(term.nbytes for term in terms if term.component == component)
        for component in dict.fromkeys(term.component for term in terms)
    }
    assert sizes == {
        "weights": entry.weights_bytes,
        "KV cache": entry.kv_cache_bytes,
        "activations": entry.activations_bytes,
        "allocator": entry.allocator_bytes,
        "overhead": entry.overhead_bytes,
    }
    assert all(term.name and term.formula for term in terms)


def test_known_weight_bytes_are_taken_as_they_are() -> None:
    entry = estimate(MISTRAL, replace(SCHEMES["bf16"], name="as-stored"), Workload(1), weights_bytes=12345)
    assert (entry.scheme, entry.weights_bytes) == ("as-stored", 12345)


def test_splits_of_flash_attention_count() -> None:
    """The keys of 275 queries are split in three on 132 multiprocessors, and not at all on 24."""
    found = {
        sm_count: Estimator(MISTRAL, SCHEMES["bf16"], platform=replace(ASSUMED_PLATFORM, sm_count=sm_count))
        .estimate(Workload(276))
        .activations_bytes
        for sm_count in (24, 132)
    }
    accumulated = 3 * 32 * 275 * (128 + 1) * 4
    assert found[24] < found[132] < found[24] + accumulated


@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize(
    "config", [MISTRAL, PRESETS["mistral-7b-v0.1"], PRESETS["smollm2-135m"]], ids=lambda c: c.name
)
@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4-g128", "nf4-dq"])
def test_more_context_or_batch_never_takes_less(config: ModelConfig, scheme: str, attention: str) -> None:
    """Beside what flash attention splits: where few heads leave a GPU idle, a larger batch ends the splitting."""
    few = config.n_heads < 16
    platform = replace(ASSUMED_PLATFORM, attention=attention, sm_count=1 if few else 132)
    estimator = Estimator(config, SCHEMES[scheme], platform=platform)
    contexts, batches = (1, 63, 1024, 4095, 4097, 20000), (1, 2, 5)
    exact = ("weights_bytes", "kv_cache_bytes", "activations_bytes", "overhead_bytes")
    for kv_bits in (16, 8, 4):
        grid = {
            (context, batch): estimator.estimate(Workload(context, batch, kv_bits, prefill_chunk=1024))
            for context, batch in itertools.product(contexts, batches)
        }
        series = [[grid[context, batch] for context in contexts] for batch in batches]
        series += [[grid[context, batch] for batch in batches] for context in contexts]
        for line in series:
            for part in exact:
                sizes = [getattr(entry, part) for entry in line]
                assert sizes == sorted(sizes)
            # holes in the allocator's segments come and go (plain attention asks for many sizes, and leaves more)
            if attention == "flash":
                for less, more in itertools.pairwise(entry.total_bytes for entry in line):
                    assert more >= less - LARGE_SEGMENT


@pytest.mark.parametrize("config", PRESETS.values(), ids=lambda c: c.name)
def test_fewer_bits_take_fewer_bytes(config: ModelConfig) -> None:
    order = ("fp32", "bf16", "int8", "int4-g32", "int4-g64", "int4-g128")
    sizes = [estimated(config, name).weights_bytes for name in order]
    assert sizes == sorted(set(sizes), reverse=True)
    assert estimated(config, "nf4-dq").weights_bytes < estimated(config, "nf4").weights_bytes
    caches = [estimated(config, "bf16", kv_bits=bits).kv_cache_bytes for bits in (16, 8, 4)]
    assert caches == sorted(set(caches), reverse=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": 1, "batch": -1}, "batch is -1"),
        ({"context": 1, "kv_bits": 5}, "kv_bits is 5"),
        ({"context": 1, "kv_group": -8}, "kv_group is -8"),
    ],
)
def test_a_workload_without_sense_is_refused(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Workload(**fields)


def test_a_group_that_does_not_divide_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"KV group of 48 .* head of 128"):
        estimated(MISTRAL, "bf16", kv_bits=4, kv_group=48)
