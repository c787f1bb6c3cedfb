"""Tables of runs: pandas frames, and these as Markdown and CSV.

CSV holds what a program reads (bytes, unrounded numbers), Markdown what a person reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import pandas as pd

from calculators.units import format_bytes, format_gib, format_tokens
from quantkit.bench.cuda.results import CudaBench
from quantkit.bench.results import BF16
from quantkit.report.errors import BARS, errors
from quantkit.report.runs import (
    COMPONENTS,
    BenchRun,
    Estimate,
    EstimateRun,
    MeasureRun,
    PerplexityRun,
    Result,
)

MISSING = "–"
COMPONENT_TITLES = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "allocator": "allocator",
    "overhead": "overhead",
}


def components(run: EstimateRun) -> pd.DataFrame:
    """Return one row an estimate with every component in bytes, in the record's order."""
    names = list(Estimate.__dataclass_fields__)
    return pd.DataFrame([[getattr(e, name) for name in names] for e in run.estimates], columns=names)


def totals(run: EstimateRun) -> pd.DataFrame:
    """Return total bytes, schemes by contexts in tokens; <NA> where the record has no such estimate."""
    wide = components(run).pivot(index="scheme", columns="context", values="total_bytes")
    return wide.reindex(index=run.schemes, columns=run.contexts).astype("Int64")


def perplexities(run: PerplexityRun) -> pd.DataFrame:
    """Return one row a result, unrounded, the original first."""
    names = list(Result.__dataclass_fields__)
    return pd.DataFrame([[getattr(r, name) for name in names] for r in run.results], columns=names)


def csv(frame: pd.DataFrame) -> str:
    """Return a frame as CSV; a named index becomes the first column."""
    return str(frame.to_csv(index=frame.index.name is not None, lineterminator="\n"))


def totals_markdown(run: EstimateRun) -> str:
    """Return the totals in GiB, schemes by contexts."""
    frame = totals(run)
    header = ["scheme", *(format_tokens(context) for context in frame.columns)]
    rows = [
        [scheme, *(MISSING if pd.isna(total) else format_gib(int(total)) for total in row)]
        for scheme, row in zip(frame.index, frame.to_numpy(dtype=object), strict=True)
    ]
    return markdown(header, rows)


def components_markdown(run: EstimateRun) -> str:
    """Return every component in GiB, one row a scheme and context."""
    header = ["scheme", "context", *(COMPONENT_TITLES[name] for name in COMPONENTS), "total"]
    rows = [
        [
            estimate.scheme,
            format_tokens(estimate.context),
            *(format_gib(estimate.component(name)) for name in COMPONENTS),
            format_gib(estimate.total_bytes),
        ]
        for estimate in run.estimates
    ]
    return markdown(header, rows)


def perplexities_markdown(run: PerplexityRun) -> str:
    """Return perplexity ± standard error, difference to the original, weights and speed."""
    header = ["scheme", "perplexity", "difference", "weights", "tokens/s"]
    rows = [
        [
            run.label(result),
            f"{result.perplexity:.3f}" + _plus_minus(result.standard_error),
            MISSING
            if result.difference is None or index == 0
            else f"{result.difference:+.3f}" + _plus_minus(result.difference_standard_error),
            format_bytes(result.weights_bytes),
            f"{result.tokens_per_second:,.1f}",
        ]
        for index, result in enumerate(run.results)
    ]
    return markdown(header, rows)


def measured(run: MeasureRun) -> pd.DataFrame:
    """Return one row a cell and quantity: bytes found and estimated, and the error as a share."""
    names = ["scheme", "kv_bits", "context", "batch", "prefill_chunk", "held_out", "own_process"]
    rows = [
        [*(getattr(cell, name) for name in names), quantity, found, cell.estimated[quantity]]
        for cell in run.cells
        for quantity, found in cell.measured.items()
    ]
    frame = pd.DataFrame(rows, columns=[*names, "quantity", "found_bytes", "estimated_bytes"])
    frame["error"] = frame["estimated_bytes"] / frame["found_bytes"] - 1
    return frame


def kernels(run: BenchRun) -> pd.DataFrame:
    """Return one row a scheme, matrix, number of rows and contender: its median seconds, and the speed-up over it.

    A GPU's have the share of its copy bandwidth, too: weights that a contender reads over what a copy moves meanwhile.
    """
    names = ["scheme", "matrix", "n", "k", "m", "weight_bytes", "rounds"]
    rows = [
        [
            *(getattr(cell, name) for name in names),
            contender,
            taken,
            cell.speedups.get(contender),
            cell.roof_shares.get(contender),
        ]
        for cell in run.bench.cells
        for contender, taken in cell.seconds.items()
    ]
    frame = pd.DataFrame(rows, columns=[*names, "contender", "seconds", "speedup", "roof_share"])
    if isinstance(run.bench, CudaBench):
        plain = frame["contender"] == BF16
        read = frame["weight_bytes"].where(~plain, 2 * frame["n"] * frame["k"])
        frame["bandwidth_share"] = read / frame["seconds"] / run.bench.limits.bytes_per_s
    return frame


def errors_markdown(run: MeasureRun) -> str:
    """Return the error of each quantity, powers of two and held-out contexts apart."""
    header = ["quantity", "contexts", "cells", "mean absolute", "largest", "mean signed", "bar", "missed"]
    rows = []
    for quantity in run.quantities:
        for held_out, name in ((False, "powers of two"), (True, "held out")):
            pairs = [
                (cell.measured[quantity], cell.estimated[quantity])
                for cell in run.cells
                if cell.held_out == held_out
            ]
            found = errors(quantity, pairs)
            if found:
                shares = (found.mean_absolute, found.largest, found.mean_signed)
                mean, largest, signed = (f"{share:+.3%}" if share else "0" for share in shares)
                bar = f"{BARS[quantity]:.0%}" + (" or 16 MiB" if quantity == "other_bytes" else "")
                title = quantity.removesuffix("_bytes")
                rows.append(
                    [title, name, str(found.cells), mean.lstrip("+"), largest, signed, bar, str(found.missed)]
                )
    return markdown(header, rows)


def repeats_markdown(run: MeasureRun) -> str:
    """Return cells that ran in a process of their own beside the same in company; empty where there is none."""
    rows = []
    key = attrgetter("scheme", "kv_bits", "context", "batch", "prefill_chunk")
    in_company = {key(cell): cell for cell in run.cells if not cell.own_process}
    for alone in (cell for cell in run.cells if cell.own_process and key(cell) in in_company):
        other = in_company[key(alone)]
        sizes = [
            f"{alone.measured[name] - other.measured[name]:+,}"
            for name in run.quantities
            if name in other.measured
        ]
        where = [alone.scheme, str(alone.kv_bits), format_tokens(alone.context), str(alone.batch)]
        rows.append([*where, *sizes])
    names = [name.removesuffix("_bytes") for name in run.quantities]
    return markdown(["scheme", "KV bits", "context", "batch", *names], rows) if rows else ""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table: the first column to the left, the others to the right."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_line(cells[0], widths), "| " + " | ".join(rule) + " |"]
    return "\n".join([*lines, *(_line(row, widths) for row in cells[1:])]) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
    return "| " + " | ".join(padded) + " |"


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"
