"""One self-contained page: a calculator to play with, and charts of what records hold."""

from quantkit.report.html.page import build_page

__all__ = ["build_page"]
