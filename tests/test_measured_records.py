"""Every committed record from a GPU against the estimator as it is now: neither may drift from the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from calculators.hardware import Platform
from quantkit.measure.cells import Cell, estimated
from quantkit.measure.cuda import platform
from quantkit.presets import PRESETS
from quantkit.records import read_record
from quantkit.report.errors import BARS, misses

FOLDER = Path(__file__).parent.parent / "reports" / "measured"
RECORDS = sorted(path for path in FOLDER.glob("*.json") if '"kind": "measure"' in path.read_text()[:200])
FIELDS = Cell.__dataclass_fields__


@pytest.mark.skipif(not RECORDS, reason="no record from a GPU is in reports/measured yet")
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_what_is_estimated_now(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = read_record(path).body
    if body.get("superseded"):
        pytest.skip(f"superseded: {body['superseded']}")
    monkeypatch.setattr("quantkit.measure.cuda.calibrated", lambda name: None)  # not what this machine knows
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
