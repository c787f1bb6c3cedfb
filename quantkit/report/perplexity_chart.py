"""The chart of a perplexity run: perplexity against weight size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from calculators.units import GIB, MIB
from quantkit.report.labels import place_around
from quantkit.report.runs import PerplexityRun
from quantkit.report.style import DPI, HALO, footnote, look, new_figure, styled, title_name


@styled
def perplexity_by_size(run: PerplexityRun) -> Figure:
    """Draw perplexity over weight size, every point labelled, with the error of its difference to the original."""
    width, height = 9.0, 5.2
    original = run.results[0]
    title = f"Perplexity by weight size: {title_name(run.model, width)}"
    subtitle = f"lower left is better; the grey line and band are the original, {run.label(original)}"
    figure = new_figure(width, height, title, subtitle)
    axes = figure.add_axes((0.75 / width, 0.98 / height, 1 - 0.95 / width, 1 - 1.72 / height))
    name, unit = ("GiB", GIB) if original.weights_bytes >= GIB else ("MiB", MIB)
    points = [(result.weights_bytes / unit, result.perplexity) for result in run.results]
    errors = [result.bar or 0.0 for result in run.results]
    axes.set_xscale("log", base=2)
    _limits(axes, points, errors)
    base = points[0][1]
    axes.axhspan(base - errors[0], base + errors[0], color="0.93", zorder=0)
    axes.axhline(base, color="0.6", linewidth=0.8, zorder=0.5, label="_original")
    texts = _draw_points(axes, run, points)
    marks = [
        _on_screen(axes, x, y - error, x, y + error) for (x, y), error in zip(points, errors, strict=True)
    ]
    obstacles = [mark.padded(4 * DPI / 72) for mark in marks]
    place_around(
        figure,
        axes,
        points,
        texts,
        [*obstacles, _on_screen(axes, axes.get_xlim()[0], base, axes.get_xlim()[1], base)],
    )
    axes.set_xlabel(f"weights ({name}, logarithmic)")
    axes.set_ylabel("perplexity")
    footnote(
        figure,
        f"Text: {run.text}. Window {run.window}, stride {run.stride}, {run.tokens_scored:,} tokens scored, "
        f"computed in {run.dtype}.\nBand and the original's bar: ± its standard error over windows. Other bars: "
        "that of the difference to it, over paired windows, where the record has it.",
    )
    return figure


def _draw_points(axes: Axes, run: PerplexityRun, points: Sequence[tuple[float, float]]) -> list[Text]:
    """Draw the results and return their labels, which are still to be placed."""
    texts = []
    for index, (result, (x, y)) in enumerate(zip(run.results, points, strict=True)):
        shown = look(result.scheme, index)
        axes.errorbar(
            [x],
            [y],
            None if result.bar is None else [result.bar],
            color=shown.color,
            marker=shown.marker,
            markerfacecolor=shown.face,
            markersize=6,
            capsize=3,
            elinewidth=1,
            zorder=3,
            label=run.label(result),
        )
        label = f"{run.label(result)}  {y:.3f}"
        texts.append(axes.text(x, y, label, color=shown.ink, path_effects=HALO, zorder=4))
    return texts


def _on_screen(axes: Axes, x0: float, y0: float, x1: float, y1: float) -> Bbox:
    return Bbox(axes.transData.transform([(x0, y0), (x1, y1)]))


def _limits(axes: Axes, points: Sequence[tuple[float, float]], errors: Sequence[float]) -> None:
    """Set limits with room for labels around the points, and ticks at round sizes."""
    low = min(y - error for (_, y), error in zip(points, errors, strict=True))
    high = max(y + error for (_, y), error in zip(points, errors, strict=True))
    margin = max(0.14 * (high - low), 0.01 * high)
    axes.set_ylim(low - margin, high + margin)
    least, most = min(x for x, _ in points), max(x for x, _ in points)
    room = max((most / least) ** 0.2, 1.3)
    left, right = least / room, most * room
    exponents = range(math.floor(math.log2(left)), math.ceil(math.log2(right)) + 1)
    shares = (1, 1.5) if right / left > 4 else (1, 1.25, 1.5, 1.75)
    ticks = [share * 2.0**exponent for exponent in exponents for share in shares]
    ticks = [tick for tick in ticks if left <= tick <= right]
    axes.set_xlim(left, right)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
