"""`quantkit estimate`, and how the command line ends when something goes wrong."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calculators.hardware import GPUS, Overhead, Platform, find_gpu, platform_of
from calculators.units import format_gib
from quantkit.cli.main import cli, explain
from quantkit.errors import CheckpointError, ConfigError, QuantkitError, SchemeError
from quantkit.presets import PRESETS
from quantkit.records import read_record
from quantkit.schemes import SCHEMES
from tests.checkpoints import hf_config, tiny_config, write_checkpoint
from tests.paths import ROOT, smollm2_gguf

FIELDS = {
    "scheme", "kv_bits", "context", "batch", "weights_bytes", "kv_cache_bytes", "activations_bytes",
    "allocator_bytes", "overhead_bytes", "allocated_bytes", "reserved_bytes", "total_bytes",
}  # fmt: skip
PARTS = ("weights_bytes", "kv_cache_bytes", "activations_bytes", "allocator_bytes", "overhead_bytes")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["estimate", *map(str, arguments)])


def body(*arguments: str | Path) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantkit", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_json_has_every_field_and_parts_that_add_up() -> None:
    found = body()
    assert found["model"] == "mistral-7b-instruct-v0.2"
    assert found["parameters"] == 7_241_732_096
    assert found["parameters_by_role"]["ffn"] == 5_637_144_576
    assert [entry["context"] for entry in found["estimates"][:6]] == [1024, 2048, 4096, 8192, 16384, 32768]
    for entry in found["estimates"]:
        assert set(entry) == FIELDS
        assert entry["total_bytes"] == sum(entry[part] for part in PARTS)
        assert all(type(entry[name]) is int for name in FIELDS - {"scheme"})
    assert {entry["scheme"] for entry in found["estimates"]} == {
        "bf16", "int8", "int4-g128", "int4-g64", "int4-g32", "nf4", "nf4-dq",
    }  # fmt: skip


def test_assumptions_are_said() -> None:
    assumed = body("--prefill-chunk", "1k", "--kv-bits", "4")["assumptions"]
    assert "quantkit's own runtime" in assumed["runtime"]
    assert assumed["prefill_chunk"] == 1024
    assert assumed["kv_bytes_per_token"] == 33_792
    assert "int4" in assumed["kv_layout"]
    assert assumed["overhead"]["status"] == "assumed"
    assert assumed["overhead"]["bytes"] == 570_425_344
    text = run("--context", "32k").stdout
    for said in (
        "quantkit's own runtime",
        "2,048 tokens",
        "131,072 bytes a token",
        "assumed",
        "CUDA context",
    ):
        assert said in text


def test_four_bits_open_with_one_sentence() -> None:
    result = run("--context", "32768", "--bits", "4")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "needs" in lines[0]
    assert "smallest common card" in lines[0]
    header = next(line for line in lines if line.startswith("scheme"))
    assert header.split() == [
        "scheme", "weights", "KV", "cache", "activations", "allocator", "overhead", "total",
    ]  # fmt: skip
    rows = lines[lines.index(header) + 1 :]
    assert rows[0].startswith("int4-g128 ")
    assert rows[0].split()[1:3] == ["3.84", "4.00"]
    names = [row.split()[0] for row in rows[: rows.index("")]]
    assert set(names) == {name for name, scheme in SCHEMES.items() if scheme.bits == 4}
    assert len({len(row) for row in [header, *rows[: len(names)]]}) == 1


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4-g128"])
@pytest.mark.parametrize("more", [(), ("--attention", "math"), ("--kv-bits", "8", "--reserve", "1GiB")])
def test_the_card_that_is_named_is_the_smallest_that_holds_it(scheme: str, more: tuple[str, ...]) -> None:
    """As --gpu says of each."""
    asked = ("--scheme", scheme, "--context", "12k", *more)
    said = run(*asked).stdout.splitlines()[0]
    card = re.search(r"holds (it|it, tightly,) is the (.*), (.*) of (.*) GiB there", said)
    assert card is not None
    gpu = find_gpu(card[2])
    verdicts = {gpu: body(*asked, "--gpu", gpu.name)["estimates"][0] for gpu in GPUS}
    assert verdicts[gpu]["verdict"] == ("fits" if card[1] == "it" else "tight")
    assert (card[3], card[4]) == (format_gib(verdicts[gpu]["total_bytes"]), format_gib(gpu.usable_bytes))
    smaller = [each for each in GPUS if each.usable_bytes < gpu.usable_bytes]
    assert not any(verdicts[gpu]["fits"] for gpu in smaller)


def test_no_card_holds_everything() -> None:
    assert "more than any one card" in run("--bits", "16", "--context", "32k", "--batch", "64").stdout


def test_bits_and_schemes_combine_each_once() -> None:
    found = body("--bits", "8", "--scheme", "nf4", "--scheme", "int8", "--bits", "16", "--context", "1k")
    assert [entry["scheme"] for entry in found["estimates"]] == ["int8", "bf16", "nf4"]


def test_without_a_context_totals_are_schemes_by_contexts() -> None:
    lines = run().stdout.splitlines()
    header = next(line for line in lines if line.startswith("scheme"))
    assert header.split() == ["scheme", "1k", "2k", "4k", "8k", "16k", "32k"]
    assert all(len(line.split()) == 7 for line in lines[lines.index(header) + 1 : lines.index(header) + 8])


def test_memory_gives_a_verdict() -> None:
    found = body("--vram", "12GiB", "--reserve", "1GiB", "--context", "32k")["estimates"]
    by_scheme = {entry["scheme"]: entry for entry in found}
    assert by_scheme["int4-g128"]["verdict"] == "fits"
    assert by_scheme["bf16"]["verdict"] == "no"
    for entry in found:
        margin = entry["margin_bytes"]
        assert margin == 11 * 2**30 - entry["total_bytes"]
        word = "no" if margin < 0 else "tight" if margin < 0.03 * entry["total_bytes"] else "fits"
        assert (entry["verdict"], entry["fits"]) == (word, word != "no")
    lines = run("--vram", "12GiB", "--context", "32k").stdout.splitlines()
    assert next(line for line in lines if line.startswith("scheme")).endswith("verdict  margin")
    assert "* does not fit 12.00 GiB" in run("--vram", "12GiB").stdout


def test_inside_the_error_band_it_is_tight() -> None:
    args = ("--scheme", "nf4", "--context", "8k")
    needed = body(*args)["estimates"][0]["total_bytes"]
    kib = -(-needed // 1024)
    assert body(*args, "--vram", f"{kib}KiB")["estimates"][0]["verdict"] == "tight"
    assert body(*args, "--vram", f"{int(kib * 1.031)}KiB")["estimates"][0]["verdict"] == "fits"
    assert body(*args, "--vram", f"{kib - 1}KiB")["estimates"][0]["verdict"] == "no"
    text = run(*args, "--vram", f"{kib}KiB").stdout
    assert "tight, " in text.splitlines()[0]
    assert "on an H200, the one GPU measured, it was at most 1.1%" in text
    assert (
        "~ tight"
        in run("--scheme", "nf4", "--context", "8k", "--context", "1k", "--vram", f"{kib}KiB").stdout
    )


def test_the_most_that_fits_is_solved() -> None:
    args = ("--scheme", "int8", "--vram", "12GiB", "--context", "8k")
    fit = body(*args)["fits"][0]
    assert fit["limited_by"] == "memory"
    assert (fit["context"], fit["batch"], fit["ceiling_tokens_per_s"]) == (8192, 1, None)

    def word(context: int, batch: int) -> str:
        options = ("--context", str(context), "--batch", str(batch))
        return body("--scheme", "int8", "--vram", "12GiB", *options)["estimates"][0]["verdict"]

    longest, largest = fit["longest_context"], fit["largest_batch"]
    assert (word(longest, 1), word(longest + 1, 1)) == ("fits", "tight")
    assert (word(8192, largest), word(8192, largest + 1)) != ("fits", "fits")
    assert word(8192, largest) == "fits"
    assert str(longest) in run(*args).stdout


def test_the_models_own_limit_is_said() -> None:
    fit = body("--scheme", "nf4", "--vram", "80GiB", "--context", "1k")["fits"][0]
    assert (fit["longest_context"], fit["limited_by"]) == (32768, "model")
    text = run("--scheme", "nf4", "--vram", "80GiB", "--context", "1k").stdout
    assert "32k=" in text
    assert "= the model's own limit" in text


def test_nothing_fits() -> None:
    fit = body("--scheme", "bf16", "--vram", "8GiB", "--context", "1k")["fits"][0]
    assert (fit["longest_context"], fit["largest_batch"], fit["limited_by"]) == (0, 0, "memory")


def test_a_gpu_gives_memory_and_a_ceiling() -> None:
    found = body("--gpu", "rtx 4090", "--scheme", "bf16", "--context", "1k")
    gpu = find_gpu("RTX 4090")
    assert found["assumptions"]["gpu"] == gpu.name
    assert found["assumptions"]["vram_bytes"] == gpu.usable_bytes
    entry = found["estimates"][0]
    assert entry["margin_bytes"] == gpu.usable_bytes - entry["total_bytes"]
    read = entry["weights_bytes"] - 31_999 * 4096 * 2 + entry["kv_cache_bytes"]
    assert found["fits"][0]["ceiling_tokens_per_s"] == round(gpu.bandwidth_gb_s * 1e9 / read, 1)
    text = run("--gpu", "RTX 4090", "--context", "1k").stdout
    assert "a ceiling, not a prediction" in text
    assert gpu.name in text


def test_a_tied_head_is_read_whole() -> None:
    found = body("smollm2-135m", "--gpu", "RTX 4090", "--scheme", "bf16", "--context", "1k")
    entry, gpu = found["estimates"][0], find_gpu("RTX 4090")
    read = entry["weights_bytes"] + entry["kv_cache_bytes"]
    assert found["fits"][0]["ceiling_tokens_per_s"] == round(gpu.bandwidth_gb_s * 1e9 / read, 1)


def test_a_gpu_says_where_its_figures_come_from() -> None:
    gpu = find_gpu("RTX 4090")
    found = body("--gpu", "RTX 4090", "--context", "1k")["assumptions"]
    assert gpu.usable_source in found["usable"]
    assert gpu.bandwidth_source in found["bandwidth"]
    assert found["overhead"]["status"] == "published"
    assert found["overhead"]["bytes"] == sum(
        part.nbytes for part in (platform_of(gpu).context, platform_of(gpu).workspace)
    )


def test_a_scheme_that_flash_does_not_take_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config(), "fp32")))
    found = body(tmp_path, "--scheme", "bf16", "--scheme", "fp32", "--scheme", "int8", "--context", "64")
    assert found["assumptions"]["attention"] == "math; flash: bf16"


def test_an_old_gpu_runs_no_flash_attention() -> None:
    assert body("--gpu", "T4", "--context", "1k")["assumptions"]["attention"] == "math"
    result = run("--gpu", "T4", "--attention", "flash")
    assert result.exit_code == 2
    assert "the T4 runs no flash attention" in result.stderr


def test_a_calibrated_gpu_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit import calibration

    measured = Overhead(300 * 2**20, "measured", "CUDA context on this machine")
    platform = Platform(measured, replace(measured, nbytes=2**20))
    monkeypatch.setattr(calibration, "calibrated", lambda name, known: platform if name == "H200" else known)
    found = body("--gpu", "H200", "--context", "1k")
    assert found["assumptions"]["overhead"]["status"] == "measured"
    assert found["estimates"][0]["overhead_bytes"] == 301 * 2**20


def test_an_unknown_gpu_offers_the_nearest() -> None:
    result = run("--gpu", "RTX 409O")
    assert result.exit_code == 2
    assert "RTX 4090" in result.stderr


def test_check_has_its_own_code() -> None:
    fitting = run("--check", "--vram", "12GiB", "--scheme", "nf4")
    assert (fitting.exit_code, fitting.stderr) == (0, "")
    result = run("--check", "--vram", "12GiB", "--scheme", "nf4", "--scheme", "bf16", "--context", "1k")
    assert result.exit_code == 3
    assert result.stderr == "does not fit: bf16 at 1k\n"
    assert (
        result.stdout
        == run("--vram", "12GiB", "--scheme", "nf4", "--scheme", "bf16", "--context", "1k").stdout
    )
    assert process("estimate", "--check", "--vram", "8GiB", "--bits", "16").returncode == 3
    needed = body("--scheme", "nf4", "--context", "1k")["estimates"][0]["total_bytes"]
    tight = run("--check", "--vram", f"{-(-needed // 1024)}KiB", "--scheme", "nf4", "--context", "1k")
    assert (tight.exit_code, tight.stderr) == (0, "tight: nf4 at 1k\n")


def test_explained_terms_add_up() -> None:
    args = ("--scheme", "bf16", "--scheme", "int4-g128", "--context", "1k", "--context", "4k", "--explain")
    found = body(*args)
    assert len(found["explained"]) == 4
    for entry, explained in zip(found["estimates"], found["explained"], strict=True):
        assert (entry["scheme"], entry["context"]) == (explained["scheme"], explained["context"])
        assert sum(term["nbytes"] for term in explained["terms"]) == entry["total_bytes"]
    lines = run(*args).stdout.splitlines()
    start = lines.index(f"bf16 at 1k tokens: {found['estimates'][0]['total_bytes']:,} bytes")
    assert lines[start + 1].split()[0] == "weights"
    assert f"{found['estimates'][0]['kv_cache_bytes']:,}" in "\n".join(lines)


def test_a_share_of_the_model() -> None:
    whole, half = (body("--tensor-parallel", n, "--context", "32k", "--scheme", "bf16") for n in "12")
    assert half["parameters"] == whole["parameters"] == 7_241_732_096
    assert half["estimates"][0]["kv_cache_bytes"] == whole["estimates"][0]["kv_cache_bytes"] // 2
    assert half["estimates"][0]["weights_bytes"] == (14_483_464_192 - 532_480) // 2 + 532_480
    assert whole["notes"] == []
    assert "NCCL's buffers" in half["notes"][0]
    assert "each of 2 GPUs" in run("--tensor-parallel", "2").stdout
    refused = run("--tensor-parallel", "3")
    assert isinstance(refused.exception, ConfigError)
    assert "possible are 1, 2, 4, 8, 16, 32" in str(refused.exception)


def test_the_runtimes_settings_are_heard() -> None:
    args = ("--scheme", "bf16", "--context", "8k")
    flash, math, segments = (
        body(*args, *extra) for extra in ((), ("--attention", "math"), ("--expandable-segments",))
    )
    assert math["estimates"][0]["activations_bytes"] > flash["estimates"][0]["activations_bytes"]
    assert math["assumptions"]["attention"] == "math"
    assert segments["assumptions"]["allocator"] == "expandable segments"
    assert segments["estimates"][0]["allocator_bytes"] != flash["estimates"][0]["allocator_bytes"]


def test_groups_of_the_cache_have_their_scales() -> None:
    args = ("--scheme", "nf4", "--context", "32k", "--kv-bits", "4")
    assert body(*args)["estimates"][0]["kv_cache_bytes"] == 1_107_296_256
    assert body(*args, "--kv-group", "64")["estimates"][0]["kv_cache_bytes"] == 1_140_850_688
    assert isinstance(run(*args, "--kv-group", "48").exception, ConfigError)


def test_gb_is_not_gib() -> None:
    text = run("--vram", "24GB", "--context", "1k").stdout
    assert "a card sold as 24 GB has about 24 GiB" in text
    assert body("--vram", "24GB", "--context", "1k")["assumptions"]["vram_bytes"] == 24 * 10**9
    bare = run("--vram", "24")
    assert bare.exit_code == 2
    assert "24GiB" in bare.stderr


def test_csv_is_the_json_in_columns() -> None:
    rows = list(csv.DictReader(io.StringIO(run("--csv", "--vram", "24GiB").stdout)))
    entries = body("--vram", "24GiB")["estimates"]
    assert [{key: str(value).lower() for key, value in entry.items()} for entry in entries] == rows


def test_the_record_holds_the_json(tmp_path: Path) -> None:
    path = tmp_path / "estimate.json"
    result = run("--json", "--output", path)
    record = read_record(path)
    assert record.kind == "estimate"
    assert record.body == json.loads(result.stdout)


def test_short_groups_are_noted_and_can_be_avoided() -> None:
    args = ("smollm2-135m", "--scheme", "int4-g128", "--context", "1k")
    assert any("K = 576" in note for note in body(*args)["notes"])
    sizes = {policy: body(*args, "--indivisible", policy) for policy in ("short", "int8", "keep")}
    assert not sizes["int8"]["notes"]
    weights = [sizes[policy]["estimates"][0]["weights_bytes"] for policy in ("short", "int8", "keep")]
    assert weights == sorted(set(weights))


def test_include_and_exclude_move_bytes() -> None:
    args = ("--scheme", "int8", "--context", "1k")
    plain, more, less = (
        body(*args, *extra)["estimates"][0]["weights_bytes"]
        for extra in ((), ("--include", "lm_head"), ("--exclude", "*.v_proj"))
    )
    assert more < plain < less


def test_a_context_beyond_the_models_is_a_warning() -> None:
    result = run("tinyllama-1.1b", "--context", "4k")
    assert result.exit_code == 0
    assert result.stderr == "Warning: 4k: above the 2k tokens that tinyllama-1.1b is made for\n"
    assert run("--context", "32k").stderr == ""


def test_a_plain_directory_is_no_stored_row(tmp_path: Path) -> None:
    config = tiny_config()
    directory = write_checkpoint(tmp_path / "model", config, "fp32", seed=0)
    found = body(directory, "--context", "64")["estimates"]
    assert [(entry["scheme"], entry["kv_bits"]) for entry in found][:3] == [
        ("fp32", 32),
        ("bf16", 16),
        ("int8", 32),
    ]
    assert found[0]["weights_bytes"] == 4 * config.parameters


def test_a_config_alone_will_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config(), "bf16")))
    assert body(tmp_path, "--context", "64")["estimates"][0]["scheme"] == "bf16"


def test_a_quantized_directory_comes_as_stored_first(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tiny_config(), "bf16", seed=0)
    quantized = CliRunner().invoke(
        cli, ["quantize", str(directory), str(tmp_path / "nf4"), "--scheme", "nf4"]
    )
    assert quantized.exit_code == 0, quantized.output
    found = {entry["scheme"]: entry for entry in body(tmp_path / "nf4", "--context", "64")["estimates"]}
    assert next(iter(found)) == "as-stored"
    assert found["as-stored"] == {**found["nf4"], "scheme": "as-stored"}


def test_tensors_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tiny_config(), "bf16", seed=0)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "intermediate_size": 264}))
    result = run(directory)
    assert isinstance(result.exception, CheckpointError)
    assert "has shape [256, 128], config.json implies [264, 128]" in str(result.exception)


def test_a_gguf_comes_as_stored_first() -> None:
    found = body(smollm2_gguf(), "--context", "1k")
    first = found["estimates"][0]
    assert first["scheme"] == "as-stored"
    assert first["weights_bytes"] < 134_515_008
    assert any("dequantized" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["gpt-5"], ConfigError, "presets are mistral-7b-instruct-v0.2"),
        (["--scheme", "int3"], SchemeError, "unknown scheme 'int3'"),
        (["--include", "nothing"], SchemeError, "matches no tensor"),
        (["--output", "/dev/null/record.json", "--context", "1k"], QuantkitError, "cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], error: type[Exception], said: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, error)
    assert said in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--context", "0"],
        ["--context", "x"],
        ["--bits", "3"],
        ["--batch", "0"],
        ["--json", "--csv"],
        ["--nonsense"],
        ["--context", "-5"],
        ["--context", "1000000000000000"],
        ["--context", "9" * 5000],
        ["--prefill-chunk", "0"],
        ["--batch", "1000000000"],
        ["--kv-group", "0"],
        ["--kv-group", "64", "--kv-bits", "16"],
        ["--kv-group", "64"],
        ["--vram", "GiB"],
        ["--vram", "-1GiB"],
        ["--vram", "0GiB"],
        ["--vram", "9999999PiB"],
        ["--vram", "99999999GiB"],
        ["--vram", "9" * 400 + "GiB"],
        ["--vram", "8GiB", "--reserve", "8GiB"],
        ["--vram", "8GiB", "--gpu", "RTX 4090"],
        ["--gpu", ""],
        ["--tensor-parallel", "0"],
        ["--check"],
        ["--csv", "--explain"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert result.stdout == ""


def test_a_process_prints_one_line_and_its_code() -> None:
    unknown = process("estimate", "gpt-5")
    assert (unknown.returncode, unknown.stdout, unknown.stderr.count("\n")) == (1, "", 1)
    assert unknown.stderr.startswith("Error: unknown model 'gpt-5': presets are ")
    assert process("estimate", "--vram", "24").returncode == 2
    assert process("nonsense").returncode == 2
    assert process("--version").stdout.startswith("quantkit, version ")


def test_it_answers_at_once_and_without_torch() -> None:
    program = (
        "import sys; sys.argv[1:] = ['estimate', '--context', '32768', '--bits', '4']\n"
        "from quantkit.cli.main import run\n"
        "try: run()\n"
        "finally: print([n for n in ('torch', 'numpy', 'pandas') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


def slowness() -> float:
    """Return how many twentieths of a second a million turns of a loop take, 1 at least."""
    start, total = time.process_time(), 0
    for turn in range(1_000_000):
        total += turn * turn
    return max(1.0, 20 * (time.process_time() - start))


def test_a_full_table_takes_less_than_a_fifth_of_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    process("estimate")  # compiles, as installing does
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("estimate").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.2 * slowness()  # of processor time, since tests share their machine


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_unwind_and_have_their_codes(name: str, code: int, tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys, time\n"
        "from quantkit.cli import main, options\n"
        "def find_model(path):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        time.sleep(5)\n"
        "    finally:\n"
        "        pathlib.Path(path).write_text('cleaned up')\n"
        "options.find_model = find_model\n"
        "sys.argv.insert(1, 'estimate')\n"
        "main.run()"
    )
    marker = tmp_path / "marker"
    done = subprocess.run(
        [sys.executable, "-c", program, str(marker)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert marker.read_text() == "cleaned up"
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m quantkit estimate --json | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_errors_of_the_machine_are_one_line() -> None:
    assert "the disk is full: /x/y" in str(explain(OSError(errno.ENOSPC, "No space left on device", "/x/y")))
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/x")) == "Permission denied: /x"
    assert "out of memory" in str(explain(MemoryError()))
    assert "out of memory" in str(
        explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"))
    )
    assert explain(QuantkitError("two\nlines")) == "two lines"
    assert explain(KeyError("a bug")) is None


def test_presets_are_in_the_help() -> None:
    text = " ".join(run("--help").stdout.split())
    assert all(name in text for name in PRESETS)
