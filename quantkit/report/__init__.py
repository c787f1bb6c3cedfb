"""Tables, charts and a page made from records; nothing is measured or estimated here."""

from quantkit.report.page import build_report

__all__ = ["build_report"]
