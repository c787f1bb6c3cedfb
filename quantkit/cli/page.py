"""What is printed for people: tables, labelled facts, and prose, folded to the terminal where there is one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import click

from quantkit.cli import bars

# a label, or cells of a list, before the text of a line: what follows is folded below itself
_LABEL = r"\s*\S.*\s{2,}(?=\S)|\s*"
_COLOURS = {"fits": "green", "tight": "yellow", "no": "red", "none": "red"}


def show(text: str) -> None:
    """Print a page on stdout; on a terminal no line of it is wider than the terminal."""
    screen = bars.screen()
    click.echo(fold(text, screen.width), color=screen.colour or None)


def fold(text: str, width: int | None) -> str:
    """Return text with the lines that are wider than `width` folded; all as it was without a width."""
    if width is None:
        return text
    return "\n".join(_fold(line, width) for line in text.split("\n"))


def _fold(line: str, width: int) -> str:
    if len(click.unstyle(line)) <= width:
        return line
    import textwrap

    found = re.match(_LABEL, line)
    hang = found.end() if found else 0
    if hang > width // 2:
        hang = len(line) - len(line.lstrip()) + 2
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * hang, break_on_hyphens=False))


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    short: Sequence[str] | None = None,
    beside: bars.Bars | None = None,
    screen: bars.Screen | None = None,
) -> str:
    """Return aligned columns: the first to the left, the others to the right, bars last where they fit.

    Args:
        header: one a column.
        rows: the cells.
        short: the header where a terminal has no room for the other one.
        beside: a column of bars, and the legend below the table; on a terminal alone.
        screen: what it is for; stdout unless named.
    """
    screen = screen or bars.screen()
    if screen.width is None:
        return "\n".join(_lines(header, rows, 2, screen.colour))
    for names, gap, least in _layouts(header, short or header, beside is not None and screen.blocks):
        used = sum(_widths(names, rows)) + gap * (len(names) - 1)
        if used + (least + 2 if least else 0) > screen.width:
            continue
        lines = _lines(names, rows, gap, screen.colour)
        if beside is None or not least:
            return "\n".join(lines)
        drawn = beside.draw(min(bars.WIDEST, screen.width - used - 2), screen.colour)
        column = [bars.paint(beside.header, "bold", screen.colour), *drawn]
        lines = [
            f"{line.ljust(_padded(line, used))}  {bar}".rstrip()
            for line, bar in zip(lines, column, strict=True)
        ]
        return "\n".join([*lines, "", beside.legend(screen.colour)])
    return _split(short or header, rows, screen.width, screen.colour)


def _layouts(
    header: Sequence[str], short: Sequence[str], barred: bool
) -> Iterator[tuple[Sequence[str], int, int]]:
    """Yield header, gap between columns and least width of bars, from the roomiest to the narrowest."""
    if barred:
        yield from ((header, 2, 12), (short, 2, 8), (short, 1, 8))
    yield from ((header, 2, 0), (short, 2, 0), (short, 1, 0))


def _split(header: Sequence[str], rows: Sequence[Sequence[str]], width: int, colour: bool) -> str:
    """Return the table in pieces one below the other, each with the first column."""
    widths = _widths(header, rows)
    pieces: list[list[int]] = [[]]
    for column in range(1, len(header)):
        if pieces[-1] and widths[0] + sum(2 + widths[one] for one in [*pieces[-1], column]) > width:
            pieces.append([])
        pieces[-1].append(column)
    tables = []
    for piece in pieces:
        chosen = [[line[0], *(line[column] for column in piece)] for line in [header, *rows]]
        tables.append("\n".join(_lines(chosen[0], chosen[1:], 2, colour)))
    return "\n\n".join(tables)


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]], gap: int, colour: bool) -> list[str]:
    widths = _widths(header, rows)
    head = _line(header, widths, gap, lambda cell: "bold" if colour else None)
    return [head, *(_line(row, widths, gap, _verdict if colour else _plain) for row in rows)]


def _line(cells: Sequence[str], widths: Sequence[int], gap: int, colour: Callable[[str], str | None]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    painted = [bars.paint(text, colour(cell)) for text, cell in zip(padded, cells, strict=True)]
    return (" " * gap).join(painted).rstrip()


def _plain(cell: str) -> None:
    return None


def _verdict(cell: str) -> str | None:
    """Return the colour of a cell that says whether something fits, in a word or by its mark."""
    marks = {"~": "yellow", "*": "red"}
    return _COLOURS.get(cell.strip()) or marks.get(cell[-1:])


def _padded(line: str, width: int) -> int:
    """Return to how many characters a line must be padded to take `width` columns: codes take none."""
    return width + len(line) - len(click.unstyle(line))


@dataclass(frozen=True)
class Facts:
    """Labelled lines below a table, their texts aligned."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def text(self, indent: str = "  ") -> str:
        """Return the lines, each after `indent`."""
        width = max((len(label) for label, _ in self.lines), default=0)
        return "\n".join(f"{indent}{label.ljust(width)}  {text}" for label, text in self.lines)
