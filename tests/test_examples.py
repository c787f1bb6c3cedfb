"""The example programs run, and print what they promise."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from calculators.units import GIB
from quantkit.records import new_record, read_record, write_record
from quantkit.schemes import SCHEMES
from tests.checkpoints import tiny_config
from tests.paths import ROOT
from tests.report.synthetic import DEVICE, cell, measure_body


def run(name: str, *arguments: object) -> str:
    """Return what an example prints; its standard error appears where it fails."""
    result = attempt(name, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def attempt(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_fit_a_card_gives_a_verdict_for_each_scheme() -> None:
    lines = run("fit_a_card.py").splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("bf16")
    assert lines[0].endswith("does not fit")
    assert any(line.startswith("int4-g128") and line.endswith(" fits") for line in lines)


def test_quantize_a_matrix_lists_every_scheme() -> None:
    lines = run("quantize_a_matrix.py").splitlines()
    assert [line.split()[0] for line in lines] == [
        name for name, scheme in SCHEMES.items() if scheme.quantized
    ]
    sqnr = {line.split()[0]: float(line.split()[-2]) for line in lines}
    assert sqnr["int8"] > 40
    assert sqnr["int4-g32"] > sqnr["int4-g64"] > sqnr["int4-g128"] > 19


def test_the_embedded_models_divergence_is_in_the_order_of_theory() -> None:
    """Each by at least 5%; NF4 and NF4-dq are alike."""
    lines = run("divergence.py", "tiny-mistral", 4096).splitlines()
    assert lines[0] == "4,096 tokens in 2 windows"
    rows = [line.replace("±", "").split() for line in lines[1:]]
    mean = {name: float(found) for name, found, _ in rows}
    assert mean["int8"] < 0.02 * mean["int4-g32"]
    assert mean["int4-g128"] > 1.05 * mean["int4-g64"] > 1.05**2 * mean["int4-g32"]
    assert mean["int4-g128"] > 1.05 * mean["nf4"] > 1.05**2 * mean["int4-g32"]
    assert abs(mean["nf4-dq"] / mean["nf4"] - 1) < 0.02


def measured(path: Path, *cells: dict[str, object], name: str = DEVICE["name"]) -> Path:
    """Write a record of some cells."""
    write_record(path, new_record("measure", measure_body(list(cells), {**DEVICE, "name": name})))
    return path


def test_records_of_single_precisions_are_joined(tmp_path: Path) -> None:
    own = cell("int8", 1024, GIB, GIB, own_process=True)
    int8 = measured(tmp_path / "int8.json", cell("int8", 1024, GIB, GIB), own)
    nf4 = measured(tmp_path / "nf4.json", cell("nf4", 1024, GIB, GIB), cell("nf4", 2048, GIB, GIB))
    out = tmp_path / "both.json"
    assert run("join_measurements.py", out, nf4) == f"2 cells of nf4: {out}\n"
    assert run("join_measurements.py", out, out, int8) == f"4 cells of int8, nf4: {out}\n"
    cells = [(row["scheme"], row["context"]) for row in read_record(out).body["cells"]]
    assert cells == [("int8", 1024), ("nf4", 1024), ("nf4", 2048), ("int8", 1024)]
    assert read_record(out).created == read_record(int8).created


@pytest.mark.parametrize(
    ("scheme", "name", "message"),
    [("int8", DEVICE["name"], "a cell comes twice"), ("nf4", "NVIDIA B200", "the records differ")],
)
def test_records_that_do_not_belong_together_are_not_joined(
    scheme: str, name: str, message: str, tmp_path: Path
) -> None:
    first = measured(tmp_path / "first.json", cell("int8", 1024, GIB, GIB))
    second = measured(tmp_path / "second.json", cell(scheme, 1024, GIB, GIB), name=name)
    result = attempt("join_measurements.py", tmp_path / "out.json", first, second)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert message in result.stderr
    assert not (tmp_path / "out.json").exists()


def test_both_sides_of_the_timing_generate_what_is_asked_for() -> None:
    pytest.importorskip("transformers")
    example = runpy.run_path(str(ROOT / "examples" / "beside_transformers.py"))
    config = tiny_config(hidden_size=128, intermediate_size=192, max_context=64)
    for side in ("ours", "theirs"):
        assert example[side](config, torch.device("cpu"), [1, 2, 3, 4, 5], 4)() == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_the_timing_needs_a_gpu_and_says_so(tmp_path: Path) -> None:
    failed = attempt("beside_transformers.py")
    assert failed.returncode == 1
    assert failed.stderr == "this needs a CUDA GPU that PyTorch sees\n"
    failed = attempt("tune_cuda.py", tmp_path / "tried.json")
    assert failed.returncode == 1
    assert failed.stderr.endswith("no CUDA GPU is visible to PyTorch\n")


TRIED = """
import json, runpy, sys
from tests.bench.cuda.stand_in import StandIn
example, device = runpy.run_path("examples/tune_cuda.py"), StandIn()
device.backend = "triton"
tried, given = example["tried"], (device, sys.argv[1], "o", (64, 128), [3], example["launches"]()[::6], 0)
notes = list(tried(*given))
print(json.dumps([notes, example["best"](notes), list(tried(*given, notes)), len(list(tried(*given, notes[1:3])))]))

def lose():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

example["multiply"].__globals__["launcher"], device.release = lose, lose
rest = tried(*given, notes[:3])
print(json.dumps(next(rest)))
try:
    next(rest)
except example["GpuLost"] as error:
    print(error)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_launches_are_tried_and_the_fastest_is_found() -> None:
    """In Triton's interpreter, where all are right."""
    command = [sys.executable, "-c", TRIED, "int4-g128"]
    environment = _environment() | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    first, failed, lost = done.stdout.splitlines()
    notes, chosen, again, rest = json.loads(first)
    assert [note["launch"] for note in notes[:2]] == ["torch bf16", "today"]
    assert len({str(note["launch"]) for note in notes}) == len(notes) == 5
    for note in notes:
        assert note["same_bits"]
        assert note["error"] < 5e-3
    assert chosen["times_bf16"] == max(note["times_bf16"] for note in notes[1:])
    assert again == []  # what is known is not tried
    assert rest == 3
    assert json.loads(failed) == {  # is known, too, when the rest is tried by another process
        "scheme": "int4-g128", "matrix": "o", "m": 3, "launch": notes[3]["launch"],
        "failed": lost.partition(" took the GPU: ")[2],
    }  # fmt: skip


def test_a_launch_that_is_wrong_or_failed_is_not_the_fastest() -> None:
    best = runpy.run_path(str(ROOT / "examples" / "tune_cuda.py"))["best"]
    right = {"launch": "today", "same_bits": True, "error": 1e-3, "seconds": 3.0, "times_bf16": 1.0}
    others = [
        {"same_bits": False, "times_bf16": 3.0},
        {"error": 0.5, "times_bf16": 3.0},
        {"launch": "torch bf16", "times_bf16": 3.0},
        {"launch": {"warps": 4}, "times_bf16": 2.0},
    ]
    notes = [right, {"launch": {}, "failed": "OutOfResources"}, *({**right, **other} for other in others)]
    assert best(notes) == notes[-1]
    assert best(notes[1:-1]) is None
