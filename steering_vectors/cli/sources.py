"""Check what a command names, models, dtypes and devices, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steering_vectors.cli.screen import note
from steering_vectors.cli.usage import BadParameter

_NAME_ON_THE_HUB = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
_MODEL_FILES = ("config.json", "adapter_config.json")


def check_settings(dtype: str | None, device: str | None) -> None:
    """Raise BadParameter for a dtype that no model has, and for a device that this machine lacks."""
    import torch

    if dtype is not None:
        found = getattr(torch, dtype, None)
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise BadParameter(
                f"{dtype!r} is no dtype of models; common ones are float32, bfloat16 and float16", param_hint="--dtype"
            )
    if device is not None:
        try:
            torch.zeros(1, device=device).item()
        except Exception as error:  # of many types, by the device
            reason = str(error).strip().partition("\n")[0]
            raise BadParameter(f"{device!r} can't be used here: {reason}", param_hint="--device") from None


def check_model(name: str, gguf_file: str | None) -> None:
    """Raise OSError for a path that leads to no model."""
    path = Path(name)
    if path.is_file():
        instead = f"write its folder, and --gguf-file {path.name}" if path.suffix == ".gguf" else "name a folder"
        raise NotADirectoryError(f"the model {name} is a file: {instead}")
    if not path.is_dir():
        if not may_be_on_the_hub(name):
            raise FileNotFoundError(f"there is no folder {name} with a model")
        return
    there = sorted(file.name for file in path.glob("*.gguf"))
    if gguf_file is not None and gguf_file not in there:
        raise FileNotFoundError(f"the folder {name} has no file {gguf_file}; its GGUF files: {_listed(there)}")
    if gguf_file is None and not any((path / file).is_file() for file in _MODEL_FILES):
        more = f", but GGUF files, one of which --gguf-file can name: {_listed(there)}" if there else ""
        raise FileNotFoundError(f"the folder {name} has no model: there is no config.json{more}")


def may_be_on_the_hub(name: str) -> bool:
    """Return True if a repository of the hub can have this name."""
    return re.fullmatch(_NAME_ON_THE_HUB, name, re.ASCII) is not None


def from_hub(name: str, load: Callable[[], Any], *, file: str, what: str) -> Any:
    """Return what ``load`` does for a name that is no folder. Raises OSError in one sentence if the hub hasn't got it.

    ``file`` is one that the repository has, and ``what`` says what is looked for.
    """
    import huggingface_hub

    # It reports each try to connect.
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not isinstance(huggingface_hub.try_to_load_from_cache(name, file), str):
        note(f"there is no folder {name}: looking for it on the Hugging Face hub")
    try:
        return load()
    except OSError as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise OSError(f"{what} {name} is no folder, and didn't come from the hub: {reason}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
