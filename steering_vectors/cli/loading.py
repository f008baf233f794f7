"""Load what commands name: models, vectors, and files of pairs, items and texts."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steering_vectors.cli.screen import note
from steering_vectors.cli.sources import check_model, check_settings, from_hub, may_be_on_the_hub
from steering_vectors.cli.usage import BadParameter, UsageError


def load_model(
    name: str | None,
    *,
    gguf_file: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[Any, Any]:
    """Return a model and its tokenizer, of the hub or a folder; SmolLM2 where its package is installed, for None.

    Raises, before it is loaded, OSError if there is none, BadParameter for a wrong dtype or device, and ValueError for
    layers that it doesn't have.
    """
    if name is not None:
        check_model(name, gguf_file)
    check_settings(dtype, device)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if name is None:
        from steering_vectors.demo import load

        note("no model was named: using SmolLM2-135M-Instruct, which takes about 20 seconds to load")
        model, tokenizer = load(None)
    else:
        given: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
        _check_config(name, gguf_file, layers)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **given)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, **given)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    if device is not None:
        model = model.to(device)
    return model.eval(), tokenizer


def _check_config(name: str, gguf_file: str | None, layers: Sequence[int] | None) -> None:
    """Raise OSError if the hub has no such model, and ValueError for layers that its config doesn't have."""
    if gguf_file is not None or (Path(name).is_dir() and not (Path(name) / "config.json").is_file()):
        return
    from transformers import AutoConfig

    def load() -> Any:
        return AutoConfig.from_pretrained(name)

    config = load() if Path(name).is_dir() else from_hub(name, load, file="config.json", what="the model")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(count, int):
        for layer in layers or ():
            if not -count <= layer < count:
                raise ValueError(f"layer {layer} does not exist: the model has {count} layers, 0 to {count - 1}")


def load_vector(path: str, layers: str | None = None) -> Any:
    """Return a vector from a file, a folder, or a repository of the hub; at these layers, where they are named."""
    from steering_vectors import SteeringVector, hub

    numbers = layers_of(layers)
    if Path(path).is_file():
        vector = SteeringVector.load(path)
    elif Path(path).is_dir():
        if not (Path(path) / hub.FILE).is_file():
            raise FileNotFoundError(f"the folder {path} has no vector: there is no {hub.FILE} in it")
        vector = hub.from_pretrained(path)
    elif Path(path).suffix == ".safetensors" or not may_be_on_the_hub(path):
        raise FileNotFoundError(f"there is no file {path}")
    else:
        vector = from_hub(path, lambda: hub.from_pretrained(path), file=hub.FILE, what="the vector")
    return vector if numbers is None else vector[numbers]


def short_names(names: Sequence[str]) -> list[str]:
    """Return a short name for each vector: its file's, or else the whole path, numbered where it comes again."""
    stems = [Path(name).stem for name in names]
    chosen = stems if len(set(stems)) == len(stems) else list(names)
    return [name if chosen.index(name) == n else f"{name}#{n + 1}" for n, name in enumerate(chosen)]


def is_vector(argument: str) -> bool:
    """Return True if an argument names a vector and not a model: a file, or a folder with a vector in it."""
    path = Path(argument)
    return path.suffix == ".safetensors" or (path.is_dir() and (path / "steering_vector.safetensors").is_file())


def model_and_rest(arguments: Sequence[str], *, least: int, usage: str) -> tuple[str | None, list[str]]:
    """Return the model's name, or None if the first argument is a vector already, and the other arguments."""
    if arguments and is_vector(arguments[0]):
        found: tuple[str | None, list[str]] = (None, list(arguments))
    else:
        found = (arguments[0] if arguments else None, list(arguments[1:]))
    if len(found[1]) < least:
        raise UsageError(f"expected {usage}")
    return found


def layers_of(text: str | None) -> list[int] | None:
    """Return the layers that a text such as ``10-16``, ``12`` or ``8,-1`` names."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise BadParameter(f"{text!r} names no layers: write 12, 10-16 or 8,12,-1")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise BadParameter(f"{part.strip()!r} ends before it begins")
        found.extend(range(first, last + 1))
    return found


def read_rows(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a CSV or JSON Lines file, which have these columns. Raises ValueError that names the line."""
    from steering_vectors._pair_files import read_rows_of

    return read_rows_of(path, names)


def read_texts(path: Path | None) -> list[str] | None:
    """Return the texts of a file, one in each line."""
    if path is None:
        return None
    from steering_vectors._pair_files import read_text

    texts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path} has no texts: write one in each line")
    return texts


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    from steering_vectors.evaluation.files import write_text

    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside ``path``, which takes its name at the end of the block; after an error there is none.

    Raises OSError, before any work, where there is something else than an empty folder.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file: name a folder")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path} has files already: name a new folder")
    check_output(path / "file" if path.is_dir() else path)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.absolute().parent))
    try:
        yield beside / "new"
        os.replace(beside / "new", path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_output(path: Path | None, *inputs: str | Path | None) -> None:
    """Raise, before any work, OSError for an output that can't be written, and ValueError for one that is an input."""
    if path is None:
        return
    if any(given is not None and Path(given).absolute() == path.absolute() for given in inputs):
        raise ValueError(f"{path} is read by this command, which would write over it: name another file")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {path.absolute().parent} doesn't exist: make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"the folder {path.absolute().parent} is read-only")
