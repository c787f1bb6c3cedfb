"""`quantkit fit`: what of a model fits one GPU at every precision, or every GPU at one precision."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click

from calculators.hardware import GPUS
from calculators.units import format_gib, format_tokens
from quantkit.cli import bars, notes, options, page, remarks
from quantkit.cli.estimate_text import batch_cell, ceiling_cell, legend, tokens_cell
from quantkit.cli.machine import (
    RUNTIME,
    Machine,
    assumptions,
    attention,
    machine,
    overhead,
    stored_rows,
    workload,
)
from quantkit.config import DTYPE_BITS, ModelConfig
from quantkit.estimate import Estimator, Workload
from quantkit.fit import Fit, fit
from quantkit.presets import DEFAULT_PRESET, PRESETS
from quantkit.schemes import QuantScheme, default_schemes, get_scheme, plan_weights

DEFAULT_CONTEXT = 8192
FITS_MEANS = "the longest context and the largest batch have the verdict fits: tight is not counted"
EACH_ITS_OWN = "each GPU's CUDA context and cuBLAS workspace; --json gives them"


@click.command("fit", epilog=f"Presets: {', '.join(PRESETS)}.")
@click.argument("model", default=DEFAULT_PRESET)
@options.schemes
@machine
@workload
@click.option(
    "--context",
    type=options.TOKENS,
    help="For the largest batch, the verdict and the ceiling [default: 8k or the model's].",
)
@options.policy
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, sizes in bytes.")
@remarks.quiet
@options.examples(
    'fit --gpu "RTX 4060"',
    "fit llama-3.1-8b --vram 12GiB",
    "fit --scheme int4-g128 --context 32k",
)
def command(
    model: str,
    schemes: Sequence[str],
    machine: Machine,
    workload: Workload,
    context: int | None,
    include: Sequence[str],
    exclude: Sequence[str],
    indivisible: str,
    as_json: bool,
) -> None:
    """Tabulate the longest context of MODEL: on one GPU at every precision, or at --scheme on every GPU.

    MODEL is a preset, a directory with config.json, a .gguf file, or owner/name on the Hugging Face Hub
    [default: mistral-7b-instruct-v0.2].
    """
    if machine.memory is None and not schemes:
        raise click.UsageError(
            "name a GPU by --gpu (or its memory by --vram) for a table of precisions, "
            "or a precision by --scheme for a table of GPUs"
        )
    if machine.memory is None or workload.kv_bits is not None:
        options.refuse_idle_group(workload.kv_group, [workload.kv_bits])
    subject = options.find_model(model)
    config, share = subject.config, machine.share(subject.config)
    run = replace(workload, context=context or min(DEFAULT_CONTEXT, config.max_context))
    wanted = [get_scheme(name) for name in dict.fromkeys(schemes)] or default_schemes(config.dtype)
    policy = (include, exclude, options.as_indivisible(indivisible))
    plans = {scheme: plan_weights(share, scheme, *policy) for scheme in wanted}
    stored = [] if schemes else stored_rows(subject, share, machine)
    cells = _solve(share, stored, plans, machine, run)
    said = [
        *notes.size(machine.size),
        *(notes.stored(subject, machine) if stored else []),
        *notes.short_groups([cell.row for cell in cells]),
        *notes.share(share, machine.gpus),
    ]
    notes.warn_of_long_contexts(share, [run.context])
    report = Report(config, cells, run, machine, said)
    if as_json:
        click.echo(json.dumps(_body(report), indent=1))
    else:
        page.show(_text(report))


@dataclass(frozen=True)
class Cell:
    """One precision and cache on one machine."""

    row: Estimator
    where: Machine
    fit: Fit


@dataclass(frozen=True)
class Report:
    """Everything that is printed; `asked` is the machine as it was named, which may be none."""

    config: ModelConfig
    cells: Sequence[Cell]
    run: Workload
    asked: Machine
    notes: Sequence[str]

    @property
    def one_memory(self) -> bool:
        return self.asked.memory is not None


def _solve(
    share: ModelConfig,
    stored: Sequence[Estimator],
    plans: Mapping[QuantScheme, Mapping[str, QuantScheme]],
    asked: Machine,
    run: Workload,
) -> list[Cell]:
    """Return every precision with every cache on the machine asked for, or with one cache on every GPU."""
    alone = asked.memory is not None
    caches = [DTYPE_BITS[share.dtype], 16, 8, 4] if alone and run.kv_bits is None else [run.kv_bits]
    machines = [asked] if alone else [replace(asked, gpu=gpu) for gpu in GPUS]
    rows = [(asked, row) for row in stored]
    platforms = [where.platform() for where in machines]
    for scheme, plan in plans.items():
        kinds = {kind: Estimator(share, scheme, plan, platform=kind) for kind in dict.fromkeys(platforms)}
        rows += [(where, kinds[kind]) for where, kind in zip(machines, platforms, strict=True)]
    return [
        Cell(row, where, fit(row, replace(run, kv_bits=bits), where.free or 0, where.bandwidth))
        for where, row in rows
        for bits in dict.fromkeys(caches)
    ]


def _text(report: Report) -> str:
    gpus = report.asked.gpus
    title = f"{report.config.name}, each of {gpus} GPUs" if gpus > 1 else report.config.name
    tables = [_schemes_table(report)] if report.one_memory else _gpu_tables(report)
    said = "\n".join(f"Note: {note}" for note in report.notes)
    fits = [cell.fit for cell in report.cells]
    return "\n\n".join([title, *tables, *filter(None, [legend(fits), said]), _facts(report)])


def _schemes_table(report: Report) -> str:
    """Return a line for each scheme: its longest contexts by cache; batch and ceiling with the first cache."""
    at = format_tokens(report.run.context)
    lines: dict[str, list[Fit]] = {}
    for cell in report.cells:
        lines.setdefault(cell.fit.scheme, []).append(cell.fit)
    caches = next(iter(lines.values()))
    header = ["scheme", "weights", *(f"KV {found.kv_bits}" for found in caches), f"batch at {at}"]
    rows = []
    for name, fits in lines.items():
        first = fits[0]
        row = [name, format_gib(first.weights_bytes), *map(tokens_cell, fits), batch_cell(first)]
        rows.append(row + ([ceiling_cell(first)] if report.asked.gpu else []))
    header += [f"tokens/s at {at}"] if report.asked.gpu else []
    where, also = report.asked.title, ", ceiling in tokens/s" if report.asked.gpu else ""
    title = (
        f"{where[0].upper()}{where[1:]}: weights in GiB, longest context at batch {report.run.batch} by bits "
    )
    title += f"of the KV cache; largest batch{also} (KV {caches[0].kv_bits})"
    short = [*header[: len(caches) + 2], "batch", "tok/s"][: len(header)]
    first_cells = [cell for cell in report.cells if cell.fit.kv_bits == caches[0].kv_bits]
    beside = _use(first_cells, f"the GPU at {at} (KV {caches[0].kv_bits})")
    return f"{title}\n\n{page.table(header, rows, short=short, beside=beside)}"


def _use(cells: Sequence[Cell], label: str) -> bars.Bars:
    """Return bars of what the workload takes of each cell's memory."""
    uses = []
    for cell in cells:
        memory = cell.where.free or 0
        weights = cell.fit.weights_bytes
        uses.append((weights, memory - cell.fit.margin_bytes - weights, memory))
    return bars.usage("", label, uses)


