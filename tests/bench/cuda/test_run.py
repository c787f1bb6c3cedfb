"""One benchmark on a stand-in: all parts, what is handed on meanwhile, and the record that becomes of it."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from quantkit.bench import sections
from quantkit.bench.cuda import kernels, models
from quantkit.bench.cuda.device import Cuda
from quantkit.bench.cuda.models import Grid
from quantkit.bench.cuda.results import CudaBench
from quantkit.bench.cuda.run import Plan, run
from quantkit.bench.shapes import QUICK_MODEL, schemes_named
from quantkit.errors import BackendError
from quantkit.presets import PRESETS
from quantkit.report.bench_run import read_bench
from quantkit.report.fields import Fields
from tests.bench.cuda.stand_in import TINY, StandIn


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, QUICK_MODEL, TINY)
    monkeypatch.setattr("quantkit.bench.cuda.run.QUICK_GRID", Grid((16,), (1, 2), (24,), 3))


def bench(plan: Plan, device: StandIn | None = None) -> tuple[CudaBench, list[CudaBench], int]:
    saved: list[CudaBench] = []
    told: list[int] = []
    return run(plan, device or StandIn(), told.append, saved.append), saved, sum(told)


def test_all_of_it_and_the_record_of_it() -> None:
    plan, device = Plan(schemes_named(("int8", "nf4-dq")), True, (TINY,), quick=True), StandIn()
    found, saved, told = bench(plan, device)
    assert device.compiled == 2 * 4 + 3
    assert told == plan.steps == 2 * 4 * 2 + 3 * 3
    assert [(d.scheme, d.batch) for d in found.decodes] == [
        (scheme, batch) for scheme in ("bf16", "int8", "nf4-dq") for batch in (1, 2)
    ]
    assert set(found.decodes[2].matrices_seconds) >= {"quantkit", "torch bf16", "dequantize + cuBLAS"}
    assert found.decodes[3].matrices_seconds == {}  # no kernels ran with two rows
    assert all(one.equal == one.runs > 0 for one in found.repeats)
    assert [one.finished for one in saved] == [False] * (len(saved) - 1) + [True]
    assert saved[0].cells == saved[0].decodes == ()
    assert saved[1].method.compile_s > 0
    assert saved[-1] == found
    body = json.loads(json.dumps(asdict(found)))
    assert read_bench(Fields(Path("bench.json"), "body.", body)) == found


def test_limits_alone_have_no_tables() -> None:
    found, _, told = bench(Plan(schemes_named(()), False, (), quick=True))
    assert told == 0
    assert min(asdict(found.limits).values()) > 0
    assert sections.kernels(found) == sections.models(found) == []


def test_jobs_travel_to_other_processes() -> None:
    device, schemes = StandIn(), schemes_named(("int8",))
    jobs = kernels.jobs(TINY, schemes, (1,), device)
    jobs += models.jobs(TINY, schemes, Grid((4,), (1,), (8,), 1), device, device.describe())
    for job in pickle.loads(pickle.dumps(jobs)):
        job()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is visible")
def test_without_a_gpu_a_line_says_so() -> None:
    with pytest.raises(BackendError, match="cannot run on cuda:0: no CUDA GPU is visible to PyTorch"):
        Cuda()


def test_compiling_happens_in_other_processes_and_its_failures_wait(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "absent/b", "c")]
    Cuda.compile(Mock(spec=Cuda), [partial(Path.touch, path) for path in paths])
    assert [path.exists() for path in paths] == [True, False, True]
