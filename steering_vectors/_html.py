"""Write tables in HTML, for notebooks: all texts are escaped, and colours are left to the theme."""

from collections.abc import Mapping, Sequence
from html import escape

MOST_ROWS = 200
_MOST_CHARACTERS = 200


def block(title: str, *parts: str) -> str:
    """Return a title and HTML below it."""
    return f"<div><strong>{escape(title)}</strong>{''.join(parts)}</div>"


def facts(entries: Mapping[str, str]) -> str:
    """Return a table with a row for each entry; long texts are cut."""
    rows = (f"<tr>{_cell('th', name, 'left')}{_cell('td', _cut(text), 'left')}</tr>" for name, text in entries.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls if it is high; of very many rows, only the first are written."""
    head = "".join(_cell("th", column) for column in columns)
    body = "".join(f"<tr>{''.join(_cell('td', cell) for cell in row)}</tr>" for row in rows[:MOST_ROWS])
    if len(rows) > MOST_ROWS:
        body += f'<tr><td colspan="{len(columns)}">… and {len(rows) - MOST_ROWS} more</td></tr>'
    return (
        '<div style="max-height: 20em; width: fit-content; max-width: 100%; overflow: auto">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(tag: str, text: str, align: str = "right") -> str:
    return f'<{tag} style="text-align: {align}; padding: 0.1em 0.6em">{escape(text)}</{tag}>'


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
