"""Say what directions promote in a model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._arguments import is_whole_number, with_hints
from steering_vectors._html import block, table
from steering_vectors._models import anatomy_of, check_model, logits_of
from steering_vectors._precision import without_autocast
from steering_vectors.layer_matching import LayerType, is_at_input

__all__ = ["LayerTokens", "TopTokens", "unembed"]

# The number of directions in a pass.
_ROWS = 64


@with_hints(missing="the arguments begin with model, directions")
@without_autocast
def unembed(model: nn.Module, directions: Tensor) -> Tensor:
    """Return what directions in the residual stream add to the logits.

    The model's final norm and head are applied to each direction in place of the last block's
    output, and the logits of zeros, which biases may give, are subtracted. A direction is taken at
    the norm √hidden, which final norms bring the stream to, so its length doesn't matter. Later
    blocks' answers to the direction are not part of the result.

    Source: the logit lens (nostalgebraist, 2020); arXiv 2203.14680 for directions.

    Args:
        model: A model with a language-model head. It is not changed.
        directions: Directions ``(…, hidden)``.

    Returns:
        Logits ``(…, vocabulary)`` in float32, without gradients.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model has no head, if a width doesn't fit, or if a direction is all zeros
            or has numbers that aren't finite.

    >>> unembed(model, vector.layer_activations[1]).shape
    torch.Size([...])
    """
    check_model(model)
    if not isinstance(directions, Tensor) or directions.ndim == 0:
        raise TypeError(f"directions must be a tensor (…, hidden), got {type(directions).__name__}")
    wide = directions.detach().double().cpu()
    norms = wide.norm(dim=-1, keepdim=True)
    if not bool(((norms > 0) & norms.isfinite()).all()):
        raise ValueError("directions must be finite, and none may be all zeros")
    rows = (wide / norms * wide.shape[-1] ** 0.5).reshape(-1, wide.shape[-1])  # (n, hidden)
    anatomy = anatomy_of(model)
    (zero,) = logits_of(anatomy, torch.zeros_like(rows[:1]))
    logits = torch.cat([logits_of(anatomy, part) - zero for part in rows.split(_ROWS)])
    return logits.reshape(*directions.shape[:-1], -1)


@dataclass(frozen=True)
class LayerTokens:
    """The tokens that one direction promotes most, and those that it suppresses most.

    Attributes:
        promoted: Texts of tokens with what the direction adds to their logits, the most first.
        suppressed: The same for the tokens from whose logits it takes most.

    >>> LayerTokens(promoted=((" good", 3.2),), suppressed=((" bad", -2.9),)).promoted
    ((' good', 3.2),)
    """

    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TopTokens(Mapping[int, LayerTokens]):
    """The tokens that a vector's directions promote and suppress, by layer. Printed, it is a table.

    Attributes:
        by_layer: The tokens of each layer.

    >>> print(TopTokens({1: LayerTokens(promoted=((" good", 3.2),), suppressed=((" bad", -2.9),))}))
        1  +  ' good'
           -  ' bad'
    """

    by_layer: Mapping[int, LayerTokens]

    def __getitem__(self, layer: int) -> LayerTokens:
        return self.by_layer[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.by_layer)

    def __len__(self) -> int:
        return len(self.by_layer)

    def __str__(self) -> str:
        return "\n".join("  ".join(cells) for cells in self._rows())

    def _repr_html_(self) -> str:
        rows = [row for layer in self for row in _cells(str(layer), self[layer])]
        return block("TopTokens", table(["layer", "", "tokens"], rows))

    def _rows(self) -> Iterator[list[str]]:
        for layer in self:
            for number, sign, tokens in _cells(str(layer), self[layer]):
                yield [f"{number:>5}", sign, tokens]


def top_tokens(
    model: nn.Module, tokenizer: Any, directions: Mapping[int, Tensor], layer_type: LayerType, k: int
) -> TopTokens:
    """Return the ``k`` tokens that each direction promotes most, and those that it suppresses most."""
    if layer_type.endswith("layernorm"):
        raise ValueError(
            f"the vector is of {layer_type}, whose output is no part of the residual stream, so it has no logits"
        )
    if is_at_input(layer_type):
        raise ValueError(
            f"the vector is of {layer_type}, which a projection maps to the residual stream, so it has no logits: "
            f"multiply its directions by the projection's weight, and pass the products to unembed"
        )
    if not is_whole_number(k) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    if not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"tokenizer must be a Hugging Face tokenizer or processor, got {type(tokenizer).__name__}")
    layers = sorted(directions)
    logits = unembed(model, torch.stack([directions[layer].flatten().cpu() for layer in layers]))
    return TopTokens({layer: _top_of(row, tokenizer, k) for layer, row in zip(layers, logits, strict=True)})


def _top_of(logits: Tensor, tokenizer: Any, k: int) -> LayerTokens:
    count = min(k, len(logits))
    sides = [logits.topk(count), (-logits).topk(count)]
    promoted, suppressed = (
        tuple((str(tokenizer.decode([token])), float(logits[token])) for token in side.indices.tolist())
        for side in sides
    )
    return LayerTokens(promoted, suppressed)


def _cells(number: str, tokens: LayerTokens) -> Iterator[list[str]]:
    for label, sign, found in ((number, "+", tokens.promoted), ("", "-", tokens.suppressed)):
        yield [label, sign, "  ".join(repr(text) for text, _ in found)]
