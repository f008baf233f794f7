"""The command line: ``steering-vectors``, each command of which is a line or two of Python.

Results go to standard output, and all else to standard error. Exit codes are 0, 1 for a failure, 2 for wrong usage, and
130 after Ctrl-C. It ends with 0 where what reads the output has ended, as ``head`` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, and end the program with its exit code."""
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = _INTERRUPTED
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output has ended: the rest goes nowhere, at the end of the program too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)


def _run(given: Sequence[str]) -> int:
    """Import the commands, which takes a moment, and run one. Return the exit code."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"error: the command line needs {error.name}: pip install 'steering-vectors[cli]'\n"
            f"Without it, 'python -m steering_vectors' shows what steering does.",
            file=sys.stderr,
        )
        return 1
    from steering_vectors.cli.running import run

    return run(given)
