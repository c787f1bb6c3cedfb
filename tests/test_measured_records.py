"""Every committed record from a GPU against estimator and trace as they are now: none may drift from the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calculators.hardware import Platform
from quantkit.estimate import Estimator, Workload
from quantkit.measure.cells import Cell, estimated
from quantkit.measure.cuda import outside_bytes, platform
from quantkit.measure.events import first_difference
from quantkit.measure.trace import Event, trace
from quantkit.presets import PRESETS
from quantkit.records import read_record
from quantkit.report.errors import BARS, misses
from quantkit.schemes import get_scheme

FOLDER = Path(__file__).parent.parent / "reports" / "measured"
RECORDS = sorted(path for path in FOLDER.glob("*.json") if '"kind": "measure"' in path.read_text()[:200])
FIELDS = Cell.__dataclass_fields__


@pytest.mark.skipif(not RECORDS, reason="no record from a GPU is in reports/measured yet")
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_what_is_estimated_now(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = read_record(path).body
    if body.get("superseded"):
        pytest.skip(f"superseded: {body['superseded']}")
    monkeypatch.setattr(
        "quantkit.measure.cuda.calibrated", lambda name, known: known
    )  # not what this machine knows
    known: Platform = platform(body["device"])
    cells = [Cell(**{name: row[name] for name in FIELDS}) for row in body["cells"]]
    missed = []
    for cell, row, now in zip(
        cells, body["cells"], estimated(PRESETS[body["model"]], cells, known), strict=True
    ):
        for quantity in BARS:
            found = row["measured"][quantity]
            if misses(quantity, found, now[quantity]):
                missed.append(f"{cell.describe()}: {quantity} {found:,}, estimated {now[quantity]:,}")
        for exact in ("weights_bytes", "kv_cache_bytes"):
            assert row["measured"][exact] == now[exact], cell.describe()
    assert not missed, "\n".join(missed)
    if known.context.status == "measured":
        assert known.context.nbytes == outside_bytes(body["cells"])


def event_runs() -> list[Any]:
    """Return device and run of every committed record of an allocator's events."""
    found = []
    for path in sorted(FOLDER.glob("events-*.json")):
        recorded = json.loads(path.read_text())
        for run in recorded["runs"]:
            name = f"{path.stem}-{run['scheme']}-kv{run['workload']['kv_bits']}"
            found.append(pytest.param(recorded["device"], run, id=name))
    return found


@pytest.mark.parametrize(("device", "run"), event_runs())
def test_the_trace_asks_for_all_that_a_gpu_was_asked_for(
    device: dict[str, Any], run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request and release of loading, three chunks and a decoded token, in order and to the byte."""
    monkeypatch.setattr("quantkit.measure.cuda.calibrated", lambda name, known: known)
    config = replace(PRESETS[run["model"]], n_layers=run["layers"])
    scheme, workload, known = get_scheme(run["scheme"]), Workload(**run["workload"]), platform(device)
    traced = trace(config, scheme, workload, known)
    assert first_difference([Event(*event) for event in run["events"]], traced.events) is None
    now = Estimator(config, scheme, platform=known).estimate(workload)
    for found in (traced, now):
        assert (found.allocated_bytes, found.reserved_bytes) == (
            run["allocated_bytes"],
            run["reserved_bytes"],
        )
