"""Measurements that a sweep has finished, kept in a file so that it can go on after it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
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
    """Return a hash of values: of functions their code and what they close over, of tensors all numbers.

    Raises ValueError for an object of which only its address is known.
    """
    return hashlib.sha256(repr([_contents(value) for value in values]).encode()).hexdigest()[:16]


def _contents(value: object) -> object:
    """Return a value as texts and numbers that are alike if, and only if, two values are."""
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), str(value.dtype), hashlib.sha256(numbers).hexdigest()
    parts = _parts_of(value)
    if parts is not None:
        return type(value).__qualname__, [_contents(part) for part in parts]
    text = repr(value)
    if " at 0x" in text and not isinstance(value, ModuleType):
        raise ValueError(
            f"{text} can't be compared with that of a later call, so its sweep can't be kept in a file: give a "
            f"function, or an object whose repr shows its settings, or leave path out"
        )
    return text


def _parts_of(value: object) -> Iterable[object] | None:
    """Return the parts that make up a value, or None for one without parts."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells
    if isinstance(value, CodeType):
        return value.co_code.hex(), value.co_names, value.co_consts
    if isinstance(value, Mapping):
        return [part for entry in value.items() for part in entry]
    if is_dataclass(value) and not isinstance(value, type):
        return [part for field in fields(value) for part in (field.name, getattr(value, field.name))]
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)  # their order differs from process to process
    return value if isinstance(value, (list, tuple)) else None


def hash_of_model(model: nn.Module) -> str:
    """Return a hash of a model's class and config, and of each parameter's and buffer's sum and some of its numbers."""
    found = hashlib.sha256(f"{type(model).__name__} {getattr(model, 'config', '')}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, len(flat) // _SAMPLED)].double().cpu().tolist()
        total = float(flat.sum(dtype=torch.float64)) if flat.device.type != "mps" else float(flat.float().sum())
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total} {sampled}".encode())
    return found.hexdigest()[:16]


def hash_of_vector(vector: SteeringVector) -> str:
    """Return a hash of a vector's directions and layer type."""
    return hash_of(vector.layer_type, {layer: vector.layer_activations[layer] for layer in vector.layers})
