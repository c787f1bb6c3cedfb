"""`quantkit quantize` as it is typed: what it prints, what it refuses, and that OUT is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from quantkit.cli.quantize import command
from quantkit.errors import OutputError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.safetensors import ShardWriter
from quantkit.presets import PRESETS
from quantkit.quantize.staging import staged_directory
from tests.checkpoints import hf_config, tiny_config, write_checkpoint
from tests.paths import ROOT

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", tiny_config(), "fp32", seed=0, shards=2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def refused(result: Result, *parts: str) -> None:
    """Hold an error to be one line that says all of `parts`."""
    message = str(result.exception)
    assert result.exit_code == 1
    assert type(result.exception).__module__ == "quantkit.errors", result.exception
    assert "\n" not in message
    for part in parts:
        assert part in message


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_it_prints_each_matrix_worst_first_and_the_sizes(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out", "--scheme", "nf4")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    ratios = [float(line.split()[2]) for line in lines[1:15]]
    assert ratios == sorted(ratios)
    assert all(19 < ratio < 22 for ratio in ratios)
    assert lines[-2].startswith("all weights: 1.22 MiB before, ")
    assert lines[-1] == str(tmp_path / "out")


def test_json_says_the_same(model: Path, tmp_path: Path) -> None:
    body = json.loads(run(model, tmp_path / "out", "--scheme", "int8", "--json").stdout)
    assert body["bytes_after"] == open_checkpoint(tmp_path / "out").stored_bytes
    assert body["scheme"] == "int8"
    assert len(body["matrices"]) == 14
    assert body["matrices"][0].keys() == {"name", "scheme", "sqnr_db", "bytes_before", "bytes_after"}


def test_an_output_that_exists_stays_without_force(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    refused(run(model, out, "--scheme", "int8"), "out exists already", "--force")
    assert (out / "config.json").read_text() == "mine"
    assert run(model, out, "--scheme", "int8", "--force").exit_code == 0
    assert names(tmp_path) == {"model", "out"}
    assert names(out) == {"config.json", "model.safetensors"}


def test_force_spares_what_is_no_model_and_the_source(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    refused(run(model, other, "--scheme", "int8", "--force"), "photos holds no config.json")
    (tmp_path / "file").touch()
    refused(run(model, tmp_path / "file", "--scheme", "int8", "--force"), "file is no directory")
    (tmp_path / "link").symlink_to(model)
    refused(run(model, tmp_path / "link", "--scheme", "int8", "--force"), "link is no directory")
    for target in (model, tmp_path, model / "inner"):
        target.mkdir(exist_ok=True)
        refused(run(model, target, "--scheme", "int8", "--force"), "overlaps the source")
    open_checkpoint(model)
    assert names(tmp_path) == {"model", "photos", "file", "link"}


def test_force_keeps_the_old_where_the_new_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(model, out, "--scheme", "int8").exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    fill_the_disk(monkeypatch)
    refused(run(model, out, "--scheme", "nf4", "--force"), "No space left on device")
    assert (out / "model.safetensors").read_bytes() == before
    assert names(tmp_path) == {"model", "out"}


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fifth tensor that is written find the disk full."""
    original, written = ShardWriter._put, []

    def put(self: ShardWriter, data: memoryview) -> None:
        written.append(data.nbytes)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, data)

    monkeypatch.setattr(ShardWriter, "_put", put)


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_the_disk(monkeypatch)
    refused(
        run(model, tmp_path / "out", "--scheme", "int8"), "out cannot be written: No space left on device"
    )
    assert names(tmp_path) == {"model"}


def test_wrong_usage_is_exit_code_2(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "out").exit_code == 2
    assert run(model, tmp_path / "out", "--scheme", "int8", "--indivisible", "short").exit_code == 2
    refused(run(model, tmp_path / "out", "--scheme", "int5"), "unknown scheme 'int5'; known are")
    refused(
        run(model, tmp_path / "absent" / "out", "--scheme", "int8"), "absent is no directory", "create it"
    )
    refused(run(tmp_path / "absent", tmp_path / "out", "--scheme", "int8"), "absent does not exist")
    assert names(tmp_path) == {"model"}


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def edit_tensor(model: Path, change: object) -> None:
    """Change `Q` in its shard by a function of the tensor; None takes it out."""
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        if Q in tensors:
            tensor = tensors.pop(Q)
            if callable(change):
                tensors[Q] = change(tensor)
            save_file(tensors, path)


def with_value(value: float) -> object:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return change


def bad_missing_shard(model: Path) -> tuple[str, ...]:
    (model / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors is missing", "index.json names it"


def bad_truncated_shard(model: Path) -> tuple[str, ...]:
    path = model / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 7)
    return ("model-00001-of-00002.safetensors is truncated",)


def bad_truncated_header(model: Path) -> tuple[str, ...]:
    os.truncate(model / "model-00001-of-00002.safetensors", 50)
    return ("model-00001-of-00002.safetensors is truncated",)


def bad_absent_tensor(model: Path) -> tuple[str, ...]:
    edit_tensor(model, None)
    return f"says that {Q} lies in", "but it is not there"


def bad_nan(model: Path) -> tuple[str, ...]:
    edit_tensor(model, with_value(float("nan")))
    return (f"{Q} holds NaN or infinite",)


