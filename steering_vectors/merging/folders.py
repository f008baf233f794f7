"""Folders of adapters, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from steering_vectors.merging.copies import check_is_model

__all__ = ["check_base", "check_target", "hash_of_weights", "written_folder"]

FACTS = "steering_adapter.json"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_OF_ADAPTERS = {_WEIGHTS, _CONFIG, FACTS, "README.md"}


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder in whose place an adapter can be written: of nothing, an empty folder, an adapter.

    Raises ValueError if the path doesn't end in a name, FileExistsError if there is something else, and
    NotADirectoryError or PermissionError if no folder can be made there.
    """
    target = Path(os.fspath(folder))
    if target.name in ("", ".."):
        raise ValueError(f"folder must end in a name, such as 'my-adapter', got {os.fspath(folder)!r}")
    if os.path.lexists(target) and not target.is_dir():
        raise FileExistsError(f"{target} is a file: an adapter is a folder, so choose another path")
    if target.is_dir() and (others := sorted({path.name for path in target.iterdir()} - _OF_ADAPTERS)):
        raise FileExistsError(
            f"{target} has other files than an adapter's, such as {others[0]}: choose an empty folder or a new one"
        )
    above = next(path for path in target.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is a file, so no folder can be made in it: choose another path")
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(f"no folder can be made in {above}: its permissions don't allow it")
    return target


def written_folder(target: Path, save: Callable[[str], object], facts: dict[str, Any], vllm: Any) -> str:
    """Let ``save`` write an adapter, put the facts beside it, and move it to ``target``. Returns the weights' hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        new = beside / "new"
        save(str(new))
        digest = hashlib.sha256((new / _WEIGHTS).read_bytes()).hexdigest()
        written = {**facts, "adapter_sha256": digest, "vllm": vllm}
        (new / FACTS).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            os.replace(target, beside / "old")
        os.replace(new, target)
    finally:
        if (beside / "old").exists() and not target.exists():
            os.replace(beside / "old", target)
        shutil.rmtree(beside, ignore_errors=True)
    return digest


def check_base(folder: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Check that an adapter was made for the weights of a model.

    Any adapter whose shapes fit can be loaded onto a model, and an ablation depends on the base's
    weights: on others, a fine-tuned model's for instance, it removes something else. The weights are
    compared by the hash in the adapter's ``steering_adapter.json``.

    Args:
        folder: The folder that :func:`~steering_vectors.merging.to_adapter` wrote.
        model: The base, before PEFT wraps it, in the dtype in which the adapter was made.

    Raises:
        FileNotFoundError: If the folder is no adapter of this library.
        TypeError: If ``model`` is no model of transformers.
        ValueError: If the adapter was made for other weights, or names none.

    >>> check_base(folder / "ablated", model)  # doctest: +SKIP
    """
    check_is_model(model)
    path = Path(folder) / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FACTS}: it is not a folder of to_adapter")
    try:
        recorded = json.loads(path.read_bytes())["base_sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        recorded = None
    if not isinstance(recorded, str):
        raise ValueError(f"{path} names no base: write the adapter again, with to_adapter")
    if hash_of_weights(model) != recorded:
        raise ValueError(
            f"the adapter {folder} was made for other weights than those of this {type(model).__name__}: load its "
            f"base, in the dtype in which the adapter was made, or write an adapter for this model with to_adapter"
        )


def hash_of_weights(model: nn.Module) -> str:
    """Return the SHA-256 of the model's weights: names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
