"""Records to a folder of charts, tables and one Markdown page that joins them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calculators.units import GIB, format_bytes
from quantkit.bench import sections
from quantkit.bench.results import whole_layers
from quantkit.errors import OutputError
from quantkit.records import write_bytes, write_text
from quantkit.report import tables
from quantkit.report.bench_charts import roofline, speedup
from quantkit.report.decode_chart import decodings
from quantkit.report.measured_charts import error_map, predicted_against_measured
from quantkit.report.memory_charts import memory_panels, memory_totals
from quantkit.report.perplexity_chart import perplexity_by_size
from quantkit.report.runs import (
    BenchRun,
    EstimateRun,
    MeasureRun,
    PerplexityRun,
    Run,
    Source,
    display_name,
    read_run,
)
from quantkit.report.style import png

PAGE = "report.md"

Files = dict[str, str | bytes]  # by name


def build_report(
    record_paths: Sequence[Path], out: Path, progress: Callable[[int], None] | None = None
) -> list[Path]:
    """Write charts, tables and `report.md` of the records into `out`, and return what was written.

    Every record is read and everything is drawn before the first file is written; each file appears
    whole or not at all, and replaces one of its name. `progress` is told of each record that is drawn.

    Raises:
        RecordError: a record cannot be read or lacks what a report needs.
        OutputError: a file cannot be written, or would replace one of the records.
    """
    runs = [read_run(path) for path in record_paths]
    files: Files = {}
    sections: list[str] = []
    stems: set[str] = {PAGE.removesuffix(".md")}
    for run in runs:
        stem = _stem(run, stems)
        made, section = _section(run, stem)
        files |= made
        sections.append(section.rstrip("\n") + "\n\n" + _provenance(run.source, out))
        if progress:
            progress(1)
    count = "one record" if len(runs) == 1 else f"{len(runs)} records"
    files[PAGE] = "\n".join([f"# quantkit report\n\nMade from {count} alone.\n", *sections])
    _protect_records(record_paths, [out / name for name in files])
    _make_folder(out)
    for name, content in files.items():
        if isinstance(content, bytes):
            write_bytes(out / name, content)
        else:
            write_text(out / name, content)
    return [out / name for name in files]


def _section(run: Run, stem: str) -> tuple[Files, str]:
    """Return the files and the page's section of one run."""
    if isinstance(run, EstimateRun):
        return _estimate(run, stem)
    if isinstance(run, BenchRun):
        return _bench(run, stem)
    return _measured(run, stem) if isinstance(run, MeasureRun) else _perplexity(run, stem)


def _estimate(run: EstimateRun, stem: str) -> tuple[Files, str]:
    """Return the files and the page's section of an estimate."""
    files: Files = {f"{stem}.csv": tables.csv(tables.components(run))}
    name = _inline(display_name(run.model))
    section = [f"## Memory: {name}\n", _facts(_assumptions(run))]
    texts = [f"# Memory: {name}\n"]
    for suffix, part in run.settings():
        panels, lines = f"{stem}{suffix}-memory.png", f"{stem}{suffix}-totals.png"
        totals = f"{stem}{suffix}-totals-gib.csv"
        files[panels] = png(memory_panels(part))
        files[totals] = tables.csv(tables.totals(part) / GIB)
        table = [f"Total in GiB ({part.setting}):\n", tables.totals_markdown(part)]
        texts += [*table, "Components in GiB:\n", tables.components_markdown(part)]
        section += [
            *table,
            f"![Memory by context, stacked, a panel for each precision: {name}]({panels})\n",
        ]
        if len(part.contexts) > 1:
            files[lines] = png(memory_totals(part))
            section.append(f"![Total memory by context, a line for each precision: {name}]({lines})\n")
        section.append(f"The totals unrounded: [{totals}]({totals}).\n")
    files[f"{stem}.md"] = "\n".join(texts)
    section.append(f"All components: [{stem}.md]({stem}.md) in GiB, [{stem}.csv]({stem}.csv) in bytes.\n")
    return files, "\n".join(section)


def _assumptions(run: EstimateRun) -> dict[str, Any]:
    overhead = f"{format_bytes(run.overhead.size_bytes)}, {run.overhead.status}: {run.overhead.source}"
    roles = ", ".join(f"{role} {count:,}" for role, count in run.parameters_by_role.items())
    return {
        "model": run.model,
        "parameters": f"{run.parameters:,} ({roles})" if roles else f"{run.parameters:,}",
        "runtime": run.runtime,
        "prefill chunk": f"{run.prefill_chunk:,} tokens",
        "KV cache": f"{run.kv_layout}, {run.kv_bytes_per_token:,} bytes a token",
        "overhead": overhead,
        **run.other_assumptions,
    }


def _perplexity(run: PerplexityRun, stem: str) -> tuple[Files, str]:
    """Return the files and the page's section of a perplexity run."""
    table, name = tables.perplexities_markdown(run), display_name(run.model)
    heading = f"Perplexity: {_inline(name)}\n"
    facts = {
        "model": run.model,
        "parameters": f"{run.parameters:,}",
        "text": f"{run.text}, sha256 {run.sha256}",
        "protocol": f"window {run.window:,}, stride {run.stride:,}, {run.tokens_scored:,} tokens scored",
        "computed in": run.dtype,
        **run.other_protocol,
    }
    caption = (
        "Perplexity ± its standard error over windows; the difference is to the original, "
        f"{_inline(run.label(run.results[0]))}.\n"
    )
    files: Files = {
        f"{stem}.png": png(perplexity_by_size(run)),
        f"{stem}.csv": tables.csv(tables.perplexities(run)),
        f"{stem}.md": "\n".join([f"# {heading}", caption, table]),
    }
    image = f"![Perplexity by weight size, {_inline(name)}]({stem}.png)\n"
    link = f"Unrounded: [{stem}.csv]({stem}.csv).\n"
    return files, "\n".join([f"## {heading}", _facts(facts), caption, table, image, link])


