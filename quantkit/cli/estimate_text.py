"""What `quantkit estimate` prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from calculators.fit import NO, TIGHT, Verdict, smallest_card
from calculators.hardware import GPU, GPUS, runs_flash
from calculators.units import format_bytes, format_gib, format_tokens
from quantkit.cli import bars, page
from quantkit.estimate import Estimator

if TYPE_CHECKING:
    from quantkit.cli.estimate import Report
    from quantkit.estimate import MemoryEstimate
    from quantkit.fit import Fit

_MARKS = {TIGHT: "~", NO: "*"}
_STACKED = ("weights", "kv_cache", "activations", "allocator", "overhead")  # as bars.COMPONENTS


def text(report: Report) -> str:
    """Return the headline, one table or more, the notes and the assumptions."""
    contexts = list(dict.fromkeys(entry.context for entry in report.estimates))
    context = f"{format_tokens(contexts[0])} tokens, " if len(contexts) == 1 else ""
    share = f"each of {report.where.gpus} GPUs, " if report.where.gpus > 1 else ""
    title = f"{report.config.name}, {report.config.parameters:,} parameters, {share}{context}"
    title += f"batch {report.run.batch}, in GiB"
    parts = [title, _components(report) if len(contexts) == 1 else _totals(report, contexts)]
    if report.asked:
        parts.insert(0, _headline(report, report.asked))
    if report.fits:
        parts.append(_fits(report))
    if report.explain:
        parts += _explained(report)
    if report.notes:
        parts.append("\n".join(f"Note: {note}" for note in report.notes))
    return "\n\n".join([*parts, _facts(report)])


def _headline(report: Report, scheme: str) -> str:
    """Return one sentence: what a scheme needs at the longest context, and whether or on which card it fits."""
    where = report.where
    entry = max((e for e in report.estimates if e.scheme == scheme), key=lambda e: e.context)
    each = f", on each of {where.gpus} GPUs" if where.gpus > 1 else ""
    needed = f"{report.config.name} at {scheme} needs {format_bytes(entry.total_bytes)}"
    needed += f" for {format_tokens(entry.context)} tokens"
    if entry.batch > 1:
        needed += f" in each of {entry.batch} sequences"
    found = where.verdict(entry)
    if found:
        free = format_bytes(abs(found.margin_bytes))
        said = {
            "fits": f"fits, {free} to spare",
            "tight": f"tight, {free} to spare",
            "no": f"no, {free} missing",
        }
        return f"{needed}; {where.title}: {said[found.word]}."
    if where.reserve:
        needed += f", and {format_bytes(where.reserve)} kept free"
    holding = _smallest_card(report, entry)
    if holding is None:
        return f"{needed}{each}: more than any one card known here holds."
    card, found = holding
    it = "it, tightly," if found.word == TIGHT else "it"
    taken = format_gib(card.usable_bytes - where.reserve - found.margin_bytes)
    there = f"{taken} of {format_gib(card.usable_bytes)} GiB there"
    return f"{needed}{each}: the smallest common card that holds {it} is the {card.name}, {there}."


def _smallest_card(report: Report, entry: MemoryEstimate) -> tuple[GPU, Verdict] | None:
    """Return the smallest card that holds what an estimate takes there, as --gpu would say it."""
    row = next(row for row in report.rows if row.scheme.name == entry.scheme)
    run, where = replace(report.run, context=entry.context), report.where

    def needed(gpu: GPU) -> int:
        platform = replace(where, gpu=gpu).platform()
        return (
            Estimator(row.config, row.scheme, row.plan, row.weights_bytes, platform).estimate(run).total_bytes
        )

    least = entry.weights_bytes + entry.kv_cache_bytes + where.reserve
    cards = [
        gpu for gpu in GPUS if gpu.usable_bytes > least and (where.attention != "flash" or runs_flash(gpu))
    ]
    return smallest_card(needed, where.reserve, cards)


def _components(report: Report) -> str:
    header = ["scheme", "weights", "KV cache", "activations", "allocator", "overhead", "total"]
    rows = []
    for entry in report.estimates:
        sizes = (
            entry.weights_bytes, entry.kv_cache_bytes, entry.activations_bytes, entry.allocator_bytes,
            entry.overhead_bytes, entry.total_bytes,
        )  # fmt: skip
        row = [entry.scheme, *map(format_gib, sizes)]
        found = report.where.verdict(entry)
        rows.append(row + ([found.word, format_gib(found.margin_bytes)] if found else []))
    also = ["verdict", "margin"] if report.where.memory else []
    short = ["scheme", "weights", "KV cache", "activ.", "alloc.", "overh.", "total"]
    return page.table(header + also, rows, short=short + also, beside=_stacks("", report.estimates))


def _stacks(header: str, entries: Sequence[MemoryEstimate]) -> bars.Bars:
    """Return bars of the components, the longest for the largest total."""
    sizes = [[getattr(entry, f"{name}_bytes") for name in _STACKED] for entry in entries]
    most = max(entry.total_bytes for entry in entries)
    return bars.stacks(header, sizes, [most] * len(sizes))


def _totals(report: Report, contexts: Sequence[int]) -> str:
    totals: dict[str, list[str]] = {}
    words = set()
    for entry in report.estimates:
        found = report.where.verdict(entry)
        word = found.word if found else ""
        words.add(word)
        mark = _MARKS.get(word, " ") if found else ""
        totals.setdefault(entry.scheme, []).append(format_gib(entry.total_bytes) + mark)
    rows = [[name, *cells] for name, cells in totals.items()]
    longest = [entry for entry in report.estimates if entry.context == contexts[-1]]
    beside = _stacks(f"at {format_tokens(contexts[-1])}", longest)
    table = page.table(["scheme", *map(format_tokens, contexts)], rows, beside=beside)
    where = report.where
    if where.memory is None:
        return table
    legend = {TIGHT: "~ tight", NO: f"* does not fit {format_bytes(where.free or 0)}"}
    said = [line for word, line in legend.items() if word in words]
    return "\n\n".join([table, "\n".join(said)]) if said else table


def _fits(report: Report) -> str:
    """Return the table of what fits the memory that was named."""
    first = report.fits[0]
    at = format_tokens(first.context)
    header = ["scheme", f"longest context, batch {first.batch}", f"largest batch at {at}"]
    if report.where.gpu:
        header.append(f"ceiling at {at}, tokens/s")
    rows = []
    for found in report.fits:
        row = [
            found.scheme,
            tokens_cell(found),
            f"{found.largest_batch:,}" if found.largest_batch else "none",
        ]
        if report.where.gpu:
            row.append(ceiling_cell(found))
        rows.append(row)
    table = f"What fits {report.where.title}, tight not counted\n\n{page.table(header, rows)}"
    return "\n\n".join(filter(None, [table, legend(report.fits)]))


def tokens_cell(found: Fit) -> str:
    """Return a longest context, with a mark where the model's own is what limits it."""
    mark = "=" if found.limited_by == "model" else " "
    return (format_tokens(found.longest_context) if found.longest_context else "none") + mark


