"""`quantkit fit`: tables for one GPU and for one precision."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner, Result

from calculators.hardware import GPUS, find_gpu
from quantkit.cli.main import cli
from quantkit.schemes import HEADLINE
from tests.paths import ROOT

FIELDS = {
    "gpu", "vram_bytes", "overhead_bytes", "overhead_status", "scheme", "kv_bits", "weights_bytes",
    "longest_context", "limited_by", "context", "batch", "verdict", "margin_bytes", "largest_batch",
    "ceiling_tokens_per_s",
}  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["fit", *arguments])


def body(*arguments: str) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def estimate(*arguments: str) -> dict:
    result = CliRunner().invoke(cli, ["estimate", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_one_gpu_has_every_scheme_and_cache() -> None:
    found = body("--gpu", "RTX 4090")
    assert found["model"] == "mistral-7b-instruct-v0.2"
    assert [(cell["scheme"], cell["kv_bits"]) for cell in found["fits"]] == [
        (scheme, bits) for scheme in ("bf16", *HEADLINE) for bits in (16, 8, 4)
    ]
    for cell in found["fits"]:
        assert set(cell) == FIELDS
        assert cell["vram_bytes"] == find_gpu("RTX 4090").usable_bytes
        assert cell["context"] == 8192
    assert found["assumptions"]["error_band"] == 0.03


def test_fewer_bits_hold_more() -> None:
    cells = body("--vram", "9GiB")["fits"]
    by_key = {(cell["scheme"], cell["kv_bits"]): cell for cell in cells}
    for (scheme, bits), cell in by_key.items():
        if bits > 4:
            less = by_key[scheme, bits // 2]
            assert less["longest_context"] >= cell["longest_context"]
            assert less["largest_batch"] >= cell["largest_batch"]
    assert by_key["bf16", 16]["longest_context"] == 0
    assert 0 < by_key["int4-g32", 16]["longest_context"] < by_key["int4-g128", 16]["longest_context"]


def test_it_says_what_estimate_says() -> None:
    cells = body("--gpu", "RTX 3060", "--scheme", "int8", "--context", "4k")["fits"]
    options = ("--gpu", "RTX 3060", "--scheme", "int8", "--context", "4k")
    for cell in cells:
        found = estimate(*options, "--kv-bits", str(cell["kv_bits"]))
        assert found["estimates"][0]["margin_bytes"] == cell["margin_bytes"]
        assert found["fits"][0].items() <= cell.items()


def test_a_table_of_schemes() -> None:
    lines = run("--gpu", "RTX 4060", "--context", "2k").stdout.splitlines()
    header = next(line for line in lines if line.startswith("scheme"))
    assert header.split() == [
        "scheme", "weights", "KV", "16", "KV", "8", "KV", "4", "batch", "at", "2k", "tokens/s", "at", "2k",
    ]  # fmt: skip
    rows = lines[lines.index(header) + 1 :]
    rows = rows[: rows.index("")]
    assert [row.split()[0] for row in rows] == ["bf16", *HEADLINE]
    assert rows[0].split()[1:] == ["13.49", "none", "none", "none", "none", "-"]
    assert any("RTX 4060" in line for line in lines)
    assert any("not a prediction" in line for line in lines)


def test_a_table_of_gpus() -> None:
    found = body("--scheme", "nf4")
    assert [cell["gpu"] for cell in found["fits"]] == [gpu.name for gpu in GPUS]
    assert {cell["kv_bits"] for cell in found["fits"]} == {16}
    assert "overhead" not in found["assumptions"]
    assert found["assumptions"]["attention"].startswith("flash; math: ")
    assert "T4" in found["assumptions"]["attention"]
    for cell, gpu in zip(found["fits"], GPUS, strict=True):
        assert cell["vram_bytes"] == gpu.usable_bytes
        assert (cell["verdict"] == "fits") == (cell["largest_batch"] > 0)
        assert (cell["ceiling_tokens_per_s"] is None) == (cell["verdict"] == "no")
    lines = run("--scheme", "nf4", "--scheme", "bf16").stdout.splitlines()
    assert sum(line.startswith("GPU ") for line in lines) == 2
    assert sum(line.startswith(f"{GPUS[0].name}  ") for line in lines) == 2


def test_a_bare_size_has_no_ceiling() -> None:
    assert {cell["ceiling_tokens_per_s"] for cell in body("--vram", "24GiB")["fits"]} == {None}
    assert "tokens/s" not in run("--vram", "24GiB").stdout


def test_the_context_is_the_models_where_that_is_shorter() -> None:
    assert body("tinyllama-1.1b", "--vram", "8GiB")["fits"][0]["context"] == 2048


def test_a_share_holds_more() -> None:
    whole, quarter = (
        body("--vram", "8GiB", "--scheme", "bf16", "--tensor-parallel", n)["fits"][0] for n in "14"
    )
    assert whole["longest_context"] == 0
    assert quarter["longest_context"] == 32768
    text = run("--vram", "8GiB", "--tensor-parallel", "4").stdout
    assert "each of 4 GPUs" in text
    assert "Each GPU's 8.00 GiB: " in text
    assert "Each H200 with " in run("--gpu", "H200", "--tensor-parallel", "4").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a GPU by --gpu"),
        (["--gpu", "GTX 1"], "Invalid value for '--gpu'"),
        (["--gpu", "RTX 4090", "--vram", "8GiB"], "exclude each other"),
        (["--vram", "8"], "no unit"),
        (["--vram", "8GiB", "--context", "10000000000"], "the most that is computed"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--gpu", "RTX 4060"], ["--scheme", "nf4"]])
def test_it_answers_soon_and_without_torch(arguments: list[str]) -> None:
    program = (
        f"import sys; sys.argv[1:] = {['fit', *arguments]}\n"
        "from quantkit.cli.main import run\n"
        "try: run()\n"
        "finally: print([n for n in ('torch', 'numpy', 'huggingface_hub') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    before = time.process_time()
    assert run(*arguments).exit_code == 0
    assert time.process_time() - before < 1
