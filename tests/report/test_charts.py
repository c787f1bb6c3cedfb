"""Charts show the records' numbers, and no label covers another or is cut off."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from calculators.units import GIB
from quantkit.report import tables
from quantkit.report.labels import spread
from quantkit.report.memory_charts import CARDS_GIB, memory_panels, memory_totals
from quantkit.report.perplexity_chart import perplexity_by_size
from quantkit.report.runs import COMPONENTS, EstimateRun, PerplexityRun, read_run
from quantkit.report.style import png
from tests.report.synthetic import (
    CONTEXTS,
    PERPLEXITIES,
    WEIGHTS,
    estimate,
    estimate_body,
    perplexity_body,
    record,
)


@pytest.fixture
def estimates(tmp_path: Path) -> EstimateRun:
    run = read_run(record(tmp_path, "estimate", estimate_body()))
    assert isinstance(run, EstimateRun)
    return run


@pytest.fixture
def perplexities(tmp_path: Path) -> PerplexityRun:
    run = read_run(record(tmp_path, "perplexity", perplexity_body()))
    assert isinstance(run, PerplexityRun)
    return run


def texts_of(figure: Figure) -> list[Text]:
    """Return every text that is drawn; ticks beyond an axis' limits exist but are not."""
    figure.draw_without_rendering()
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        found += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        found += [title for title in axes.get_children() if isinstance(title, Text)]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in dict.fromkeys(found) if text.get_text() and text.get_visible()]


def assert_nothing_overlaps(figure: Figure) -> None:
    canvas = figure.bbox
    # Text's own extent: an annotation's includes its line, which may well run beneath another label.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts_of(figure)]
    for name, box in boxes:
        inside = canvas.x0 <= box.x0 and box.x1 <= canvas.x1 and canvas.y0 <= box.y0 and box.y1 <= canvas.y1
        assert inside, f"{name!r} is cut off"
    for (name, box), (other_name, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), f"{name!r} overlaps {other_name!r}"


def named_lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_panels_stack_the_records_bytes(estimates: EstimateRun) -> None:
    figure = memory_panels(estimates)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(WEIGHTS)
    for axes, scheme in zip(figure.axes, WEIGHTS, strict=True):
        rows = [e for e in estimate_body()["estimates"] if e["scheme"] == scheme]
        floor = np.zeros(len(rows))
        for bars, component in zip(axes.containers, COMPONENTS, strict=True):
            heights = np.array([row[f"{component}_bytes"] / GIB for row in rows])
            np.testing.assert_allclose([bar.get_height() for bar in bars], heights, rtol=1e-12)
            np.testing.assert_allclose([bar.get_y() for bar in bars], floor, rtol=1e-12)
            floor += heights
        np.testing.assert_allclose(floor, [row["total_bytes"] / GIB for row in rows], rtol=1e-12)
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "1k",
            "2k",
            "4k",
            "8k",
            "16k",
            "32k",
        ]
        totals = [text.get_text() for text in axes.texts][:6]
        assert totals == [f"{row['total_bytes'] / GIB:.1f}" for row in rows]
    assert "GiB" in figure.axes[0].get_ylabel()
    assert "mistral-7b-instruct-v0.2" in figure.texts[0].get_text()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["weights", "KV cache", "activations", "allocator", "overhead (assumed)"]


def test_panels_share_an_axis_and_mark_the_cards_in_range(estimates: EstimateRun) -> None:
    figure = memory_panels(estimates)
    top = figure.axes[0].get_ylim()[1]
    for axes in figure.axes:
        assert axes.get_ylim() == (0, top)
        cards = sorted(float(line.get_ydata()[0]) for line in axes.lines)
        assert cards == [card for card in CARDS_GIB if card < top] == [8, 12, 16, 24]


def test_the_legend_covers_no_panel(estimates: EstimateRun) -> None:
    figure = memory_panels(estimates)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_lines_hold_the_totals(estimates: EstimateRun) -> None:
    axes = memory_totals(estimates).axes[0]
    lines = named_lines(axes)
    assert list(lines) == list(WEIGHTS)
    for scheme, (xs, ys) in lines.items():
        rows = [e for e in estimate_body()["estimates"] if e["scheme"] == scheme]
        np.testing.assert_allclose(xs, np.log2(CONTEXTS))
        np.testing.assert_allclose(ys, [row["total_bytes"] / GIB for row in rows], rtol=1e-12)
        assert f"{scheme}  {rows[-1]['total_bytes'] / GIB:.2f} GiB" in [
            text.get_text() for text in axes.texts
        ]


