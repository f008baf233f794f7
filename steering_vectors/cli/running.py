"""Run the program: errors become a line, and exit codes say what kind they are of."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from steering_vectors.cli.app import app
from steering_vectors.cli.screen import print_error

# What the library, and what it calls, raises for a user's mistake and for what the machine lacks.
_EXPECTED = (ImportError, LookupError, MemoryError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError)


def run(arguments: Sequence[str]) -> int:
    """Run a command, and return its exit code."""
    given = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(given, standalone_mode=False, prog_name="steering-vectors")
    except click.exceptions.Abort:
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except click.ClickException as error:
        error.show(sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # what reads the output has ended
        return 0
    except _EXPECTED as error:
        if len(given) != len(arguments):
            raise
        print_error(error)
        return 1
    return int(code or 0)


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130
