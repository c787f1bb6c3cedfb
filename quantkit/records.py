"""Versioned JSON records of runs: what was run, on what, what came out.

A record is a JSON object with `format` ("quantkit-record"), `version`, `kind` ("estimate", "perplexity",
"measure" or "bench"), `created` (UTC), `quantkit` (its version), `environment`, and `body`, which is what the
command of that kind prints with `--json`. Reports read records and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.errors import OutputError, RecordError

FORMAT = "quantkit-record"
VERSION = 1
KINDS = ("estimate", "perplexity", "measure", "bench")
_VERSIONED_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "gguf")


@dataclass(frozen=True)
class Record:
    """One run; see the module's text for the fields."""

    kind: str
    body: dict[str, Any]
    created: str
    quantkit: str
    environment: dict[str, str]


def new_record(kind: str, body: Mapping[str, Any]) -> Record:
    """Return a record of what has just been run, with the versions and machine it ran on."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(kind, dict(body), now, __version__, _environment())


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all.

    Raises:
        OutputError: the file cannot be written, or a number of the record is not finite.
    """
    value = {"format": FORMAT, "version": VERSION, **record.__dict__}
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError:
        raise OutputError(f"{path} is not written: a number in it is not finite, and JSON has none") from None
    write_text(path, text + "\n")


def check_output(path: Path) -> None:
    """Refuse, before long work, a file that `write_bytes` could not write; nothing is left behind.

    Raises:
        OutputError: it is a directory, or no file can be made there.
    """
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return
        folder = next(parent for parent in path.parents if parent.exists())
        beside = folder / _beside(path).name
        try:
            beside.touch()
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, as `write_bytes` does.

    Raises:
        OutputError: the file cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it there; write straight into a device or a pipe.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        beside = _beside(path)
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def read_record(path: Path) -> Record:
    """Return the record in `path`.

    Raises:
        RecordError: it is missing, no record of quantkit's, or of an unknown version or kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read as a record: {error}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise RecordError(f"{path} is no quantkit record: its 'format' is not {FORMAT!r}")
    if value.get("version") != VERSION or value.get("kind") not in KINDS:
        raise RecordError(
            f"{path} is a record of version {value.get('version')} and kind {value.get('kind')!r}; "
            f"this quantkit reads version {VERSION} of {', '.join(KINDS)}"
        )
    try:
        return Record(**{name: value[name] for name in Record.__dataclass_fields__})
    except KeyError as error:
        raise RecordError(f"{path} lacks the field {error}") from None


def is_record(path: Path) -> bool:
    """Whether a file is a record that this quantkit reads."""
    try:
        read_record(path)
    except RecordError:
        return False
    return True


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine(), "cpus": str(os.cpu_count())}
    for package in _VERSIONED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
