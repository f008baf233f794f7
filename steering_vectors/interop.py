"""Vectors that exist elsewhere: files of other projects, tensors at hand, features of sparse autoencoders.

Each function says which layer a direction is of. Here layer l is the output of block l, from 0.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._arguments import is_whole_number
from steering_vectors.layer_matching import LayerType
from steering_vectors.steering_vector import SteeringVector

__all__ = ["from_sae", "from_tensors", "load_caa", "load_persona_vectors"]


def load_caa(path: str | os.PathLike[str], *, layer: int) -> SteeringVector:
    """The vector of a ``.pt`` file of contrastive activation addition's code: one direction ``(hidden,)``.

    ``layer`` is the number in its name, as in ``vec_layer_13_….pt``: that code counts blocks from 0 and reads their
    outputs, so that it is layer 13 here. It steers by the direction at multipliers like 1, as training here gives it.

    The file is read by ``torch.load(…, weights_only=True)``, which runs no code. Raises FileNotFoundError if there is
    none, and ValueError for a file that holds something else.

    Source: https://github.com/nrimsky/CAA, for arXiv 2312.06681.

    >>> torch.save(torch.ones(4), folder / "vec_layer_13_Llama-2-7b-chat-hf.pt")
    >>> load_caa(folder / "vec_layer_13_Llama-2-7b-chat-hf.pt", layer=13).layers
    [13]
    """
    direction = _loaded(path)
    if not isinstance(direction, Tensor) or direction.ndim != 1:
        raise ValueError(f"{path} holds {_shown(direction)}, expected one direction (hidden,)")
    return from_tensors(direction, layer=layer)


def load_persona_vectors(path: str | os.PathLike[str]) -> SteeringVector:
    """The vectors of a ``.pt`` file of the persona vectors' code: a tensor ``(blocks + 1, hidden)``.

    Its row i is of ``hidden_states[i]``, so of layer i - 1 here. Row 0 is of the embeddings, which are no block's
    output, and the last row was read behind the model's final norm, which is no block's output either: both are left
    out. The paper's layer 20 is this vector's layer 19.

    The file is read by ``torch.load(…, weights_only=True)``, which runs no code. Raises FileNotFoundError if there is
    none, and ValueError for a file that holds something else.

    Source: https://github.com/safety-research/persona_vectors, for arXiv 2507.21509.

    >>> torch.save(torch.randn(5, 8), folder / "evil_response_avg_diff.pt")
    >>> load_persona_vectors(folder / "evil_response_avg_diff.pt").layers
    [0, 1, 2]
    """
    rows = _loaded(path)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[0] < 3:
        raise ValueError(f"{path} holds {_shown(rows)}, expected a tensor (blocks + 1, hidden)")
    return SteeringVector({number - 1: rows[number].clone() for number in range(1, rows.shape[0] - 1)})


def from_tensors(tensors: Any, *, layer: int | None = None, layer_type: LayerType = "decoder_block") -> SteeringVector:
    """A vector of directions at hand.

    ``tensors`` is one direction ``(hidden,)``, with its ``layer``; or a tensor ``(layers, hidden)`` or a sequence of
    directions, whose row l is layer l's; or a mapping from layer numbers, which may be strings such as ``"12"`` or
    ``"layers.12"``, to directions. Tensors are kept as they are, arrays and lists made tensors.

    Raises TypeError and ValueError as :class:`~steering_vectors.SteeringVector`, and ValueError for a ``layer`` that is
    missing or too much, and for names without a number.

    >>> from_tensors(torch.ones(4), layer=12).layers
    [12]
    >>> from_tensors({"layers.3": torch.ones(4)}).layers
    [3]
    """
    if isinstance(tensors, Mapping):
        directions = {_number(name): direction for name, direction in tensors.items()}
        if len(directions) < len(tensors):
            raise ValueError(f"several of the names are of one layer: {list(tensors)}")
    else:
        rows = _rows(tensors)
        is_one = (isinstance(rows, Tensor) and rows.ndim == 1) or (isinstance(rows, list) and _is_number(rows[:1]))
        if is_one and layer is None:
            raise ValueError("one direction needs its layer: from_tensors(direction, layer=12)")
        if len(rows) == 0:
            raise ValueError("tensors is empty: give at least one direction")
        directions = {layer: rows} if is_one and layer is not None else dict(enumerate(rows))
        layer = None if is_one else layer
    if layer is not None:
        raise ValueError("layer is for one direction; the layers of several are told by their keys or places")
    return SteeringVector(directions, layer_type)


def from_sae(sae: Any, feature: int, *, layer: int, layer_type: LayerType = "decoder_block") -> SteeringVector:
    """A feature of a sparse autoencoder as a direction: its row of the decoder.

    ``sae`` is anything with a decoder weight: an attribute ``W_dec`` ``(features, hidden)``, or a ``decoder`` that is a
    linear layer, whose weight is ``(hidden, features)``; or the weight ``(features, hidden)`` itself.

    ``layer`` is the block at whose output the autoencoder was trained: of ``blocks.8.hook_resid_post`` 8, of
    ``blocks.8.hook_resid_pre`` 7, since that is what goes into block 8.

    Raises TypeError for what has no decoder weight, and ValueError for a feature that it hasn't.

    >>> from_sae(torch.eye(4), 2, layer=7).layer_activations
    {7: tensor([0., 0., 1., 0.])}
    """
    rows = _decoder_rows(sae)
    if not is_whole_number(feature) or not 0 <= feature < rows.shape[0]:
        raise ValueError(f"feature {feature!r} of an autoencoder with {rows.shape[0]} features (0 to {len(rows) - 1})")
    return SteeringVector({layer: rows[feature].detach().clone()}, layer_type)


def _decoder_rows(sae: Any) -> Tensor:
    """``(features, hidden)``."""
    weight = sae if isinstance(sae, Tensor) else getattr(sae, "W_dec", None)
    decoder = getattr(sae, "decoder", None)
    if weight is None and isinstance(decoder, nn.Linear):
        weight = decoder.weight.T
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(
            f"expected an autoencoder with W_dec (features, hidden) or a linear decoder, or that weight, got "
            f"{_shown(sae)}"
        )
    return weight


def _loaded(path: str | os.PathLike[str]) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes it raise anything
        kind = type(error).__name__
        raise ValueError(f"{path} is no file of tensors alone that torch.load reads, safely ({kind})") from error
    return content.detach() if isinstance(content, Tensor) else content


def _rows(tensors: Any) -> Any:
    """Directions, or the numbers of one."""
    if isinstance(tensors, Sequence) and not isinstance(tensors, str):
        return list(tensors)
    try:
        rows = torch.as_tensor(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"tensors must be a tensor, a sequence or a mapping, got {_shown(tensors)}") from error
    if not isinstance(tensors, Tensor) and not rows.is_floating_point():
        rows = rows.to(torch.get_default_dtype())
    if rows.ndim == 0:
        raise TypeError("tensors must be a direction or several, got one number, of no dimension")
    return rows


def _number(name: Any) -> int:
    """The layer that a name tells of: a number, or a text with just one in it."""
    if is_whole_number(name):
        return int(name)
    numbers = [part for part in re.split("[._]", str(name)) if re.fullmatch("-?[0-9]{1,9}", part)]
    if len(numbers) != 1:
        raise ValueError(f"can't tell the layer from the name {name!r}: expected a number such as 12 or 'layers.12'")
    return int(numbers[0])


def _is_number(first: Sequence[Any]) -> bool:
    return bool(first) and not isinstance(first[0], (Sequence, Mapping)) and getattr(first[0], "ndim", 0) == 0


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
