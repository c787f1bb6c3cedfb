"""A directory that appears whole or not at all.

Beside OUT lies, while it is written, a locked folder:

    .OUT.partial-PID/     holds a lock on itself for as long as the process lives
    ├── new/              what becomes OUT by a rename
    └── old/              what OUT was, between the two renames that replace it

A process that is killed frees its lock; the next one that writes OUT sees this and removes the folder,
after putting `old` back where the kill fell between the renames.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calculators.units import format_bytes
from quantkit.errors import OutputError


@contextmanager
def staged_directory(out: Path, source: Path, force: bool) -> Iterator[Path]:
    """Yield an empty directory that becomes `out` when the block ends without an exception.

    Args:
        out: where the directory appears; its parent must exist.
        source: what is being converted, which is never replaced.
        force: replace `out` where it is an empty directory or a model's.

    Raises:
        OutputError: `out` exists and may not be replaced, or writing failed.
    """
    out = Path(os.path.abspath(out))
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no directory: create it first, {out.name} is written into it")
    try:
        _remove_leftovers(out)
        check_replaceable(out, source, force)
        staging, lock = _create_locked(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}") from None
    try:
        new = staging / "new"
        new.mkdir()
        yield new
        check_replaceable(out, source, force)  # hours may have passed
        _publish(new, out, staging / "old")
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror or error}; nothing is left of it"
        ) from None
    finally:
        _discard(staging, out)
        os.close(lock)


def check_replaceable(out: Path, source: Path, force: bool) -> None:
    """Refuse to write to `out` where something is that must stay.

    Raises:
        OutputError: `out` exists, and `force` is not given or does not cover it.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise OutputError(f"{out} exists already: name another directory, or replace it with --force")
    if out.is_symlink() or not out.is_dir():
        raise OutputError(f"{out} is no directory: --force replaces model directories only")
    target, origin = out.resolve(), source.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise OutputError(f"{out} overlaps the source {source}: --force does not replace what is being read")
    if any(out.iterdir()) and not (out / "config.json").is_file():
        raise OutputError(f"{out} holds no config.json: --force replaces model directories only")


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OutputError: fewer than `needed_bytes` are free where `directory` lies.
    """
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise OutputError(
            f"{directory} has {format_bytes(free)} free, but the output takes {format_bytes(needed_bytes)}: "
            "free some space or write elsewhere"
        )


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_locked(out: Path) -> tuple[Path, int]:
    """Create the staging folder and lock it, again where another process took it for a leftover."""
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    while True:
        staging.mkdir(exist_ok=True)
        try:
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(lock), staging.stat()):
                return staging, lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _remove_leftovers(out: Path) -> None:
    """Remove the staging folders of processes that were killed: those whose lock is free."""
    prefix = f".{out.name}.partial-"
    for staging in sorted(out.parent.iterdir()):
        if not staging.name.startswith(prefix) or staging.is_symlink() or not staging.is_dir():
            continue
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _discard(staging, out)
        except BlockingIOError:
            pass  # a living process writes there
        finally:
            os.close(lock)


def _publish(new: Path, out: Path, old: Path) -> None:
    sync(new)
    if out.exists():
        out.rename(old)
    new.rename(out)
    sync(out.parent)


def _discard(staging: Path, out: Path) -> None:
    """Remove a staging folder, giving OUT back what it was unless the new one stands in its place."""
    old = staging / "old"
    if old.exists() and not os.path.lexists(out):
        old.rename(out)
    shutil.rmtree(staging, ignore_errors=True)
