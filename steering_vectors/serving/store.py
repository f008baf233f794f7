"""Folders of steering vectors: files by name, checked against the model that is to be steered."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from steering_vectors.serving.spec import check_name
from steering_vectors.steering_vector import SteeringVector

__all__ = ["StoredVector", "read_folder", "read_vector"]

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class StoredVector:
    """A vector as it is served: directions by layer in float32, and a hash of them."""

    name: str
    directions: Mapping[int, Tensor]
    hash: str

    @property
    def largest(self) -> float:
        """The largest absolute number among the directions."""
        return max(float(direction.abs().max()) for direction in self.directions.values())


def read_folder(folder: str | os.PathLike[str], *, depth: int, width: int) -> dict[str, StoredVector]:
    """Return the vectors of all files in a folder by name, for a model of ``depth`` layers and this width.

    Raises ValueError, naming the file, for a file that isn't named ``NAME.safetensors``, for a file that ``vec.save``
    did not write, and for a vector that doesn't fit the model. Raises NotADirectoryError if there is no such folder.
    """
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"there is no folder {os.fspath(folder)!r} of steering vectors")
    paths = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    for path in paths:
        if path.suffix != _SUFFIX or not path.is_file():
            raise ValueError(f"{path} is not named NAME{_SUFFIX}: the folder must hold files of vec.save() alone")
    return {path.stem: read_vector(folder, path.stem, depth=depth, width=width) for path in paths}


def read_vector(folder: str | os.PathLike[str], name: str, *, depth: int, width: int) -> StoredVector:
    """Return the vector of one file in a folder, checked as ``read_folder`` does.

    Raises FileNotFoundError if the folder has no such file.
    """
    path = Path(folder) / f"{name}{_SUFFIX}"
    try:
        check_name(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not path.is_file():
        raise FileNotFoundError(f"the folder of steering vectors has no file {name}{_SUFFIX}")
    vector = SteeringVector.load(path)
    _check(vector, path, depth, width)
    directions = {layer: d.detach().float() for layer, d in vector.layer_activations.items()}
    for layer, direction in directions.items():
        if not math.isfinite(float(direction.abs().max())):
            raise ValueError(f"{path}: the direction of layer {layer} is too large for float32")
    return StoredVector(name, directions, _hash(directions))


def _check(vector: SteeringVector, path: Path, depth: int, width: int) -> None:
    if vector.layer_type != "decoder_block" or vector.metadata.get("layer_config"):
        where = vector.metadata.get("layer_config") or repr(vector.layer_type)
        raise ValueError(f"{path} steers {where}: only vectors at outputs of decoder blocks are served")
    for layer in vector.layers:
        if layer < 0:
            raise ValueError(f"{path} has layer {layer}: write it as {layer + depth}, counted from the first layer")
        if layer >= depth:
            raise ValueError(f"{path} has layer {layer}, and the model has {depth} layers (0 to {depth - 1})")
    if vector.hidden_size != width:
        raise ValueError(
            f"{path}: the direction of layer {vector.layers[0]} has {vector.hidden_size} numbers, the model's layers "
            f"have {width}"
        )


def _hash(directions: Mapping[int, Tensor]) -> str:
    found = sha256()
    for layer in sorted(directions):
        numbers = directions[layer].reshape(-1).to(torch.float32).contiguous()
        found.update(f"{layer}:{len(numbers)}:".encode())
        found.update(numbers.numpy().tobytes())
    return found.hexdigest()[:32]
