"""What records hold, as charts of the page: quality against size, estimates against measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calculators.units import GIB, MIB
from quantkit.report.runs import MeasureRun, PerplexityRun, Run, display_name
from quantkit.report.style import look


def record_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a chart of each perplexity record and of each measured one, as JSON values; other kinds have none."""
    charts = []
    for index, run in enumerate(runs):
        if isinstance(run, PerplexityRun):
            charts.append({"id": f"record-{index}", **_perplexity(run)})
        elif isinstance(run, MeasureRun) and not run.traced:
            charts.append({"id": f"record-{index}", **_measured(run)})
    return charts


def _perplexity(run: PerplexityRun) -> dict[str, Any]:
    return {
        "title": f"Perplexity against size: {display_name(run.model)}",
        "note": f"{run.tokens_scored:,} tokens of {run.text} in windows of {run.window:,}, computed in {run.dtype}. "
        "The original's bar is its standard error; the others' are those of the difference to it, over paired "
        f"windows, where the record has them. Recorded {run.source.created}.",
        "x": "weights (MiB)",
        "y": "perplexity",
        "x_scale": "linear",
        "y_scale": "linear",
        "line": None,
        "series": [
            {
                "name": run.label(result),
                "x": [result.weights_bytes / MIB],
                "y": [result.perplexity],
                "error": None if result.bar is None else [result.bar],
                "color": look(result.scheme, index).color,
            }
            for index, result in enumerate(run.results)
        ],
    }


def _measured(run: MeasureRun) -> dict[str, Any]:
    quantity = run.quantities[-2] if "device_bytes" in run.quantities else run.quantities[0]
    schemes = list(dict.fromkeys(cell.scheme for cell in run.cells))
    pairs = {
        scheme: [
            (cell.measured[quantity] / GIB, cell.estimated[quantity] / GIB)
            for cell in run.cells
            if cell.scheme == scheme
        ]
        for scheme in schemes
    }
    most = max(max(pair) for several in pairs.values() for pair in several)
    return {
        "title": f"Measured against predicted: {display_name(run.model)}",
        "note": f"{quantity.replace('_', ' ')} on {run.where}; on the line both agree. Recorded {run.source.created}.",
        "x": "measured (GiB)",
        "y": "predicted (GiB)",
        "x_scale": "linear",
        "y_scale": "linear",
        "line": {"x": [0, most], "y": [0, most]},
        "series": [
            {
                "name": scheme,
                "x": [measured for measured, _ in pairs[scheme]],
                "y": [estimated for _, estimated in pairs[scheme]],
                "error": None,
                "color": look(scheme, index).color,
            }
            for index, scheme in enumerate(schemes)
        ],
    }
