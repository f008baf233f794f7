"""Ablate directions wherever the residual stream is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from steering_vectors._arguments import finite_number, with_hints
from steering_vectors._models import INPUT, OUTPUT, anatomy_of
from steering_vectors._steering import (
    Place,
    Steering,
    SteeringContext,
    as_multiplier,
    checked_steering,
    is_steered_by_token_or_row,
    parts_inside,
    width_message,
)
from steering_vectors._tokens import TokenSelection, as_selector
from steering_vectors._vectors import checked_direction, in_ranges, span_of
from steering_vectors.layer_matching import Layers, ModelLayerConfig, layers_of
from steering_vectors.steering_operators import ablation_operator
from steering_vectors.steering_vector import SteeringVector

Strength: TypeAlias = float | Mapping[int, float] | Mapping[str, float] | Callable[[int, str], float]
# What is written to the stream. Attention and MLP bear the names of their layer types.
_PARTS = ("embeddings", "self_attn", "mlp")


@with_hints(missing="the arguments begin with model, direction")
def ablate_everywhere(
    model: nn.Module,
    direction: Tensor | SteeringVector | Mapping[int, Tensor],
    *,
    layer_config: ModelLayerConfig | None = None,
    tokens: TokenSelection | None = None,
    rows: Sequence[bool] | Tensor | None = None,
    strength: Strength = 1.0,
) -> SteeringContext:
    """Return a context manager, also a decorator, that removes ``direction`` from the whole stream.

    In the residual stream, ``h`` becomes ``h − (h·u)u`` with ``u = d / ‖d‖`` in three places: the
    input of the first decoder block, each block's output, and the outputs that each block's
    attention and MLP, or their counterparts, add to the stream. Where a norm follows such a module,
    the norm's output is ablated. This is how refusal is removed from chat models.

    Entering finds the modules that write to the stream, by passes over five tokens in which module
    outputs are replaced. Hooks of other code see these passes too. Some blocks' outputs are not the
    sum of their input and their modules' outputs, as in blocks that end in a norm: there, only the
    block's output is ablated. The same holds where the model can't be run on tokens alone. In
    training mode, some blocks apply dropout to outputs that were ablated already.

    Of several directions ``(k, hidden)`` the span is removed: nothing is left along any combination
    of them. They needn't be independent or at right angles.

    With a ``strength`` s other than 1, ``h`` becomes ``h − s(h·u)u`` in what is written: in the
    first block's input, and in what attention and MLP add. Blocks' outputs then stay as they are,
    since they hold all that was written before. It is the same as ``W − s u uᵀW`` in all weights
    that write to the stream, and in their biases.

    Source: directional ablation, arXiv 2406.11717, section 2.4.

    Args:
        model: The model to steer.
        direction: A direction ``(hidden,)`` or several ``(k, hidden)``, or a vector of one layer.
            Lengths and signs have no effect. Or a mapping from layers to such directions, each of
            which is removed at its layer only: at the block's output and parts, and for the first
            block at its input too.
        layer_config: The blocks' names, as in :meth:`SteeringVector.apply`.
        tokens: The tokens to ablate, as in :meth:`SteeringVector.apply`; by default all.
        rows: True or False for each row of a batch, to run ablated and unsteered rows side by side;
            beams have their prompt's. None ablates all.
        strength: How much is removed: one number; or a mapping from layers or from the parts
            ``"embeddings"``, ``"self_attn"`` and ``"mlp"`` to numbers, in which what is left out
            has strength 0; or a callable ``(layer, part) → number``. The embeddings are the first
            block's input and belong to its layer. A part that stands in attention's place counts
            as attention. Numbers above 1 turn the part along the direction around, negative ones
            enlarge it.

    Raises:
        TypeError: If ``model`` is not a module, ``direction`` not numbers, ``rows`` not bools, or
            ``strength`` neither numbers nor a callable that returns them.
        ValueError: If the layers can't be identified, if the width doesn't fit, if the directions
            are all zeros, if several require grad, if ``strength`` names layers or parts that don't
            exist, or if the model is currently steered by token or by row. On entering, if the
            strength isn't 1 and the parts that it applies to can't be found.

    Warns:
        UserWarning: On entering, if the model can't be run on tokens alone.

    >>> with ablate_everywhere(model, torch.ones(32)):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    >>> with ablate_everywhere(model, {1: torch.randn(3, 32)}, rows=[True, False]):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    >>> with ablate_everywhere(model, torch.ones(32), strength={"self_attn": 1.0, "mlp": 0.5}):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    """

    def steering() -> tuple[Steering, dict[tuple[int, str], float]]:
        anatomy = anatomy_of(model)
        found = layers_of(anatomy, "decoder_block", layer_config)
        removed = _removed(direction, found)
        width = next(iter(removed.values())).shape[-1]
        if anatomy.widths and width not in anatomy.widths:
            raise ValueError(width_message(width, min(removed), anatomy.widths[0]))
        if is_steered_by_token_or_row(model):
            raise ValueError(
                "the model is already steered by token or by row: remove that steering, enter ablate_everywhere, and "
                "apply it again inside"
            )
        strengths = _strengths(strength, found, removed)
        selector = None if tokens is None else as_selector(tokens)
        places = _places_around(found, strengths)
        made = Steering(anatomy, places, removed, ablation_operator(), _switches(rows), selector)
        return checked_steering(made), strengths

    checked, _ = steering()  # so that this call raises errors, not the entry of the block

    def with_parts() -> Steering:
        made, strengths = steering()
        return replace(made, places=_with_parts(model, made.places, strengths))

    return SteeringContext(with_parts, shown=repr(checked))


def stream_writers(
    model: nn.Module, *, layer_config: ModelLayerConfig | None = None
) -> dict[int, dict[str, str | None]]:
    """Return the modules inside each block that write to the residual stream, by layer number.

    They are the modules that :func:`~steering_vectors.ablate_everywhere` ablates, found in the same
    way: by passes over five tokens, in which module outputs are replaced. Each module's name has
    its layer type, ``"self_attn"`` or ``"mlp"``, or None if that is unknown. A norm that follows a
    module is named instead of it. A block is empty if its output is not the sum of its input and
    such modules' outputs.

    Args:
        model: The model to look at. It is not changed.
        layer_config: The blocks' names, as in
            :meth:`~steering_vectors.SteeringVector.apply`.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If the layers can't be identified.

    Warns:
        UserWarning: If the model can't be run on tokens alone.

    >>> stream_writers(model)[0]
    {'transformer.h.0.attn': 'self_attn', 'transformer.h.0.mlp': 'mlp'}
    """
    blocks = layers_of(anatomy_of(model), "decoder_block", layer_config).modules
    names = {module: name for name, module in model.named_modules()}
    found: dict[int, dict[str, str | None]] = {layer: {} for layer in blocks}
    for layer, part, kind in parts_inside(model, blocks):
        found[layer][names[part]] = kind
    return found


def _strengths(strength: Any, found: Layers, layers: Iterable[int]) -> dict[tuple[int, str], float]:
    """Return the strength at each layer and part; the embeddings are a part of the first layer alone."""
    places = [(n, part) for n in layers for part in _PARTS if part != "embeddings" or n == min(found.modules)]
    if callable(strength):
        return {place: finite_number(strength(*place), f"strength{place}") for place in places}
    if not isinstance(strength, Mapping):
        return dict.fromkeys(places, finite_number(strength, "strength"))
    numbers = {key: finite_number(number, f"the strength of {key!r}") for key, number in strength.items()}
    named = [key for key in numbers if isinstance(key, str)]
    if named and len(named) < len(numbers):
        raise TypeError(
            f"strength must map layers or parts to numbers, not both, got {list(numbers)}: for both, pass a function "
            f"(layer, part) → number"
        )
    if unknown := [key for key in named if key not in _PARTS]:
        raise ValueError(f"strength has no part {unknown[0]!r}: the parts are {', '.join(map(repr, _PARTS))}")
    if not numbers:
        raise ValueError("strength is empty: give one number at least")
    if named:
        return {(n, part): numbers.get(part, 0.0) for n, part in places}
    by_layer = {found.number(key): number for key, number in numbers.items()}
    if len(by_layer) < len(numbers):
        raise ValueError(f"strength has one layer twice, among {list(numbers)}: keep only one of its numbers")
    return {(n, part): by_layer.get(n, 0.0) for n, part in places}


def _places_around(found: Layers, strengths: Mapping[tuple[int, str], float]) -> list[Place]:
    """Return the first block's input, and the outputs of the blocks of which something is ablated."""
    first = min(found.modules)
    at_input = strengths.get((first, "embeddings"), 0.0)
    inputs = [Place(first, found.modules[first], INPUT, at_input)] if at_input else []
    layers = dict.fromkeys(layer for (layer, part), number in strengths.items() if part != "embeddings" and number)
    return [*inputs, *(Place(layer, found.modules[layer]) for layer in layers)]


