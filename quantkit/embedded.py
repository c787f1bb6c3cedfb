"""The trained model that the package carries, so that every command has something real to run on."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODEL = "tiny-mistral"


def embedded_path(name: str) -> Path | None:
    """Return the directory of the embedded model of that name, None where there is none."""
    return Path(__file__).parent / "data" / EMBEDDED_MODEL if name.lower() == EMBEDDED_MODEL else None
