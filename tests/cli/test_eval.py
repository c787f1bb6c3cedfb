"""`quantkit eval` and `generate`, as they are typed."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from quantkit.cli.eval import _is_input
from quantkit.cli.main import cli
from quantkit.errors import CheckpointError, OutputError, QuantkitError, SchemeError, TokenizerError
from quantkit.kernels import ops
from quantkit.models.decoder import Decoder
from quantkit.records import Record, new_record, read_record, write_record
from quantkit.report.runs import PerplexityRun, read_run
from tests.checkpoints import tiny_config, write_checkpoint
from tests.paths import shared_data

RESULT_KEYS = {
    "scheme", "kv_bits", "kv_group", "perplexity", "nll", "standard_error", "tokens_scored", "weights_bytes",
    "tokens_per_second", "difference", "difference_standard_error",
}  # fmt: skip


def run(*arguments: str | int | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)


def test_eval_prints_json_and_writes_the_record(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    result = run(
        "eval", "--scheme", "int8", "--scheme", "nf4", "--window", "512", "--limit-tokens", "4096", "--json",
        "-o", record,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body == read_record(record).body
    assert [entry["scheme"] for entry in body["results"]] == ["bf16", "int8", "nf4"]
    for entry in body["results"]:
        assert entry.keys() >= RESULT_KEYS
        assert entry["tokens_scored"] == 8 * 511
        assert entry["perplexity"] == pytest.approx(math.exp(entry["nll"]))
        assert entry["kv_bits"] == 16
    assert body["results"][0]["difference"] == 0
    assert body["results"][0]["weights_bytes"] == 2 * body["parameters"]
    assert body["protocol"]["window"] == 512
    assert body["device"] == ("cpu" if ops.choose_device() == "cpu" else ops.device_name("cuda"))
    assert body["backend"] == ops.choose_backend("auto", ops.choose_device())
    assert len(body["protocol"]["sha256"]) == 64


def test_eval_of_the_written_directory_equals_eval_in_memory(tmp_path: Path) -> None:
    for scheme in ("int8", "nf4", "nf4-dq"):
        common = ["--limit-tokens", "2048", "--json", "-o", tmp_path / "record.json"]
        in_memory = json.loads(run("eval", "--scheme", scheme, *common).stdout)["results"][1]
        assert run("quantize", tmp_path / scheme, "--scheme", scheme).exit_code == 0
        written = json.loads(run("eval", tmp_path / scheme, *common).stdout)["results"][0]
        assert written["scheme"] == scheme
        assert written["nll"] == pytest.approx(in_memory["nll"], abs=1e-6)
        assert written["weights_bytes"] == in_memory["weights_bytes"]


def test_stride_scores_every_token_once(tmp_path: Path) -> None:
    result = run(
        "eval", "--window", "256", "--stride", "64", "--limit-tokens", "1024", "--json",
        "-o", tmp_path / "record.json",
    )  # fmt: skip
    body = json.loads(result.stdout)
    assert body["protocol"]["windows"] == 13
    assert body["results"][0]["tokens_scored"] == 1023


def test_kv_bits_are_used_and_said(tmp_path: Path) -> None:
    bits = ["--kv-bits", "4", "--kv-bits", "16", "--kv-bits", "8", "--kv-bits", "4", "--kv-group", "32"]
    result = run("eval", "--limit-tokens", "4096", *bits, "--json", "-o", tmp_path / "record.json")
    plain, finer, coarser = json.loads(result.stdout)["results"]
    found = [(entry["kv_bits"], entry["kv_group"]) for entry in (plain, finer, coarser)]
    assert found == [(16, 0), (8, 32), (4, 32)]
    assert (plain["difference"], coarser["difference"]) == (0, coarser["perplexity"] - plain["perplexity"])
    assert abs(finer["nll"] - plain["nll"]) < 1e-3 < coarser["nll"] - plain["nll"]


@pytest.fixture
def stories(tmp_path: Path) -> list[str | Path]:
    """Return what evaluates a trained model on four windows of 64 tokens, and a record's place to add."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who liked to play in the sun.\n" * 20)
    return [
        "eval",
        shared_data("stories260K"),
        "--text",
        text,
        "--window",
        "64",
        "--limit-tokens",
        "256",
        "-o",
    ]


