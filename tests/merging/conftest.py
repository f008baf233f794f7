"""Merged models, made once, saved, and loaded in one fresh process."""

import re
import warnings
from typing import Any

import pytest

from steering_vectors.merging import merge, merge_ablation
from tests.merging.cases import ABLATED, ADDED, DIRECTION, MULTIPLIER, VECTOR, there
from tests.merging.fresh import lively, logits, logits_in_a_fresh_process


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, Any]]:
    """By kind and case, logits of the merged model, here and in a fresh process."""
    folder = tmp_path_factory.mktemp("merged")
    here, folders = {}, {}
    for kind, cases in (("added", ADDED), ("ablated", ABLATED)):
        for name in there(cases):
            architecture, settings = cases[name]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the embeddings are no longer tied")
                for category in (DeprecationWarning, FutureWarning):  # those of old versions of transformers
                    warnings.filterwarnings("ignore", category=category)
                model = lively(architecture, **settings)
                added = kind == "added"
                made = merge(VECTOR, model, multiplier=MULTIPLIER) if added else merge_ablation(model, DIRECTION)
                here[kind, name] = logits(made)
            folders[kind, name] = folder / re.sub(r"\W+", "-", f"{kind} {name}")
            made.save_pretrained(folders[kind, name])
    fresh = logits_in_a_fresh_process(folders.values(), folder)
    return {key: (here[key], fresh[str(folders[key])]) for key in here}
