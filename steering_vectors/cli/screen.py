"""Write to the terminal: results to standard output, all else to standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 80


def print_error(error: BaseException) -> None:
    """Print an error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AssertionError):
        text = f"{type(error).__name__}: {text}"
    if isinstance(error, KeyError):
        text = f"there is no {text}"
    print(f"error: {text} (--debug shows where)", file=sys.stderr)


def print_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    """Print a warning in one line, without the place in the code that it arose at."""
    note(f"warning: {' '.join(str(message).split())}")


def note(text: str) -> None:
    """Print a remark beside the results."""
    print(text, file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: bool = True) -> None:
    """Print a table in 80 columns, all but its first column to the right if they are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    print_on(console(), table)


def print_on(target: Console, table: Table) -> None:
    """Print a table, without the spaces at the ends of lines where nobody sees them."""
    if target.is_terminal:
        target.print(table)
        return
    with target.capture() as captured:
        target.print(table)
    print("\n".join(line.rstrip(" ") for line in captured.get().rstrip("\n").split("\n")))


def console() -> Console:
    """Return the console of standard output, 80 columns wide or less."""
    found = Console(highlight=False, markup=False, emoji=False)
    found.width = min(WIDTH, found.width) if found.is_terminal else WIDTH
    return found


def shows_progress() -> bool:
    """Return True if standard error is a terminal, on which progress bars can be drawn."""
    return sys.stderr.isatty()


def rich_bar(**options: Any) -> Any:
    """Return a progress bar on standard error that is drawn by rich, with the options of tqdm."""
    from tqdm import TqdmExperimentalWarning
    from tqdm.rich import tqdm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)
        return tqdm(**options, options={"console": Console(stderr=True), "redirect_stdout": False})
