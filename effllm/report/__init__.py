"""Rows as tables for the terminal and Markdown, and as a self-contained HTML page with plots.

Everything here is a function of rows: it measures nothing, and reads and writes no file but its own template.
"""

from __future__ import annotations

from effllm.report.markdown import markdown_table
from effllm.report.page import html_page
from effllm.report.terminal import terminal_table

__all__ = ["html_page", "markdown_table", "terminal_table"]