def _with_parts(model: nn.Module, places: Sequence[Place], strengths: Mapping[tuple[int, str], float]) -> list[Place]:
    """Return the places of an ablation with the parts of the blocks; below full strength, without the blocks' outputs.

    Raises ValueError if what a strength applies to is unknown.
    """
    blocks = {place.layer: place.module for place in places if place.side == OUTPUT}
    inside = list(parts_inside(model, blocks)) if blocks else []
    if all(number == 1 for number in strengths.values()):
        return [*places, *(Place(layer, part) for layer, part, _ in inside)]
    made = [place for place in places if place.side == INPUT]
    for layer, part, kind in inside:
        both = (strengths[layer, "self_attn"], strengths[layer, "mlp"])
        if kind is None and both[0] != both[1]:
            raise ValueError(
                f"can't tell attention from MLP among the parts of block {layer}, {type(blocks[layer]).__name__}, so "
                f"they can't be ablated with different strengths: give both the same"
            )
        if number := both[0] if kind is None else strengths[layer, kind]:
            made.append(Place(layer, part, OUTPUT, number))
    if whole := blocks.keys() - {layer for layer, _, _ in inside}:
        raise ValueError(
            f"the parts that write to the stream are not found in blocks {in_ranges(sorted(whole))} of "
            f"{type(model).__name__}, so these can be ablated at strength 1 only"
        )
    return made


