"""`quantkit bench`: how fast it runs, beside what the machine can do and beside others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.cli import options, page, remarks

if TYPE_CHECKING:
    from quantkit.bench.results import Bench


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
    "--model", "models", multiple=True, metavar="MODEL",
    help="Run a whole model of these shapes, repeatable [default: mistral-7b-instruct-v0.2 and smollm2-135m].",
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
    from quantkit.bench.run import Plan, run
    from quantkit.bench.shapes import schemes_named

    named = models or (whole.QUICK_MODELS if quick else whole.MODELS)
    plan = Plan(
        schemes=schemes_named(schemes),
        kernels="kernels" in wanted,
        models=tuple(options.find_model(name).config for name in named) if "models" in wanted else (),
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
    from quantkit.bench import tables

    parts = [page.Facts(tables.machine(found)).text(indent="")]
    if found.cells:
        parts += [f"{tables.about_kernels(found)}\n\n{page.table(*tables.kernels(found))}"]
        parts += [f"Share of the read bandwidth at one row\n\n{page.table(*tables.shares(found))}"]
    if found.models:
        parts += [f"{tables.about_models(found)}\n\n{page.table(*tables.models(found))}"]
    return "\n\n".join([*parts, tables.QUICK] if found.quick else parts)
