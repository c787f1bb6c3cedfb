"""`quantkit report`: records to charts, tables and a page; and the page to calculate on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from quantkit.cli import options, remarks

PAGE_MODELS = ("mistral-7b-instruct-v0.2", "llama-3.1-8b", "qwen2.5-7b", "tinyllama-1.1b")


@click.command(name="report")
@click.argument("records", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the report; it may exist, files of the same names are replaced.",
)
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one self-contained page: a calculator, and the charts of RECORDS.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help=f"A model to choose on the page, repeatable [default: {', '.join(PAGE_MODELS)}].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the names of the files written as JSON.")
@remarks.quiet
@options.examples(
    "report perplexity-tiny-mistral.json -o report",
    "report records/*.json -o report --html page.html",
    "report --html page.html --model llama-3.1-8b",
)
def command(
    records: Sequence[Path], out: Path | None, html: Path | None, models: Sequence[str], as_json: bool
) -> None:
    """Draw charts and tables from RECORDS, or write a page to calculate on.

    RECORDS are files that `quantkit estimate`, `eval`, `measure` and `bench` wrote. From them alone come
    report.md, charts of memory over context, of perplexity against weight size and of speed, and the tables
    as Markdown and CSV. The page of --html needs no records and no network.
    """
    if out is None and html is None:
        raise click.UsageError(
            "nothing to write: name a folder by -o for tables and charts, or a page by --html"
        )
    if out and not records:
        raise click.UsageError("-o DIR needs RECORDS to report on")
    if models and html is None:
        raise click.UsageError("--model chooses for the page of --html, which is not asked for")
    for path in records:
        if path.is_dir():
            raise click.BadParameter(
                f"{path} is a directory: name its records, such as {path}/*.json", param_hint="RECORDS"
            )
    written: list[Path] = []
    if out:
        with remarks.progress("drawing", len(records)) as bar:
            from quantkit.report import build_report  # loads the plotting library, for a second

            written += build_report(records, out, bar.update)
    if html:
        _write_page(records, html, list(dict.fromkeys(models)) or PAGE_MODELS)
        written.append(html)
    names = list(map(str, written))
    click.echo(json.dumps({"written": names}, indent=1) if as_json else "\n".join(names))


def _write_page(records: Sequence[Path], html: Path, models: Sequence[str]) -> None:
    from quantkit.errors import OutputError
    from quantkit.records import write_text
    from quantkit.report.html import build_page
    from quantkit.report.runs import read_run

    if html.resolve() in {path.resolve() for path in records}:
        raise OutputError(f"{html} is one of the records; choose another file for the page")
    runs = [read_run(path) for path in records]
    configs = [options.find_model(model).config for model in models]
    with remarks.progress("computing the page", len(configs)) as bar:
        page = build_page(configs, runs, bar.update)
    write_text(html, page)
