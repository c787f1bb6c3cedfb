"""What a terminal adds to a page: its width, colour, and bars of block characters. A pipe gets none of them.

Bars need a terminal. Colour needs one that is not `TERM=dumb`, or FORCE_COLOR; NO_COLOR wins over both. Values
are named tuples here: `estimate` is to start at once, and a dataclass takes longer to make than to use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import click

_EIGHTHS = " ▏▎▍▌▋▊▉"
WIDEST = 32


class Screen(NamedTuple):
    """What stdout shows.

    Attributes:
        width: columns of the terminal; None in a pipe, where nothing is folded.
        blocks: whether bars are drawn.
        colour: whether text is coloured.
    """

    width: int | None = None
    blocks: bool = False
    colour: bool = False


def screen() -> Screen:
    """Return what stdout shows now."""
    terminal = bool(sys.stdout and sys.stdout.isatty())  # None where it is closed
    if not terminal:
        return Screen(colour=_colour(terminal))
    import shutil  # late: a pipe does without

    blocks = _encodes(_EIGHTHS + "█▓▒░·›", sys.stdout.encoding)
    return Screen(shutil.get_terminal_size().columns, blocks, _colour(terminal))


def _colour(terminal: bool) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (terminal and os.environ.get("TERM") != "dumb")


def _encodes(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


class Part(NamedTuple):
    """One component of stacked bars: told by its glyph alone where there is no colour."""

    name: str
    glyph: str
    colour: str


WEIGHTS = Part("weights", "█", "blue")
KV_CACHE = Part("KV cache", "▓", "cyan")
ACTIVATIONS = Part("activations", "▒", "magenta")
ALLOCATOR = Part("allocator", "░", "yellow")
OVERHEAD = Part("overhead", "·", "white")
COMPONENTS = (WEIGHTS, KV_CACHE, ACTIVATIONS, ALLOCATOR, OVERHEAD)
_USED = (WEIGHTS, Part("all else", "▓", "cyan"), Part("free", "·", "white"))
_OVER = "›"


class Bars(NamedTuple):
    """A last column of bars.

    Attributes:
        header: above them.
        draw: returns one bar for each row, for a width in columns and whether in colour.
        legend: returns the line below the table, for whether in colour.
    """

    header: str
    draw: Callable[[int, bool], Sequence[str]]
    legend: Callable[[bool], str]


def cells(sizes: Sequence[int], scale: int, width: int) -> list[int]:
    """Return how many of `width` columns each size takes where `scale` takes all of them.

    They add up to the columns of the sum, cut at `width`: each has its whole columns, and those that are left
    go to the largest remainders, so that a small part shows in all rows or in none.
    """
    left, scaled = scale, []
    for size in sizes:
        scaled.append(min(size, left) * width)
        left -= min(size, left)
    whole = (2 * sum(scaled) + scale) // (2 * scale)
    found = [size // scale for size in scaled]
    remainders = [size % scale for size in scaled]
    order = sorted(range(len(sizes)), key=lambda part: -remainders[part])
    for part in order[: whole - sum(found)]:
        found[part] += 1
    return found


def stack(sizes: Sequence[int], scale: int, width: int, parts: Sequence[Part], colour: bool) -> str:
    """Return a bar of parts side by side, up to `width` columns."""
    drawn = zip(parts, cells(sizes, scale, width), strict=True)
    return "".join(paint(part.glyph * count, part.colour, colour) for part, count in drawn if count)


def stacks(
    header: str, rows: Sequence[Sequence[int]], scales: Sequence[int], parts: Sequence[Part] = COMPONENTS
) -> Bars:
    """Return a column of stacked bars, each row by its own scale."""

    def draw(width: int, colour: bool) -> list[str]:
        return [stack(row, scale, width, parts, colour) for row, scale in zip(rows, scales, strict=True)]

    def legend(colour: bool) -> str:
        return "  ".join(f"{paint(part.glyph, part.colour, colour)} {part.name}" for part in parts)

    return Bars(header, draw, legend)


def usage(header: str, label: str, uses: Sequence[tuple[int, int, int]]) -> Bars:
    """Return a column of what is used of a memory, a row for each triple: weights, all else, memory."""

    def draw(width: int, colour: bool) -> list[str]:
        return [_use(*use, width, colour) for use in uses]

    def legend(colour: bool) -> str:
        parts = "  ".join(f"{paint(part.glyph, part.colour, colour)} {part.name}" for part in _USED)
        over = any(weights + rest > memory for weights, rest, memory in uses)
        return f"{label}: {parts}" + (f"  {paint(_OVER, 'red', colour)} beyond it" if over else "")

    return Bars(header, draw, legend)


def _use(weights: int, rest: int, memory: int, width: int, colour: bool) -> str:
    spare = memory - weights - rest
    if spare >= 0:
        return stack((weights, rest, spare), memory, width, _USED, colour)
    return stack((weights, rest), memory, width - 1, _USED[:2], colour) + paint(_OVER, "red", colour)


def lengths(header: str, values: Sequence[float], legend: str) -> Bars:
    """Return a column of bars by magnitude, in eighths of a column: above zero red, below it green."""
    most = max(map(abs, values), default=0.0)

    def draw(width: int, colour: bool) -> list[str]:
        return [
            paint(length(abs(value), most, width), "red" if value > 0 else "green", colour)
            for value in values
        ]

    return Bars(header, draw, lambda colour: legend)


def length(value: float, most: float, width: int) -> str:
    """Return a bar of value / most of `width` columns, in eighths of a column; nothing for none."""
    eighths = round(value / most * width * 8) if most else 0
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def paint(text: str, colour: str | None, wanted: bool = True) -> str:
    """Return text in a colour where it is wanted; `bold` is a colour, too."""
    if not (text and colour and wanted):
        return text
    return click.style(text, bold=True) if colour == "bold" else click.style(text, fg=colour)
