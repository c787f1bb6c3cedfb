"""What `quantkit measure --calibrate` learned of this machine's GPUs, for `estimate` and `fit` to use.

One JSON file, `$XDG_CONFIG_HOME/quantkit/calibration.json` (by default under ~/.config): for each GPU, by
the name it is known by, the bytes outside the allocator, those of cuBLAS's workspace, and what they were
measured with.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calculators.hardware import Overhead, Platform
from quantkit.errors import ConfigError
from quantkit.records import write_text

FORMAT, VERSION = "quantkit-calibration", 1


@dataclass(frozen=True)
class Calibration:
    """What one GPU was found to take.

    Attributes:
        context_bytes: of the process beyond what the allocator reserves, after running every kernel.
        workspace_bytes: of cuBLAS, for one handle and stream.
        torch: version of PyTorch.
        driver: version of the driver.
        date: when, UTC.
    """

    context_bytes: int
    workspace_bytes: int
    torch: str
    driver: str
    date: str


def calibration_file() -> Path:
    """Return where calibrations are kept."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "quantkit" / "calibration.json"


def calibrated(gpu_name: str, known: Platform) -> Platform:
    """Return what is known of a GPU, with what was measured of it on this machine, if anything was, in its place.

    Raises:
        ConfigError: the file is there and cannot be read.
    """
    entry = _read().get(gpu_name)
    if entry is None:
        return known
    found = f"on this machine {entry.date[:10]}, torch {entry.torch}, driver {entry.driver}"
    workspace = f"cuBLAS workspace {entry.workspace_bytes:,} B, {found}"
    return replace(
        known,
        context=Overhead(entry.context_bytes, "measured", f"CUDA context and loaded kernels, {found}"),
        workspace=Overhead(entry.workspace_bytes, "measured", workspace),
    )


def save(gpu_name: str, calibration: Calibration) -> Path:
    """Add or replace what is known of a GPU, and return the file.

    Raises:
        ConfigError: the file is there and cannot be read.
        OutputError: it cannot be written.
    """
    entries = {**_read(), gpu_name: calibration}
    value = {
        "format": FORMAT,
        "version": VERSION,
        "gpus": {name: asdict(one) for name, one in entries.items()},
    }
    path = calibration_file()
    write_text(path, json.dumps(value, indent=1) + "\n")
    return path


def _read() -> dict[str, Calibration]:
    path = calibration_file()
    if not path.exists():
        return {}
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT or value["version"] != VERSION:
            raise ValueError("another format or version")
        entries = {name: Calibration(**entry) for name, entry in value["gpus"].items()}
        if any(not _sound(entry) for entry in entries.values()):
            raise ValueError("sizes that are no byte counts")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no calibration of this quantkit ({error}): delete it, or run `quantkit measure --calibrate`"
        ) from None
    return entries


def _sound(entry: Calibration) -> bool:
    sizes = (entry.context_bytes, entry.workspace_bytes)
    return all(type(size) is int and size >= 0 for size in sizes) and isinstance(entry.date, str)