def batch_cell(found: Fit) -> str:
    """Return a largest batch."""
    return f"{found.largest_batch:,}" if found.largest_batch else "none"


def ceiling_cell(found: Fit) -> str:
    """Return a ceiling in tokens/s to three digits or a whole number."""
    value = found.ceiling_tokens_per_s
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def legend(fits: Sequence[Fit]) -> str:
    """Return a line below the table where a cell has the mark."""
    return "= the model's own limit" if any(found.limited_by == "model" for found in fits) else ""


def _explained(report: Report) -> list[str]:
    """Return one aligned list for each estimate: component, bytes, name and formula of every term."""
    parts = []
    for entry, terms in zip(report.estimates, report.explain, strict=True):
        if not terms:
            continue
        lines, component = [], ""
        sizes = max(len(f"{term.nbytes:,}") for term in terms)
        widths = (max(len(term.component) for term in terms), max(len(term.name) for term in terms))
        for term in terms:
            label = term.component if term.component != component else ""
            component = term.component
            lines.append(
                f"  {label:<{widths[0]}}  {term.nbytes:>{sizes},}  {term.name:<{widths[1]}}  {term.formula}"
            )
        head = f"{entry.scheme} at {format_tokens(entry.context)} tokens: {entry.total_bytes:,} bytes"
        parts.append("\n".join([head, *lines]))
    return parts


def _facts(report: Report) -> str:
    assumed = report.assumptions
    overhead = assumed["overhead"]
    lines = [
        ("runtime", assumed["runtime"]),
        ("prefill", f"chunks of {assumed['prefill_chunk']:,} tokens"),
        ("attention", assumed["attention"]),
        ("KV cache", f"{assumed['kv_layout']}; {assumed['kv_bytes_per_token']:,} bytes a token"),
        ("allocator", f"PyTorch's caching allocator, {assumed['allocator']}"),
        ("overhead", f"{format_gib(overhead['bytes'])} GiB, {overhead['status']}: {overhead['source']}"),
    ]
    lines += [
        (name, assumed[name]) for name in ("tight", "usable", "bandwidth", "ceiling") if name in assumed
    ]
    return "Assumptions\n" + page.Facts(lines).text()
