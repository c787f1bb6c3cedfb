"""`quantkit bench`: how fast it runs, beside what the machine can do and beside others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calculators.units import format_bytes
from quantkit.cli import options, page, remarks
from quantkit.errors import ConfigError
from quantkit.presets import PRESETS

if TYPE_CHECKING:
    from quantkit.bench.results import Bench, Limits, Machine

MISSING = "–"


@click.group("bench")
@options.examples("bench cpu --quick", "bench cpu --help")
def command() -> None:
    """Measure how fast quantized models run on this machine, beside what it could do at most."""


@command.command("cpu")
@click.option(
    "--only", "sections", type=click.Choice(["machine", "kernels", "models"]), multiple=True,
    help="Run this part alone, repeatable; the machine's own limits always are measured.",
)  # fmt: skip
@click.option("--scheme", "schemes", multiple=True, metavar="NAME", help="Repeatable [default: four].")
@click.option(
    "--model", "models", multiple=True, metavar="PRESET",
    help="Shapes of a whole model, repeatable [default: mistral-7b-instruct-v0.2 and smollm2-135m].",
)  # fmt: skip
@click.option(
    "--llama", metavar="PYTHON",
    help="Also run llama.cpp on the same shapes, by an interpreter that has llama_cpp.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the file for llama.cpp is written for the time being.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="A few seconds that show that everything works.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write a record.")
@click.option("--json", "as_json", is_flag=True, help="Print the record's body as JSON.")
@remarks.quiet
@options.examples(
    "bench cpu --quick",
    "bench cpu --only kernels --scheme int4-g128",
    "bench cpu --llama path/to/python -o bench.json",
)
def cpu(
    sections: Sequence[str],
    schemes: tuple[str, ...],
    models: Sequence[str],
    llama: str | None,
    folder: Path | None,
    quick: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure the CPU kernels: their share of the read bandwidth, and whole models with random weights.

    What is compared runs in alternation, and every ratio is a median of pairs, so that other load on the
    machine changes both sides; still, nothing else should run. torch's threads are used: OMP_NUM_THREADS.
    """
    wanted = set(sections) or {"machine", "kernels", "models"}
    if (models or llama) and "models" not in wanted:
        raise click.UsageError("--model and --llama belong to the models: add --only models")
    if folder and not llama:
        raise click.UsageError("--folder is for the file that --llama reads: name an interpreter, too")
    from quantkit.bench import models as whole
    from quantkit.bench.run import Plan, run, schemes_named

    presets = models or (whole.QUICK_MODELS if quick else whole.MODELS)
    for name in presets:
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    plan = Plan(
        schemes=schemes_named(schemes),
        kernels="kernels" in wanted,
        models=tuple(PRESETS[name] for name in presets) if "models" in wanted else (),
        quick=quick,
        llama=llama,
        folder=folder,
    )
    with remarks.progress("measuring", plan.steps) as bar:
        found = run(plan, bar.update)
    body = asdict(found)
    if output:
        from quantkit.records import new_record, write_record

        write_record(output, new_record("bench", body))
        remarks.remark(f"record: {output}")
    click.echo(json.dumps(body, indent=1)) if as_json else page.show(_text(found))


def _text(found: Bench) -> str:
    parts = [_limits(found.machine, found.limits)]
    if found.cells:
        parts += [_kernels(found), _shares(found)]
    if found.models:
        parts.append(_models(found))
    if found.quick:
        parts.append("A quick run: its figures mean nothing.")
    return "\n\n".join(parts)


def _limits(machine: Machine, limits: Limits) -> str:
    best = limits.readers[0]
    facts = [
        ("machine", f"{machine.cpu}, {machine.cores} cores, {format_bytes(machine.memory_bytes)}"),
        ("runs", f"{machine.threads} threads, {machine.isa}, torch {machine.torch}"),
        ("reads", f"{best.bytes_per_s / 1e9:.1f} GB/s ({best.name}, {best.pages} pages)"),
        ("multiplies", f"{limits.flops_per_s / 1e9:,.0f} GFLOP/s (torch, bfloat16)"),
    ]
    return page.Facts(facts).text(indent="")


def _kernels(found: Bench) -> str:
    from quantkit.bench.results import layers

    sums = layers(found.cells)
    others = list(dict.fromkeys(name for layer in sums for name in layer.speedups))
    rows = [
        [
            layer.scheme,
            str(layer.m),
            f"{1e3 * layer.seconds:,.2f}",
            f"{layer.flops_per_s / 1e9:,.0f}",
            *(f"{layer.speedups[name]:.2f}" if name in layer.speedups else MISSING for name in others),
        ]
        for layer in sums
    ]
    header = ["scheme", "rows", "ms", "GFLOP/s", *(f"x {name}" for name in others)]
    about = f"One layer's matrices of {found.shapes}; x is how many times as fast as the other"
    return f"{about}\n\n{page.table(header, rows)}"


def _shares(found: Bench) -> str:
    names = list(dict.fromkeys(cell.matrix for cell in found.cells))
    shares = {(cell.scheme, cell.matrix): cell.read_share for cell in found.cells if cell.m == 1}
    rows = [
        [scheme, *(f"{shares[scheme, name] or 0.0:.0%}" for name in names)]
        for scheme in dict.fromkeys(cell.scheme for cell in found.cells)
    ]
    return "Share of the read bandwidth at one row\n\n" + page.table(["scheme", *names], rows)


def _models(found: Bench) -> str:
    peers = [run.peer for run in found.models if run.peer]
    header = ["model", "scheme", "decode", "of bandwidth", "prefill"]
    if peers:
        header += ["beside", "its decode", "x decode", "its prefill", "x prefill"]
    rows = []
    for run in found.models:
        row = [run.model, run.scheme, f"{run.decode_tokens_per_s:,.2f}", f"{run.read_share:.0%}"]
        row.append(f"{run.prefill_tokens_per_s:,.1f}")
        if run.peer:
            row += [run.peer.file_type, f"{run.peer.decode_tokens_per_s:,.2f}", f"{run.peer.decode_speedup:.2f}"]
            row += [f"{run.peer.prefill_tokens_per_s:,.1f}", f"{run.peer.prefill_speedup:.2f}"]
        rows.append(row)
    first = found.models[0]
    about = [
        f"Whole models with random weights, in tokens/s: {first.decode_tokens} decoded one by one after a prompt of "
        f"{first.prompt_tokens}",
        f"beside {peers[0].name}: x is how many times as fast" if peers else "llama.cpp is beside where --llama names it",
    ]
    return "\n".join([*about, "", page.table(header, rows)])
