"""From a vector and what is asked of it to a steering of a model: all that can be checked before the model runs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from steering_vectors._models import Anatomy, anatomy_of
from steering_vectors._steering.attaching import OUTPUT
from steering_vectors._steering.change import width_message
from steering_vectors._steering.multiplier import Multiplier
from steering_vectors._vectors import checked_directions, type_and_depth
from steering_vectors.layer_matching import LayerType, ModelLayerConfig, check_layer_type, layers_of
from steering_vectors.steering_operators import PatchDeltaOperator, addition_operator, check_operator
from steering_vectors.token_selection import Selector


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """What is to be done to a model's activations; checked, and not attached yet.

    ``directions`` are ``(hidden,)`` by layer number, ``places`` the modules that are changed, each with its layer's
    number and whether its output or its input is meant. None as ``selector`` means all tokens. With
    ``this_thread_only`` only passes in the thread that attaches it are steered.
    """

    anatomy: Anatomy
    places: Sequence[tuple[int, nn.Module, str]]
    directions: Mapping[int, Tensor]
    operator: PatchDeltaOperator
    multiplier: Multiplier
    selector: Selector | None
    this_thread_only: bool = False

    def __repr__(self) -> str:
        thread = ", this_thread_only=True" if self.this_thread_only else ""
        return (
            f"layers={sorted(self.directions)}, multiplier={self.multiplier}, operator={self.operator!r}, "
            f"tokens={self.selector or 'all'}{thread}"
        )


class Vector(Protocol):
    """What a steering takes of a vector."""

    layer_activations: dict[int, Tensor]
    layer_type: LayerType


def steering_of(
    vector: Vector,
    model: nn.Module,
    layer_config: ModelLayerConfig | None,
    operator: PatchDeltaOperator | None,
    multiplier: Multiplier,
    selector: Any,
    this_thread_only: bool,
) -> Steering:
    """The vector's steering of a model, with all that can be checked before the model runs."""
    check_layer_type(vector.layer_type)
    anatomy = anatomy_of(model)
    found = layers_of(anatomy, vector.layer_type, layer_config)
    operator = addition_operator() if operator is None else operator
    check_operator(operator)
    if selector is not None or multiplier.by_row:
        _check_tokens_can_be_told(anatomy)
    directions = checked_directions(vector.layer_activations)
    if not directions:
        raise ValueError("this steering vector has no directions")
    by_number: dict[int, Tensor] = {}
    for layer, direction in directions.items():
        number = found.number(layer)
        if number in by_number:
            same = [key for key in directions if found.number(key) == number]
            raise ValueError(f"the vector's layers {same} are one layer of this model, number {number}")
        by_number[number] = direction
    widths = [] if layer_config and vector.layer_type in layer_config else anatomy.widths
    width = next(iter(by_number.values())).shape[-1]
    if widths and width not in widths:
        raise ValueError(width_message(width, min(by_number), widths[0]))
    modules = {number: found.modules[number] for number in sorted(by_number)}
    if len(set(modules.values())) < len(modules):
        raise ValueError(
            f"layers {sorted(by_number)} of {type(model).__name__} share modules, and can't be steered apart"
        )
    places = [(number, module, OUTPUT) for number, module in modules.items()]
    return Steering(anatomy, places, by_number, operator, multiplier, selector, this_thread_only)


def _check_tokens_can_be_told(anatomy: Anatomy) -> None:
    if anatomy.learns_prompts:
        raise ValueError(
            "prompt learning puts virtual tokens before the prompt's own, so it can't be told exactly which tokens to "
            "steer; steer all tokens"
        )
    if anatomy.takes_tokens_again:
        raise ValueError(
            f"can't tell where the tokens stand in {type(anatomy.model).__name__}, which takes some of a row's again "
            f"and in another order; steer all tokens"
        )


def warn_of_another_model(metadata: Mapping[str, str], anatomy: Anatomy) -> None:
    """Warn if the metadata tell of another type of model, or of one of another depth. Names are not compared."""
    here = type_and_depth(anatomy)
    others = [
        f"{name} {metadata[name]!r}, here {here[name]!r}"
        for name in ("model_type", "layers_of_model")
        if name in metadata and name in here and metadata[name] != here[name]
    ]
    if others:
        warnings.warn(f"the vector was made for another model: {'; '.join(others)}", UserWarning, stacklevel=3)
