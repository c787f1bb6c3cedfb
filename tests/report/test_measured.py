"""Errors by hand, what a record of kind `measure` becomes, and that a trace is never called measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from calculators.units import GIB, MIB
from quantkit.errors import RecordError
from quantkit.report import build_report, tables
from quantkit.report.errors import Errors, errors, misses
from quantkit.report.measured_charts import error_map, predicted_against_measured
from quantkit.report.runs import MeasureRun, read_run
from tests.report.synthetic import cell, measure_body, record

CELLS = [
    cell("bf16", 1024, 10 * GIB, 10 * GIB + 512 * MIB),
    cell("bf16", 3072, 10 * GIB, 10 * GIB - 102 * MIB),
    cell("nf4", 1024, 5 * GIB, 5 * GIB),
    cell("nf4", 4096, 5 * GIB, 5 * GIB, prefill_chunk=1 << 20),
    cell("nf4", 1024, 5 * GIB + 2 * MIB, 5 * GIB, own_process=True),
]


def read(folder: Path, body: dict[str, Any]) -> MeasureRun:
    run = read_run(record(folder, "measure", body))
    assert isinstance(run, MeasureRun)
    return run


def test_errors_by_hand() -> None:
    pairs = [(100, 101), (200, 190), (1000, 1000)]
    found = errors("reserved_bytes", pairs)
    assert found == Errors(3, pytest.approx((0.01 + 0.05) / 3), -0.05, pytest.approx((0.01 - 0.05) / 3), 1)
    assert errors("reserved_bytes", []) is None


@pytest.mark.parametrize(
    ("quantity", "measured", "off", "missed"),
    [
        ("allocated_bytes", 10000, 100, False),
        ("allocated_bytes", 10000, 101, True),
        ("reserved_bytes", 10000, -201, True),
        ("device_bytes", 10000, 300, False),
        ("other_bytes", 100 * MIB, 16 * MIB, False),  # 5% of it would be 5 MiB
        ("other_bytes", 100 * MIB, 16 * MIB + 1, True),
        ("other_bytes", 1000 * MIB, -50 * MIB, False),
        ("other_bytes", 1000 * MIB, -50 * MIB - 1, True),
    ],
)
def test_the_bars(quantity: str, measured: int, off: int, missed: bool) -> None:
    assert misses(quantity, measured, measured + off) is missed


def test_tables_tell_fitted_from_held_out_and_repeats_apart(tmp_path: Path) -> None:
    run = read(tmp_path, measure_body(CELLS))
    lines = [
        [part.strip() for part in line.split("|")[1:-1]] for line in tables.errors_markdown(run).splitlines()
    ]
    assert lines[2] == ["allocated", "powers of two", "4", "1.260%", "+5.000%", "+1.240%", "1%", "1"]
    assert lines[3] == ["allocated", "held out", "1", "0.996%", "-0.996%", "-0.996%", "1%", "0"]
    frame = tables.measured(run)
    assert len(frame) == len(CELLS) * 4
    assert frame["error"].iloc[0] == pytest.approx(0.05)
    repeats = tables.repeats_markdown(run).splitlines()
    assert len(repeats) == 3
    assert "+2,097,152" in repeats[2]


def test_charts_show_each_quantity_and_frame_what_misses(tmp_path: Path) -> None:
    run = read(tmp_path, measure_body(CELLS))
    panels = predicted_against_measured(run).axes
    assert [axes.get_title(loc="left") for axes in panels][:2] == ["allocated", "reserved"]
    assert len(panels) == 4
    assert all(len(axes.collections) == len(CELLS) for axes in panels)
    maps = error_map(run, "device_bytes").axes
    assert [axes.get_title(loc="left") for axes in maps] == [
        "KV 16 bits, batch 1, chunks of 2,048", "KV 16 bits, batch 1, whole prompt at once",
    ]  # fmt: skip
    assert [text.get_text() for text in maps[0].texts] == ["+5.00%", "-1.00%", "0"]
    assert len(maps[0].patches) == 1  # 5% is over the bar of 3%


@pytest.mark.parametrize("cells", [CELLS, CELLS[:1]], ids=["several", "one"])
def test_a_report_of_measured_cells(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    body = measure_body(cells)
    body["failures"] = [{**cell("bf16", 32768, 1, 1), "error": "CUDA out of memory."}]
    written = build_report([record(tmp_path, "measure", body)], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Measured memory: mistral-7b-instruct-v0.2" in page
    assert "NVIDIA H200, driver 580.1, torch 2.11.0" in page
    assert "bf16, 32,768 tokens, batch 1, KV 16 bits: CUDA out of memory." in page
    for path in written:
        if path.suffix == ".png":
            assert matplotlib.image.imread(path).shape[1] == 1350


def test_what_is_exact_is_said_and_has_no_map(tmp_path: Path) -> None:
    cells = [cell("bf16", 1024, GIB, GIB), cell("bf16", 3072, 2 * GIB, 2 * GIB)]
    cells[1]["estimated"]["device_bytes"] -= MIB
    written = build_report([record(tmp_path, "measure", measure_body(cells))], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Estimated to the byte in every cell: allocated, reserved, other." in page
    assert [path.name for path in written if "-error-" in path.name] == [
        "mistral-7b-instruct-v0.2-measured-error-device.png"
    ]
    panels = predicted_against_measured(read(tmp_path, measure_body(cells))).axes
    said = [axes.texts[0].get_text().splitlines() for axes in panels]
    assert said[0] == ["powers of two: equal to the byte in all 1", "held out: equal to the byte in all 1"]
    assert said[2][1] == "held out: 0.05% mean, -0.05% most"
    lines = [
        line.split("|")[1:-1]
        for line in tables.errors_markdown(read(tmp_path, measure_body(cells))).splitlines()
    ]
    assert [part.strip() for part in lines[2]] == [
        "allocated",
        "powers of two",
        "1",
        "0",
        "0",
        "0",
        "1%",
        "0",
    ]


def test_a_trace_is_never_called_measured(tmp_path: Path) -> None:
    cells = [cell("bf16", 1024, 10, 10)]
    del cells[0]["measured"]["device_bytes"]
    build_report([record(tmp_path, "measure", measure_body(cells, device=None))], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "traced, without a GPU" in page
    assert "measured" not in page.lower()
    assert "| device" not in page


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda body: body.pop("device"), "lacks body.device"),
        (lambda body: body["device"].pop("driver"), "lacks body.device.driver"),
        (lambda body: body["cells"].clear(), "body.cells is .* a list that is not empty"),
        (
            lambda body: body["cells"][0]["estimated"].pop("device_bytes"),
            "lacks body.cells.0..estimated.device_bytes",
        ),
        (lambda body: body["cells"][0]["measured"].update(device_bytes=-1), "must be a whole number from 1"),
    ],
)
def test_a_broken_record_is_refused_by_name(spoil: Any, message: str, tmp_path: Path) -> None:
    body = measure_body([cell("bf16", 1024, 10, 10)], {"name": "x", "driver": "y", "torch": "z"})
    spoil(body)
    with pytest.raises(RecordError, match=message):
        read_run(record(tmp_path, "measure", body))
