"""The report as one self-contained page, and several runs side by side as another: no script, no network."""

from compress.report.html.page import render_comparison, render_report

__all__ = ["render_comparison", "render_report"]
