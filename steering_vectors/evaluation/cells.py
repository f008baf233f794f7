"""Measurements that a sweep has finished, kept in a file so that it can go on after it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors.evaluation.files import read_json, write_text
from steering_vectors.steering_vector import SteeringVector

_SECONDS_BETWEEN_WRITES = 1.0
_SAMPLED = 64  # numbers of each parameter


class Cells:
    """Finished measurements by name, in a file if ``path`` is given.

    ``settings`` are hashes by name of all on which the measurements depend. Raises ValueError for a file that was
    written for others, naming them.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, str]) -> None:
        self._path = None if path is None else Path(path)
        self._settings = dict(settings)
        self._cells: dict[str, list[Any]] = {}
        self._written = 0.0
        if self._path is None:
            return
        if self._path.is_dir():
            raise IsADirectoryError(f"{self._path} is a folder: name a file in it")
        if self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        found = read_json(path, "a sweep")
        settings, cells = found.get("settings"), found.get("cells")
        if not isinstance(settings, dict) or not isinstance(cells, dict):
            raise ValueError(f"{path} is not the file of a sweep: name another, or remove it")
        others = sorted(name for name in self._settings if settings.get(name) != self._settings[name])
        if others:
            raise ValueError(
                f"{path} holds a sweep with another {' and another '.join(others)}: name another file, or remove this "
                f"one to begin anew"
            )
        self._cells = cells

    def __contains__(self, name: str) -> bool:
        return name in self._cells

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self._cells[name], dtype=torch.float64, device="cpu")

    def __setitem__(self, name: str, values: Tensor) -> None:
        self._cells[name] = values.tolist()
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write all cells to the file, if there is one."""
        if self._path is not None:
            write_text(self._path, json.dumps({"settings": self._settings, "cells": self._cells}))
            self._written = time.monotonic()


def hash_of(*values: object) -> str:
    """Return a hash of values as they are printed, without addresses of objects."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(values))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_of_model(model: nn.Module) -> str:
    """Return a hash of a model's class and of numbers of each parameter."""
    return _hash_of_tensors(type(model).__name__, model.named_parameters())


def hash_of_vector(vector: SteeringVector) -> str:
    """Return a hash of a vector's directions and layer type."""
    named = ((str(layer), direction) for layer, direction in sorted(vector.layer_activations.items()))
    return _hash_of_tensors(vector.layer_type, named)


def _hash_of_tensors(title: str, named: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256(title.encode())
    for name, tensor in named:
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, len(flat) // _SAMPLED)].double().cpu().tolist()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sampled}".encode())
    return found.hexdigest()[:16]
