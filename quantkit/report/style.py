"""What all charts share: style, palette, title, small print, PNG.

Figures use the object interface and Agg, never pyplot, and matplotlib's default style whatever the
user's own, so that the same records give the same bytes. Sizes are inches, 9 wide as in a README.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from quantkit.report.runs import display_name

DPI = 150

# Okabe and Ito's palette, which stays apart under the common kinds of colour blindness.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
RED, SKY, PURPLE, GREY = "#D55E00", "#56B4E9", "#CC79A7", "#999999"
_LOOKS = {
    "fp32": (BLACK, "o"),
    "bf16": (BLACK, "o"),
    "fp16": (BLACK, "o"),
    "int8": (BLUE, "s"),
    "int4-g128": (ORANGE, "D"),
    "int4-g64": (GREEN, "^"),
    "int4-g32": (RED, "v"),
    "nf4": (PURPLE, "P"),
    "nf4-dq": (SKY, "X"),
}
_CYCLE = tuple(zip((GREY, BLUE, ORANGE, GREEN, RED, PURPLE, SKY), "*<>hdp8", strict=True))
# Darker shades of those colours that are too light for text on white.
_INKS = {ORANGE: "#9A6A00", SKY: "#1F78A8", GREY: "#666666", PURPLE: "#A04F7C", GREEN: "#00795A"}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar sign in a model's name is a dollar sign
    "figure.dpi": DPI,
}
INK, FAINT = "#222222", "#666666"
HALO = [withStroke(linewidth=2, foreground="white")]

_P = ParamSpec("_P")


@dataclass(frozen=True)
class Look:
    """Colour, marker, its filling, dash and the colour of text of one series."""

    color: str
    marker: str
    face: str
    dash: str
    ink: str


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Draw in the default style with ours on top, and leave the caller's settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return drawn


def png(figure: Figure) -> bytes:
    """Return the figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """Return a figure of this size with a title and a line below it."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    left = 0.12 / width
    figure.text(left, 1 - 0.1 / height, title, fontsize=12, fontweight="bold", va="top", color=INK)
    figure.text(left, 1 - 0.34 / height, subtitle, va="top", color=FAINT)
    return figure


def footnote(figure: Figure, note: str) -> None:
    """Write small print at the bottom, wrapped to the figure's width; a line has at most two rows."""
    width, height = figure.get_size_inches()
    rows = []
    for line in note.split("\n"):
        rows += textwrap.wrap(line, int(width * 17), max_lines=2, placeholder=" …")
    figure.text(0.12 / width, 0.09 / height, "\n".join(rows), fontsize=7, va="bottom", color=FAINT)


def look(scheme: str, index: int) -> Look:
    """Return how a scheme is drawn in every chart; `index` decides for one that is not among the usual.

    Dashes differ by family, so that two lines of equal sizes show through each other.
    """
    base = scheme.removesuffix("-asym")
    color, marker = _LOOKS.get(base, _CYCLE[index % len(_CYCLE)])
    dash = "--" if scheme.startswith("nf4") else "-" if base == scheme else ":"
    return Look(color, marker, color if base == scheme else "white", dash, _INKS.get(color, color))


def title_name(model: str, width: float) -> str:
    """Return a model's name cut to what a title of this width has room for."""
    return clip(display_name(model), int(width * 9) - 36)


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(1, length - 1)] + "…"
