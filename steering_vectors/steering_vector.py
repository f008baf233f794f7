"""Steering vectors: directions by layer, their arithmetic, and their application to a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from steering_vectors._arguments import with_hints
from steering_vectors._steering import (
    CALL_HINTS,
    Numbers,
    Steering,
    SteeringContext,
    SteeringPatchHandle,
    as_multiplier,
    attach,
    one_selection,
    steering_of,
    warn_of_doubts,
)
from steering_vectors._tokens import TokenSelection
from steering_vectors._vectors import (
    ByLayer,
    Metadata,
    are_equal,
    asked_layers,
    checked_directions,
    checked_factor,
    cosines,
    derived,
    inherited,
    line_of,
    orthogonal,
    plain_number,
    projections,
    read,
    scaled,
    shares_of,
    table_of,
    united,
    write,
)
from steering_vectors.layer_matching import LayerType, ModelLayerConfig, check_layer_type
from steering_vectors.steering_operators import PatchDeltaOperator, unit_direction
from steering_vectors.unembedding import TopTokens, top_tokens

__all__ = ["PatchDeltaOperator", "SteeringPatchHandle", "SteeringVector"]


@dataclass(eq=False, repr=False)
class SteeringVector(ByLayer):
    """Directions by layer number, and the type of layer that they change.

    The vector is checked when it is made, and again when it is applied or saved.

    Args:
        layer_activations: A mapping from layer numbers to directions ``(hidden,)`` or
            ``(1, hidden)``, all of one width. Layer numbers count from 0; negative ones count from
            the model's end. Tensors are kept as they are, and numpy arrays and lists are converted
            to tensors on the CPU.
        layer_type: The kind of activation that the directions change: the output of the decoder
            block, or of a part of it such as ``"mlp"``; or ``"heads"`` or ``"neurons"``, the inputs
            of attention's and of the MLP's projection back to the stream.
        metadata: A mapping of strings that records the vector's origin; the vector keeps it as a
            read-only one. Training fills it, files keep it, and equality ignores it, except for the
            entry ``layer_config``: it names the modules to steer, if the vector was trained at
            others than the model's layers of its type.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If directions differ in width or have other shapes, if numbers aren't finite, or
            if the layer type is unknown.

    >>> SteeringVector({1: [3.0, 4.0], 2: [0.0, 1.0]})
    SteeringVector(layers=[1, 2], hidden_size=2, layer_type='decoder_block', norms=1 to 5)
    """

    layer_activations: dict[int, Tensor]
    layer_type: LayerType = "decoder_block"
    metadata: Mapping[str, str] = field(default=Metadata({}), kw_only=True)

    def __post_init__(self) -> None:
        check_layer_type(self.layer_type)
        self.layer_activations = checked_directions(self.layer_activations)
        self.metadata = Metadata(self.metadata)

    def __getstate__(self) -> dict[str, Any]:
        # Plain types, so that the class of 0.12.2 can load the state too.
        state = {"layer_activations": self.layer_activations, "layer_type": self.layer_type}
        return {**state, "metadata": dict(self.metadata)} if self.metadata else state

    def __deepcopy__(self, _memo: Any) -> SteeringVector:
        # copy.deepcopy refuses tensors that were computed with gradients.
        copies = {n: d.detach().clone().requires_grad_(d.requires_grad) for n, d in self.layer_activations.items()}
        return SteeringVector(copies, self.layer_type, metadata=self.metadata)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "metadata": Metadata(state.get("metadata", {}))})

    @with_hints(**CALL_HINTS)
    def apply(
        self,
        model: nn.Module,
        layer_config: ModelLayerConfig | None = None,
        operator: PatchDeltaOperator | Callable[..., Tensor] | None = None,
        multiplier: Numbers = 1.0,
        min_token_index: int | None = None,
        token_indices: TokenSelection | None = None,
        *,
        tokens: TokenSelection | None = None,
        this_thread_only: bool = False,
    ) -> SteeringContext:
        """Return a context manager, usable as a decorator too, inside which ``model`` is steered.

        Hooks change the layers' outputs inside the block; the model's modules and weights stay as
        they are. Several steerings act in the order in which they are entered.

        Token indices count the tokens of a row, without its padding and including those in the
        cache. Negative ones count columns from the end of each pass: -1 is the prompt's last column
        first, and then each generated token. They thus depend on the passes into which a cache
        splits the sequence; :func:`~steering_vectors.generated` doesn't.

        Beam search and several answers to a prompt make k times as many rows; row i then has the
        multiplier of row i // k.

        The operator's result is converted to the activation's dtype. Directions, multipliers and
        selectors' weights that require grad get gradients, where they are 0 too. This holds under
        gradient checkpointing as well, if the model's own method enables it.

        The arguments are checked in this call and again on entering, before any hook is attached.

        Args:
            model: The model to steer.
            layer_config: The layers' names, for models whose layers aren't found automatically. It
                maps a layer type to a template such as ``"transformer.h.{num}"``, or to a callable
                ``(model, number) → name``. By default, it is the one that the vector was trained
                with, if that named other modules than the model's own layers.
            operator: A callable that gets the activation, in its dtype, and the direction times
                ``multiplier``, on the activation's device in float32 or wider. It returns what is
                added to the activation; by default, that is the direction times ``multiplier``. It
                may ask for more: see :class:`~steering_vectors.PatchDeltaOperator`.
            multiplier: One number, or a sequence or tensor ``(rows,)`` with one for each row of a
                batch. At 0 the model runs as if it weren't steered.
            min_token_index: An older way to write ``tokens=from_index(min_token_index)``.
            token_indices: The older name of ``tokens``. Pass only one of the three.
            tokens: The tokens to steer; by default all. It is a selector, a list of indices, a
                slice, or a mask of columns. A selector is :func:`~steering_vectors.generated` or
                another one of this library, or any callable from
                :class:`~steering_vectors.TokenPositions` to a mask or weights ``(batch, seq)``.
            this_thread_only: True to steer only the passes in the thread that enters the block.
                Other threads that run the same model at the same time are not steered, nor are
                threads started inside the block.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the model doesn't have one of the layers, if a width doesn't fit, if
                numbers aren't finite, or if there is more than one selection of tokens. In the
                model's pass, if a change is too large for the activation's dtype.

        Warns:
            UserWarning: If the metadata name another type of model or another depth, or if addition
                would move the activations by more than their own norm, in sum over the layers
                (:meth:`shares`).
            RuntimeWarning: On leaving, if the model did not run inside the block, or if it ran and
                one of the layers was not steered.

        >>> with vector.apply(model, multiplier=2.0, tokens=generated(inputs)):
        ...     output = model.generate(**inputs, max_new_tokens=4)
        """

        def steering() -> Steering:
            selector = one_selection(min_token_index, token_indices, tokens)
            return steering_of(
                self, model, layer_config, operator, as_multiplier(multiplier), selector, this_thread_only
            )

        checked = steering()  # so that mistakes are raised here, before the block
        warn_of_doubts(self, checked)
        return SteeringContext(steering, shown=repr(checked))

    @with_hints(**CALL_HINTS)
    def patch(
        self,
        model: nn.Module,
        layer_config: ModelLayerConfig | None = None,
        operator: PatchDeltaOperator | Callable[..., Tensor] | None = None,
        multiplier: Numbers = 1.0,
        min_token_index: int | None = None,
        token_indices: TokenSelection | None = None,
        *,
        tokens: TokenSelection | None = None,
        this_thread_only: bool = False,
    ) -> SteeringPatchHandle:
        """Steer ``model`` from now on, until ``remove()`` of the returned handle is called.

        ``patch_activations`` is the older name of this method. Errors and warnings are those of
        :meth:`apply`.

        Args:
            model: The model to steer.
            layer_config: The layers' names, as in :meth:`apply`.
            operator: A callable that gets the activation and the direction times ``multiplier``,
                and returns what is added.
            multiplier: One number, or one for each row of a batch.
            min_token_index: An older way to write ``tokens=from_index(min_token_index)``.
            token_indices: The older name of ``tokens``.
            tokens: The tokens to steer, as in :meth:`apply`; by default all.
            this_thread_only: True to steer only the passes in the thread that calls this method.

        >>> handle = vector.patch(model, multiplier=2.0)
        >>> handle.remove()
        """
        selector = one_selection(min_token_index, token_indices, tokens)
        steering = steering_of(
            self, model, layer_config, operator, as_multiplier(multiplier), selector, this_thread_only
        )
        warn_of_doubts(self, steering)
        return attach(steering)

    patch_activations = patch

    def shares(self) -> dict[int, float]:
        """Return each direction's norm as a share of the norm of the activations at its layer.

        Those are the median of what training read of the model. Shares times the multiplier, in sum
        over the layers, say how much a steering adds to what is there. Layers for which the
        activations' norm is unknown are left out: those of vectors that weren't trained, or were
        combined across models.

        >>> train_steering_vector(model, tokenizer, [("I love it", "I hate it")], layers=[1]).shares()
        {1: ...}
        """
        return shares_of(self.layer_activations, self.metadata)

    def __add__(self, other: object) -> SteeringVector:
        """Return the sum at each layer that either vector has.

        Raises:
            ValueError: If layer types or widths differ.
        """
        return self._combined(other, "{} + {}", torch.add)

    def __radd__(self, other: object) -> SteeringVector:
        """Return the vector for ``0 + vector``, so that ``sum(vectors)`` works."""
        return replace(self) if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: object) -> SteeringVector:
        """Return the difference at each layer that either vector has.

        Raises:
            ValueError: If layer types or widths differ.
        """
        return self._combined(other, "{} - {}", torch.sub)

    def __mul__(self, factor: float | Tensor) -> SteeringVector:
        """Return the vector with each direction multiplied by a number.

        Gradients flow to a number that requires grad.

        >>> (2 * SteeringVector({1: [3.0, 4.0]})).layer_activations
        {1: tensor([6., 8.])}
        """
        return NotImplemented if isinstance(factor, SteeringVector) else self.scaled(checked_factor(factor, "a factor"))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> SteeringVector:
        """Return the vector with each direction divided by a number, as it is multiplied.

        Raises:
            ZeroDivisionError: If the number is 0.
        """
        number = checked_factor(divisor, "a divisor")
        if plain_number(number) == 0:
            raise ZeroDivisionError("a steering vector can't be divided by 0")
        made = {layer: d / number for layer, d in checked_directions(self.layer_activations).items()}
        return self._with(made, f"{{}} / {plain_number(number):g}")

    def __neg__(self) -> SteeringVector:
        return self._with({n: -direction for n, direction in checked_directions(self.layer_activations).items()}, "-{}")

    def cosine_similarity(self, other: SteeringVector) -> dict[int, float]:
        """Return the cosine of the angle between the directions, for each layer that both vectors have.

        It is NaN where a direction is all zeros.

        Raises:
            ValueError: If layer types or widths differ, or if the vectors have no layer in common.

        >>> other = SteeringVector({1: [4.0, 3.0], 2: [1.0, 0.0]})
        >>> SteeringVector({1: [3.0, 4.0]}).cosine_similarity(other)
        {1: 0.96}
        """
        self._check_alike(other)
        found = cosines(self.layer_activations, other.layer_activations)
        if not found:
            raise ValueError(f"the vectors have no layer in common: one has {self.layers}, the other {other.layers}")
        return found

    def orthogonal_to(self, other: SteeringVector) -> SteeringVector:
        """Return the vector without the part of each direction along the other's at the same layer.

        Layers that the other vector lacks stay as they are.

        Raises:
            ValueError: If layer types or widths differ.

        >>> other = SteeringVector({1: [2.0, 0.0]})
        >>> SteeringVector({1: [3.0, 4.0]}).orthogonal_to(other).layer_activations
        {1: tensor([0., 4.])}
        """
        self._check_alike(other)
        made = orthogonal(self.layer_activations, other.layer_activations)
        return self._with(made, "{} without what is along {}", other)

    def project(self, activations: Mapping[int, Tensor | Sequence[Tensor]]) -> dict[int, Any]:
        """Project activations on the directions: ``h·u`` with ``u = d / ‖d‖``, for monitoring.

        Args:
            activations: A mapping from layers to tensors ``(…, hidden)`` or lists of them, as
                ``record_activations`` and ``read_activations`` return them.

        Returns:
            The projections in the same form without the last axis, in float32 or wider, for the
            layers that both have.

        Raises:
            ValueError: If there is no such layer, if a width differs, or if a direction is all
                zeros.

        >>> SteeringVector({1: [3.0, 4.0]}).project({1: torch.tensor([[1.0, 0.0], [3.0, 4.0]])})
        {1: tensor([0.6000, 5.0000])}
        """
        found = projections(checked_directions(self.layer_activations), activations)
        if not found:
            raise ValueError(f"activations must have one of the layers {self.layers}, got only {sorted(activations)}")
        return found

    def top_tokens(self, model: nn.Module, tokenizer: Any, k: int = 10) -> TopTokens:
        """Return the tokens that each direction promotes most and suppresses most, printed as a table.

        The model's final norm and head are applied to the direction: :func:`~steering_vectors.unembed`.

        Args:
            model: The model that the vector was made for.
            tokenizer: The model's tokenizer, or a processor that has one.
            k: The number of tokens of each kind.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the vector is of a norm's output, of heads or of neurons, which aren't
                part of the residual stream, and as :func:`~steering_vectors.unembed` does.

        >>> vector.top_tokens(model, tokenizer, k=2)[1].promoted
        ((..., ...), (..., ...))
        """
        return top_tokens(model, tokenizer, checked_directions(self.layer_activations), self.layer_type, k)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vector to one safetensors file, bit for bit, and whole or not at all.

        Raises:
            FileNotFoundError: If the folder doesn't exist.
            IsADirectoryError: If ``path`` is a folder.
            ValueError: If the vector has no directions.
        """
        write(path, self.layer_activations, self.layer_type, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringVector:
        """Load a vector from a file that :meth:`save` wrote, on the CPU. Nothing in the file is executed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is anything but a complete file of a steering vector: a pickle,
                a file that is cut off or too large, a newer format, numbers that aren't finite.
        """
        directions, layer_type, metadata = read(path)
        return cls(directions, layer_type, metadata=metadata)  # type: ignore[arg-type]  # read() has checked the layer type

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the vector and a model card into a folder: :func:`steering_vectors.hub.save_pretrained`."""
        from steering_vectors import hub

        hub.save_pretrained(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a steering vector",
        create_pr: bool = False,
    ) -> str:
        """Upload the vector to the Hugging Face hub: :func:`steering_vectors.hub.push_to_hub`.

        Args:
            repo_id: The repository's name, such as ``"user/joy"``. It is created if needed.
            token: A token of the hub; by default that of ``hf auth login``.
            private: True to create a private repository.
            revision: The branch.
            commit_message: The commit's message.
            create_pr: True to open a pull request instead of committing to the branch.

        Returns:
            The commit's URL.
        """
        from steering_vectors import hub

        return hub.push_to_hub(
            self,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    @staticmethod
    def from_pretrained(
        repo_id_or_folder: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> SteeringVector:
        """Load a vector from a folder or the hub: :func:`steering_vectors.hub.from_pretrained`.

        Args:
            repo_id_or_folder: The folder's path, or the repository's name.
            revision: A branch, tag or commit of the repository.
            token: A token of the hub; by default that of ``hf auth login``.
        """
        from steering_vectors import hub

        return hub.from_pretrained(repo_id_or_folder, revision=revision, token=token)

    def normalized(self) -> SteeringVector:
        """Return the vector with each direction at norm 1.

        Raises:
            ValueError: If a direction is all zeros.

        >>> SteeringVector({1: [3.0, 4.0]}).normalized().layer_activations[1]
        tensor([0.6000, 0.8000])
        """
        zeros = [layer for layer, norm in self.norms().items() if norm == 0]
        if zeros:
            raise ValueError(f"the directions of layers {zeros} are all zeros, which have no norm 1: leave them out")
        directions = checked_directions(self.layer_activations)
        # In float64, so that no norm overflows, and on the CPU, as some devices have no float64.
        made = {layer: unit_direction(d.cpu().double()).to(d) for layer, d in directions.items()}
        return self._with(made, "{} at norm 1")

    def scaled(self, factor: float | Tensor | Mapping[int, float | Tensor]) -> SteeringVector:
        """Return the vector with each direction times ``factor``.

        Gradients flow to factors that require grad.

        Args:
            factor: One number, or a mapping with one for each layer. Layers in the mapping that
                this vector lacks are ignored, as :func:`~steering_vectors.residual_norms` returns
                all layers of a model.

        Raises:
            TypeError: If a factor is not a number.
            ValueError: If a mapping lacks one of this vector's layers, or if numbers aren't finite.

        >>> SteeringVector({1: [3.0, 4.0]}).scaled({0: 10.0, 1: 2.0}).norms()
        {1: 10.0}
        """
        factors = factor if isinstance(factor, Mapping) else dict.fromkeys(self.layers, factor)
        missing = [layer for layer in self.layers if layer not in factors]
        if missing:
            raise ValueError(f"factor must have a number for each layer: it lacks {missing}, and has {list(factors)}")
        numbers = {layer: checked_factor(factors[layer], "a factor") for layer in self.layers}
        made = {layer: scaled(d, numbers[layer]) for layer, d in checked_directions(self.layer_activations).items()}
        return self._with(
            made, "{} scaled by layer" if isinstance(factor, Mapping) else f"{plain_number(factor):g} * {{}}"
        )

    def __getitem__(self, layers: int | slice | Iterable[int]) -> SteeringVector:
        """Return the vector of some layers: ``vec[12]``, ``vec[[10, 12]]``, ``vec[10:14]``.

        A slice means the layer numbers in it, without its stop. An open end means the lowest or
        highest layer of this vector. Negative numbers count from the end of the model, if the
        metadata record its depth. Directions are shared, not copied.

        Raises:
            LookupError: If this vector lacks one of the layers.
            TypeError: If an index is not a layer number.
        """
        depth = self.metadata.get("layers_of_model", "")
        wanted = asked_layers(self.layers, layers, depth=int(depth) if depth.isdecimal() else None)
        return self._of_same_origin({layer: self.layer_activations[layer] for layer in wanted})

    # The signatures of torch.Tensor.to.
    @overload
    def to(self, dtype: torch.dtype, non_blocking: bool = False, copy: bool = False) -> SteeringVector: ...

    @overload
    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        copy: bool = False,
    ) -> SteeringVector: ...

    @overload
    def to(self, other: Tensor, non_blocking: bool = False, copy: bool = False) -> SteeringVector: ...

    def to(self, *args: Any, **kwargs: Any) -> SteeringVector:
        """Return the vector with each direction moved or converted, with ``torch.Tensor.to``'s arguments.

        >>> SteeringVector({1: [3.0, 4.0]}).to(torch.bfloat16).layer_activations[1].dtype
        torch.bfloat16
        """
        return self._of_same_origin({n: d.to(*args, **kwargs) for n, d in self.layer_activations.items()})

    def _of_same_origin(self, directions: dict[int, Tensor]) -> SteeringVector:
        return replace(self, layer_activations=directions, metadata=inherited(self.metadata))

    def _combined(self, other: object, operation: str, combine: Callable[[Tensor, Tensor], Tensor]) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented  # type: ignore[no-any-return]
        self._check_alike(other)
        return self._with(united(self.layer_activations, other.layer_activations, combine), operation, other)

    def _with(self, directions: dict[int, Tensor], operation: str, *others: SteeringVector) -> SteeringVector:
        """Return a vector with the directions that an operation computed; its metadata record the operation."""
        metadata = derived(operation, self.metadata, *(other.metadata for other in others))
        return SteeringVector(directions, self.layer_type, metadata=metadata)

    def _check_alike(self, other: object) -> None:
        if not isinstance(other, SteeringVector):
            raise TypeError(f"expected a SteeringVector, got {type(other).__name__}")
        if self.layer_type != other.layer_type:
            raise ValueError(f"the vectors have different layer types: {self.layer_type!r} and {other.layer_type!r}")
        sites = [vector.metadata.get("layer_config", "") for vector in (self, other)]
        if sites[0] != sites[1]:
            raise ValueError(f"the vectors belong to different modules: layer_config is {sites[0]!r} and {sites[1]!r}")
        widths = {vector.hidden_size for vector in (self, other) if vector.layer_activations}
        if len(widths) > 1:
            raise ValueError(f"the directions have different widths: {self.hidden_size} and {other.hidden_size}")

    def __eq__(self, other: object) -> bool:
        """Return True if layers, their modules, values, dtypes and shapes are equal; devices may differ."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        sites = ((v.layer_type, v.metadata.get("layer_config", "")) for v in (self, other))
        return len(set(sites)) == 1 and are_equal(self.layer_activations, other.layer_activations)

    __hash__ = None  # type: ignore[assignment]  # a mutable value

    def __repr__(self) -> str:
        return line_of(self.layer_activations, self.layer_type)

    def _repr_html_(self) -> str:
        return table_of(self.layer_activations, self.layer_type, self.metadata)
