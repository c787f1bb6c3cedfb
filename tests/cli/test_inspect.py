"""`quantkit inspect`: what model pages leave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quantkit.cli.main import cli
from quantkit.errors import CheckpointError, ConfigError
from quantkit.presets import PRESETS
from tests.checkpoints import hf_config, tiny_config, write_checkpoint
from tests.paths import smollm2_gguf


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)])


def test_mistral_by_role() -> None:
    result = run()
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "mistral-7b-instruct-v0.2"
    for line in (
        "attention 1,342,177,280",
        "FFN 5,637,144,576",
        "embedding and head 262,144,000",
        "norms 266,240",
        "total 7,241,732,096",
        "activation silu, gated (SwiGLU)",
        "norm RMSNorm, eps 1e-05",
        "RoPE theta 1,000,000",
        "window none",
        "context 32,768 tokens",
    ):
        assert line in lines


@pytest.mark.parametrize("name", PRESETS)
def test_json_of_every_preset(name: str) -> None:
    body = json.loads(run(name, "--json").stdout)
    assert body["model"] == name
    assert body["parameters"] == sum(body["parameters_by_role"].values()) == PRESETS[name].parameters
    assert body["sliding_window"] == PRESETS[name].sliding_window
    assert run(name).exit_code == 0


def test_scaling_and_windows_are_said() -> None:
    assert "Llama-3 scaling by 8 from 8k" in run("llama-3.1-8b").stdout
    assert "4,096 tokens" in run("mistral-7b-v0.1").stdout
    assert "bias on Q, K and V" in run("qwen2.5-7b").stdout
    assert "tied head" in run("smollm2-135m").stdout


def test_a_directory_with_weights_says_what_is_stored(tmp_path: Path) -> None:
    config = tiny_config()
    directory = write_checkpoint(tmp_path / "model", config, "fp32", seed=0)
    body = json.loads(run(directory, "--json").stdout)
    assert body["stored_bytes"] == 4 * config.parameters
    assert body["stored_schemes"] == {}
    assert f"{4 * config.parameters:,} bytes" in run(directory).stdout


def test_a_directory_with_a_config_alone_will_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config(), "bf16")))
    body = json.loads(run(tmp_path, "--json").stdout)
    assert body["parameters"] == tiny_config().parameters
    assert "stored_bytes" not in body


def test_a_gguf_file() -> None:
    body = json.loads(run(smollm2_gguf(), "--json").stdout)
    assert body["parameters"] == 134_515_008
    assert body["stored_bytes"] < 134_515_008


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    unknown = run("gpt-5").exception
    assert isinstance(unknown, ConfigError)
    assert "presets are mistral-7b-instruct-v0.2, " in str(unknown)
    assert isinstance(run(tmp_path).exception, ConfigError)
    (tmp_path / "notes.txt").write_text("")
    assert isinstance(run(tmp_path / "notes.txt").exception, CheckpointError)