def test_points_hold_perplexities_and_errors(perplexities: PerplexityRun) -> None:
    axes = perplexity_by_size(perplexities).axes[0]
    assert [container.get_label() for container in axes.containers] == list(PERPLEXITIES)
    for container, (scheme, (perplexity, error)) in zip(axes.containers, PERPLEXITIES.items(), strict=True):
        size = WEIGHTS.get(scheme, 2 * WEIGHTS["bf16"]) / GIB
        point, _, bars = container.lines
        np.testing.assert_allclose([point.get_xdata()[0], point.get_ydata()[0]], [size, perplexity])
        bar = error if scheme == "fp32" else error / 10  # the original's own, the others' of the difference
        ends = [[size, perplexity - bar], [size, perplexity + bar]]
        np.testing.assert_allclose(bars[0].get_segments()[0], ends)
        assert f"{scheme}  {perplexity:.3f}" in [text.get_text() for text in axes.texts]
    assert axes.get_xlabel().startswith("weights (GiB")
    note = perplexity_by_size(perplexities).texts[-1].get_text()
    assert all(said in note for said in ("The Python language reference", "Window 2048", "131,072 tokens"))


@pytest.mark.parametrize("draw", [memory_panels, memory_totals])
@pytest.mark.parametrize("schemes", [1, 2, 3, 5, 7], ids="{}-schemes".format)
def test_no_memory_label_overlaps(tmp_path: Path, draw: Any, schemes: int) -> None:
    body = estimate_body()
    body["estimates"] = body["estimates"][-6 * schemes :]
    run = read_run(record(tmp_path, "estimate", body))
    assert_nothing_overlaps(draw(run))


def test_labels_stay_apart_with_twenty_schemes_and_odd_contexts(tmp_path: Path) -> None:
    body = estimate_body()
    contexts = [1000, 1024, 3000, 4096, 5000, 8192, 10000, 32768, 65536]
    body["estimates"] = [estimate(f"scheme-{n}-asym", c, 4 * GIB + n) for n in range(20) for c in contexts]
    run = read_run(record(tmp_path, "estimate", body))
    assert isinstance(run, EstimateRun)
    assert_nothing_overlaps(memory_totals(run))
    assert_nothing_overlaps(memory_panels(run))


def test_no_perplexity_label_overlaps_a_label_or_a_mark(perplexities: PerplexityRun) -> None:
    figure = perplexity_by_size(perplexities)
    assert_nothing_overlaps(figure)
    axes = figure.axes[0]
    for container in axes.containers:
        bar = axes.transData.transform(container.lines[2][0].get_segments()[0])
        for text in axes.texts:
            box = text.get_window_extent()
            across = box.x0 <= bar[0, 0] <= box.x1
            assert not (across and box.y0 <= bar[1, 1] and bar[0, 1] <= box.y1), text.get_text()


def test_labels_around_coinciding_points_stay_apart(tmp_path: Path) -> None:
    body = perplexity_body()
    first = body["results"][0]
    body["results"] = [{**first, "scheme": f"nf4-b{n}", "perplexity": 4.4 + n / 1e4} for n in range(10)]
    run = read_run(record(tmp_path, "perplexity", body))
    assert isinstance(run, PerplexityRun)
    assert_nothing_overlaps(perplexity_by_size(run))


def test_a_single_result_without_an_error_is_drawn(tmp_path: Path) -> None:
    body = perplexity_body()
    body["results"] = [{**body["results"][0], "standard_error": None, "difference": None}]
    run = read_run(record(tmp_path, "perplexity", body))
    assert isinstance(run, PerplexityRun)
    assert_nothing_overlaps(perplexity_by_size(run))
    assert "| fp32   |      4.420 |" in tables.perplexities_markdown(run)


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([1.0, 5.0], [1.0, 5.0]),
        ([5.0, 5.0], [4.5, 5.5]),
        ([5.0, 5.2, 5.1], [4.1, 6.1, 5.1]),
        ([0.0, 0.0], [0.0, 1.0]),
        ([10.0, 10.0], [9.0, 10.0]),
        ([], []),
    ],
)
def test_spread_moves_least(wanted: list[float], placed: list[float]) -> None:
    assert spread(wanted, 1.0, 0.0, 10.0) == pytest.approx(placed)


def test_an_estimate_that_is_absent_leaves_a_gap(tmp_path: Path) -> None:
    body = estimate_body()
    del body["estimates"][5]
    run = read_run(record(tmp_path, "estimate", body))
    assert isinstance(run, EstimateRun)
    assert tables.totals_markdown(run).splitlines()[2].endswith("    – |")
    assert len(memory_panels(run).axes[0].containers[0]) == 5
    assert_nothing_overlaps(memory_totals(run))


def test_pngs_carry_no_date_and_no_software(estimates: EstimateRun) -> None:
    image = png(memory_totals(estimates))
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"tEXt" not in image
