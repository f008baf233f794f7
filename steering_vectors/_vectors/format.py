"""The file format of steering vectors: names, versions, and the checks on writing and reading."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steering_vectors._vectors.algebra import norms
from steering_vectors._vectors.directions import checked_directions
from steering_vectors._vectors.safetensors_file import load_tensors, save_tensors
from steering_vectors.layer_matching import LayerType, check_layer_type, is_at_input, read_config

FORMAT, VERSION = "steering-vectors", 1
_AT_OUTPUT = "the output of the layer, numbered from 0: hidden_states[layer + 1] of Hugging Face"
_AT_INPUT = "the input of the projection back to the residual stream, in the decoder block of this number, from 0"


def write(path: str | os.PathLike[str], directions: Mapping[int, Tensor], layer_type: LayerType, metadata: Any) -> None:
    """Check directions and write them with their metadata to one safetensors file, atomically."""
    check_layer_type(layer_type)
    read_config(metadata.get("layer_config", ""), layer_type)
    checked = checked_directions(directions)
    if not checked:
        raise ValueError("this steering vector has no directions: there is nothing to save")
    computed = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "layer_type": layer_type,
        "layer_convention": _AT_INPUT if is_at_input(layer_type) else _AT_OUTPUT,
        "hidden_size": str(next(iter(checked.values())).shape[-1]),
        "norms": json.dumps(norms(checked)),
    }
    tensors = {f"{layer_type}.{layer}": direction for layer, direction in checked.items()}
    for name in tensors:
        _layer_of(name, layer_type)
    save_tensors(path, tensors, {**metadata, **computed})


def read(path: str | os.PathLike[str]) -> tuple[dict[int, Tensor], str, dict[str, str]]:
    """Return the directions, the layer type and the metadata of a file, all checked.

    Raises as ``load_tensors``. Raises ValueError too for a file of another format or of a newer version, and for
    directions of other shapes or with numbers that aren't finite.
    """
    tensors, metadata = load_tensors(path)
    try:
        return _checked(tensors, metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> tuple[dict[int, Tensor], str, dict[str, str]]:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"this safetensors file is not a steering vector: its metadata have format="
            f"{_short(metadata.get('format'))}, expected {FORMAT!r}; for plain tensors, use interop.from_tensors"
        )
    version = metadata.get("format_version", "")
    if not re.fullmatch("[1-9][0-9]*", version):
        raise ValueError(f"its format_version is {_short(version)}, expected a whole number of at least 1")
    if len(version) > 9 or int(version) > VERSION:
        raise ValueError(
            f"its format version is {version[:20]}, but this library reads versions up to {VERSION}: "
            f"pip install --upgrade steering-vectors"
        )
    layer_type = metadata.get("layer_type", "")
    check_layer_type(layer_type[:60])
    read_config(metadata.get("layer_config", ""), layer_type)  # type: ignore[arg-type]
    directions = checked_directions({_layer_of(name, layer_type): tensor for name, tensor in sorted(tensors.items())})
    if not directions:
        raise ValueError("the file has no directions")
    width = str(next(iter(directions.values())).shape[-1])
    stated = metadata.get("hidden_size")
    if stated != width:
        raise ValueError(f"its directions have width {width}, but its metadata have hidden_size={_short(stated)}")
    return dict(sorted(directions.items())), layer_type, metadata


def _short(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 40 else f"{text[:40]}…")


def _layer_of(name: str, layer_type: str) -> int:
    given, _, number = name.rpartition(".")
    try:
        layer = int(number) if len(number) < 10 else None
    except ValueError:
        layer = None
    if given != layer_type or layer is None or str(layer) != number:
        raise ValueError(
            f"its tensor {name[:60]!r} doesn't belong to the layer type {layer_type!r}: expected a name such as "
            f"'{layer_type}.16'"
        )
    return layer
