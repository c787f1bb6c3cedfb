"""Charts of a measured run: predicted against measured, and the errors over precision and context."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from calculators.units import GIB, format_tokens
from quantkit.report.errors import BARS, errors, misses, relative_error
from quantkit.report.runs import MeasuredCell, MeasureRun
from quantkit.report.style import FAINT, INK, footnote, look, new_figure, styled, title_name

TITLES = {
    "allocated_bytes": "allocated",
    "reserved_bytes": "reserved",
    "device_bytes": "whole device",
    "other_bytes": "neither weights nor KV cache",
}
_LEAST_SCALE = 0.005  # the colours' ends, as a share: smaller errors stay pale


@styled
def predicted_against_measured(run: MeasureRun) -> Figure:
    """Draw a panel for each quantity: the estimate over what was found, with the line where both agree."""
    names = run.quantities
    columns = 2
    rows = math.ceil(len(names) / columns)
    width, height = 9.0, 1.3 + 3.75 * rows
    verb = "traced" if run.traced else "measured"
    title = f"Estimated against {verb} memory: {title_name(run.model, width)}"
    figure = new_figure(width, height, title, run.where)
    panels = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.075, 0.98 / height, 0.98, 1 - 0.85 / height, wspace=0.2, hspace=0.28)
    schemes = list(dict.fromkeys(cell.scheme for cell in run.cells))
    for axes, name in zip(panels.flat, names, strict=False):
        _scatter(axes, run, name, schemes)
        axes.set_ylabel("estimated (GiB)")
        axes.set_xlabel(f"{verb} (GiB)")
    for axes in panels.flat[len(names) :]:
        axes.remove()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(
        named.values(), named.keys(), loc="lower left", bbox_to_anchor=(0.06, 0.27 / height),
        ncols=8, frameon=False, columnspacing=1.2, handletextpad=0.2,
    )  # fmt: skip
    footnote(figure, "Filled: contexts that are powers of two. Hollow: held-out contexts. Line: both agree.")
    return figure


def _scatter(axes: Axes, run: MeasureRun, quantity: str, schemes: Sequence[str]) -> None:
    pairs = [(cell.measured[quantity], cell.estimated[quantity]) for cell in run.cells]
    low, high = min(map(min, pairs)) / GIB, max(map(max, pairs)) / GIB
    room = 0.06 * (high - low) or 0.05 * high
    ends = (low - room, high + room)
    axes.plot(ends, ends, color="0.6", linewidth=0.8, zorder=1, label="_agree")
    for cell in run.cells:
        shown = look(cell.scheme, schemes.index(cell.scheme))
        axes.scatter(
            cell.measured[quantity] / GIB,
            cell.estimated[quantity] / GIB,
            s=22,
            marker=shown.marker,
            color=shown.color,
            facecolor="none" if cell.held_out else shown.face,
            linewidth=1,
            zorder=2,
            label="_held out" if cell.held_out else cell.scheme,
        )
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_title(TITLES[quantity], fontsize=9.5, fontweight="bold", loc="left", pad=5)
    axes.text(
        0.03, 0.97, _said(run, quantity), transform=axes.transAxes, va="top", fontsize=7.5, color=INK, zorder=3,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip


def _said(run: MeasureRun, quantity: str) -> str:
    """Return the errors of a quantity in words, held-out contexts apart."""
    lines = []
    for held_out, name in ((False, "powers of two"), (True, "held out")):
        cells = [cell for cell in run.cells if cell.held_out == held_out]
        found = errors(quantity, [(cell.measured[quantity], cell.estimated[quantity]) for cell in cells])
        if found and found.largest == 0:
            lines.append(f"{name}: equal to the byte in all {found.cells}")
        elif found:
            lines.append(f"{name}: {found.mean_absolute:.2%} mean, {found.largest:+.2%} most")
            lines.append(f"    {found.mean_signed:+.2%} signed, {found.missed} of {found.cells} miss the bar")
    return "\n".join(lines)


@styled
def error_map(run: MeasureRun, quantity: str) -> Figure:
    """Draw the error of each precision at each context, a panel for each cache, batch and chunk."""
    settings = _settings(run.cells)
    widest = max(len({cell.context for cell in cells}) for _, cells in settings)
    tallest = max(len({cell.scheme for cell in cells}) for _, cells in settings)
    columns = 1 if widest > 6 or len(settings) == 1 else 2
    rows = math.ceil(len(settings) / columns)
    width, height = 9.0, 1.35 + rows * (0.62 + 0.25 * tallest)
    title = f"Error of the estimate, {TITLES[quantity]}: {title_name(run.model, width)}"
    figure = new_figure(width, height, title, f"{run.where}; above 0 the estimate is too high")
    panels = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        1.15 / width, 0.62 / height, 0.985, 1 - 0.95 / height, wspace=0.3, hspace=0.62 / (0.25 * tallest)
    )
    most = max(abs(_error(cell, quantity)) for cell in run.cells)
    norm = TwoSlopeNorm(0.0, -max(most, _LEAST_SCALE), max(most, _LEAST_SCALE))
    for axes, (name, cells) in zip(panels.flat, settings, strict=False):
        _map(axes, cells, quantity, norm)
        axes.set_title(name, fontsize=9, loc="left", pad=4)
    for axes in panels.flat[len(settings) :]:
        axes.remove()
    bar = f"Framed: the bar is missed, {BARS[quantity]:.0%} of the {'traced' if run.traced else 'measured'} value"
    floor = " or 16 MiB, whichever is more" if quantity == "other_bytes" else ""
    footnote(figure, f"{bar}{floor}. * held out.")
    return figure


def _settings(cells: Sequence[MeasuredCell]) -> list[tuple[str, list[MeasuredCell]]]:
    """Return the cells by cache, batch and chunk, the most cells first; of a cell that ran twice the first run."""
    first: dict[tuple[object, ...], MeasuredCell] = {}
    for cell in sorted(cells, key=lambda cell: cell.own_process):
        first.setdefault((cell.scheme, cell.kv_bits, cell.context, cell.batch, cell.prefill_chunk), cell)
    found: dict[str, list[MeasuredCell]] = {}
    for cell in first.values():
        chunk = cell.prefill_chunk
        size = "whole prompt at once" if chunk >= 1 << 20 else f"chunks of {chunk:,}"
        found.setdefault(f"KV {cell.kv_bits} bits, batch {cell.batch}, {size}", []).append(cell)
    return sorted(found.items(), key=lambda setting: -len(setting[1]))


def _map(axes: Axes, cells: Sequence[MeasuredCell], quantity: str, norm: TwoSlopeNorm) -> None:
    schemes = list(dict.fromkeys(cell.scheme for cell in cells))
    contexts = sorted({cell.context for cell in cells})
    grid = [[math.nan] * len(contexts) for _ in schemes]
    for cell in cells:
        x, y = contexts.index(cell.context), schemes.index(cell.scheme)
        grid[y][x] = _error(cell, quantity)
        if misses(quantity, cell.measured[quantity], cell.estimated[quantity]):
            axes.add_patch(
                Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, fill=False, edgecolor=INK, linewidth=1.4)
            )
    axes.imshow(grid, cmap="RdBu_r", norm=norm, aspect="auto")
    for y, row in enumerate(grid):
        for x, error in enumerate(row):
            if not math.isnan(error):
                color = "white" if abs(error) > 0.6 * float(norm.vmax or 1) else INK
                axes.text(
                    x, y, f"{error:+.2%}" if error else "0", ha="center", va="center", fontsize=7, color=color
                )
    names = [format_tokens(context) + ("*" if context & (context - 1) else "") for context in contexts]
    axes.set_xticks(range(len(contexts)), names, fontsize=7.5)
    axes.set_yticks(range(len(schemes)), schemes, fontsize=8)
    axes.tick_params(length=0, colors=FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _error(cell: MeasuredCell, quantity: str) -> float:
    return relative_error(cell.measured[quantity], cell.estimated[quantity])
