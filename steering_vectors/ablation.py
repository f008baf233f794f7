"""Ablate a direction wherever the residual stream is written."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from steering_vectors._arguments import with_hints
from steering_vectors._models import INPUT, OUTPUT, anatomy_of
from steering_vectors._steering import (
    Steering,
    SteeringContext,
    as_multiplier,
    is_steered_by_token_or_row,
    parts_inside,
    width_message,
)
from steering_vectors._vectors import checked_direction, in_ranges
from steering_vectors.layer_matching import ModelLayerConfig, layers_of
from steering_vectors.steering_operators import ablation_operator
from steering_vectors.steering_vector import SteeringVector


@with_hints(missing="the arguments begin with model, direction")
def ablate_everywhere(
    model: nn.Module, direction: Tensor | SteeringVector, *, layer_config: ModelLayerConfig | None = None
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

    Source: directional ablation, arXiv 2406.11717, section 2.4.

    Args:
        model: The model to steer.
        direction: A direction ``(hidden,)``, or a vector of one layer. Its length and sign have no
            effect.
        layer_config: The blocks' names, as in :meth:`SteeringVector.apply`.

    Raises:
        TypeError: If ``model`` is not a module or ``direction`` not a tensor of numbers.
        ValueError: If the layers can't be identified, if the width doesn't fit, if the direction is
            all zeros, or if the model is currently steered by token or by row.

    Warns:
        UserWarning: On entering, if the model can't be run on tokens alone.

    >>> with ablate_everywhere(model, torch.ones(32)):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    """

    def steering() -> Steering:
        anatomy = anatomy_of(model)
        found = layers_of(anatomy, "decoder_block", layer_config)
        ablated = checked_direction(_only_direction(direction), "the direction").reshape(-1)
        if not bool(ablated.detach().any()):
            raise ValueError("the direction is all zeros, so there is nothing to ablate: pass a nonzero direction")
        if anatomy.widths and ablated.shape[0] not in anatomy.widths:
            raise ValueError(width_message(ablated.shape[0], 0, anatomy.widths[0]))
        if is_steered_by_token_or_row(model):
            raise ValueError(
                "the model is already steered by token or by row: remove that steering, enter ablate_everywhere, and "
                "apply it again inside"
            )
        blocks = [found.modules[number] for number in sorted(found.modules)]
        places = [(0, blocks[0], INPUT), *((number, block, OUTPUT) for number, block in enumerate(blocks))]
        return Steering(
            anatomy, places, dict.fromkeys(range(len(blocks)), ablated), ablation_operator(), as_multiplier(1), None
        )

    checked = steering()  # so that this call raises errors, not the entry of the block

    def with_parts() -> Steering:
        made = steering()
        blocks = [module for _, module, place in made.places if place == OUTPUT]
        parts = [(number, part, OUTPUT) for number, part in parts_inside(model, blocks)]
        return replace(made, places=[*made.places, *parts])

    return SteeringContext(with_parts, shown=repr(checked))


def _only_direction(direction: Tensor | SteeringVector) -> Tensor:
    if not isinstance(direction, SteeringVector):
        return direction
    if len(direction) != 1:
        raise ValueError(
            f"ablate_everywhere removes one direction, but the vector has those of layers {in_ranges(direction)}: "
            f"choose one, as in vector[16]"
        )
    return next(iter(direction.layer_activations.values()))
