"""Steering vectors: directions by layer, and how to apply them to a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from steering_vectors._arguments import check_takes, finite_number, is_whole_number
from steering_vectors._changes import OUTPUT, width_message
from steering_vectors._directions import checked_directions, layer_number
from steering_vectors._model_structure import layer_widths, learns_prompts, takes_tokens_again
from steering_vectors._steering import Multiplier, Steering, SteeringContext, SteeringPatchHandle, as_multiplier
from steering_vectors._token_indices import TokenSelection, one_selection
from steering_vectors.layer_matching import (
    LayerType,
    ModelLayerConfig,
    check_layer_type,
    find_layers,
)
from steering_vectors.steering_operators import PatchDeltaOperator, addition_operator

__all__ = ["PatchDeltaOperator", "SteeringPatchHandle", "SteeringVector"]


@dataclass(eq=False, repr=False)
class SteeringVector:
    """Directions by layer number, and the type of layer at whose output they act.

    ``layer_activations`` maps layer numbers, from 0 (negative ones count from the model's end), to directions
    ``(hidden,)`` or ``(1, hidden)``, all of one width: tensors, which are kept as they are, or numpy arrays and lists.

    Raises TypeError for other values, and ValueError for other shapes, numbers that aren't finite, and an unknown layer
    type; when it is made, and again when it is applied.

    >>> SteeringVector({1: [3.0, 4.0], 2: [0.0, 1.0]})
    SteeringVector(layers=[1, 2], hidden_size=2, layer_type='decoder_block', norms=1 to 5)
    """

    layer_activations: dict[int, Tensor]
    layer_type: LayerType = "decoder_block"

    def __post_init__(self) -> None:
        check_layer_type(self.layer_type)
        self.layer_activations = checked_directions(self.layer_activations)

    def apply(
        self,
        model: nn.Module,
        layer_config: ModelLayerConfig | None = None,
        operator: PatchDeltaOperator | None = None,
        multiplier: Multiplier = 1.0,
        min_token_index: int | None = None,
        token_indices: TokenSelection | None = None,
        *,
        tokens: TokenSelection | None = None,
        this_thread_only: bool = False,
    ) -> SteeringContext:
        """A context manager, and a decorator, in which ``model`` is steered.

        The model's modules and weights stay as they are: hooks change the layers' outputs while the block lasts.
        Several steerings act in the order in which they are entered.

        ``layer_config`` says where the layers are, for models whose layers aren't found: a mapping from layer type to a
        template such as ``"transformer.h.{num}"``, or to a callable ``(model, number) → name``.
        ``operator`` says what is added, from the activation and the direction times ``multiplier``; by default the
        latter itself. At 0 the model runs as if it weren't steered. A sequence or tensor ``(rows,)`` gives each row of
        a batch a multiplier of its own; with k times as many rows, as beams and several answers make them, row i has
        that of row i // k.

        Which tokens are steered, by one of these; by default all:
        ``tokens`` takes a selector (:func:`~steering_vectors.generated` and others, or any callable from
        :class:`~steering_vectors.TokenPositions` to a mask or weights ``(batch, seq)``), a list of indices, a slice
        or a mask of columns. ``token_indices`` is its older name, ``min_token_index=n`` means ``tokens=from_index(n)``.
        Indices count a row's own tokens, without padding, and with those in the cache. Negative ones count columns from
        the end of each pass: -1 is the prompt's last column first, and then each generated token. With them it matters
        how the cache cuts the passes; :func:`~steering_vectors.generated` is exact.

        With ``this_thread_only`` only passes in the thread that enters are steered, and not those of other threads that
        run the same model at once, nor of threads started inside the block.

        The change is computed in the activation's dtype, on its device. Directions that require grad get it, also under
        gradient checkpointing, if it was enabled before.

        Raises, when called and again on entering, before anything is attached: TypeError for arguments of a wrong kind;
        ValueError for a layer that the model hasn't, a width that doesn't fit, numbers that aren't finite, and more
        than one selection of tokens. Warns with a RuntimeWarning on leaving if the model ran and was steered nowhere.

        >>> with vector.apply(model, multiplier=2.0, tokens=generated(inputs)):
        ...     output = model.generate(**inputs, max_new_tokens=4)
        """

        def steering() -> Steering:
            selector = one_selection(min_token_index, token_indices, tokens)
            return _steering(self, model, layer_config, operator, as_multiplier(multiplier), selector, this_thread_only)

        steering()  # a mistake shows here, before the block
        return SteeringContext(lambda: SteeringPatchHandle(steering()))

    def patch(
        self,
        model: nn.Module,
        layer_config: ModelLayerConfig | None = None,
        operator: PatchDeltaOperator | None = None,
        multiplier: Multiplier = 1.0,
        min_token_index: int | None = None,
        token_indices: TokenSelection | None = None,
        *,
        tokens: TokenSelection | None = None,
        this_thread_only: bool = False,
    ) -> SteeringPatchHandle:
        """Steer ``model`` from now on, until the handle's ``remove()``.

        Arguments and errors are those of :meth:`apply`. ``patch_activations`` is the older name.

        >>> handle = vector.patch(model, multiplier=2.0)
        >>> handle.remove()
        """
        selector = one_selection(min_token_index, token_indices, tokens)
        return SteeringPatchHandle(
            _steering(self, model, layer_config, operator, as_multiplier(multiplier), selector, this_thread_only)
        )

    patch_activations = patch

    @property
    def layers(self) -> list[int]:
        """The layers' numbers, ascending."""
        return sorted(self.layer_activations)

    @property
    def hidden_size(self) -> int:
        """How many numbers each direction has. Raises ValueError for a vector without directions."""
        widths = [direction.shape[-1] for direction in self.layer_activations.values()]
        if not widths:
            raise ValueError("this steering vector has no directions")
        return int(widths[0])

    def norms(self) -> dict[int, float]:
        """Each direction's Euclidean norm, by layer.

        >>> SteeringVector({1: [3.0, 4.0]}).norms()
        {1: 5.0}
        """
        directions = {layer: torch.as_tensor(self.layer_activations[layer]).detach() for layer in self.layers}
        return {layer: float(direction.cpu().double().norm()) for layer, direction in directions.items()}

    def normalized(self) -> "SteeringVector":
        """A vector with each direction at norm 1. Raises ValueError for a direction of zeros.

        >>> SteeringVector({1: [3.0, 4.0]}).normalized().layer_activations[1]
        tensor([0.6000, 0.8000])
        """
        norms = self.norms()
        zeros = [layer for layer, norm in norms.items() if norm == 0]
        if zeros:
            raise ValueError(f"the directions of layers {zeros} are zero, and can't be brought to norm 1")
        return self.scaled({layer: 1 / norm for layer, norm in norms.items()})

    def scaled(self, factor: float | Mapping[int, float]) -> "SteeringVector":
        """A vector with each direction times ``factor``: one number, or one for each layer.

        Of a mapping, layers that this vector lacks are ignored: :func:`~steering_vectors.residual_norms` gives all of
        a model. Raises TypeError for other factors, and ValueError for a mapping that lacks one of this vector's
        layers, and for numbers that aren't finite.

        >>> SteeringVector({1: [3.0, 4.0]}).scaled({0: 10.0, 1: 2.0}).norms()
        {1: 10.0}
        """
        factors = factor if isinstance(factor, Mapping) else dict.fromkeys(self.layers, factor)
        missing = [layer for layer in self.layers if layer not in factors]
        if missing:
            raise ValueError(f"factor has no number for layers {missing}; it has some for {sorted(factors)}")
        numbers = {layer: finite_number(factors[layer], "a factor") for layer in self.layers}
        return self._with(
            {layer: numbers[layer] * d for layer, d in checked_directions(self.layer_activations).items()}
        )

    def __getitem__(self, layers: int | slice | Iterable[int]) -> "SteeringVector":
        """The vector of some layers: ``vec[12]``, ``vec[[10, 12]]``, ``vec[10:14]``.

        A slice means the layer numbers in it, the last one excluded; where an end is open, the lowest or highest layer
        of this vector. Directions are shared, not copied. Raises LookupError for a layer that isn't there, and
        TypeError for what is no layer number.
        """
        wanted = self._numbers(layers)
        missing = [layer for layer in wanted if layer not in self.layer_activations]
        if missing or not wanted:
            raise LookupError(f"no direction for layers {missing or layers}; there are directions for {self.layers}")
        return self._with({layer: self.layer_activations[layer] for layer in wanted})

    def _numbers(self, layers: Any) -> list[int]:
        if isinstance(layers, slice):
            first, last = min(self.layers, default=0), max(self.layers, default=-1)
            start = first if layers.start is None else layers.start
            stop = last + 1 if layers.stop is None else layers.stop
            return list(range(start, stop, 1 if layers.step is None else layers.step))
        numbers = [layers] if is_whole_number(layers) else list(layers)
        return [layer_number(layer) for layer in dict.fromkeys(numbers)]

    # The signatures of torch.Tensor.to.
    @overload
    def to(self, dtype: torch.dtype, non_blocking: bool = False, copy: bool = False) -> "SteeringVector": ...

    @overload
    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        copy: bool = False,
    ) -> "SteeringVector": ...

    @overload
    def to(self, other: Tensor, non_blocking: bool = False, copy: bool = False) -> "SteeringVector": ...

    def to(self, *args: Any, **kwargs: Any) -> "SteeringVector":
        """A vector whose directions are ``direction.to(…)`` of this one's, with the arguments of ``torch.Tensor.to``.

        >>> SteeringVector({1: [3.0, 4.0]}).to(torch.bfloat16).layer_activations[1].dtype
        torch.bfloat16
        """
        moved = {layer: direction.to(*args, **kwargs) for layer, direction in self.layer_activations.items()}
        return self._with(moved)

    def _with(self, layer_activations: dict[int, Tensor]) -> "SteeringVector":
        return replace(self, layer_activations=layer_activations)

    def __eq__(self, other: object) -> bool:
        """Whether layers, layer type, and all numbers with their dtypes and shapes are the same; devices may differ."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        mine, theirs = self.layer_activations, other.layer_activations
        return (
            self.layer_type == other.layer_type
            and mine.keys() == theirs.keys()
            and all(_equal(mine[layer], theirs[layer]) for layer in mine)
        )

    __hash__ = None  # type: ignore[assignment]  # a mutable value

    def __repr__(self) -> str:
        if not self.layer_activations:
            return f"SteeringVector(layers=[], layer_type={self.layer_type!r})"
        norms = self.norms().values()
        low, high = f"{min(norms):.3g}", f"{max(norms):.3g}"
        return (
            f"SteeringVector(layers={_ranges(self.layers)}, hidden_size={self.hidden_size}, "
            f"layer_type={self.layer_type!r}, norms={low if low == high else f'{low} to {high}'})"
        )


def _steering(
    vector: SteeringVector,
    model: nn.Module,
    layer_config: ModelLayerConfig | None,
    operator: PatchDeltaOperator | None,
    multiplier: float | Tensor,
    selector: Any,
    this_thread_only: bool,
) -> Steering:
    """The vector's steering of a model, with all that can be checked before the model runs."""
    check_layer_type(vector.layer_type)
    found = find_layers(model, vector.layer_type, layer_config)
    operator = addition_operator() if operator is None else operator
    check_takes(operator, 2, "operator", "ablation_operator()")
    if selector is not None or isinstance(multiplier, Tensor):
        _check_tokens_can_be_told(model)
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
    widths = [] if layer_config and vector.layer_type in layer_config else layer_widths(model)
    if widths and vector.hidden_size not in widths:
        raise ValueError(width_message(vector.hidden_size, min(by_number), widths[0]))
    modules = {number: model.get_submodule(found.names[number]) for number in sorted(by_number)}
    if len(set(modules.values())) < len(modules):
        raise ValueError(
            f"layers {sorted(by_number)} of {type(model).__name__} share modules, and can't be steered apart"
        )
    places = [(number, module, OUTPUT) for number, module in modules.items()]
    return Steering(model, places, by_number, operator, multiplier, selector, this_thread_only)


def _check_tokens_can_be_told(model: nn.Module) -> None:
    if learns_prompts(model):
        raise ValueError(
            "prompt learning puts virtual tokens before the prompt's own, so it can't be told exactly which tokens to "
            "steer; steer all tokens"
        )
    if takes_tokens_again(model):
        raise ValueError(
            f"can't tell where the tokens stand in {type(model).__name__}, which takes some of a row's again and in "
            f"another order; steer all tokens"
        )


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    return mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine.cpu(), theirs.cpu())


def _ranges(layers: list[int]) -> str:
    """Layer numbers for people: runs as ``0-29``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"[{', '.join(parts)}]"
