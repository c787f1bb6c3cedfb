"""`quantkit bench`: a quick run makes a record that reports read; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from quantkit.bench.cuda.models import Grid
from quantkit.bench.cuda.results import CudaBench
from quantkit.bench.results import Bench
from quantkit.bench.shapes import QUICK_MODEL
from quantkit.cli.main import cli, explain
from quantkit.errors import QuantkitError
from quantkit.kernels import native
from quantkit.presets import PRESETS
from quantkit.report.runs import BenchRun, read_run
from tests.bench.cuda.stand_in import TINY, StandIn

needs_extension = pytest.mark.skipif(native.extension() is None, reason="the extension is not built")


@needs_extension
def test_a_quick_run_makes_a_record(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    arguments = ["bench", "cpu", "--quick", "--scheme", "int8", "--scheme", "nf4-dq", "-o", str(path)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "x torch bf16" in result.stdout
    assert "Share of the read bandwidth at one row" in result.stdout
    assert "without llama.cpp, which --llama names" in result.stdout
    assert "its figures mean nothing" in result.stdout
    run = read_run(path)
    assert isinstance(run, BenchRun)
    found = run.bench
    assert isinstance(found, Bench)
    assert found.quick
    assert found.limits.bytes_per_s > 0
    assert found.limits.flops_per_s > 0
    assert {cell.scheme for cell in found.cells} == {"int8", "nf4-dq"}
    assert [(model.model, model.scheme) for model in found.models] == [
        ("smollm2-135m", "int8"),
        ("smollm2-135m", "nf4-dq"),
    ]


@needs_extension
def test_the_machine_alone_as_json() -> None:
    result = CliRunner().invoke(cli, ["bench", "cpu", "--quick", "--only", "machine", "--json"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["cells"] == body["models"] == []
    assert body["machine"]["isa"] in native.require().available_isas()
    assert body["limits"]["readers"][0]["bytes_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--scheme", "int3"], "unknown scheme 'int3'"),
        (
            ["--scheme", "bf16"],
            "bf16 is not quantized: torch's bf16 runs beside every scheme; name one of int8",
        ),
        (["-o", "/dev/null/x.json"], "x.json cannot be written: Not a directory"),
        (["--model", "gpt-2"], "unknown model 'gpt-2': presets are mistral-7b-instruct-v0.2"),
        pytest.param(
            ["--llama", "/absent/python"], "/absent/python is no Python to run", marks=needs_extension
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(cli, ["bench", "cpu", "--quick", *arguments])
    assert isinstance(result.exception, QuantkitError)
    said = explain(result.exception) or ""
    assert line in said
    assert "\n" not in said


def test_no_extension_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    result = CliRunner().invoke(cli, ["bench", "cpu", "--quick"])
    assert isinstance(result.exception, QuantkitError)
    assert "install quantkit where there is a C++ compiler" in str(result.exception)


def test_a_quick_run_on_a_stand_in_makes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.bench.cuda.device.Cuda", StandIn)
    monkeypatch.setattr("quantkit.bench.cuda.run.QUICK_GRID", Grid((16,), (1, 2), (24,), 3))
    monkeypatch.setitem(PRESETS, QUICK_MODEL, TINY)
    path = tmp_path / "bench.json"
    result = CliRunner().invoke(cli, ["bench", "cuda", "--quick", "--scheme", "nf4", "-o", str(path)])
    assert result.exit_code == 0, result.output
    for said in (
        "Share of the copy bandwidth",
        "x dequantize + cuBLAS",
        "tokens/s",
        "its figures mean nothing",
    ):
        assert said in result.stdout
    run = read_run(path)
    assert isinstance(run, BenchRun)
    assert isinstance(run.bench, CudaBench)
    assert run.bench.finished
    result = CliRunner().invoke(cli, ["bench", "cuda", "--quick", "--only", "machine", "--json"])
    assert json.loads(result.stdout)["limits"]["bytes_per_s"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible to PyTorch")
def test_a_quick_run_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = CliRunner().invoke(cli, ["bench", "cuda", "--quick", "-o", str(path)])
    assert result.exit_code == 0, result.output
    run = read_run(path)
    assert isinstance(run, BenchRun)
    assert isinstance(run.bench, CudaBench)
    assert run.bench.finished
    assert len(run.bench.cells) == 4 * 4 * 2
    assert len(run.bench.prefills) == 5
    assert len(run.bench.decodes) == 5 * 2 + 2
    assert all(repeat.equal == repeat.runs for repeat in run.bench.repeats)
    for cell in run.bench.cells:
        assert {"quantkit", "torch bf16", "dequantize + cuBLAS"} <= set(cell.seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is visible to PyTorch")
def test_no_gpu_is_one_line() -> None:
    result = CliRunner().invoke(cli, ["bench", "cuda", "--quick"])
    assert isinstance(result.exception, QuantkitError)
    assert "cannot run on cuda:0: no CUDA GPU is visible to PyTorch" in (explain(result.exception) or "")


def test_models_that_are_not_run_are_wrong_usage() -> None:
    arguments = ["bench", "cuda", "--only", "kernels", "--model", "smollm2-135m"]
    assert CliRunner().invoke(cli, arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments", [["--only", "kernels", "--llama", "python"], ["--folder", "."], ["--only", "gpu"]]
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["bench", "cpu", *arguments]).exit_code == 2
