"""The command line: ``steering-vectors``, each command of which is a line or two of Python.

Results go to standard output, and all else to standard error. Exit codes are 0, 1 for a failure, 2 for wrong usage, and
130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, and end the program with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"error: the command line needs {error.name}: pip install 'steering-vectors[cli]'\n"
            f"Without it, 'python -m steering_vectors' shows what steering does.",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    from steering_vectors.cli.running import run

    raise SystemExit(run(given))
