"""`measure` without a GPU: jobs, records, failures, verdicts and refusals on a device that is none."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from calculators.allocator import ROUND
from calculators.hardware import ASSUMED_PLATFORM
from quantkit.cli.main import cli
from quantkit.errors import BackendError, QuantkitError
from quantkit.measure import cuda, worker
from quantkit.measure.cells import (
    CONTEXTS,
    HELD_OUT,
    KV_BITS,
    SCHEMES,
    Cell,
    estimated,
    full_grid,
    jobs,
    product_of,
    quick_grid,
    repeats,
)
from quantkit.measure.device import BY_PROCESS, WHOLE_CARD, CudaDevice
from quantkit.measure.events import first_difference, from_snapshot
from quantkit.measure.trace import Event, trace
from quantkit.presets import PRESETS
from quantkit.records import read_record
from quantkit.schemes import get_scheme
from tests.checkpoints import tiny_config

GPU = {
    "name": "NVIDIA H200", "total_bytes": 150_000_000_000, "driver": "1.2", "cuda": "13.0", "torch": "2.11.0",
    "capability": "9.0", "workspace_bytes": 33_554_432,
}  # fmt: skip


class Pretended:
    """A device on the CPU that says made-up figures; at `full_from` calls it is out of memory."""

    method = "pretended"

    def __init__(self, full_at: int = -1) -> None:
        self.torch_device = torch.device("cpu")
        self.begun, self.full_at = 0, full_at
        self.free = 50 << 20

    def describe(self) -> dict[str, Any]:
        return dict(GPU)

    def process_bytes(self) -> int:
        return 7_000_000

    def free_bytes(self) -> int:
        self.free -= 3 << 20  # as if each look found less
        return self.free

    def begin(self) -> None:
        self.begun += 1

    def peak_allocated(self) -> int:
        if self.begun == self.full_at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB.")
        return 5_000_000

    def peak_reserved(self) -> int:
        return 6_000_000


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PRESETS, "tiny", tiny_config(name="tiny", n_layers=2))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


CELLS = [Cell("bf16", 16, 40), Cell("bf16", 8, 40, batch=2), Cell("bf16", 4, 65, prefill_chunk=16)]


def start(job: Mapping[str, Any], device: Pretended | None = None) -> Iterator[Mapping[str, Any]]:
    """Run a job here and now, its results through JSON as from another process."""
    results: list[Mapping[str, Any]] = []
    worker.work(json.loads(json.dumps(job)), device or Pretended(), results.append)
    return iter(json.loads(json.dumps(results)))


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4-g32-asym", "nf4-dq"])
def test_a_worker_runs_its_cells_and_counts_real_tensors(scheme: str) -> None:
    cells = [Cell(scheme, 16, 40), Cell(scheme, 8, 40, batch=2)]
    [job] = jobs("tiny", cells, "auto")
    first, *results = start(job)
    assert (first["loaded"]["name"], first["method"]) == ("NVIDIA H200", "pretended")
    beside = estimated(PRESETS["tiny"], cells, cuda.platform(GPU))
    for number, (result, estimate) in enumerate(zip(results, beside, strict=True)):
        assert result["cell"] == number
        for exact in ("weights_bytes", "kv_cache_bytes"):
            assert result["measured"][exact] == estimate[exact]
        assert set(result["measured"]) == set(estimate)


def test_a_cell_that_runs_out_of_memory_is_a_failure_and_the_others_go_on() -> None:
    [job] = jobs("tiny", CELLS, "auto")
    found = cuda.measure(PRESETS["tiny"], [job], lambda count: None, lambda job: start(job, Pretended(3)))
    assert [row["context"] for row in found.rows] == [40, 65]
    [failure] = found.failures
    assert failure["kv_bits"] == 8
    assert failure["error"] == "CUDA out of memory. Tried to allocate 20.00 MiB."


def test_a_process_that_dies_fails_its_own_cells_alone() -> None:
    done: list[int] = []

    def dying(job: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        results = start(job)
        if job["cells"][0]["scheme"] == "bf16":
            yield from (next(results), next(results))
            yield {"error": "the process ended with -9"}
        else:
            yield from results

    every = jobs("tiny", [*CELLS, Cell("int8", 16, 40)], "auto")
    found = cuda.measure(PRESETS["tiny"], every, done.append, dying)
    assert [(row["scheme"], row["context"]) for row in found.rows] == [("bf16", 40), ("int8", 40)]
    assert [failure["error"] for failure in found.failures] == ["the process ended with -9"] * 2
    assert sum(done) == 4
    row = found.rows[0]
    assert row["estimated"]["load_peak_bytes"] >= row["measured"]["weights_bytes"]
    assert cuda.outside_bytes(found.rows) == 1_000_000


def test_without_a_gpu_it_is_refused_with_what_to_do() -> None:
    assert not torch.cuda.is_available()
    result = CliRunner().invoke(cli, ["measure", "tiny", "--scheme", "bf16", "--context", "64"])
    assert isinstance(result.exception, BackendError)
    assert "--trace" in str(result.exception)


def test_jobs_are_a_process_a_scheme_and_one_for_each_repeat() -> None:
    cells = product_of(("bf16", "nf4"), (64, 128), (16, 8), (), ())
    alone = repeats(cells, 3)
    found = jobs("tiny", [*cells, *alone], "flash")
    assert [len(job["cells"]) for job in found] == [4, 4, 1, 1, 1]
    assert all(job["cells"][0]["own_process"] for job in found[2:])
    assert repeats(cells, 100) == [Cell(**{**cell.__dict__, "own_process": True}) for cell in cells]


def test_the_grids() -> None:
    grid = full_grid()
    assert len(grid) == len(set(grid)) == 7 * 3 * 10 + 7 * 4
    assert {cell.context for cell in grid if cell.held_out} == set(HELD_OUT)
    assert {cell.context for cell in grid if not cell.held_out} == set(CONTEXTS)
    assert len(product_of((), (), (), (), ())) == len(SCHEMES) * len(CONTEXTS) * len(KV_BITS)
    assert 0 < len(quick_grid()) < 10
    assert {cell.kv_group for cell in product_of(("bf16",), (64,), (16, 8), (), (), 32)} == {0, 32}


@pytest.mark.parametrize("scheme", ["bf16", "int4-g128"])
def test_verdicts_try_what_fits_and_what_does_not(scheme: str) -> None:
    held: list[int] = []

    @contextlib.contextmanager
    def holding(memory: int) -> Iterator[None]:
        held.append(memory)
        yield

    tried: list[int] = []

    def trying(job: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        [cell] = job["cells"]
        tried.append(cell["context"])
        runs = len(tried) % 2 == 1
        yield {"measured": {}, "cell": 0} if runs else {"error": "out of memory", "cell": 0}

    config = PRESETS["mistral-7b-instruct-v0.2"]
    sizes = [8 << 30, 24 << 30]
    rows = cuda.verdicts(config, config.name, [scheme], sizes, "flash", ASSUMED_PLATFORM, trying, holding)
    assert set(held) == set(sizes)
    expected = {"int4-g128": ["fits", "no"] * 2, "bf16": ["no", "fits", "no"]}[
        scheme
    ]  # 14.5 GB never fit 8 GiB
    assert [row["expected"] for row in rows] == expected
    for fits, no in itertools.pairwise(rows):
        if (fits["expected"], no["expected"]) == ("fits", "no"):
            assert fits["context"] < no["context"]
    assert rows[-1]["error"] is None or rows[-1]["error"] == "out of memory"


def test_holding_takes_all_but_what_is_to_be_left() -> None:
    said: list[Mapping[str, Any]] = []
    device = Pretended()
    worker.hold(20 << 20, device, said.append)
    assert said[0]["held"] > 0
    assert said[0]["held"] % (2 << 20) == 0
    assert said[0]["free"] < 22 << 20
    with pytest.raises(QuantkitError, match="are free, fewer than"):
        worker.hold(1 << 40, device, said.append)


def snapshot(*events: tuple[str, int, int]) -> list[Event]:
    return from_snapshot({"action": action, "addr": addr, "size": size} for action, addr, size in events)


def test_a_snapshot_becomes_events_and_addresses_are_used_again() -> None:
    events = snapshot(
        ("alloc", 0, 100), ("segment_alloc", 0, 2 << 20), ("free_requested", 0, 100), ("free_completed", 0, 100),
        ("alloc", 0, 700), ("free_requested", 99, 5),
    )  # fmt: skip
    assert events == [Event("alloc", 0, 100), Event("free", 0, 100), Event("alloc", 2, 700)]


def test_the_first_difference_is_named() -> None:
    ours = snapshot(
        ("alloc", 0, 100), ("alloc", 1, 900), ("free_requested", 0, 100), ("free_requested", 1, 900)
    )
    turned = snapshot(
        ("alloc", 0, ROUND), ("alloc", 1, 1024), ("free_requested", 1, 900), ("free_requested", 0, 1)
    )
    assert first_difference(ours, turned) is None  # sizes as they are rounded, releases in any order
    assert first_difference(ours, ours[:3]) is None  # nor whether they are recorded after the last request
    longer = [*ours, Event("alloc", 4, 100)]
    assert first_difference(longer, ours) == "5 events here, 2 there; those they share are the same"
    larger = [ours[0], Event("alloc", 1, 5000), *ours[2:]]
    assert first_difference(ours, larger) == "event 1: alloc of 1,024 bytes here, alloc of 5,120 bytes there"


def test_a_trace_equals_itself_and_not_another() -> None:
    workload = Cell("bf16", 8, 100, prefill_chunk=32).workload
    first = trace(PRESETS["tiny"], get_scheme("bf16"), workload).events
    assert first_difference(first, trace(PRESETS["tiny"], get_scheme("bf16"), workload).events) is None
    other = trace(PRESETS["tiny"], get_scheme("int8"), workload).events
    assert first_difference(first, other) is not None


def test_a_traced_record_is_the_estimate(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    arguments = [
        "measure",
        "tiny",
        "--trace",
        "--scheme",
        "nf4",
        "--context",
        "300",
        "--kv-bits",
        "8",
        "-o",
        path,
    ]
    result = CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    body = read_record(path).body
    assert body["device"] is None
    assert body["method"]["device_bytes"] == "trace"
    [cell] = body["cells"]
    assert (cell["context"], cell["kv_bits"], cell["held_out"]) == (300, 8, True)
    assert "device_bytes" not in cell["measured"]
    for name, size in cell["measured"].items():
        assert cell["estimated"][name] == pytest.approx(size, abs=ROUND)
    assert "a trace" in result.stdout


def run_pretended(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(cuda.measure, "__defaults__", (start, None))
    result = CliRunner().invoke(cli, ["measure", "tiny", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_measured_record_names_device_and_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    flags = [
        "--scheme",
        "bf16",
        "--context",
        48,
        "--kv-bits",
        16,
        "--own-processes",
        1,
        "--attention",
        "math",
    ]
    said = run_pretended(monkeypatch, *flags, "--calibrate", "-o", path)
    assert "NVIDIA H200, driver 1.2, torch 2.11.0" in said
    body = read_record(path).body
    assert body["device"]["name"] == "NVIDIA H200"
    assert body["method"] == {
        "device_bytes": "pretended", "weights": "random", "backend": "reference", "attention": "math",
        "cuda_graphs": False, "expandable_segments": False, "chunks": "all",
    }  # fmt: skip
    assert [cell["own_process"] for cell in body["cells"]] == [False, True]
    estimate = CliRunner().invoke(cli, ["estimate", "tiny", "--gpu", "H200", "--context", "64", "--json"])
    overhead = json.loads(estimate.stdout)["assumptions"]["overhead"]
    assert overhead["status"] == "measured"
    assert overhead["bytes"] == 1_000_000 + 33_554_432
    assert "on this machine" in overhead["source"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "quantkit-calibration", "version": 1, "gpus": 3}']
)
def test_a_broken_calibration_is_named(content: str) -> None:
    from quantkit.calibration import calibrated, calibration_file
    from quantkit.errors import ConfigError

    assert calibrated("H200", ASSUMED_PLATFORM) is ASSUMED_PLATFORM
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(content)
    with pytest.raises(ConfigError, match=r"calibration\.json is no calibration"):
        calibrated("H200", ASSUMED_PLATFORM)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--grid", "--quick"], 2, "exclude each other"),
        (["--quick", "--context", "4k"], 2, "--grid and --quick have their own contexts"),
        (["--grid", "--kv-group", "4"], 2, "--grid and --quick have their own contexts"),
        (["--trace", "-o", "/dev/null/x.json"], 1, "x.json cannot be written: Not a directory"),
        (["--trace", "--calibrate"], 2, "no GPU to calibrate"),
        (["--scheme", "int5"], 1, "unknown scheme 'int5'"),
        (["--trace", "--kv-bits", "8", "--kv-group", "7"], 1, "KV group of 7 does not divide"),
        (["--context", "0"], 2, "no count of tokens"),
        (["--events", "x.json"], 1, "no CUDA GPU"),
        (["--grid", "--scheme", "fp32"], 1, "none of fp32 is in that grid"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(cli, ["measure", "tiny", *arguments])
    assert result.exit_code == code
    assert message in (result.output if code == 2 else str(result.exception))


class NVML:
    """What `CudaDevice` asks of pynvml, for two GPUs in another order than CUDA's."""

    class NVMLError(Exception):
        pass

    def __init__(self, listed: dict[int, int | None]) -> None:
        self.listed, self.used = listed, {"A": 10, "B": 100}

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> list[str]:
        return ["AB"[index]]  # a list: handles cannot be hashed

    def nvmlDeviceGetUUID(self, handle: list[str]) -> str:
        return f"GPU-{handle[0]}"

    def nvmlDeviceGetMemoryInfo(self, handle: list[str]) -> SimpleNamespace:
        return SimpleNamespace(used=self.used[handle[0]])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: list[str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.listed.items()]


@pytest.mark.parametrize(
    ("listed", "method", "size"),
    [
        ({os.getpid(): 77, 1: 5}, BY_PROCESS, 77),
        ({1: 77}, WHOLE_CARD, 400),
        ({os.getpid(): None}, WHOLE_CARD, 400),
    ],
    ids=["listed", "hidden", "without size"],
)
def test_a_processs_bytes_are_nvmls_or_the_cards_change(
    listed: dict[int, int | None], method: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = NVML(listed)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: nvml.used.update(B=500))  # the context
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="B"))
    device = CudaDevice()
    assert (device.method, device.process_bytes()) == (method, size)
