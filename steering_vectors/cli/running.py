"""Run the program: errors become a line, and exit codes say what kind they are of."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from steering_vectors._progress import bars_drawn_by
from steering_vectors.cli.app import app
from steering_vectors.cli.screen import print_error, print_warning, rich_bar
from steering_vectors.cli.usage import ClickException

_INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Run a command, and return its exit code."""
    given = [argument for argument in arguments if argument != "--debug"]
    try:
        with _plain_warnings(), bars_drawn_by(rich_bar):
            code = app(given, standalone_mode=False, prog_name="steering-vectors")
    except typer.Abort:
        raise KeyboardInterrupt from None
    except ClickException as error:
        error.show(sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:  # what reads the output has ended
        return 0
    except SystemExit as error:  # typer ends so where it meets a broken pipe
        if isinstance(error.__context__, BrokenPipeError):
            return 0
        raise
    except Exception as error:
        if len(given) != len(arguments):
            raise
        print_error(error)
        return 1
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    return int(code or 0)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    before = warnings.showwarning
    warnings.showwarning = print_warning
    try:
        yield
    finally:
        warnings.showwarning = before
