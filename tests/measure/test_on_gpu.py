"""On a CUDA GPU: the decoder against the CPU, the trace against the allocator, one measured cell."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch

from calculators.units import MIB
from quantkit.config import ModelConfig
from quantkit.measure import cuda
from quantkit.measure.cells import Cell, jobs
from quantkit.measure.events import record_small_runs
from quantkit.models.decoder import Decoder, Weight
from quantkit.presets import PRESETS
from quantkit.quantize import quantize
from quantkit.schemes import SCHEMES, plan_weights
from tests.checkpoints import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible to PyTorch"),
]
# float32 sums in another order; a cached element on the edge between two codes may fall to either side,
# which moves it by a step: 1/127, or 1/7, of its vector's largest
TOLERANCES = {32: 1e-4, 16: 1e-2, 8: 2e-2, 4: 2e-1}


def weights(config: ModelConfig, scheme: str, dtype: torch.dtype) -> dict[str, Weight]:
    torch.manual_seed(0)
    plan, made = plan_weights(config, SCHEMES[scheme]), {}
    for spec in config.tensors:
        weight = torch.randn(spec.shape, dtype=torch.float32) * 0.1 + (len(spec.shape) == 1)
        planned = plan.get(spec.name)
        made[spec.name] = quantize(weight, planned, torch.float32) if planned else weight.to(dtype)
    return made


def logits(config: ModelConfig, scheme: str, dtype: torch.dtype, device: str, kv_bits: int) -> torch.Tensor:
    """Return logits after a prompt in chunks and some decoded tokens, on the CPU."""
    here = {name: weight.to(device) for name, weight in weights(config, scheme, dtype).items()}
    decoder = Decoder(config, here, dtype)
    ids = torch.randint(0, config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(1)).to(device)
    cache = decoder.new_cache(2, 60, kv_bits)
    last = [decoder.prefill(ids[:, :50], cache, chunk=16)]
    for step in range(50, 60):
        last.append(decoder.logits(decoder.forward(ids[:, step : step + 1], cache)[:, -1]))
    return torch.stack(last).cpu()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kv_bits", TOLERANCES)
@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4-g32", "int4-g32-asym", "nf4", "nf4-dq"])
def test_logits_are_the_cpus(scheme: str, kv_bits: int, window: int | None) -> None:
    config = tiny_config(dtype="fp32", head_dim=64, n_layers=2, sliding_window=window)
    expected, found = (logits(config, scheme, torch.float32, device, kv_bits) for device in ("cpu", "cuda"))
    assert (found - expected).abs().max() <= TOLERANCES[kv_bits] * expected.abs().max()


@pytest.mark.parametrize("window", [None, 20])
def test_flash_attention_in_bf16_is_near_float32(window: int | None) -> None:
    config = tiny_config(dtype="bf16", head_dim=64, n_layers=2, sliding_window=window)
    expected = logits(config, "fp32", torch.float32, "cpu", 32)
    found = logits(config, "bf16", torch.bfloat16, "cuda", 16)
    # bf16 keeps 8 bits; two layers add up some ten roundings
    assert (found - expected).norm() <= 3e-2 * expected.norm()


needs_nvml = pytest.mark.skipif(find_spec("pynvml") is None, reason="nvidia-ml-py is not installed")


@needs_nvml
@pytest.mark.parametrize("scheme", ["bf16", "int4-g128", "nf4-dq"])
def test_the_trace_asks_for_what_the_gpu_was_asked_for(scheme: str) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # where nothing else holds memory
        found = alone.submit(record_small_runs, PRESETS["tinyllama-1.1b"], [scheme]).result()
    for run in found["runs"]:
        assert run["difference"] is None
        assert run["allocated_bytes"] == run["traced_allocated_bytes"]
        assert run["reserved_bytes"] == run["traced_reserved_bytes"]


@needs_nvml
def test_a_measured_cell_is_within_the_bars() -> None:
    config = PRESETS["tinyllama-1.1b"]
    [job] = jobs(config.name, [Cell("bf16", 16, 2048)], "flash")
    found = cuda.measure(config, [job], lambda count: None)
    assert not found.failures
    measured, estimate = found.rows[0]["measured"], found.rows[0]["estimated"]
    assert estimate["allocated_bytes"] == pytest.approx(measured["allocated_bytes"], rel=0.01)
    assert estimate["reserved_bytes"] == pytest.approx(measured["reserved_bytes"], rel=0.02)
    assert estimate["other_bytes"] == pytest.approx(measured["other_bytes"], rel=0.05, abs=16 * MIB)
