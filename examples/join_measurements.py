"""Join records of `quantkit measure` that were made one precision at a time on one card.

    python examples/join_measurements.py OUT RECORD...

OUT may be among the records. What the records say of model, device, method, environment and version must be
the same; `created` becomes the latest. Cells come by precision, repeats in processes of their own last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, RecordError
from quantkit.records import Record, read_record, write_record
from quantkit.schemes import SCHEMES


def joined(records: Sequence[Record]) -> Record:
    """Return one record with the cells of all.

    Raises:
        RecordError: one is no measurement, they are not of the same run, or a cell comes twice.
    """
    if any(record.kind != "measure" for record in records):
        raise RecordError("only records of kind 'measure' can be joined")
    if any(_run(record) != _run(records[0]) for record in records):
        raise RecordError("the records differ in what ran, on what or with which versions: join none of them")
    cells = sorted((cell for record in records for cell in record.body["cells"]), key=_place)
    kinds = [{name: cell[name] for name in cell if name not in ("measured", "estimated")} for cell in cells]
    if any(kind in kinds[:index] for index, kind in enumerate(kinds)):
        raise RecordError("a cell comes twice: join each record once")
    failures = [failure for record in records for failure in record.body["failures"]]
    body = {**records[0].body, "cells": cells, "failures": failures}
    return replace(records[0], body=body, created=max(record.created for record in records))


def _run(record: Record) -> tuple[Any, ...]:
    body = {name: value for name, value in record.body.items() if name not in ("cells", "failures")}
    return record.quantkit, record.environment, body


def _place(cell: dict[str, Any]) -> tuple[bool, int]:
    return cell["own_process"], list(SCHEMES).index(cell["scheme"])


def main(out: Path, paths: Sequence[Path]) -> None:
    record = joined([read_record(path) for path in paths])
    write_record(out, record)
    schemes = dict.fromkeys(cell["scheme"] for cell in record.body["cells"])
    print(f"{len(record.body['cells'])} cells of {', '.join(schemes)}: {out}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(str(__doc__))
    try:
        main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
    except QuantkitError as error:
        sys.exit(f"error: {error}")
