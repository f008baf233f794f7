"""Merge a steering vector into a model's weights, as biases."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors._arguments import finite_number, with_hints
from steering_vectors.merging.copies import (
    block_names,
    check_equal,
    check_mergeable,
    in_whole_float32,
    logits_of,
    restore_dtypes,
    wide_copy,
    wide_dtype,
)
from steering_vectors.merging.families import FAMILIES_AS_LLAMA, Family, family_of
from steering_vectors.merging.reexpressed import as_llama, check_is_like_llama
from steering_vectors.steering_vector import SteeringVector

__all__ = ["check_addable", "merge"]

_ALL_ALIKE = "a bias is added at every token, by addition alone: "


@with_hints(
    operator=f"{_ALL_ALIKE}steer with vector.apply, or remove a direction with merge_ablation",
    tokens=f"{_ALL_ALIKE}steer chosen tokens with vector.apply",
    token_indices=f"{_ALL_ALIKE}steer chosen tokens with vector.apply",
    min_token_index=f"{_ALL_ALIKE}steer chosen tokens with vector.apply",
    layer_config="only outputs of the model's decoder blocks can be merged",
    missing="the arguments begin with vector, model",
)
@in_whole_float32
def merge(
    vector: SteeringVector, model: PreTrainedModel, *, multiplier: float = 1.0, engine: str | None = None
) -> PreTrainedModel:
    """Return a copy of ``model`` with the vector in its weights: an ordinary model that is always steered.

    The copy computes what ``model`` does inside ``vector.apply(model, multiplier=multiplier)``. Each
    direction becomes part of the bias of its block's last linear layer, where the family's config
    has a setting for such a bias. Models of Mistral, Qwen2 and Phi-3 without such a setting become
    Llama models that compute the same. The result is saved by ``save_pretrained`` and loaded by
    ``from_pretrained`` without this library. It is in evaluation mode, with the given model's dtypes
    and device; the given model is not changed.

    The two are compared on a few tokens before the copy is returned, in float32, and the copy is
    rounded to the model's dtype at the end. Memory is needed for the model and for a copy in
    float32, which is twice as large as a model in half precision.

    Args:
        vector: The vector, of decoder blocks' outputs.
        model: A Hugging Face model of a family that has such biases; an error lists them.
        multiplier: The factor on the directions.
        engine: None if transformers will run the result; ``"vllm"`` to refuse the families that
            vLLM isn't known to serve with their biases.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the family has no such bias, if the vector is of another layer type, has no
            directions or doesn't fit the model, if weights are quantized, not loaded, split over
            devices or too large for their dtype, if the model is being steered or has forward hooks,
            which weights can't hold, or if the copy computes something else.

    Warns:
        UserWarning: As :meth:`~steering_vectors.SteeringVector.apply` does.

    >>> merged = merge(vector, model, multiplier=2.0)
    >>> merged.save_pretrained(folder / "steered")
    """
    check_addable(vector, "merged")
    number = finite_number(multiplier, "multiplier")
    check_mergeable(model)
    family = family_of(model.config.model_type, engine)
    for name, value in family.needed.items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"with {name}={getattr(model.config, name)}, the model has a norm after its blocks' last bias, so a "
                f"vector can't be merged into it: steer with vector.apply"
            )
    if model.config.model_type in FAMILIES_AS_LLAMA:
        check_is_like_llama(model)
    merged = wide_copy(model)
    expected = logits_of(merged, vector.apply(merged, multiplier=number))
    if merged.config.model_type in FAMILIES_AS_LLAMA:
        merged = as_llama(merged)
    _add_missing_biases(merged, family)
    names = block_names(merged)
    factor = float(getattr(merged.config, family.factor)) if family.factor else 1.0
    for layer, direction in vector.layer_activations.items():
        _add(merged.get_parameter(f"{names[layer]}.{family.bias}"), direction, number / factor)
    check_equal(logits_of(merged), expected, "the merged model")
    restore_dtypes(merged, model)
    return merged  # type: ignore[no-any-return]


def check_addable(vector: object, done: str) -> None:
    """Raise TypeError unless it is a steering vector, ValueError unless its directions are of blocks' outputs."""
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"vector must be a SteeringVector, got {type(vector).__name__}")
    if not vector.layer_activations:
        raise ValueError(f"the vector has no directions, so there is nothing to be {done}")
    kind = vector.layer_type
    if kind != "decoder_block" or vector.metadata.get("layer_config"):
        raise ValueError(
            f"only a vector of decoder blocks' outputs can be {done}, and this one is of "
            f"{'other modules' if kind == 'decoder_block' else kind}: steer with vector.apply"
        )


def _add_missing_biases(model: Any, family: Family) -> None:
    """Switch the family's biases on, in place; new ones are zeros."""
    for name, value in family.settings.items():
        setattr(model.config, name, value)
    with torch.device("meta"):
        wanted = type(model)(copy.deepcopy(model.config))
    there = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in wanted.named_parameters(remove_duplicate=False):
        if name not in there and name.endswith("bias"):
            owner, _, last = name.rpartition(".")
            zeros = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
            setattr(model.get_submodule(owner), last, nn.Parameter(zeros))


@torch.no_grad()
def _add(bias: nn.Parameter, direction: Tensor, factor: float) -> None:
    """Add a direction times a factor to a bias ``(hidden,)``, or to each expert's ``(experts, hidden)``, in place."""
    wide = torch.promote_types(wide_dtype(bias), direction.dtype)
    bias.copy_(bias.to(wide) + factor * direction.detach().reshape(-1).to(bias.device, wide))
