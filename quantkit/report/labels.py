"""Where labels go so that none covers another: spread along one axis, or placed around points."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

_ANGLES = (0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90)  # degrees; sides before above and below
_LEADER_FROM_POINTS = 14.0  # a label farther from its point than this gets a line to it


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions at least `gap` apart, in the order of `wanted` and as near to it as can be.

    Least squares under an order is isotonic regression of `wanted[i] - i * gap`; neighbours that
    would collide are pooled at their mean. Positions stay in `low..high` where all fit there.
    """
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    pools: list[tuple[float, int]] = []  # (mean, members)
    for rank, index in enumerate(order):
        mean, members = wanted[index] - rank * gap, 1
        while pools and pools[-1][0] >= mean:
            before, count = pools.pop()
            mean, members = (before * count + mean * members) / (count + members), count + members
        pools.append((mean, members))
    shifted = [mean for mean, members in pools for _ in range(members)]
    ceiling = max(low, high - (len(wanted) - 1) * gap)
    placed = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        placed[index] = min(max(shifted[rank], low), ceiling) + rank * gap
    return placed


def place_around(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[Text],
    obstacles: Sequence[Bbox],
) -> None:
    """Move each text to the nearest free place around its point, with a thin line where that is far.

    Free is what lies inside the axes and touches no obstacle (display coordinates), no other text
    and no line to one; where it can be, its own line crosses none of these either. A text for which
    nothing is free goes to the nearest place that was tried.

    Args:
        figure: whose resolution counts.
        axes: with final limits and size.
        points: in data coordinates.
        texts: one for each point.
        obstacles: what else must stay visible, the points' own marks included.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    unit = figure.dpi / 72  # pixels a point
    frame = axes.get_window_extent(renderer).padded(-2 * unit)
    taken = [box.padded(unit) for box in obstacles]
    for point, text in zip(points, texts, strict=True):
        size = text.get_window_extent(renderer)
        x, y = (float(value) for value in axes.transData.transform(point))
        tried = _candidates(x, y, size.width, size.height, unit)
        free = [box for box in tried if _is_inside(box, frame) and not any(map(box.overlaps, taken))]
        clear = (box for box in free if not _crosses((x, y), box, taken, unit))
        box = next(clear, (free or tried)[0])
        text.set_horizontalalignment("left")
        text.set_verticalalignment("bottom")
        left, bottom = axes.transData.inverted().transform((box.x0, box.y0))
        text.set_position((float(left), float(bottom)))
        taken.append(box.padded(1.5 * unit))
        leader = _leader((x, y), box, unit)
        if leader:
            taken += [Bbox.from_extents(px, py, px, py).padded(unit) for px, py in leader]
            _draw_leader(axes, leader[0], _nearest((x, y), box))


def _draw_leader(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    xs, ys = axes.transData.inverted().transform([start, end]).T
    axes.plot(xs, ys, color="0.55", linewidth=0.6, zorder=1, label="_leader")


def _candidates(x: float, y: float, width: float, height: float, unit: float) -> list[Bbox]:
    """Return boxes of a text's size around a point, nearest first."""
    boxes = []
    for points in range(7, 260, 4):
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            cx = x + dx * points * unit + _sign(dx) * width / 2
            cy = y + dy * points * unit + _sign(dy) * height / 2
            boxes.append(Bbox.from_bounds(cx - width / 2, cy - height / 2, width, height))
    return boxes


def _is_inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def _crosses(point: tuple[float, float], box: Bbox, taken: Sequence[Bbox], unit: float) -> bool:
    """Whether the line from a point to its label touches what is taken, away from the point itself."""
    leader = [place for place in _leader(point, box, unit) if math.dist(place, point) > 12 * unit]
    others = [other for other in taken if not other.contains(*point)]
    return any(other.contains(*place) for other in others for place in leader)


def _leader(point: tuple[float, float], box: Bbox, unit: float) -> list[tuple[float, float]]:
    """Return places along the line from a point to a box, beginning off the mark; none where it is near."""
    end = _nearest(point, box)
    length = math.dist(point, end) / unit
    if length <= _LEADER_FROM_POINTS:
        return []
    steps = max(2, int(length / 2))
    first = 5 / length
    shares = [first + (0.97 - first) * step / steps for step in range(steps + 1)]
    return [(point[0] + (end[0] - point[0]) * s, point[1] + (end[1] - point[1]) * s) for s in shares]


def _nearest(point: tuple[float, float], box: Bbox) -> tuple[float, float]:
    return min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-9 else (1 if value > 0 else -1)
