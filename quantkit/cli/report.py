"""`quantkit report`: records to charts, tables and a page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="report")
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the report; it may exist, files of the same names are replaced.",
)
def command(records: tuple[Path, ...], out: Path) -> None:
    """Draw charts and tables from RECORDS.

    RECORDS are files that `quantkit estimate` and `quantkit eval` wrote. From them alone come report.md,
    charts of memory over context and of perplexity against weight size, and the tables as Markdown and CSV.
    """
    for path in records:
        if path.is_dir():
            raise click.BadParameter(
                f"{path} is a directory: name its records, such as {path}/*.json", param_hint="RECORDS"
            )
    from quantkit.report import build_report

    for written in build_report(records, out):
        click.echo(written)
