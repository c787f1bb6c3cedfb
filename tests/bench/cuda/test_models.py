"""Whole models on a stand-in: what a step reads, what a prompt computes, what has no room, and equal bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.bench.cuda import models
from quantkit.bench.cuda.models import Grid, Setting, matrices_seconds, prefill_flops
from quantkit.bench.cuda.results import Decode, Failure, Finding, Prefill, Repeat
from quantkit.bench.results import Cell
from quantkit.models.kv_cache import KVCache
from quantkit.presets import PRESETS
from quantkit.schemes import get_scheme
from tests.bench.cuda.stand_in import LIMITS, METHOD, TINY, StandIn, place

GRID = Grid(prompts=(16,), batches=(1, 3), contexts=(40,), steps=4)


def run(name: str, device: StandIn, grid: Grid = GRID) -> list[Finding]:
    torch.manual_seed(0)
    return list(models.measure(TINY, get_scheme(name), grid, place(device), []))


def test_a_model_runs_a_prompt_and_decodes() -> None:
    prefill, *decodes, repeat = run("int4-g128", StandIn())
    assert isinstance(prefill, Prefill)
    assert (prefill.tokens, prefill.rounds) == (16, METHOD.prefill_rounds)
    assert all(isinstance(one, Decode) for one in decodes)
    assert [(d.batch, d.context, d.kv_bits) for d in decodes] == [
        (1, 40, 16),
        (3, 40, 16),
        (1, 40, 8),
        (1, 40, 4),
    ]
    first = decodes[0]
    matrices = 2 * ((256 + 128 + 2 * 256 + 256) * 128) * 33 // 64  # codes of 4 bits, a 16-bit scale for 128
    plain = 2 * (96 * 128 + 5 * 128)  # head and norms
    cache = 2 * 2 * 2 * 32 * 2 * 38.5  # layers, K and V, heads, head_dim, bytes, tokens: 37 to 40 of them
    assert first.weights_bytes == matrices + plain + 2 * 96 * 128
    assert first.step_bytes == matrices + plain + cache
    assert first.roof_share == pytest.approx(first.step_bytes / LIMITS.bytes_per_s / first.seconds)
    assert first.tokens_per_s == pytest.approx(1 / first.seconds)
    assert repeat == Repeat("smollm2-135m, int4-g128, decoding", 4, 4)


def test_what_has_no_room_is_left_out_with_the_reason() -> None:
    found = run("bf16", StandIn(memory_bytes=800 << 20), replace(GRID, batches=(1, 1 << 20)))
    assert [one.batch for one in found if isinstance(one, Decode)] == [1]
    (failure,) = [one for one in found if isinstance(one, Failure)]
    assert failure.what == "smollm2-135m, bf16, batch 1048576, 40 tokens, KV 16 bits"
    assert failure.reason.endswith("GiB by the estimate, and the GPU has 800.00 MiB")


def test_what_fails_stops_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = KVCache.extend

    def full(
        self: KVCache, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(k) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return extend(self, layer, k, v)

    monkeypatch.setattr(KVCache, "extend", full)
    prompt, one, three, repeat = run("nf4", StandIn())
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert prompt == Failure("smollm2-135m, nf4, a prompt of 16 tokens", reason)
    assert one == Failure("smollm2-135m, nf4, batch 1, 40 tokens, KV 16 bits", reason)
    assert isinstance(three, Decode)
    assert repeat == Repeat("smollm2-135m, nf4, decoding", 1, 1)


def test_a_model_that_cannot_be_loaded_is_said() -> None:
    device = StandIn()
    device.backend = "cutlass"
    (failure,) = run("int8", device)
    assert isinstance(failure, Failure)
    assert failure.what == "smollm2-135m, int8"
    assert failure.reason.startswith("BackendError: unknown backend 'cutlass'")


def test_operations_of_a_prompt_by_hand() -> None:
    config = PRESETS["mistral-7b-instruct-v0.2"]
    one = 2 * (6_979_321_856 + 2 * 32 * 4096 + 32000 * 4096)
    assert prefill_flops(config, 1) == one
    pairs = 1 + 2 + 3
    assert prefill_flops(config, 3) == 2 * (3 * 6_979_321_856 + 2 * 32 * 4096 * pairs + 32000 * 4096)


def test_the_grid_has_caches_of_few_bits_for_one_scheme() -> None:
    assert len(models.GRID.settings(get_scheme("nf4"))) == 12
    assert models.GRID.settings(get_scheme("int4-g128"))[12:] == [Setting(1, 32768, 8), Setting(1, 32768, 4)]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_cache_is_filled_with_values_of_the_usual_size(bits: int) -> None:
    torch.manual_seed(0)
    cache = KVCache(TINY, 2, 30, torch.bfloat16, bits)
    models.fill(cache)
    keys = cache._load(1, 30).float()
    assert torch.isfinite(keys).all()
    assert 0.2 < float(keys.std()) < 2


def test_sums_over_the_layers_hold_whole_layers_alone() -> None:
    def cell(matrix: str, m: int, **seconds: float) -> Cell:
        return Cell("nf4", matrix, 8, 8, m, 36, 3, {"quantkit": 1.0, **seconds}, {}, {})

    cells = [cell("o", 1, a=2.0, b=1.0), cell("down", 1, a=3.0), cell("o", 4, a=1.0)]
    assert matrices_seconds(cells, "nf4", 1, layers=10) == {"quantkit": 20.0, "a": 50.0}
    assert matrices_seconds(cells, "nf4", 4, layers=10) == {}
    assert matrices_seconds(cells, "int8", 1, layers=10) == {}