def _removed(direction: Tensor | SteeringVector | Mapping[int, Tensor], found: Layers) -> dict[int, Tensor]:
    """Return the directions to remove by layer number, ascending."""
    if isinstance(direction, Mapping):
        if not direction:
            raise ValueError("there are no directions, so there is nothing to ablate: pass one at least")
        removed = {
            found.number(layer): _span(rows, f"the direction of layer {layer}") for layer, rows in direction.items()
        }
        widths = sorted({rows.shape[-1] for rows in removed.values()})
        if len(widths) > 1:
            raise ValueError(f"all directions must have the same width, got {widths}")
        return dict(sorted(removed.items()))
    return dict.fromkeys(sorted(found.modules), _span(_only_direction(direction), "the direction"))


def _span(rows: Any, name: str) -> Tensor:
    """Return a direction ``(hidden,)`` as it is, and for several directions orthogonal ones with their span."""
    if not (isinstance(rows, Tensor) and rows.ndim == 2 and len(rows) > 1):
        ablated = checked_direction(rows, name).reshape(-1)
    else:
        for row in rows:
            checked_direction(row, name)
        if rows.requires_grad:
            raise ValueError(f"{name} requires grad, which a set of {len(rows)} directions can't: pass it detached")
        ablated = span_of(rows) if bool(rows.any()) else rows
    if not bool(ablated.detach().any()):
        raise ValueError(f"{name} is all zeros, so there is nothing to ablate: pass a nonzero direction")
    return ablated


def _switches(rows: Sequence[bool] | Tensor | None) -> Any:
    """Return the multiplier that is 1 for the rows to ablate and 0 for the others."""
    if rows is None:
        return as_multiplier(1)
    try:
        numbers = torch.as_tensor(rows, device="cpu").double()
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0, 0, device="cpu")
    if numbers.ndim != 1 or not bool(((numbers == 0) | (numbers == 1)).all()):
        raise TypeError(f"rows must be a list of True and False, one for each row of a batch, got {rows!r}")
    return as_multiplier(numbers)


def _only_direction(direction: Tensor | SteeringVector) -> Tensor:
    if not isinstance(direction, SteeringVector):
        return direction
    if len(direction) != 1:
        raise ValueError(
            f"ablate_everywhere removes one direction, but the vector has those of layers {in_ranges(direction)}: "
            f"choose one, as in vector[16], or remove each at its layer, as in vector.layer_activations"
        )
    return next(iter(direction.layer_activations.values()))