def _gpu_tables(report: Report) -> list[str]:
    """Return a table for each scheme, with a line for each GPU."""
    at = format_tokens(report.run.context)
    header = ["GPU", "GiB", "longest context", f"batch at {at}", f"verdict at {at}", "margin"]
    header.append(f"tokens/s at {at}")
    short = ["GPU", "GiB", "longest", "batch", "verdict", "margin", "tok/s"]
    tables: dict[tuple[str, int], list[list[str]]] = {}
    cells: dict[tuple[str, int], list[Cell]] = {}
    for cell in report.cells:
        found, gpu = cell.fit, cell.where.gpu
        assert gpu is not None
        row = [gpu.name, format_gib(gpu.usable_bytes), tokens_cell(found), batch_cell(found)]
        row += [found.verdict, format_gib(found.margin_bytes), ceiling_cell(found)]
        tables.setdefault((found.scheme, found.kv_bits), []).append(row)
        cells.setdefault((found.scheme, found.kv_bits), []).append(cell)
    return [
        f"{scheme}, KV cache of {bits} bits: longest context at batch {report.run.batch}, largest batch, verdict, "
        f"margin in GiB, ceiling in tokens/s\n\n"
        + page.table(header, rows, short=short, beside=_use(cells[scheme, bits], f"each GPU at {at}"))
        for (scheme, bits), rows in tables.items()
    ]


def _assumptions(report: Report) -> dict[str, Any]:
    """Return what the figures hang on; where GPUs differ in their overhead, each cell has its own."""
    found = assumptions(report.cells[0].where, [cell.row for cell in report.cells])
    if not report.one_memory:
        for name in ("gpu", "usable", "bandwidth", "vram_bytes", "overhead"):
            found.pop(name, None)
        gpus = {cell.where.gpu.name: cell.row.model.attention for cell in report.cells if cell.where.gpu}
        found["attention"] = attention(gpus)
    return {"runtime": RUNTIME, "prefill_chunk": report.run.prefill_chunk, "fits": FITS_MEANS, **found}


def _facts(report: Report) -> str:
    assumed = _assumptions(report)
    both = assumed.get("overhead")
    overhead = (
        f"{format_gib(both['bytes'])} GiB, {both['status']}: {both['source']}" if both else EACH_ITS_OWN
    )
    lines = [
        ("runtime", assumed["runtime"]),
        ("prefill", f"chunks of {assumed['prefill_chunk']:,} tokens"),
        ("attention", assumed["attention"]),
        ("allocator", f"PyTorch's caching allocator, {assumed['allocator']}"),
        ("overhead", overhead),
        ("fits", assumed["fits"]),
        ("tight", assumed["tight"]),
    ]
    lines += [(name, assumed[name]) for name in ("usable", "bandwidth", "ceiling") if name in assumed]
    return "Assumptions\n" + page.Facts(lines).text()


def _body(report: Report) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "model": report.config.name,
        "parameters": report.config.parameters,
        "assumptions": _assumptions(report),
        "notes": list(report.notes),
        "fits": [_entry(cell) for cell in report.cells],
    }


def _entry(cell: Cell) -> dict[str, Any]:
    both = overhead(cell.row.platform)
    return {
        "gpu": cell.where.gpu.name if cell.where.gpu else None,
        "vram_bytes": cell.where.memory,
        "overhead_bytes": both.nbytes,
        "overhead_status": both.status,
        **asdict(cell.fit),
    }
