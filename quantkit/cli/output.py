"""How a command that runs long ends: what it found is printed, and written as a record where one is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from quantkit.cli import page, remarks


def check(path: Path | None) -> None:
    """Refuse a record that could not be written, before anything runs."""
    if path:
        from quantkit.records import check_output

        check_output(path)


def keep(path: Path | None, kind: str, body: dict[str, Any]) -> None:
    """Write the record of what was found so far, if it can be: a full disk may have room when the command ends."""
    from quantkit.errors import OutputError

    with suppress(OutputError):
        _write(path, kind, body)


def finish(
    path: Path | None, kind: str, body: dict[str, Any], as_json: bool, text: Callable[[], str]
) -> None:
    """Write the record and print its body, as JSON or in words, even where it cannot be written."""
    try:
        _write(path, kind, body)
    finally:
        if as_json:
            click.echo(json.dumps(body, indent=1))
        else:
            page.show(text())
    if path:
        remarks.remark(f"record: {path}")


def _write(path: Path | None, kind: str, body: dict[str, Any]) -> None:
    if path:
        from quantkit import records

        records.write_record(path, records.new_record(kind, body))
