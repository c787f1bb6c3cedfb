"""`quantkit bench cpu`: a quick run makes a record that reports read; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.cli.main import cli, explain
from quantkit.errors import QuantkitError
from quantkit.kernels import native
from quantkit.report.runs import BenchRun, read_run

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


@pytest.mark.parametrize(
    "arguments", [["--only", "kernels", "--llama", "python"], ["--folder", "."], ["--only", "gpu"]]
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["bench", "cpu", *arguments]).exit_code == 2
