"""A Sphinx directive for a command's help page, as the program prints it."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import steering_vectors.cli


def help_page(command: str) -> str:
    """Return what ``steering-vectors COMMAND --help`` prints in 80 columns."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="80"), redirect_stdout(printed):
        try:
            steering_vectors.cli.main([*command.split(), "--help"])
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"there is no command {command!r}") from ended
    return printed.getvalue()


class CommandHelp(SphinxDirective):
    """The help page of a command: ``.. command-help:: export gguf``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Print the page, and return it as a block of text."""
        for path in Path(steering_vectors.cli.__file__).parent.glob("*.py"):
            self.env.note_dependency(os.fspath(path))
        page = help_page(self.arguments[0])
        return [nodes.literal_block(page, page, language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
