"""What a record of kind `bench` becomes: charts of its own numbers, tables, and refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from quantkit.bench.results import Bench
from quantkit.errors import RecordError
from quantkit.report import build_report
from quantkit.report.bench_charts import roofline, speedup
from quantkit.report.runs import BenchRun, read_run
from tests.report.synthetic import BITS, MULTIPLIES, READS, bench_body, record
from tests.report.test_charts import assert_nothing_overlaps, named_lines


def read(folder: Path, body: dict[str, Any]) -> Bench:
    run = read_run(record(folder, "bench", body))
    assert isinstance(run, BenchRun)
    return run.bench


def test_the_roofline_holds_what_the_machine_can_do(tmp_path: Path) -> None:
    figure = roofline(read(tmp_path, bench_body()))
    assert_nothing_overlaps(figure)
    (axes,) = figure.axes
    roof = {str(line.get_label()): line.get_xydata() for line in axes.lines}
    (x, y), ridge = roof["_memory"]
    assert y == pytest.approx(x * READS / 1e9)
    assert list(ridge) == pytest.approx([MULTIPLIES / READS, MULTIPLIES / 1e9])
    lines = named_lines(axes)
    assert list(lines) == ["torch bf16", *BITS]
    xs, ys = lines["int4-g128"]
    assert xs[0] == pytest.approx(2 * 8 / 4.125, rel=1e-3)
    assert ys[0] == pytest.approx(0.9 * xs[0] * READS / 1e9)
    assert ys[-1] == pytest.approx(0.9 * MULTIPLIES / 1e9)


@pytest.mark.parametrize("rows", [(1,), (1, 16), (8, 16), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)])
def test_charts_of_any_rows_are_legible(rows: tuple[int, ...], tmp_path: Path) -> None:
    found = read(tmp_path, bench_body(rows))
    for figure in (roofline(found), speedup(found)):
        assert_nothing_overlaps(figure)
    lines = named_lines(speedup(found).axes[0])
    assert list(lines) == list(BITS)
    assert lines["int8"][1][0] == pytest.approx(0.9 * 16 / (0.8 * 8.004), rel=1e-3)


def test_a_report_has_charts_and_tables(tmp_path: Path) -> None:
    written = build_report([record(tmp_path, "bench", bench_body())], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "- reads: 42.0 GB/s (streams-4, huge pages)" in page
    assert "beside it llama.cpp (llama-cpp-python 0.3.36)" in page
    model = next(line for line in page.splitlines() if "Q4_0" in line)
    assert [part.strip() for part in model.split("|")[2:-1]] == [
        "int4-g128", "9.50", "87%", "50.0", "Q4_0", "9.30", "1.02", "31.0", "1.61",
    ]  # fmt: skip
    assert {path.name for path in written} == {
        "report.md", *(f"mistral-7b-instruct-v0.2-bench{end}" for end in (".csv", "-roofline.png", "-speedup.png")),
    }  # fmt: skip
    for path in written:
        if path.suffix == ".png":
            assert matplotlib.image.imread(path).shape[1] == 1350


@pytest.mark.parametrize("left_out", ["cells", "models"])
def test_what_was_not_run_is_not_there(left_out: str, tmp_path: Path) -> None:
    written = build_report([record(tmp_path, "bench", {**bench_body(), left_out: []})], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert ("Whole models" in page) == (left_out == "cells")
    assert (len(written) == 1) == (left_out == "cells")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda body: body.pop("limits"), "lacks body.limits"),
        (lambda body: body["machine"].pop("isa"), "lacks body.machine.isa"),
        (
            lambda body: body["limits"].update(readers=[]),
            "body.limits.readers is .* a list that is not empty",
        ),
        (lambda body: body["limits"].update(flops_per_s=0.0), "flops_per_s is 0.0; it must be above 0"),
        (lambda body: body["cells"][0]["seconds"].pop("quantkit"), "lacks body.cells.0..seconds.quantkit"),
        (
            lambda body: body["cells"][0]["roof_shares"].pop("torch bf16"),
            "lacks body.cells.0..roof_shares.torch bf16",
        ),
        (lambda body: body["models"][0].update(decode_tokens_per_s="fast"), "must be a finite number"),
        (lambda body: body["models"][0]["peer"].pop("name"), "lacks body.models.0..peer.name"),
    ],
)
def test_a_broken_record_is_refused_by_name(spoil: Any, message: str, tmp_path: Path) -> None:
    body = bench_body()
    spoil(body)
    with pytest.raises(RecordError, match=message):
        read_run(record(tmp_path, "bench", body))
