"""What goes to stderr beside errors: warnings, remarks and progress, all of which --quiet silences."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_QUIET = "quantkit.quiet"
_SECONDS_BETWEEN_DRAWINGS = 0.1
_WIDEST_BAR = 30


def _hush(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_QUIET] = value
    if value:  # the libraries that download have bars of their own
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


# eager: what other options' callbacks say is silenced, too
quiet = click.option(
    "--quiet", "-q", is_flag=True, is_eager=True, expose_value=False, callback=_hush,
    help="No progress, warnings or remarks on stderr; errors stay.",
)  # fmt: skip


def is_quiet() -> bool:
    """Whether the running command was given --quiet."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


def warn(text: str) -> None:
    """Print one line of warning on stderr."""
    remark(f"Warning: {text}")


def remark(text: str) -> None:
    """Print one line on stderr that is no error."""
    if not is_quiet():
        click.echo(text, err=True)


def progress(label: str, length: int) -> Progress:
    """Return a progress line on stderr, hidden by --quiet and where that is no terminal."""
    terminal = sys.stderr and sys.stderr.isatty()  # None where it is closed
    return Progress(label, length, hidden=is_quiet() or not terminal)


class Progress:
    """One line on stderr that says how much is done and how long the rest will take; erased at the end.

    Args:
        label: what is being done.
        length: how many steps it has.
        hidden: whether to print nothing.
    """

    def __init__(self, label: str, length: int, hidden: bool) -> None:
        self._label, self._length, self._hidden = label, max(length, 1), hidden
        self._done = 0
        self._started = self._drawn = time.monotonic()
        self._shown = 0  # columns of the line that is there now

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._print("")

    def update(self, steps: int) -> None:
        """Count steps as done."""
        self._done += steps
        now = time.monotonic()
        if now - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            self._draw()

    def line(self, columns: int) -> str:
        """Return the line for a terminal of that many columns; the bar shrinks first, then the label is cut."""
        share = min(self._done / self._length, 1.0)
        figures = f"{share:4.0%}{self._left()}"
        room = columns - len(self._label) - len(figures) - 4
        if room < 4:
            return f"{self._label} {figures}"[:columns]
        width = min(room, _WIDEST_BAR)
        full = int(share * width)
        return f"{self._label}  {'#' * full}{'-' * (width - full)}  {figures}"

    def _left(self) -> str:
        """Return the time left, known as soon as a step is done."""
        if not 0 < self._done < self._length:
            return ""
        seconds = (time.monotonic() - self._started) * (self._length - self._done) / self._done
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"  {clock} left"

    def _draw(self) -> None:
        if not self._hidden:
            self._print(self.line(_columns() - 1))  # a terminal wraps at its last column

    def _print(self, line: str) -> None:
        """Print over the line that is there, with spaces: a dumb terminal knows no codes."""
        if not self._hidden:
            sys.stderr.write(f"\r{line.ljust(self._shown)}\r" if not line else f"\r{line.ljust(self._shown)}")
            sys.stderr.flush()
            self._shown = len(line)


def _columns() -> int:
    """Return the columns of stderr's terminal: stdout may be a pipe."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
