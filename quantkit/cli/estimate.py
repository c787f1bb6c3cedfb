"""`quantkit estimate`: bytes of weights, KV cache, activations and overhead, by scheme and context."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from calculators.fit import Verdict, smallest_card, verdict
from calculators.hardware import ASSUMED_OVERHEAD
from calculators.units import format_bytes, format_gib, format_tokens
from quantkit.cli import options
from quantkit.config import ModelConfig
from quantkit.estimate import (
    PREFILL_CHUNK,
    MemoryEstimate,
    Workload,
    compute_dtype,
    estimate,
    kv_layout,
    weight_bytes,
)
from quantkit.presets import DEFAULT_PRESET, PRESETS
from quantkit.schemes import SCHEMES, QuantScheme, default_schemes, get_scheme, plan_weights, schemes_of_bits

DEFAULT_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
AS_STORED = "as-stored"
RUNTIME = "quantkit's own runtime on one GPU: quantized matrices dequantized to multiply, fused attention"


@dataclass(frozen=True)
class Row:
    """One precision of the model: what is quantized to what, and the bytes of all weights."""

    scheme: QuantScheme
    plan: Mapping[str, QuantScheme]
    weights_bytes: int


@dataclass(frozen=True)
class Memory:
    """The memory that is at hand, and what of it stays free."""

    size: options.Size | None
    reserve: int

    def verdict(self, entry: MemoryEstimate) -> Verdict | None:
        """Return whether an estimate fits, None where no memory was named."""
        return verdict(entry.total_bytes, self.size.nbytes, self.reserve) if self.size else None


@dataclass(frozen=True)
class Report:
    """Everything that is printed."""

    config: ModelConfig
    rows: Sequence[Row]
    estimates: Sequence[MemoryEstimate]
    workload: Workload
    memory: Memory
    headline: str | None
    notes: Sequence[str]


@click.command("estimate", epilog=f"Presets: {', '.join(PRESETS)}.")
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
@options.kv_bits
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--prefill-chunk", type=options.TOKENS, default=PREFILL_CHUNK, show_default=True)
@click.option("--vram", type=options.SIZE, help="Memory of the GPU, such as 24GiB: adds a verdict.")
@click.option("--reserve", type=options.SIZE, help="Memory to keep free, such as 1GiB for a display.")
@options.policy
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, sizes in bytes.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, sizes in bytes.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Also write a record.")
def command(
    model: str,
    contexts: Sequence[int],
    bits: Sequence[str],
    schemes: Sequence[str],
    kv_bits: int | None,
    batch: int,
    prefill_chunk: int,
    vram: options.Size | None,
    reserve: options.Size | None,
    include: Sequence[str],
    exclude: Sequence[str],
    indivisible: str,
    as_json: bool,
    as_csv: bool,
    output: Path | None,
) -> None:
    """Estimate the GPU memory of MODEL at each precision and context.

    MODEL is a preset, a directory with config.json, or a .gguf file [default: mistral-7b-instruct-v0.2].
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other: choose one")
    subject = options.find_model(model)
    config = subject.config
    chosen = _schemes(config, bits, schemes)
    policy = options.as_indivisible(indivisible)
    rows = _stored_rows(subject)
    for scheme in chosen or default_schemes(config.dtype):
        plan = plan_weights(config, scheme, include, exclude, policy)
        rows.append(Row(scheme, plan, weight_bytes(config, scheme, plan)))
    tokens = list(dict.fromkeys(contexts)) or list(DEFAULT_CONTEXTS)
    workload = Workload(max(tokens), batch, kv_bits, prefill_chunk)
    estimates = [
        estimate(config, row.scheme, replace(workload, context=context), row.plan, row.weights_bytes)
        for row in rows
        for context in tokens
    ]
    memory = Memory(vram, reserve.nbytes if reserve else 0)
    headline = _headline(config, chosen[0], estimates, memory) if chosen else None
    notes = [*_size_notes(vram, reserve), *_stored_notes(subject), *_short_notes(config, rows)]
    report = Report(config, rows, estimates, workload, memory, headline, notes)
    _warn_of_long_contexts(config, tokens)
    if output:
        from quantkit.records import new_record, write_record

        write_record(output, new_record("estimate", _body(report)))
        click.echo(f"record: {output}", err=True)
    click.echo(json.dumps(_body(report), indent=1) if as_json else _csv(report) if as_csv else _text(report))


