"""Write tables of text in 80 columns, and data frames."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 80


def text_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column to the left, the others to the right; a long first column is cut to fit."""
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    widths[0] = min(widths[0], max(9, WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    written = []
    for first, *others in (columns, *lines):
        if len(first) > widths[0]:
            first = f"{first[: widths[0] - 1]}…"  # noqa: PLW2901
        cells = [first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(others, widths[1:], strict=True))]
        written.append("  ".join(cells).rstrip())
    return "\n".join(written)


def paragraph(text: str) -> str:
    """Return a text in lines of 80 characters."""
    return textwrap.fill(text, WIDTH)


def signed(number: float) -> str:
    """Return a number with its sign; 0 has none."""
    return f"{number:+g}" if number else "0"


def data_frame(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Return lines as a pandas DataFrame. Raises ImportError, with what to install, without pandas."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas: pip install 'steering-vectors[pandas]'") from error
    return pandas.DataFrame(lines)
