"""Charts of an estimate: memory over context, stacked by component and as totals.

Each takes a run with one batch and one KV width, as `EstimateRun.settings` yields them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calculators.units import GIB, format_tokens
from quantkit.report.labels import spread
from quantkit.report.runs import COMPONENTS, EstimateRun
from quantkit.report.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    footnote,
    look,
    new_figure,
    styled,
    title_name,
)
from quantkit.report.tables import COMPONENT_TITLES

CARDS_GIB = (8, 12, 16, 24, 48, 80)
COMPONENT_COLORS = {
    "weights": BLUE, "kv_cache": ORANGE, "activations": GREEN, "allocator": PURPLE, "overhead": "#BBBBBB",
}  # fmt: skip

_LEFT, _BOTTOM = 0.6, 0.8  # margins in inches: of both charts, as their axes' names and small print need
_CHARACTER = 0.065  # inches that a character of a tick's name takes


@styled
def memory_panels(run: EstimateRun) -> Figure:
    """Draw stacked components over context, a panel for each scheme."""
    schemes = run.schemes
    columns = len(schemes) if len(schemes) <= 4 else (3 if len(schemes) <= 6 else 4)
    rows = math.ceil(len(schemes) / columns)
    width, height = (7.0 if columns <= 2 else 9.0), 1.75 + 2.15 * rows
    title = f"GPU memory by context length: {title_name(run.model, width)}"
    figure = new_figure(width, height, title, run.setting)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    figure.subplots_adjust(
        _LEFT / width, _BOTTOM / height, 1 - 0.65 / width, 1 - 1.13 / height, wspace=0.09, hspace=0.36
    )
    inches = panels[0, 0].get_position().width * width
    cards = False
    for index, axes in enumerate(panels.flat):
        if index >= len(schemes):
            axes.remove()
            continue
        _stack(axes, run, schemes[index], inches)
        ends_row = (index + 1) % columns == 0 or index == len(schemes) - 1
        axes.set_ylim(0, _memory_top(run))
        cards = _cards(axes, 1.5, label_at=(1.02, "center") if ends_row else None)
        if index % columns == 0:
            axes.set_ylabel("memory (GiB)")
        if index + columns >= len(schemes):
            axes.set_xlabel("context (tokens)")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.47 / width, 1 - 0.5 / height),
        ncols=5,
        frameon=False,
        columnspacing=1.4,
        handlelength=1.2,
    )
    footnote(figure, _note(run, cards))
    return figure


def _stack(axes: Axes, run: EstimateRun, scheme: str, inches: float) -> None:
    """Stack the components of one scheme, with the total over each bar where there is room for it."""
    estimates = {estimate.context: estimate for estimate in run.estimates if estimate.scheme == scheme}
    present = [(x, estimates[context]) for x, context in enumerate(run.contexts) if context in estimates]
    places = [x for x, _ in present]
    bottoms = [0.0] * len(present)
    for name in COMPONENTS:
        heights = [estimate.component(name) / GIB for _, estimate in present]
        label = COMPONENT_TITLES[name] + (f" ({run.overhead.status})" if name == "overhead" else "")
        color = COMPONENT_COLORS[name]
        axes.bar(
            places, heights, 0.8, bottom=bottoms, color=color, label=label, edgecolor="white", linewidth=0.4
        )
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    digits = 1 if _largest(run) >= 10 else 2
    totals = [f"{estimate.total_bytes / GIB:.{digits}f}" for _, estimate in present]
    all_fit = len(run.contexts) * (max(map(len, totals)) + 0.6) * _CHARACTER <= inches
    for x, y, total in zip(places, bottoms, totals, strict=True):
        if all_fit or x == places[-1]:
            _total(axes, x, y, total)
    axes.set_title(scheme, fontsize=9.5, fontweight="bold", loc="left", pad=5)
    axes.set_xlim(-0.6, len(run.contexts) - 0.4)
    _name_contexts(axes, range(len(run.contexts)), run.contexts, inches / (len(run.contexts) + 0.2))


def _total(axes: Axes, x: float, y: float, text: str) -> None:
    """Write a total over its bar, on white so that no card's line strikes it through."""
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
        zorder=5,
    )


