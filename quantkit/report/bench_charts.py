"""Charts of a benchmark: the roofline of the kernels, and how many times as fast as torch in bfloat16 they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from quantkit.bench.cuda.results import AnyBench
from quantkit.bench.results import BF16, Bench, Layer, bf16_layers, layers, roof
from quantkit.report.style import HALO, INK, Look, footnote, look, new_figure, styled, title_name

_WIDTH, _HEIGHT = 9.0, 5.2
_PAIRS = {  # whether the roof ran beside
    True: " of pairs: what the machine would need at least, at the speeds of the same round,",
    False: ": what the machine would need at least, at the speeds of the same run,",
}
_MARGINS = {
    "left": 0.75 / _WIDTH,
    "right": 1 - 0.2 / _WIDTH,
    "top": 1 - 0.74 / _HEIGHT,
    "bottom": 1.0 / _HEIGHT,
}


@styled
def roofline(found: AnyBench) -> Figure:
    """Draw operations a second over arithmetic intensity, a line for each scheme, below what the machine can do.

    Heights are each scheme's share of the roof: were they its own operations a second, a machine whose bandwidth
    drifts would put them anywhere.
    """
    words = found.words
    figure, axes = _axes(found, f"{words.kernels} below the roofline")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sums = [*bf16_layers(found.cells), *layers(found.cells)]
    limits = found.limits
    memory, peak = limits.bytes_per_s / words.rates, limits.flops_per_s / words.rates
    ridge = peak / memory
    heights = {(s.name, s.m): s.roof_share * roof(limits, s.intensity) / words.rates for s in sums}
    left = 0.7 * min(layer.intensity for layer in sums)
    right = 1.6 * max(ridge, *(layer.intensity for layer in sums))
    bottom, top = 0.6 * min(heights.values()), 1.9 * max(peak, *heights.values())
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.plot([left, ridge], [left * memory, peak], color=INK, linewidth=1.3, label="_memory")
    axes.plot([ridge, right], [peak, peak], color=INK, linewidth=1.3, label="_compute")
    _label_roof(axes, memory, peak, found)
    for index, line in enumerate(_by_scheme(sums)):
        shown = _look(line[0].name, index)
        points = [layer.intensity for layer in line], [heights[layer.name, layer.m] for layer in line]
        _line(axes, *points, shown, line[0].name)
    ticks = [2**power for power in range(-1, 16) if left <= 2**power <= right]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("arithmetic intensity: operations for each byte of codes and scales")
    axes.set_ylabel(words.rate)
    figures = [
        step * 10**power for power in range(5) for step in (1, 2, 5) if bottom <= step * 10**power <= top
    ]
    axes.set_yticks(figures, [f"{tick:,}" for tick in figures])
    axes.yaxis.set_minor_formatter(NullFormatter())  # else a narrow axis labels those ticks, too
    axes.legend(loc="lower right", frameon=False)
    rows = list(dict.fromkeys(layer.m for layer in sums))
    said = f"{', '.join(map(str, rows))} row{'' if rows == [1] else 's'}"
    footnote(
        figure,
        f"{_small_print(found)} Marks from left to right: {said} of bfloat16.\nHeights are shares of the roof, "
        f"medians{_PAIRS[isinstance(found, Bench)]} beside what it took.",
    )
    return figure


def _label_roof(axes: Axes, memory: float, peak: float, found: AnyBench) -> None:
    """Write what the lines are, the slanted one along itself."""
    words = found.words
    left, ridge = axes.get_xlim()[0], peak / memory
    axes.annotate(  # where no curve comes: above the slanted line
        f"torch's bfloat16 product: {peak:,.0f} {words.rate}", (ridge, peak), (-4, 4), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=INK,
    )  # fmt: skip
    x = left * (ridge / left) ** 0.45
    start, end = (axes.transData.transform((at, at * memory)) for at in (x, 1.1 * x))
    slope = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
    axes.annotate(
        f"{words.moves}: {found.limits.bytes_per_s / 1e9:,.1f} GB/s", (x, x * memory), (-7, 7),
        textcoords="offset points", ha="center", va="center",
        fontsize=8, color=INK, rotation=slope, path_effects=HALO,
    )  # fmt: skip


@styled
def speedup(found: AnyBench) -> Figure:
    """Draw how many times as fast as torch in bfloat16 each scheme is, over the number of rows."""
    figure, axes = _axes(found, "Speed-up over torch in bfloat16")
    sums = layers(found.cells)
    rows = list(dict.fromkeys(layer.m for layer in sums))
    axes.set_xscale("log", base=2)
    for index, line in enumerate(_by_scheme(sums)):
        _line(
            axes,
            [s.m for s in line],
            [s.speedups[BF16] for s in line],
            _look(line[0].name, index),
            line[0].name,
        )
    axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0.5, label="_even")
    axes.set_ylim(bottom=0.0)
    axes.set_xticks(rows, [f"{m:,}" for m in rows])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rows of x")
    axes.set_ylabel("times as fast as torch's bf16 linear")
    axes.legend(loc="upper right", frameon=False)
    footnote(figure, f"{_small_print(found)}\nMedians of paired ratios; grey: as fast as torch.")
    return figure


def _axes(found: AnyBench, title: str) -> tuple[Figure, Axes]:
    where = found.machine.line
    subtitle = f"A quick run: its figures mean nothing. {where}" if found.quick else where
    figure = new_figure(_WIDTH, _HEIGHT, f"{title}: {title_name(found.shapes, _WIDTH)}", subtitle)
    axes = figure.subplots()
    figure.subplots_adjust(**_MARGINS)
    return figure, axes


def _small_print(found: AnyBench) -> str:
    names = ", ".join(f"{c.matrix} {c.n:,} x {c.k:,}" for c in {c.matrix: c for c in found.cells}.values())
    away = "" if found.quick else "; weights come from memory, not from a cache"
    return f"All matrices of one layer: {names}{away}."


def _by_scheme(sums: Sequence[Layer]) -> list[list[Layer]]:
    return [[layer for layer in sums if layer.name == name] for name in dict.fromkeys(s.name for s in sums)]


def _look(name: str, index: int) -> Look:
    return look("bf16" if name == BF16 else name, index)


def _line(axes: Axes, xs: Sequence[float], ys: Sequence[float], shown: Look, label: str) -> None:
    axes.plot(
        xs, ys, color=shown.color, linestyle=shown.dash, marker=shown.marker, markerfacecolor=shown.face,
        markersize=5, linewidth=1.4, label=label,
    )  # fmt: skip