def bad_infinity(model: Path) -> tuple[str, ...]:
    edit_tensor(model, with_value(float("-inf")))
    return (f"{Q} holds NaN or infinite",)


def bad_shape(model: Path) -> tuple[str, ...]:
    edit_tensor(model, lambda tensor: tensor[:-1].contiguous())
    return (f"{Q} has shape [127, 128], config.json implies [128, 128]",)


def bad_dtype(model: Path) -> tuple[str, ...]:
    edit_tensor(model, lambda tensor: tensor.to(torch.int32))
    return f"{Q} has dtype I32", "F32, BF16, F16"


def bad_architecture(model: Path) -> tuple[str, ...]:
    edit_config(model, architectures=["MambaForCausalLM"])
    return "unknown architecture MambaForCausalLM", "MistralForCausalLM"


def bad_missing_key(model: Path) -> tuple[str, ...]:
    edit_config(model, num_hidden_layers=None)
    return ("the key 'num_hidden_layers' is missing",)


def bad_missing_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").unlink()
    return ("config.json does not exist",)


def bad_pickle(model: Path) -> tuple[str, ...]:
    for path in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return "pytorch_model.bin is a pickle", "refused"


@pytest.mark.parametrize("spoil", [value for name, value in globals().items() if name.startswith("bad_")])
def test_bad_input_is_one_line_and_leaves_nothing(spoil: object, model: Path, tmp_path: Path) -> None:
    assert callable(spoil)
    expected = spoil(model)
    refused(run(model, tmp_path / "out", "--scheme", "int8"), *expected)
    assert names(tmp_path) == {"model"}


def test_what_fp16_cannot_hold_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    edit_tensor(model, with_value(-1e5))
    refused(run(model, tmp_path / "out", "--scheme", "fp16"), f"{Q} holds 100000, beyond the 65504 of fp16")
    assert names(tmp_path) == {"model"}


def test_an_indivisible_group_is_refused_by_name(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tiny_config(intermediate_size=192), "fp32", seed=0)
    arguments = (model, tmp_path / "out", "--scheme", "int4-g128")
    refused(
        run(*arguments),
        "layers.0.mlp.down_proj.weight",
        "K = 192",
        "the largest group that divides every matrix is 64",
    )
    assert names(tmp_path) == {"model"}
    assert run(*arguments, "--indivisible", "int8").exit_code == 0


# A run that stops after some tensors, says so, and waits to be killed.
SLOW = """
import sys, time
from quantkit.cli import main
from quantkit.formats.safetensors import ShardWriter
append, count = ShardWriter._append, 0
def slow(self, name, tensor):
    global count
    append(self, name, tensor)
    count += 1
    if count == 5:
        print("writing", flush=True)
        time.sleep(60)
ShardWriter._append = slow
main.run()
"""


def start(model: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """Return a run that has written some of its tensors and stands still."""
    arguments = [sys.executable, "-c", SLOW, "quantize", str(model), str(out), "--scheme", "int8", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupt_leaves_nothing(name: str, code: int, model: Path, tmp_path: Path) -> None:
    process = start(model, tmp_path / "out")
    assert len(names(tmp_path)) == 2
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert names(tmp_path) == {"model"}


def test_a_kill_leaves_what_the_next_run_removes(model: Path, tmp_path: Path) -> None:
    process = start(model, tmp_path / "out")
    leftover = names(tmp_path) - {"model"}
    assert run(model, tmp_path / "other", "--scheme", "int8").exit_code == 0
    with pytest.raises(OutputError), staged_directory(tmp_path / "out", model, force=False):
        raise OutputError("only to look")
    assert leftover < names(tmp_path), "a living process keeps its folder"
    process.kill()
    process.communicate()
    assert names(tmp_path) == {"model", "other", *leftover}
    assert run(model, tmp_path / "out", "--scheme", "int8").exit_code == 0
    assert names(tmp_path) == {"model", "other", "out"}


def test_a_kill_between_the_renames_loses_no_old_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(model, out, "--scheme", "int8").exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    killed = tmp_path / ".out.partial-1"
    (killed / "new").mkdir(parents=True)
    out.rename(killed / "old")
    refused(run(model, out, "--scheme", "nf4"), "out exists already")
    assert (out / "model.safetensors").read_bytes() == before
    assert names(tmp_path) == {"model", "out"}


MEASURE = """
import sys
from quantkit.cli.main import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "options", [["int8"], ["int4-g128"], ["nf4-dq", "--include", "lm_head"], ["fp32"]], ids=" ".join
)
def test_peak_memory_stays_within_1536_mib(options: list[str], tmp_path: Path) -> None:
    """One layer of Mistral-7B with embedding and head: its largest tensors, one held at a time."""
    config = replace(PRESETS["mistral-7b-instruct-v0.2"], n_layers=1)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(hf_config(config, "bf16")))
    writer = ShardWriter(model / "model.safetensors", [spec.name for spec in config.tensors])
    noise = (torch.randn(1 << 22) * 0.02).bfloat16()
    for spec in config.tensors:
        writer.write(
            spec.name, noise.repeat(-(-spec.elements // len(noise)))[: spec.elements].view(spec.shape)
        )
    writer.close()
    (model / "tokenizer.json").write_text("{}")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, "quantize", str(model), str(tmp_path / "out"), "--scheme", *options],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert int(result.stdout.split()[-1]) <= 1536 * 1024
