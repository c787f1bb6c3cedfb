"""`quantkit estimate`: bytes of weights, KV cache and all else on one GPU, by scheme and context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calculators.fit import NO, TIGHT
from calculators.units import format_tokens
from quantkit.cli import notes, options, page, remarks
from quantkit.cli.machine import (
    RUNTIME,
    Machine,
    assumptions,
    machine,
    stored_rows,
    workload,
)
from quantkit.config import ModelConfig
from quantkit.estimate import Estimator, MemoryEstimate, Workload, compute_dtype, kv_layout
from quantkit.presets import DEFAULT_PRESET, PRESETS
from quantkit.schemes import QuantScheme, default_schemes, get_scheme, plan_weights, schemes_of_bits

if TYPE_CHECKING:
    from quantkit.estimate import Explained
    from quantkit.fit import Fit

DEFAULT_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
DOES_NOT_FIT = 3


@dataclass(frozen=True)
class Report:
    """Everything that is printed.

    Attributes:
        config: the model as it was named.
        share: what one GPU holds of it: itself, but for tensor parallelism.
        rows: one for each precision.
        estimates: of every row at every context.
        run: the workload at the longest context.
        where: the machine.
        asked: the first scheme that was asked for by name or bits.
        notes: what the reader should know.
        fits: one for each row where a memory is named.
        explain: the terms of each estimate where they are asked for.
    """

    config: ModelConfig
    share: ModelConfig
    rows: Sequence[Estimator]
    estimates: Sequence[MemoryEstimate]
    run: Workload
    where: Machine
    asked: str | None
    notes: Sequence[str]
    fits: Sequence[Fit] = ()
    explain: Sequence[Sequence[Explained]] = ()

    @cached_property
    def assumptions(self) -> dict[str, Any]:
        return _assumptions(self)


@click.command(
    "estimate",
    epilog=f"Exits with {DOES_NOT_FIT} where --check finds that something does not fit. "
    f"Presets: {', '.join(PRESETS)}.",
)
@click.argument("model", default=DEFAULT_PRESET)
@click.option(
    "--context", "contexts", type=options.TOKENS, multiple=True, help="32k; repeatable [default: 1k to 32k]"
)
@click.option(
    "--bits",
    type=click.Choice(["16", "8", "4"]),
    multiple=True,
    help="All of these bits; repeatable.",
)
@options.schemes
@workload
@machine
@click.option(
    "--check", is_flag=True, help=f"Exit with {DOES_NOT_FIT} where anything asked for does not fit."
)
@options.policy
@click.option("--explain", "explained", is_flag=True, help="Print every term's formula with its numbers.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, sizes in bytes.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, sizes in bytes.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Also write a record.")
@remarks.quiet
@options.examples(
    "estimate --context 32k --bits 4",
    'estimate llama-3.1-8b --gpu "RTX 4090"',
    "estimate path/to/model --vram 12GiB --scheme nf4 --check",
)
def command(
    model: str,
    contexts: Sequence[int],
    bits: Sequence[str],
    schemes: Sequence[str],
    workload: Workload,
    machine: Machine,
    check: bool,
    include: Sequence[str],
    exclude: Sequence[str],
    indivisible: str,
    explained: bool,
    as_json: bool,
    as_csv: bool,
    output: Path | None,
) -> None:
    """Estimate the GPU memory of MODEL at each precision and context.

    MODEL is a preset, a directory with config.json, a .gguf file, or owner/name on the Hugging Face Hub
    [default: mistral-7b-instruct-v0.2].
    """
    _refuse_combinations(machine, check, explained, as_json, as_csv)
    options.refuse_idle_group(workload.kv_group, [workload.kv_bits])
    subject = options.find_model(model)
    chosen = _schemes(subject.config, bits, schemes)
    policy = (include, exclude, options.as_indivisible(indivisible))
    share = machine.share(subject.config)
    platform = machine.platform()
    rows = stored_rows(subject, share, machine)
    for scheme in chosen or default_schemes(share.dtype):
        rows.append(Estimator(share, scheme, plan_weights(share, scheme, *policy), platform=platform))
    tokens = list(dict.fromkeys(contexts)) or list(DEFAULT_CONTEXTS)
    report = Report(
        config=subject.config,
        share=share,
        rows=rows,
        estimates=[row.estimate(replace(workload, context=context)) for row in rows for context in tokens],
        run=replace(workload, context=max(tokens)),
        where=machine,
        asked=chosen[0].name if chosen else None,
        notes=[
            *notes.size(machine.size),
            *notes.stored(subject, machine),
            *notes.short_groups(rows),
            *notes.share(share, machine.gpus),
        ],
    )
    report = replace(report, fits=_fits(report), explain=_explained(report, tokens) if explained else ())
    notes.warn_of_long_contexts(share, tokens)
    if output:
        from quantkit.records import new_record, write_record

        write_record(output, new_record("estimate", _body(report)))
        remarks.remark(f"record: {output}")
    if as_json or as_csv:
        click.echo(json.dumps(_body(report), indent=1) if as_json else _csv(report))
    else:
        page.show(_text(report))
    if check:
        _check(report)


def _refuse_combinations(machine: Machine, check: bool, explained: bool, as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other: choose one")
    if as_csv and explained:
        raise click.UsageError("--csv has no place for --explain: use --json")
    if check and machine.memory is None:
        raise click.UsageError("--check needs a memory to check against: name one by --gpu or --vram")


def _schemes(config: ModelConfig, bits: Sequence[str], names: Sequence[str]) -> list[QuantScheme]:
    """Return what --bits and --scheme ask for, each once."""
    wanted = [scheme for size in bits for scheme in schemes_of_bits(int(size), config.dtype)]
    wanted += [get_scheme(name) for name in names]
    return list(dict.fromkeys(wanted))


def _fits(report: Report) -> list[Fit]:
    """Return what fits the memory that was named."""
    where = report.where
    if where.free is None:
        return []
    from quantkit.fit import fit

    return [fit(row, report.run, where.free, where.bandwidth) for row in report.rows]


def _explained(report: Report, tokens: Sequence[int]) -> list[Sequence[Explained]]:
    """Return the terms of every estimate; none for weights that are known by their sum alone."""
    from quantkit.estimate import explain

    return [
        explain(row.config, row.scheme, replace(report.run, context=context), row.plan, row.platform)
        if len(row.weights) > 1
        else ()
        for row in report.rows
        for context in tokens
    ]


def _check(report: Report) -> None:
    """Exit with `DOES_NOT_FIT` where an estimate does not fit; say which, and which are tight."""
    cells: dict[str, list[str]] = {NO: [], TIGHT: []}
    for entry in report.estimates:
        found = report.where.verdict(entry)
        if found and found.word in cells:
            cells[found.word].append(f"{entry.scheme} at {format_tokens(entry.context)}")
    if cells[TIGHT]:
        remarks.remark(f"tight: {', '.join(cells[TIGHT])}")
    if cells[NO]:
        click.echo(f"does not fit: {', '.join(cells[NO])}", err=True)
        raise click.exceptions.Exit(DOES_NOT_FIT)


def _body(report: Report) -> dict[str, Any]:
    """Return what `--json` prints and a record holds."""
    body: dict[str, Any] = {
        "model": report.config.name,
        "parameters": report.config.parameters,
        "parameters_by_role": report.config.parameters_by_role(),
        "assumptions": report.assumptions,
        "notes": list(report.notes),
        "estimates": [_entry(entry, report.where) for entry in report.estimates],
    }
    if report.fits:
        body["fits"] = [asdict(found) for found in report.fits]
    if report.explain:
        body["explained"] = [
            {"scheme": entry.scheme, "context": entry.context, "terms": [asdict(term) for term in terms]}
            for entry, terms in zip(report.estimates, report.explain, strict=True)
        ]
    return body


def _entry(entry: MemoryEstimate, where: Machine) -> dict[str, Any]:
    fields: dict[str, Any] = {**asdict(entry), "total_bytes": entry.total_bytes}
    found = where.verdict(entry)
    if found:
        fields |= {"verdict": found.word, "fits": found.fits, "margin_bytes": found.margin_bytes}
    return fields


def _assumptions(report: Report) -> dict[str, Any]:
    """Return what the figures hang on; the KV layout is that of the first row, others are named."""
    config, run = report.share, report.run
    layouts = {
        row.scheme.name: kv_layout(config, row.scheme, run.kv_bits, run.kv_group)
        for row in sorted(report.rows, key=lambda row: compute_dtype(config, row.scheme) != config.dtype)
    }
    first = next(iter(layouts.values()))
    others = [f"{name}: {layout.describe()}" for name, layout in layouts.items() if layout != first]
    rolling = f"last {config.sliding_window:,} tokens" if config.sliding_window else ""
    return {
        "runtime": RUNTIME,
        "prefill_chunk": run.prefill_chunk,
        "kv_layout": "; ".join(filter(None, [first.describe(), rolling, *others])),
        "kv_bytes_per_token": first.token_bytes,
        **assumptions(report.where, report.rows),
    }


def _csv(report: Report) -> str:
    """Return one line an estimate; no field holds a comma."""
    entries = [_entry(entry, report.where) for entry in report.estimates]
    lines = [",".join(entries[0]), *(",".join(map(_csv_cell, entry.values())) for entry in entries)]
    return "\n".join(lines)


def _csv_cell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(report: Report) -> str:
    from quantkit.cli.estimate_text import text

    return text(report)
