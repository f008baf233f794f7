"""Plan a steering of a model by a vector, with every check that is possible before the model runs."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from steering_vectors._models import OUTPUT, Anatomy, Site, anatomy_of
from steering_vectors._steering.change import width_message
from steering_vectors._steering.multiplier import Multiplier
from steering_vectors._tokens import Selector
from steering_vectors._vectors import checked_directions, in_ranges, type_and_depth
from steering_vectors.layer_matching import (
    LayerType,
    ModelLayerConfig,
    check_layer_type,
    is_at_input,
    layers_of,
    read_config,
)
from steering_vectors.steering_operators import (
    PatchDeltaOperator,
    addition_operator,
    asked_of,
    check_layers,
    check_operator,
    check_operator_alone,
)

# What to write instead of arguments that apply and patch don't have.
CALL_HINTS = dict.fromkeys(
    ("strength", "scale", "coefficient", "coeff"), "the argument is multiplier="
) | dict.fromkeys(("layer", "layers"), "choose layers of the vector first, as in vector[16].apply(model)")


class Place(NamedTuple):
    """A module to change, at its output or its input, the number of its layer, and a factor on the change."""

    layer: int
    module: nn.Module
    side: str = OUTPUT
    strength: float = 1.0


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """A checked request to change a model's activations, not attached yet.

    ``directions`` are ``(hidden,)`` by layer number, or ``(k, hidden)`` to be used one after another; with None, the
    operator gets the activation alone. A ``selector`` of None means all tokens. With ``this_thread_only``, only passes
    in the thread that attaches it are steered.
    """

    anatomy: Anatomy
    places: Sequence[Place]
    directions: Mapping[int, Tensor] | None
    operator: Callable[..., Tensor]
    multiplier: Multiplier
    selector: Selector | None
    this_thread_only: bool = False

    @property
    def layers(self) -> list[int]:
        """The numbers of the steered layers, ascending."""
        return sorted({place.layer for place in self.places})

    def directions_at(self, layer: int) -> list[Tensor] | list[None]:
        """Return the directions of a layer, in the order in which they are used; None in their place without any."""
        if self.directions is None:
            return [None]
        directions = self.directions[layer]
        return [directions] if directions.ndim == 1 or len(directions) == 1 else list(directions)

    @property
    def asked(self) -> tuple[str, ...]:
        """The keyword-only arguments that the operator asks for."""
        return asked_of(self.operator)

    @property
    def locating(self) -> tuple[Callable[..., Tensor], ...]:
        """The callables that get the tokens' positions: the selector, and an operator that asks for them."""
        operator = (self.operator,) if "positions" in self.asked else ()
        return operator if self.selector is None else (self.selector, *operator)

    def __repr__(self) -> str:
        thread = ", this_thread_only=True" if self.this_thread_only else ""
        return (
            f"layers={self.layers}, multiplier={self.multiplier}, operator={_shown(self.operator)}, "
            f"tokens={self.selector or 'all'}{thread}"
        )


def _shown(operator: Callable[..., Tensor]) -> str:
    """Return an operator's representation, in one line for a module."""
    return f"{type(operator).__name__}(…)" if isinstance(operator, nn.Module) else repr(operator)


class Vector(Protocol):
    """The part of a steering vector that a steering uses."""

    layer_activations: dict[int, Tensor]
    layer_type: LayerType
    metadata: Mapping[str, str]

    def shares(self) -> dict[int, float]: ...


def steering_of(
    vector: Vector,
    model: nn.Module,
    layer_config: ModelLayerConfig | None,
    operator: PatchDeltaOperator | Callable[..., Tensor] | None,
    multiplier: Multiplier,
    selector: Any,
    this_thread_only: bool,
) -> Steering:
    """Return the vector's steering of a model. Raises every error that can be found before the model runs."""
    check_layer_type(vector.layer_type)
    anatomy = anatomy_of(model)
    layer_config = config_for(anatomy, vector, layer_config)
    found = layers_of(anatomy, vector.layer_type, layer_config)
    operator = addition_operator() if operator is None else operator
    check_operator(operator)
    directions = checked_directions(vector.layer_activations)
    if not directions:
        raise ValueError("this steering vector has no directions, so there is nothing to apply")
    by_number: dict[int, Tensor] = {}
    for layer, direction in directions.items():
        number = found.number(layer)
        if number in by_number:
            same = [key for key in directions if found.number(key) == number]
            raise ValueError(
                f"the vector's layers {same} are the same layer of this model, number {number}: keep only one of them"
            )
        by_number[number] = direction
    is_elsewhere = is_at_input(vector.layer_type) or (layer_config and vector.layer_type in layer_config)
    widths = [] if is_elsewhere else anatomy.widths
    width = next(iter(by_number.values())).shape[-1]
    if widths and width not in widths:
        raise ValueError(width_message(width, min(by_number), widths[0]))
    sites = found.sites_of(sorted(by_number))
    _check_inputs(width, sites, vector.layer_type)
    places = [Place(number, *site) for number, site in sites.items()]
    return checked_steering(Steering(anatomy, places, by_number, operator, multiplier, selector, this_thread_only))