def _measured(run: MeasureRun, stem: str) -> tuple[Files, str]:
    """Return the files and the page's section of a measured, or traced, run."""
    name = _inline(display_name(run.model))
    kind = "Traced" if run.traced else "Measured"
    scatter = f"{stem}-predicted.png"
    files: Files = {
        f"{stem}.csv": tables.csv(tables.measured(run)),
        scatter: png(predicted_against_measured(run)),
    }
    facts = {"model": run.model, "parameters": f"{run.parameters:,}", "device": run.where, **run.method}
    section = [
        f"## {kind} memory: {name}\n",
        _facts(facts),
        f"Errors of the estimate, as shares of the {kind.lower()} value:\n",
        tables.errors_markdown(run),
        f"![Estimated against {kind.lower()}, a panel for each quantity: {name}]({scatter})\n",
    ]
    exact = [quantity for quantity in run.quantities if all(cell.exact(quantity) for cell in run.cells)]
    if exact:
        titles = ", ".join(quantity.removesuffix("_bytes") for quantity in exact)
        section.append(f"Estimated to the byte in every cell: {titles}.\n")
    for quantity in (quantity for quantity in run.quantities if quantity not in exact):
        title = quantity.removesuffix("_bytes")
        files[f"{stem}-error-{title}.png"] = png(error_map(run, quantity))
        section.append(f"![Error over precision and context, {title}: {name}]({stem}-error-{title}.png)\n")
    repeats = tables.repeats_markdown(run)
    if repeats:
        section += ["In a process of its own, less in one where others ran before, in bytes:\n", repeats]
    if run.failures:
        section.append(
            "Cells that did not run:\n\n" + "".join(f"- {_inline(text)}\n" for text in run.failures)
        )
    section.append(f"Every cell in bytes: [{stem}.csv]({stem}.csv).\n")
    return files, "\n".join(section)


def _bench(run: BenchRun, stem: str) -> tuple[Files, str]:
    """Return the files and the page's section of a benchmark."""
    found, name = run.bench, _inline(display_name(run.model))
    files: Files = {}
    section = [f"## Speed: {name}\n", _facts(dict(sections.facts(found)))]
    section += [f"{line}\n" for line in sections.warnings(found)]
    if whole_layers(found.cells):
        files[f"{stem}-roofline.png"] = png(roofline(found))
        files[f"{stem}-speedup.png"] = png(speedup(found))
        section += [
            f"![{found.words.rate} over arithmetic intensity, a line for each scheme: {name}]({stem}-roofline.png)\n",
            f"![Speed-up over torch in bfloat16 by rows, a line for each scheme: {name}]({stem}-speedup.png)\n",
        ]
    section += _sections(sections.kernels(found))
    if found.cells:
        files[f"{stem}.csv"] = tables.csv(tables.kernels(run))
        section.append(f"Every matrix: [{stem}.csv]({stem}.csv), in seconds.\n")
    for number, (model, figure) in enumerate(decodings(found).items(), 1):
        chart = f"{stem}-decode{f'-{number}' if number > 1 else ''}.png"
        files[chart] = png(figure)
        section.append(f"![Tokens/s over the context, a line for each scheme: {_inline(model)}]({chart})\n")
    return files, "\n".join(section + _sections(sections.models(found)))


def _sections(titled: Sequence[sections.Section]) -> list[str]:
    return [line for about, table in titled for line in (f"{about}:\n", tables.markdown(*table))]


def _facts(facts: Mapping[str, Any]) -> str:
    return "".join(
        f"- {_inline(key.replace('_', ' '))}: {_inline(_said(value))}\n" for key, value in facts.items()
    )


def _said(value: Any) -> str:
    """Return a value of a record in words: texts as they are, numbers with separators, the rest as JSON."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _inline(text: str) -> str:
    """Return text that stays on its line and means nothing to Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def _provenance(source: Source, out: Path) -> str:
    """Return where a section's numbers come from, with a link to a record that lies beside the report."""
    path, folder = source.path.resolve(), out.resolve()
    named = f"`{source.path.name}`"
    if path.is_relative_to(folder.parent):
        named = f"[{named}](<{Path(os.path.relpath(path, folder)).as_posix()}>)"
    environment = ", ".join(f"{name} {_said(value)}" for name, value in source.environment.items())
    return (
        f"Record {named}, {_inline(source.created)}, quantkit {_inline(source.quantkit)}, "
        f"on {_inline(environment)}.\n"
    )


def _stem(run: Run, taken: set[str]) -> str:
    """Return the start of a run's file names, which no other run has, and note it as taken."""
    kinds = {EstimateRun: "estimate", PerplexityRun: "perplexity", MeasureRun: "measured", BenchRun: "bench"}
    kind = "traced" if isinstance(run, MeasureRun) and run.traced else kinds[type(run)]
    model = re.sub(r"[^a-z0-9.]+", "-", display_name(run.model).lower()).strip("-.") or "model"
    base = stem = f"{model}-{kind}"
    number = 1
    while stem in taken:
        number += 1
        stem = f"{base}-{number}"
    taken.add(stem)
    return stem


def _protect_records(records: Sequence[Path], files: Sequence[Path]) -> None:
    mine = {path.resolve() for path in records}
    for file in files:
        if file.resolve() in mine:
            raise OutputError(f"{file} is one of the records; choose another folder for the report")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written as a folder: {error.strerror}") from None
