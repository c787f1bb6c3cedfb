"""How fast whole models decode on a GPU: tokens/s over the context, a panel for each number of sequences."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from calculators.units import format_tokens
from quantkit.bench.cuda.results import AnyBench, CudaBench, Decode
from quantkit.report.style import INK, footnote, look, new_figure, styled, title_name

_KV_BITS = 16
_WIDTH, _PANEL = 9.0, 2.3  # inches, a row of two panels


def decodings(found: AnyBench) -> dict[str, Figure]:
    """Return a chart of each model that decoded, by the model's name."""
    if not isinstance(found, CudaBench):
        return {}
    names = dict.fromkeys(run.model for run in found.decodes if run.kv_bits == _KV_BITS)
    return {name: decoding(found, name) for name in names}


@styled
def decoding(found: CudaBench, model: str) -> Figure:
    """Draw tokens/s of one model, all sequences together, below what copying as many bytes would allow.

    Only caches of 16 bits: others were run at one place alone.
    """
    runs = [run for run in found.decodes if run.model == model and run.kv_bits == _KV_BITS]
    batches = sorted({run.batch for run in runs})
    rows = -(-len(batches) // 2)
    height = 1.75 + _PANEL * rows
    line = found.machine.line
    subtitle = f"A quick run: its figures mean nothing. {line}" if found.quick else line
    figure = new_figure(_WIDTH, height, f"Decoding: {title_name(model, _WIDTH)}", subtitle)
    panels = figure.subplots(rows, 2, squeeze=False)
    figure.subplots_adjust(0.085, 1.2 / height, 0.98, 1 - 0.85 / height, wspace=0.22, hspace=0.42)
    schemes = list(dict.fromkeys(run.scheme for run in runs))
    for axes, batch in zip(panels.flat, batches, strict=False):
        _panel(axes, [run for run in runs if run.batch == batch], schemes, found.limits.bytes_per_s)
        title = f"{batch} sequences" if batch > 1 else "1 sequence"
        axes.set_title(title, fontsize=9.5, fontweight="bold", loc="left", pad=5)
    for axes in panels.flat[len(batches) :]:
        axes.remove()
    for row in panels:
        row[0].set_ylabel("tokens/s")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.42 / height), ncols=8, frameon=False,
        columnspacing=1.4,
    )  # fmt: skip
    footnote(
        figure,
        f"Over the tokens of the context; all sequences together, a cache of {_KV_BITS} bits. Short lines above: what "
        f"copies at {found.limits.bytes_per_s / 1e9:,.0f} GB/s would allow, for the weights and the cache that a step "
        "reads. What has no room on the GPU is not there.",
    )
    return figure


def _panel(axes: Axes, runs: Sequence[Decode], schemes: Sequence[str], bytes_per_s: float) -> None:
    contexts = sorted({run.context for run in runs})
    for index, scheme in enumerate(schemes):
        line = sorted((run for run in runs if run.scheme == scheme), key=lambda run: run.context)
        shown, xs = look(scheme, index), [run.context for run in line]
        axes.plot(
            xs, [run.tokens_per_s for run in line], color=shown.color, linestyle=shown.dash, marker=shown.marker,
            markerfacecolor=shown.face, markersize=5, linewidth=1.4, label=scheme,
        )  # fmt: skip
        roofs = [run.batch * bytes_per_s / run.step_bytes for run in line]
        axes.plot(xs, roofs, color=shown.color, linestyle="none", marker="_", markersize=9, label="_roof")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [format_tokens(context) for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(colors=INK)
