"""The page assembled: template, style, script, the chart library and the numbers, in one file."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from quantkit import __version__
from quantkit.config import ModelConfig
from quantkit.errors import OutputError
from quantkit.report.html.grid import page_data
from quantkit.report.html.records import record_charts
from quantkit.report.runs import Run


def build_page(
    models: Sequence[ModelConfig], runs: Sequence[Run] = (), progress: Callable[[int], None] | None = None
) -> str:
    """Return a HTML page that needs nothing beside itself; the same input gives the same text.

    Args:
        models: that can be chosen, the first one at the start.
        runs: records whose charts are shown.
        progress: told of each model that is done.

    Raises:
        OutputError: plotly, whose script draws the charts, is not installed.
    """
    data = {"calculator": page_data(models, progress), "records": record_charts(runs)}
    assets = files("quantkit.report.html")
    return Template(assets.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=f"{models[0].name}: GPU memory",
        version=__version__,
        css=assets.joinpath("page.css").read_text(encoding="utf-8"),
        js=assets.joinpath("page.js").read_text(encoding="utf-8"),
        data=_packed(json.dumps(data, separators=(",", ":"))),
        charts=_packed(_chart_library()),
    )


def _packed(text: str) -> str:
    """Return a text compressed, in characters that HTML leaves alone: a quarter of its size."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


def _chart_library() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise OutputError("a HTML page needs the plotly package: pip install plotly") from None
    script: Any = get_plotlyjs()
    return str(script)