def steering_alone(
    model: nn.Module,
    operator: Callable[..., Tensor],
    layers: int | Iterable[int] | None,
    layer_type: LayerType,
    layer_config: ModelLayerConfig | None,
    multiplier: Multiplier,
    selector: Selector | None,
    this_thread_only: bool,
) -> Steering:
    """Return a steering of a model by an operator without a direction. Raises the errors of :func:`steering_of`."""
    anatomy = anatomy_of(model)
    found = layers_of(anatomy, layer_type, layer_config)
    check_operator_alone(operator)
    places = [Place(number, *site) for number, site in found.sites_of(found.numbers(layers)).items()]
    return checked_steering(Steering(anatomy, places, None, operator, multiplier, selector, this_thread_only))


def checked_steering(steering: Steering) -> Steering:
    """Return the steering. Raises ValueError if its operator doesn't know a layer, or if tokens can't be located."""
    check_layers(steering.operator, steering.layers)
    if steering.locating or steering.multiplier.by_row:
        _check_tokens_can_be_located(steering.anatomy)
    return steering


def _check_inputs(width: int, sites: Mapping[int, Site], layer_type: LayerType) -> None:
    """Raise ValueError if directions of this width don't fit the input of a projection."""
    for number, site in sites.items():
        if site.input_width not in (None, width):
            raise ValueError(
                f"the vector's directions have {width} numbers, but the {layer_type} of the model's layer {number} "
                f"have {site.input_width}: use a vector of the {layer_type} of this model"
            )


def config_for(anatomy: Anatomy, vector: Vector, given: ModelLayerConfig | None) -> ModelLayerConfig | None:
    """Return the given ``layer_config`` or, if it says nothing of the vector's layer type, the vector's own.

    Raises ValueError if the model doesn't have the modules that the vector was trained at.
    """
    site = read_config(vector.metadata.get("layer_config", ""), vector.layer_type)
    if site is None or not (given is None or (isinstance(given, Mapping) and vector.layer_type not in given)):
        return given
    try:
        layers_of(anatomy, vector.layer_type, site)
    except ValueError as error:
        raise ValueError(
            f"the vector was trained with layer_config={vector.metadata['layer_config']}, which names no module of "
            f"{type(anatomy.model).__name__}: pass the layer_config that names its modules here"
        ) from error
    return site


def _check_tokens_can_be_located(anatomy: Anatomy) -> None:
    if anatomy.learns_prompts:
        raise ValueError(
            "prompt learning puts virtual tokens before the prompt's own, so the tokens to steer can't be located "
            "exactly: steer all tokens, with one multiplier for all rows"
        )
    if anatomy.takes_tokens_again:
        raise ValueError(
            f"can't locate the tokens in {type(anatomy.model).__name__}, which takes some of a row's tokens again and "
            f"in another order: steer all tokens, with one multiplier for all rows"
        )


def warn_of_doubts(vector: Vector, steering: Steering) -> None:
    """Warn if the vector was made for another model, or if the steering is probably too strong."""
    for message in (_of_another_model(vector.metadata, steering.anatomy), _of_strength(vector.shares(), steering)):
        if message:
            warnings.warn(message, UserWarning, stacklevel=4)  # where apply or patch was called, which is decorated


def _of_another_model(metadata: Mapping[str, str], anatomy: Anatomy) -> str | None:
    """Return a message if the metadata name another type of model or number of layers. Names are not compared."""
    here = type_and_depth(anatomy)
    others = [
        f"{name} {metadata[name]!r}, here {here[name]!r}"
        for name in ("model_type", "layers_of_model")
        if name in metadata and name in here and metadata[name] != here[name]
    ]
    return f"the vector was made for another model: {'; '.join(others)}" if others else None


def _of_strength(shares: Mapping[int, float], steering: Steering) -> str | None:
    """Return a message if additions move the activations by more than their norm; ``shares`` are the directions'."""
    multiplier = steering.multiplier
    if multiplier.is_learned or type(steering.operator) is not type(addition_operator()):
        return None
    total = multiplier.largest * sum(shares.values())
    if round(total, 2) <= 1:
        return None
    middle = sorted(shares)[len(shares) // 2]
    one = f"steer one layer, as in vector[{middle}].apply(model), or " if len(shares) > 1 else ""
    return (
        f"this steering adds {total:.3g} times the norm of the activations, in sum over layers "
        f"{in_ranges(sorted(shares))} with multiplier {multiplier!r}, which is more than what is there, and text "
        f"usually breaks: {one}use a smaller multiplier; vector.shares() gives each layer's part"
    )
