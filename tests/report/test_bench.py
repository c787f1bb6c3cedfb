"""What a record of kind `bench` becomes: charts of its own numbers, tables, and refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from quantkit.bench.cuda.results import AnyBench
from quantkit.errors import RecordError
from quantkit.report import build_report
from quantkit.report.bench_charts import roofline, speedup
from quantkit.report.decode_chart import decodings
from quantkit.report.runs import BenchRun, read_run
from tests.report.synthetic import (
    BITS,
    COPIES,
    CUDA_MULTIPLIES,
    MULTIPLIES,
    READS,
    bench_body,
    cuda_bench_body,
    record,
)
from tests.report.test_charts import assert_nothing_overlaps, named_lines


def read(folder: Path, body: dict[str, Any]) -> AnyBench:
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


def test_a_gpus_roofline_holds_its_copies(tmp_path: Path) -> None:
    figure = roofline(read(tmp_path, cuda_bench_body()))
    assert_nothing_overlaps(figure)
    (axes,) = figure.axes
    roof = {str(line.get_label()): line.get_xydata() for line in axes.lines}
    assert list(roof["_memory"][1]) == pytest.approx([CUDA_MULTIPLIES / COPIES, CUDA_MULTIPLIES / 1e12])
    xs, ys = named_lines(axes)["nf4"]
    assert ys[0] == pytest.approx(0.9 * xs[0] * COPIES / 1e12)
    texts = [text.get_text() for text in [*axes.texts, *figure.texts]]
    assert "copies: 4,200.0 GB/s" in texts
    assert "torch's bfloat16 product: 710 TFLOP/s" in texts
    assert "NVIDIA H200, torch 2.11.0, Triton 3.6.0, quantkit 0.1.0" in texts


@pytest.mark.parametrize("rows", [(1,), (1, 16), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)])
def test_a_gpus_charts_of_any_rows_are_legible(rows: tuple[int, ...], tmp_path: Path) -> None:
    found = read(tmp_path, cuda_bench_body(rows))
    for figure in (roofline(found), speedup(found)):
        assert_nothing_overlaps(figure)


@pytest.mark.parametrize("batches", [(1,), (1, 4), (1, 4, 16, 64)])
def test_decoding_is_drawn_below_what_copies_allow(batches: tuple[int, ...], tmp_path: Path) -> None:
    body = cuda_bench_body()
    first = body["decodes"][0]
    schemes = ("bf16", *BITS)
    body["decodes"] = [
        {
            **first,
            "scheme": scheme,
            "batch": batch,
            "context": context,
            "seconds": 1e-3 * (index + context / 8192),
        }
        for index, scheme in enumerate(schemes, 1)
        for batch in batches
        for context in (1024, 8192, 32768)
    ]
    body["decodes"].append({**first, "kv_bits": 4})
    ((model, figure),) = decodings(read(tmp_path, body)).items()
    assert model == first["model"]
    assert_nothing_overlaps(figure)
    assert len(figure.axes) == len(batches)
    for axes, batch in zip(figure.axes, batches, strict=True):
        lines = named_lines(axes)
        assert list(lines) == list(schemes)
        assert lines["bf16"][1] == pytest.approx(
            [batch / (1e-3 * (1 + c / 8192)) for c in (1024, 8192, 32768)]
        )
        roof = next(line for line in axes.lines if line.get_label() == "_roof")
        assert list(roof.get_ydata()) == pytest.approx([batch * COPIES / first["step_bytes"]] * 3)


def test_a_gpus_report_has_charts_and_tables(tmp_path: Path) -> None:
    written = build_report([record(tmp_path, "bench", cuda_bench_body())], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    rows = [[part.strip() for part in line.split("|")[2:-1]] for line in page.splitlines() if "nf4 " in line]
    assert ["nf4", "16", "1", "1k", "800.0", "1.25", "80%", "3.20", "4.00"] in rows
    assert ["nf4", "2,048", "51,200", "40.00", "80%", "1.25"] in rows
    assert "- copies: 4,200 GB/s, read and written (8.00 GiB)" in page
    assert "Share of the copy bandwidth at one row:" in page
    assert "RuntimeError: no kernel" in page
    assert "cut short" not in page
    cells = pd.read_csv(tmp_path / "out" / "mistral-7b-instruct-v0.2-bench.csv")
    one = cells[(cells["m"] == 1) & cells["contender"].isin(["quantkit", "torch bf16"])]
    np.testing.assert_allclose(one["bandwidth_share"], one["roof_share"])
    assert {path.name for path in written} == {
        "report.md",
        *(f"mistral-7b-instruct-v0.2-bench{end}.png" for end in ("-roofline", "-speedup", "-decode")),
        "mistral-7b-instruct-v0.2-bench.csv",
    }


def test_a_run_that_was_cut_short_is_reported_with_what_there_is(tmp_path: Path) -> None:
    body = {
        **cuda_bench_body(),
        "finished": False,
        "decodes": [],
        "prefills": [],
        "repeats": [],
        "failures": [],
    }
    body["cells"] = body["cells"][:43]  # of the second scheme only some of one matrix
    written = build_report([record(tmp_path, "bench", body)], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "The run was cut short: this is what there was." in page
    assert len(written) == 4
    lines = named_lines(roofline(read(tmp_path, body)).axes[0])
    assert list(lines) == ["torch bf16", "int8"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda body: body.pop("method"), "lacks body.method"),
        (
            lambda body: body["method"].update(product=[8192, 8192]),
            r"method.product is .* it must be M, N and K",
        ),
        (lambda body: body["machine"].update(l2_bytes=0), "l2_bytes is 0; it must be a whole number from 1"),
        (
            lambda body: body["machine"]["settings"].update(driver=5),
            "settings.driver is 5; it must be a text",
        ),
        (lambda body: body["limits"].update(bytes_per_s=-1.0), "bytes_per_s is -1.0; it must be above 0"),
        (lambda body: body["decodes"][1].pop("batch"), "lacks body.decodes.1..batch"),
        (lambda body: body["repeats"][0].pop("equal"), "lacks body.repeats.0..equal"),
    ],
)
def test_a_broken_record_of_a_gpu_is_refused_by_name(spoil: Any, message: str, tmp_path: Path) -> None:
    body = cuda_bench_body()
    spoil(body)
    with pytest.raises(RecordError, match=message):
        read_run(record(tmp_path, "bench", body))
