"""Files of PyTorch by other projects: directions in ``.pt`` files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering_vectors._arguments import is_whole_number
from steering_vectors._whole_files import whole_file
from steering_vectors.interop.exported import blocks_of, exported, only_one
from steering_vectors.interop.values import from_tensors, shown
from steering_vectors.steering_vector import SteeringVector

_DIRECTION, _PLACE = "direction.pt", "direction_metadata.json"
_ONE, _EACH = "one direction (hidden,)", "a tensor (blocks + 1, hidden)"
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_BLOCKS = 100_000


def load_caa(path: str | os.PathLike[str], *, layer: int) -> SteeringVector:
    """Load the ``.pt`` file of one direction ``(hidden,)`` that the code of CAA writes.

    The code of contrastive activation addition counts blocks from 0 and reads their outputs, as
    this library does. Directions have the scale of those trained here: multipliers near 1 fit. The
    file is read with ``torch.load(…, weights_only=True)``, which runs no code.

    Source: https://github.com/nrimsky/CAA, for arXiv 2312.06681.

    Args:
        path: The file's path.
        layer: The number in the file's name: ``vec_layer_13_….pt`` is of layer 13.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``layer`` is not a whole number.
        ValueError: If the file has other content.

    >>> torch.save(torch.ones(4), folder / "vec_layer_13_Llama-2-7b-chat-hf.pt")
    >>> load_caa(folder / "vec_layer_13_Llama-2-7b-chat-hf.pt", layer=13).layers
    [13]
    """
    return from_tensors(_numbers(path, _ONE), layer=layer)


def load_persona_vectors(path: str | os.PathLike[str]) -> SteeringVector:
    """Load the ``.pt`` file of a tensor ``(blocks + 1, hidden)`` that the persona vectors code writes.

    Row i was read from ``hidden_states[i]``, which is layer i - 1 here: the paper's layer 20 is
    this vector's layer 19. Row 0 was read from the embeddings, which no block writes, and is left
    out; so are rows of zeros, which steer nothing. In files of that code, the last row was read
    after the model's final norm, although that code too adds it before. The file is read with
    ``torch.load(…, weights_only=True)``, which runs no code.

    Source: https://github.com/safety-research/persona_vectors, for arXiv 2507.21509.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has other content.

    >>> torch.save(torch.randn(5, 8), folder / "evil_response_avg_diff.pt")
    >>> load_persona_vectors(folder / "evil_response_avg_diff.pt").layers
    [0, 1, 2, 3]
    """
    rows = _numbers(path, _EACH)
    directions = {layer: row.clone() for layer, row in enumerate(rows[1:]) if bool(row.any())}
    if not directions:
        raise ValueError(f"{path} has zeros in all rows after the first one, so no layer has a direction")
    return SteeringVector(directions)


def load_refusal_direction(path: str | os.PathLike[str], *, layer: int | None = None) -> SteeringVector:
    """Load the direction that the code of "Refusal in language models" selects: ``direction.pt``.

    That code reads the inputs of blocks, and its layer n is the input of block n: layer n - 1 here.
    The file is read with ``torch.load(…, weights_only=True)``, which runs no code.

    Source: https://github.com/andyrdt/refusal_direction, for arXiv 2406.11717.

    Args:
        path: The folder of a run, with ``direction.pt`` and ``direction_metadata.json``, or the
            direction's file alone.
        layer: The layer in that code's numbers, from 1; by default the one in
            ``direction_metadata.json``, which a file alone doesn't have.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file has other content, if a file alone has no ``layer``, or if the
            direction is of layer 0 there, the embeddings, which are the output of no block.

    >>> torch.save(torch.ones(4), folder / "direction.pt")
    >>> load_refusal_direction(folder / "direction.pt", layer=14).layers
    [13]
    """
    is_folder = os.path.isdir(path)
    direction = _numbers(Path(path) / _DIRECTION if is_folder else path, _ONE)
    if layer is None:
        if not is_folder:
            raise ValueError(f"{path} doesn't say its layer: pass layer=, or the folder that has {_PLACE} too")
        layer = _written_layer(Path(path) / _PLACE)
    if not is_whole_number(layer) or layer < 1:
        raise ValueError(f"layer must be a whole number from 1, the block whose input was read, got {layer!r}")
    return from_tensors(direction, layer=int(layer) - 1)


def to_caa(vector: SteeringVector, path: str | os.PathLike[str], *, multiplier: float = 1.0) -> None:
    """Write a vector of one layer as the ``.pt`` file that the code of CAA reads, in float32.

    That code takes the layer from the file's name, ``vec_layer_13_….pt``: it is this library's.

    Args:
        vector: The vector, of one layer.
        path: The file's path.
        multiplier: The factor on the direction.

    Raises:
        OSError: If the file can't be written, as in :meth:`~steering_vectors.SteeringVector.save`.
        TypeError: If an argument has the wrong type.
        ValueError: If the vector isn't of the output of one decoder block, or if a number is too
            large for float32.

    >>> to_caa(vector, folder / "vec_layer_1_gpt2.pt")
    >>> load_caa(folder / "vec_layer_1_gpt2.pt", layer=1) == vector
    True
    """
    _, direction = only_one(exported(vector, multiplier, "CAA's code"), "CAA's code")
    _save(path, direction)


def to_persona_vectors(
    vector: SteeringVector, path: str | os.PathLike[str], *, multiplier: float = 1.0, blocks: int | None = None
) -> None:
    """Write the ``.pt`` file that the persona vectors code reads.

    It is a tensor ``(blocks + 1, hidden)`` in float32. Row i is layer i - 1 of this library: layer
    20 of that code is layer 19 here. Rows of layers that the vector lacks are zeros, which steer
    nothing, and :func:`load_persona_vectors` leaves them out.

    Args:
        vector: The vector.
        path: The file's path.
        multiplier: The factor on the directions.
        blocks: The number of the model's blocks, by default the one in the metadata.

    Raises:
        OSError: If the file can't be written, as in :meth:`~steering_vectors.SteeringVector.save`.
        TypeError: If an argument has the wrong type.
        ValueError: If the vector isn't of decoder blocks, if the number of blocks is unknown or too
            small for the vector's layers, or if a number is too large for float32.

    >>> to_persona_vectors(vector, folder / "evil_response_avg_diff.pt", blocks=3)
    >>> torch.load(folder / "evil_response_avg_diff.pt").shape[0]
    4
    """
    directions = exported(vector, multiplier, "the persona vectors code")
    found = blocks_of(vector) if blocks is None else blocks
    if found is None:
        raise ValueError("the metadata don't record how many blocks the model has: pass blocks=")
    if not is_whole_number(found) or found <= max(directions):
        raise ValueError(f"blocks must be a whole number above the vector's layer {max(directions)}, got {blocks!r}")
    if found > _MOST_BLOCKS:
        raise ValueError(f"blocks must be {_MOST_BLOCKS} at most, as the file has a row for each, got {found}")
    rows = torch.zeros(found + 1, vector.hidden_size, dtype=torch.float32, device="cpu")
    for layer, direction in directions.items():
        rows[layer + 1] = direction
    _save(path, rows)


def to_refusal_direction(
    vector: SteeringVector, folder: str | os.PathLike[str], *, multiplier: float = 1.0, position: int = -1
) -> None:
    """Write a vector of one layer as a run of the "Refusal in language models" code, in float32.

    The files are ``direction.pt`` and ``direction_metadata.json``, in a folder that exists. Layer l
    of this library is layer l + 1 there: the input of the next block.

    Args:
        vector: The vector, of one layer.
        folder: The folder's path.
        multiplier: The factor on the direction.
        position: The token that the direction was read at, counted from the prompt's end; the files
            keep it for the reader.

    Raises:
        OSError: If a file can't be written, as in :meth:`~steering_vectors.SteeringVector.save`.
        TypeError: If an argument has the wrong type.
        ValueError: If the vector isn't of the output of one decoder block, or if a number is too
            large for float32.

    >>> to_refusal_direction(vector, folder)
    >>> load_refusal_direction(folder) == vector
    True
    """
    reader = "the refusal direction code"
    layer, direction = only_one(exported(vector, multiplier, reader), reader)
    if not is_whole_number(position):
        raise TypeError(f"position must be a whole number, such as -1, got {position!r}")
    with whole_file(Path(folder) / _DIRECTION) as tensor, whole_file(Path(folder) / _PLACE) as place:
        torch.save(direction, tensor)
        place.write_text(json.dumps({"pos": int(position), "layer": layer + 1}), encoding="utf-8")


def _save(path: str | os.PathLike[str], tensor: Tensor) -> None:
    with whole_file(path) as temporary:
        torch.save(tensor, temporary)


def _written_layer(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: pass layer=")
    try:
        return json.loads(path.read_text(encoding="utf-8"))["layer"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f'{path} has no layer: expected JSON such as {{"pos": -1, "layer": 14}}') from error


def _numbers(path: str | os.PathLike[str], expected: str) -> Tensor:
    """Return the tensor of a file: one direction, or a row for each layer and one more.

    Raises ValueError if the file holds anything else, or numbers that aren't real and finite.
    """
    tensor = _loaded(path)
    is_plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested
    if not is_plain or tensor.is_meta or tensor.numel() == 0 or tensor.ndim != (1 if expected == _ONE else 2):
        what = f"a {tensor.layout} tensor" if isinstance(tensor, Tensor) and not is_plain else shown(tensor)
        raise ValueError(f"{path} holds {what}, expected {expected}")
    if tensor.dtype not in _REAL:
        raise ValueError(f"{path} holds numbers of {tensor.dtype}, expected real numbers of 16, 32 or 64 bits")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{path} has NaN or infinite numbers")
    return tensor  # type: ignore[no-any-return]


def _loaded(path: str | os.PathLike[str]) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of all kinds for broken files
        kind = type(error).__name__
        raise ValueError(f"{path} can't be loaded safely, as a file of tensors only ({kind})") from error
    return content.detach() if isinstance(content, Tensor) else content