def _schemes(config: ModelConfig, bits: Sequence[str], names: Sequence[str]) -> list[QuantScheme]:
    """Return what --bits and --scheme ask for, each once."""
    wanted = [scheme for size in bits for scheme in schemes_of_bits(int(size), config.dtype)]
    wanted += [get_scheme(name) for name in names]
    return list(dict.fromkeys(wanted))


def _stored_rows(subject: options.Subject) -> list[Row]:
    """Return the row of weights as they lie in the file, for a quantized checkpoint and a GGUF."""
    checkpoint = subject.checkpoint
    if checkpoint is None or not (checkpoint.schemes or subject.is_gguf):
        return []
    scheme = replace(SCHEMES[subject.config.dtype], name=AS_STORED)
    return [Row(scheme, checkpoint.schemes, checkpoint.stored_bytes)]


def _headline(
    config: ModelConfig, scheme: QuantScheme, estimates: Sequence[MemoryEstimate], memory: Memory
) -> str:
    """Return one sentence: what the first scheme asked for needs at the longest context, on which card."""
    entry = max((e for e in estimates if e.scheme == scheme.name), key=lambda e: e.context)
    needed = f"{config.name} at {scheme.name} needs {format_bytes(entry.total_bytes)}"
    needed += f" for {format_tokens(entry.context)} tokens"
    if entry.batch > 1:
        needed += f" in each of {entry.batch} sequences"
    if memory.reserve:
        needed += f", and {format_bytes(memory.reserve)} kept free"
    card = smallest_card(entry.total_bytes, memory.reserve)
    if card is None:
        return f"{needed}: more than any one card known here holds."
    usable = f"{format_gib(card.usable_bytes)} GiB"
    return f"{needed}: the smallest common card that holds it is the {card.name}, with {usable}."


def _size_notes(*sizes: options.Size | None) -> list[str]:
    notes = []
    for size in sizes:
        if size and size.decimal and size.text.strip()[-2] in "gG":
            number = size.text.strip()[:-2].strip()
            notes.append(
                f"{number} GB is {size.nbytes:,} bytes, {format_gib(size.nbytes)} GiB; a card sold as "
                f"{number} GB has about {number} GiB: write {number}GiB for it"
            )
    return notes


def _stored_notes(subject: options.Subject) -> list[str]:
    if not subject.is_gguf:
        return []
    return [
        f"{AS_STORED}: the weights as the file holds them; quantkit itself runs a GGUF dequantized, "
        f"as its {subject.config.dtype} row says"
    ]


def _short_notes(config: ModelConfig, rows: Sequence[Row]) -> list[str]:
    """Say which schemes have short last groups: they can be computed with, but not written."""
    found = {}
    for row in rows:
        ragged = [
            spec.shape[1]
            for spec in config.tensors
            if spec.name in row.plan and not row.plan[spec.name].divides(spec.shape[1])
        ]
        if ragged and row.scheme.name != AS_STORED:
            found[row.scheme.name] = f"K = {', '.join(map(str, sorted(set(ragged))))}"
    return [
        f"{name}: short last groups ({which}), which no file can hold; --indivisible int8|keep shows what "
        "can be written"
        for name, which in found.items()
    ]


def _warn_of_long_contexts(config: ModelConfig, contexts: Sequence[int]) -> None:
    above = [format_tokens(context) for context in contexts if context > config.max_context]
    if above:
        options.warn(
            f"{', '.join(above)}: above the {format_tokens(config.max_context)} tokens that {config.name} "
            "is made for"
        )


def _body(report: Report) -> dict[str, Any]:
    """Return the JSON object, which is also a record's body; sizes are bytes."""
    return {
        "model": report.config.name,
        "parameters": report.config.parameters,
        "parameters_by_role": report.config.parameters_by_role(),
        "assumptions": _assumptions(report),
        "notes": list(report.notes),
        "estimates": [_entry(entry, report.memory) for entry in report.estimates],
    }