def test_what_cannot_be_written_is_refused_before_the_model_runs(
    stories: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluate.run.load", None)
    text = tmp_path / "text.txt"
    for path, said in ((text / "record.json", "Not a directory"), (text, "is what is evaluated")):
        result = run(*stories, path)
        assert isinstance(result.exception, OutputError)
        assert said in str(result.exception)
    assert run(*stories, tmp_path).exit_code == 2
    monkeypatch.chdir(tmp_path)
    Path("perplexity-stories260K.json").mkdir()
    assert isinstance(run(*stories[:-1]).exception, OutputError)  # the default place
    assert text.read_text().startswith("Once upon a time")


def test_a_record_replaces_no_file_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.evaluate.run.load", None)
    model = write_checkpoint(tmp_path / "model", tiny_config(), "bf16", seed=0)
    for name in ("model.safetensors", "config.json"):
        before = (model / name).read_bytes()
        result = run("eval", model, "-o", model / name)
        assert isinstance(result.exception, OutputError)
        assert "is what is evaluated" in str(result.exception)
        assert (model / name).read_bytes() == before
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not _is_input(tmp_path / "loop", model, None)
    write_record(model / "perplexity.json", new_record("perplexity", {}))
    assert not _is_input(model / "perplexity.json", model, None)


def test_what_was_computed_is_shown_even_if_it_cannot_be_written(
    stories: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, record: Record) -> None:
        raise OutputError(f"{path} cannot be written: the disk is full")

    monkeypatch.setattr("quantkit.records.write_record", full)
    result = run(*stories, tmp_path / "record.json", "--json")
    assert isinstance(result.exception, OutputError)
    assert json.loads(result.stdout)["results"][0]["scheme"] == "fp32"


def test_each_precision_runs_once(stories: list[str | Path], tmp_path: Path) -> None:
    schemes = [word for name in ("fp32", "int8", "int8") for word in ("--scheme", name)]
    result = run(*stories, tmp_path / "record.json", *schemes)
    assert "fp32: what the original is computed in" in result.stderr
    found = read_run(tmp_path / "record.json")
    assert isinstance(found, PerplexityRun)
    assert [one.scheme for one in found.results] == ["fp32", "int8"]


@pytest.mark.parametrize("nll", [math.nan, math.inf, 800.0])
def test_no_perplexity_is_an_error_that_keeps_the_others(
    nll: float, stories: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []  # of the weights: the second model's NLL is made bad, then the original's

    def scored(decoder: Decoder, ids: torch.Tensor, *cache: object) -> torch.Tensor:
        sizes.append(decoder.weights_bytes)
        bad = list(dict.fromkeys(sizes)).index(decoder.weights_bytes) == bad_one
        return torch.full((len(ids), ids.shape[1] - 1), nll if bad else 2.0)

    monkeypatch.setattr("quantkit.evaluate.perplexity.token_nll", scored)
    record, schemes = tmp_path / "record.json", ["--scheme", "int8", "--scheme", "nf4", "--json"]
    bad_one = 0
    result = run(*stories, record, *schemes)
    assert isinstance(result.exception, QuantkitError)
    assert "fp32 with a 32-bit KV cache has no perplexity" in str(result.exception)
    assert not record.exists()
    sizes.clear()
    bad_one = 1
    result = run(*stories, record, *schemes)
    assert isinstance(result.exception, QuantkitError)
    assert f"int8 with a 32-bit KV cache has no perplexity: the mean NLL of a token is {nll:g}" in str(
        result.exception
    )
    assert [one["scheme"] for one in json.loads(result.stdout)["results"]] == ["fp32", "nf4"]
    assert read_record(record).body == json.loads(result.stdout)


def test_line_ends_are_scored_and_hashed_as_they_are(stories: list[str | Path], tmp_path: Path) -> None:
    content = b"Once upon a time\r\n" * 200
    (tmp_path / "text.txt").write_bytes(content)
    protocol = json.loads(run(*stories, tmp_path / "record.json", "--json").stdout)["protocol"]
    assert protocol["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_kv_group_that_does_not_divide_the_head_is_refused(tmp_path: Path) -> None:
    result = run("eval", "--kv-bits", "4", "--kv-group", "3", "-o", tmp_path / "r.json")
    assert result.exit_code == 1
    assert "KV group of 3 does not divide a head of 64" in str(result.exception)
    for bits in ([], ["--kv-bits", "16"]):
        result = run("eval", "--kv-group", "32", *bits)
        assert result.exit_code == 2
        assert "--kv-group needs --kv-bits 8 or 4" in result.output


def test_the_default_text_is_pythons_own(tmp_path: Path) -> None:
    result = run("eval", "--window", "512", "--limit-tokens", "512", "-o", tmp_path / "record.json")
    assert result.exit_code == 0, result.output
    assert "pydoc_data.topics" in result.stdout
    assert "511 tokens scored" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--scheme", "int5"], SchemeError, "unknown scheme 'int5'; known are"),
        (["--text", "absent.txt"], QuantkitError, "absent.txt cannot be read"),
        (["--limit-tokens", "100"], QuantkitError, "fewer than one window of 2,048: use a shorter --window"),
        (["--window", "64", "--stride", "65"], QuantkitError, "stride"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    result = run("eval", *arguments, "-o", tmp_path / "record.json")
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_window_beyond_the_models_context_is_said(tmp_path: Path) -> None:
    result = run("eval", "--window", "2049", "--limit-tokens", "2049", "-o", tmp_path / "record.json")
    assert result.exit_code == 0
    assert "windows of 2,049 tokens exceed the 2,048 of tiny-mistral" in result.stderr
    assert "±" not in result.stdout  # one window leaves the errors open
    found = read_record(tmp_path / "record.json").body["results"][0]
    assert (
        found["standard_error"] is found["nll_standard_error"] is found["difference_standard_error"] is None
    )


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run("eval", tmp_path / "absent")
    assert isinstance(result.exception, CheckpointError)
    assert "does not exist" in str(result.exception)


def test_a_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    result = run("eval", "--text", tmp_path / "latin")
    assert "not UTF-8 text: byte 3" in str(result.exception)


def test_greedy_generation_is_the_references_text() -> None:
    model = shared_data("stories260K")
    reference = json.loads(shared_data("stories260K", "REFERENCE.json").read_text())
    result = run("generate", model, "Once upon a time", "-n", "64")
    assert result.exit_code == 0, result.output
    assert "Once upon a time" + result.stdout.rstrip("\n") == reference["greedy_text"]


@pytest.mark.parametrize(
    "option",
    ["--seed=9223372036854775808", "--temperature=nan", "--temperature=inf", "--top-p=nan", "-n=16777217"],
)
def test_numbers_beyond_their_range_are_wrong_usage(option: str) -> None:
    assert run("generate", "Once upon a time", *option.split("=")).exit_code == 2


def test_the_greatest_seed_is_taken() -> None:
    model = shared_data("stories260K")
    result = run("generate", model, "Once", "-n", "2", "--temperature", "1", "--seed", 2**63 - 1)
    assert result.exit_code == 0, result.output


def test_a_prompt_that_is_not_utf8_is_one_line() -> None:
    result = run("generate", shared_data("stories260K"), "caf\udce9")
    assert isinstance(result.exception, TokenizerError)
    assert "not valid UTF-8 at character 3" in str(result.exception)


def test_sampling_repeats_with_its_seed() -> None:
    sample = ["generate", "Once upon a time", "-n", "24", "--temperature", "0.9", "--top-p", "0.9"]
    first, again, other = (run(*sample, "--seed", seed).stdout for seed in ("3", "3", "4"))
    assert first == again
    assert first != other