@styled
def memory_totals(run: EstimateRun) -> Figure:
    """Draw the total over context, a labelled line for each scheme."""
    width, height = 9.0, max(5.0, 1.95 + 0.2 * len(run.schemes))
    title = f"Total GPU memory by context length: {title_name(run.model, width)}"
    figure = new_figure(width, height, title, run.setting)
    lines = {
        scheme: sorted((e.context, e.total_bytes / GIB) for e in run.estimates if e.scheme == scheme)
        for scheme in run.schemes
    }
    names = {scheme: f"{scheme}  {line[-1][1]:.2f} GiB" for scheme, line in lines.items()}
    across = width - _LEFT - 0.5 - 0.082 * max(map(len, names.values()))
    down = height - _BOTTOM - 0.75
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, across / width, down / height))
    for index, (scheme, line) in enumerate(lines.items()):
        shown = look(scheme, index)
        axes.plot(
            [math.log2(context) for context, _ in line],
            [total for _, total in line],
            shown.dash,
            color=shown.color,
            marker=shown.marker,
            markerfacecolor=shown.face,
            markersize=4,
            linewidth=1.4,
            label=scheme,
        )
    first, last = math.log2(run.contexts[0]), math.log2(run.contexts[-1])
    span = max(last - first, 1.0)
    axes.set_xlim(first - 0.11 * span, last + 0.02 * span)  # the names of cards stand left of the data
    axes.set_ylim(0, _memory_top(run))
    ends = [(math.log2(line[-1][0]), line[-1][1]) for line in lines.values()]
    _name_lines(axes, names, ends, across, down)
    _name_contexts(
        axes, [math.log2(context) for context in run.contexts], run.contexts, across / (1.13 * span)
    )
    cards = _cards(axes, down, label_at=(0.004, "bottom"))
    axes.set_xlabel("context (tokens, logarithmic)")
    axes.set_ylabel("memory (GiB)")
    footnote(figure, _note(run, cards))
    return figure


def _name_lines(
    axes: Axes, names: dict[str, str], ends: Sequence[tuple[float, float]], across: float, down: float
) -> None:
    """Name every line to the right of the axes, spread so that no name covers another."""
    top = axes.get_ylim()[1]
    heights = spread([y for _, y in ends], 0.175 / down * top, 0.02 * top, 0.98 * top)
    for index, ((scheme, name), end, y) in enumerate(zip(names.items(), ends, heights, strict=True)):
        shown = look(scheme, index)
        axes.annotate(
            name,
            end,
            xytext=(1 + 0.3 / across, y),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=shown.ink,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": shown.color,
                "linewidth": 0.6,
                "shrinkA": 1,
                "relpos": (0, 0.5),
            },
        )


def _largest(run: EstimateRun) -> float:
    return max(estimate.total_bytes for estimate in run.estimates) / GIB


def _memory_top(run: EstimateRun) -> float:
    """Return the axis' end in GiB: just above the next card where that is near, else above the data."""
    largest = _largest(run)
    above = [card for card in CARDS_GIB if card >= largest]
    return above[0] * 1.05 if above and above[0] <= 1.35 * largest else largest * 1.12


def _cards(axes: Axes, inches: float, label_at: tuple[float, str] | None) -> bool:
    """Draw a thin line at each card's size in range, but for those that would crowd a larger one.

    Args:
        axes: with its final limits.
        inches: the height of the axes.
        label_at: where across the axes a card is named, and which side of the text is at its line.

    Returns:
        Whether there was any.
    """
    top, above = axes.get_ylim()[1], math.inf
    for card in reversed([card for card in CARDS_GIB if card < top]):
        if (above - card) / top * inches < 0.13:
            continue
        above = card
        axes.axhline(card, color="0.35", linewidth=0.6, linestyle=(0, (5, 4)), zorder=2.5, label="_card")
        if label_at:
            place = axes.get_yaxis_transform()
            x, va = label_at
            axes.text(x, card, f"{card} GiB", transform=place, va=va, fontsize=7.5, color=FAINT)
    return above < math.inf


def _name_contexts(axes: Axes, places: Sequence[float], contexts: Sequence[int], scale: float) -> None:
    """Tick contexts, naming each that does not run into the last named; `scale` is inches a unit of x."""
    names = [format_tokens(context) for context in contexts]
    free = -math.inf
    for index, (place, name) in enumerate(zip(places, names, strict=True)):
        half = (len(name) + 1) * _CHARACTER / 2
        if place * scale - half < free:
            names[index] = ""
        else:
            free = place * scale + half
    axes.set_xticks(places, names, fontsize=8)


def _note(run: EstimateRun, cards: bool) -> str:
    note = f"Overhead {run.overhead.status}: {run.overhead.source.rstrip('.')}."
    return note + (" Dashed: common sizes of cards." if cards else "")
