"""A lack of GPU memory is one line with the estimate and what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from calculators.hardware import find_gpu, platform_of
from calculators.units import GIB, format_bytes
from quantkit.cli.main import cli
from quantkit.errors import BackendError, DeviceMemoryError
from quantkit.estimate import Workload, estimate
from quantkit.kernels import ops
from quantkit.models import kv_cache
from quantkit.presets import PRESETS
from quantkit.room import in_memory
from quantkit.schemes import SCHEMES, plan_weights

MISTRAL = PRESETS["mistral-7b-instruct-v0.2"]


@pytest.fixture(autouse=True)
def _small_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 8 * GIB)


def line(dtype: str, plan: dict[str, Any], workload: Workload) -> str:
    with pytest.raises(DeviceMemoryError) as error, in_memory(MISTRAL, dtype, plan, workload):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_that_does_not_fit() -> None:
    said = line("bf16", {}, Workload(4096))
    h200 = platform_of(find_gpu("NVIDIA H200"))
    needed = estimate(MISTRAL, SCHEMES["bf16"], Workload(4096), platform=h200).total_bytes
    assert said.startswith("out of memory on NVIDIA H200, where 10.")
    assert "of 140.00 GiB are to be had: mistral-7b-instruct-v0.2 as bf16 with 4,096 tokens, batch 1" in said
    assert f"a 16-bit KV cache takes {format_bytes(needed)} by the estimate" in said
    assert said.endswith("what would fit: int8, int4-g128, int4-g64, int4-g32, nf4, nf4-dq")


def test_a_context_that_does_not_fit() -> None:
    plan = plan_weights(MISTRAL, SCHEMES["int8"])
    said = line("bf16", plan, Workload(32768, kv_bits=16))
    fitting = said.rpartition("what would fit: ")[2]
    assert fitting.startswith("up to ")
    assert 4096 < int(fitting.split()[2].replace(",", "")) < 32768
    assert "int4-g128" in fitting
    assert "int8" not in fitting


def test_nothing_fits() -> None:
    assert line("bf16", {}, Workload(32768, batch=64)).endswith("no context and no precision")


@pytest.mark.parametrize(
    "said",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_whoever_says_it(said: str) -> None:
    with (
        pytest.raises(DeviceMemoryError, match="on NVIDIA H200"),
        in_memory(MISTRAL, "bf16", {}, Workload(1)),
    ):
        raise RuntimeError(said)


def test_no_memory_for_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert line("bf16", {}, Workload(1)).endswith("nvidia-smi shows what else takes the GPU's memory")


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("can't allocate memory")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), in_memory(MISTRAL, "bf16", {}, Workload(1)):
        raise error


@pytest.mark.parametrize("command", [["generate", "Once"], ["eval", "--limit-tokens", "2048"]])
def test_commands_say_it(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*shape: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kv_cache.torch, "zeros", refuse)
    result = CliRunner().invoke(cli, [*command, "--device", "cpu"])
    assert isinstance(result.exception, DeviceMemoryError)
    assert "tiny-mistral as bf16" in str(result.exception)


def test_a_device_is_named_or_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [ops.choose_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    assert ops.device_name("cuda") == "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.choose_device() == ops.device_name("cpu") == "cpu"
    with pytest.raises(BackendError, match="no CUDA GPU is visible to PyTorch"):
        ops.choose_device("cuda")
    with pytest.raises(BackendError, match="unknown device 'tpu'; known are auto, cpu, cuda"):
        ops.choose_device("tpu")
