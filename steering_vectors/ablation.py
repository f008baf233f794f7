"""Ablate a direction wherever the residual stream is written."""

from dataclasses import replace

from torch import Tensor, nn

from steering_vectors._models import anatomy_of
from steering_vectors._steering import (
    INPUT,
    OUTPUT,
    Steering,
    SteeringContext,
    SteeringPatchHandle,
    as_multiplier,
    is_steered_by_token_or_row,
    parts_inside,
    width_message,
)
from steering_vectors._vectors import checked_direction
from steering_vectors.layer_matching import ModelLayerConfig, layers_of
from steering_vectors.steering_operators import ablation_operator


def ablate_everywhere(
    model: nn.Module, direction: Tensor, *, layer_config: ModelLayerConfig | None = None
) -> SteeringContext:
    """A context manager, and a decorator, in which the residual stream has no part along ``direction`` anywhere.

    ``h − (h·u)u`` with ``u = d / ‖d‖`` is done to what goes into the first decoder block, to what each block's
    attention and MLP (or what stands in their place) write to the stream, after a norm of their own where they have
    one, and to each block's output. So refusal is taken out of chat models. The length and sign of ``direction`` do
    nothing.

    Which modules write to the stream is told on entering, by passes over five tokens, in which their outputs are
    replaced; hooks of others see these passes too. Where a block's output is no sum of its input and its modules'
    outputs, as in blocks that end in a norm, the block's output alone is ablated; so it is, with a UserWarning, where
    the model can't be run on tokens alone. In training mode some blocks drop out what was ablated already.

    ``direction`` has the shape ``(hidden,)``. ``layer_config`` is that of :meth:`SteeringVector.apply`.

    Raises TypeError for what is no model or direction, and ValueError for layers that can't be told, a width that
    doesn't fit, a direction of zeros, and a model that is steered by token or by row just now.

    Source: directional ablation, arXiv 2406.11717, section 2.4.

    >>> with ablate_everywhere(model, torch.ones(32)):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    """

    def steering() -> Steering:
        anatomy = anatomy_of(model)
        found = layers_of(anatomy, "decoder_block", layer_config)
        ablated = checked_direction(direction, "the direction").reshape(-1)
        if not bool(ablated.detach().any()):
            raise ValueError("the direction is zero, and has no line that could be ablated")
        if anatomy.widths and ablated.shape[0] not in anatomy.widths:
            raise ValueError(width_message(ablated.shape[0], 0, anatomy.widths[0]))
        if is_steered_by_token_or_row(model):
            raise ValueError(
                "the model is steered by token or by row: enter ablate_everywhere before, and that steering inside"
            )
        blocks = [found.modules[number] for number in sorted(found.modules)]
        places = [(0, blocks[0], INPUT), *((number, block, OUTPUT) for number, block in enumerate(blocks))]
        return Steering(
            anatomy, places, dict.fromkeys(range(len(blocks)), ablated), ablation_operator(), as_multiplier(1), None
        )

    checked = steering()  # a mistake shows here, before the block

    def attach() -> SteeringPatchHandle:
        made = steering()
        blocks = [module for _, module, place in made.places if place == OUTPUT]
        parts = [(number, part, OUTPUT) for number, part in parts_inside(model, blocks)]
        return SteeringPatchHandle(replace(made, places=[*made.places, *parts]))

    return SteeringContext(attach, shown=repr(checked))
