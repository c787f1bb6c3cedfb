"""`quantkit bench`: how fast it runs, beside what the machine can do and beside others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options, page, remarks
from quantkit.cli.output import check, finish, keep

if TYPE_CHECKING:
    from quantkit.bench.cuda.results import AnyBench, CudaBench
    from quantkit.config import ModelConfig

PARTS = ("machine", "kernels", "models")


@click.group("bench")
@options.examples("bench cpu --quick", "bench cpu --help")
def command() -> None:
    """Measure how fast quantized models run on this machine, beside what it could do at most."""


def _options(models: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the options that both have; `models` are those that are run whole where none is named."""
    both = (
        click.option(
            "--only", "sections", type=click.Choice(PARTS), multiple=True,
            help="Run this part alone, repeatable; the machine's own limits always are measured.",
        ),
        click.option("--scheme", "schemes", multiple=True, metavar="NAME", help="Repeatable [default: four]."),
        click.option(
            "--model", "models", multiple=True, metavar="MODEL",
            help=f"Run a whole model of these shapes, repeatable [default: {models}].",
        ),
        click.option("--quick", is_flag=True, help="A few seconds that show that everything works."),
        click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write a record."),
        click.option("--json", "as_json", is_flag=True, help="Print the record's body as JSON."),
        remarks.quiet,
    )  # fmt: skip

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(both):
            function = option(function)
        return function

    return add


@command.command("cpu")
@_options("mistral-7b-instruct-v0.2 and smollm2-135m")
@click.option(
    "--llama", metavar="PYTHON",
    help="Also run llama.cpp on the same shapes, by an interpreter that has llama_cpp.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the file for llama.cpp is written for the time being.",
)  # fmt: skip
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
    wanted = _parts(sections, models)
    check(output)
    if llama and "models" not in wanted:
        raise click.UsageError("--llama belongs to the models: add --only models")
    if folder and not llama:
        raise click.UsageError("--folder is for the file that --llama reads: name an interpreter, too")
    from quantkit.bench import models as whole
    from quantkit.bench.run import Plan, run
    from quantkit.bench.shapes import schemes_named

    plan = Plan(
        schemes=schemes_named(schemes),
        kernels="kernels" in wanted,
        models=_configs(models or (whole.QUICK_MODELS if quick else whole.MODELS))
        if "models" in wanted
        else (),
        quick=quick,
        llama=llama,
        folder=folder,
    )
    with remarks.progress("measuring", plan.steps) as bar:
        found = run(plan, bar.update)
    finish(output, "bench", asdict(found), as_json, lambda: _text(found))


@command.command("cuda")
@_options("mistral-7b-instruct-v0.2")
@options.examples(
    "bench cuda --quick",
    "bench cuda --only kernels --scheme int4-g128",
    "bench cuda -o bench.json",
)
def cuda(
    sections: Sequence[str],
    schemes: tuple[str, ...],
    models: Sequence[str],
    quick: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure the kernels of the first CUDA GPU beside its copy bandwidth, and whole models with random weights.

    Kernels run in CUDA graphs, in alternation, from copies that no cache holds. The record is written again
    with each new figure, so that a run that is cut short keeps what it measured.
    """
    wanted = _parts(sections, models)
    check(output)
    from quantkit.bench.cuda.device import Cuda
    from quantkit.bench.cuda.run import Plan, run
    from quantkit.bench.shapes import schemes_named, shapes

    plan = Plan(
        schemes=schemes_named(schemes),
        kernels="kernels" in wanted,
        models=_configs(models or (shapes(quick).name,)) if "models" in wanted else (),
        quick=quick,
    )

    def save(found: CudaBench) -> None:
        if output:  # else all that was found would be copied with each figure, for nothing
            keep(output, "bench", asdict(found))

    device = Cuda()
    with remarks.progress("measuring", plan.steps) as bar:
        found = run(plan, device, bar.update, save)
    finish(output, "bench", asdict(found), as_json, lambda: _text(found))


def _parts(sections: Sequence[str], models: Sequence[str]) -> set[str]:
    """Return the parts that are run."""
    wanted = set(sections) or set(PARTS)
    if models and "models" not in wanted:
        raise click.UsageError("--model belongs to the models: add --only models")
    return wanted


def _configs(models: Sequence[str]) -> tuple[ModelConfig, ...]:
    return tuple(options.find_model(name).config for name in models)


def _text(found: AnyBench) -> str:
    from quantkit.bench import sections

    tables = [*sections.kernels(found), *sections.models(found)]
    return "\n\n".join(
        [
            page.Facts(sections.facts(found)).text(indent=""),
            *(f"{about}\n\n{page.table(*table)}" for about, table in tables),
            *sections.warnings(found),
        ]
    )