def _entry(entry: MemoryEstimate, memory: Memory) -> dict[str, Any]:
    fields: dict[str, Any] = {**asdict(entry), "total_bytes": entry.total_bytes}
    found = memory.verdict(entry)
    if found:
        fields |= {"fits": found.fits, "margin_bytes": found.margin_bytes}
    return fields


def _assumptions(report: Report) -> dict[str, Any]:
    """Return what the figures hang on; the KV layout is that of the first row, others are named."""
    config, workload = report.config, report.workload
    layouts = {
        row.scheme.name: kv_layout(config, row.scheme, workload.kv_bits)
        for row in sorted(report.rows, key=lambda row: compute_dtype(config, row.scheme) != config.dtype)
    }
    first = next(iter(layouts.values()))
    others = [f"{name}: {layout.describe()}" for name, layout in layouts.items() if layout != first]
    rolling = f"last {config.sliding_window:,} tokens" if config.sliding_window else ""
    assumed: dict[str, Any] = {
        "runtime": RUNTIME,
        "prefill_chunk": workload.prefill_chunk,
        "kv_layout": "; ".join(filter(None, [first.describe(), rolling, *others])),
        "kv_bytes_per_token": first.token_bytes,
        "overhead": {
            "bytes": ASSUMED_OVERHEAD.nbytes,
            "status": ASSUMED_OVERHEAD.status,
            "source": ASSUMED_OVERHEAD.source,
        },
    }
    if report.memory.size:
        assumed |= {"vram_bytes": report.memory.size.nbytes, "reserve_bytes": report.memory.reserve}
    return assumed


def _csv(report: Report) -> str:
    """Return one line an estimate; no field holds a comma."""
    entries = [_entry(entry, report.memory) for entry in report.estimates]
    lines = [",".join(entries[0]), *(",".join(map(_csv_cell, entry.values())) for entry in entries)]
    return "\n".join(lines)


def _csv_cell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(report: Report) -> str:
    contexts = list(dict.fromkeys(entry.context for entry in report.estimates))
    batch = report.workload.batch
    context = f"{format_tokens(contexts[0])} tokens, " if len(contexts) == 1 else ""
    title = f"{report.config.name}, {report.config.parameters:,} parameters, {context}batch {batch}, in GiB"
    parts = [title, _components(report) if len(contexts) == 1 else _totals(report, contexts)]
    if report.headline:
        parts.insert(0, report.headline)
    if report.notes:
        parts.append("\n".join(f"Note: {note}" for note in report.notes))
    return "\n\n".join([*parts, _facts(report)])


def _components(report: Report) -> str:
    header = ["scheme", "weights", "KV cache", "activations", "overhead", "total"]
    rows = []
    for entry in report.estimates:
        sizes = (entry.weights_bytes, entry.kv_cache_bytes, entry.activations_bytes, entry.overhead_bytes)
        row = [entry.scheme, *map(format_gib, sizes), format_gib(entry.total_bytes)]
        found = report.memory.verdict(entry)
        if found:
            row += ["yes" if found.fits else "no", format_gib(found.margin_bytes)]
        rows.append(row)
    return options.table(header + (["fits", "margin"] if report.memory.size else []), rows)


def _totals(report: Report, contexts: Sequence[int]) -> str:
    totals: dict[str, list[str]] = {}
    for entry in report.estimates:
        found = report.memory.verdict(entry)
        mark = "" if found is None else " " if found.fits else "*"
        totals.setdefault(entry.scheme, []).append(format_gib(entry.total_bytes) + mark)
    rows = [[name, *cells] for name, cells in totals.items()]
    text = options.table(["scheme", *map(format_tokens, contexts)], rows)
    if report.memory.size:
        text += f"\n\n* does not fit {format_bytes(report.memory.size.nbytes - report.memory.reserve)}"
    return text


def _facts(report: Report) -> str:
    assumed = _assumptions(report)
    overhead = assumed["overhead"]
    facts = options.Facts(
        [
            ("runtime", assumed["runtime"]),
            ("prefill", f"chunks of {assumed['prefill_chunk']:,} tokens"),
            ("KV cache", f"{assumed['kv_layout']}; {assumed['kv_bytes_per_token']:,} bytes a token"),
            ("overhead", f"{format_gib(overhead['bytes'])} GiB, {overhead['status']}: {overhead['source']}"),
        ]
    )
    return "Assumptions\n" + facts.text()
