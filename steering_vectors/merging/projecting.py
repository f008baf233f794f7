"""Merge an ablation into a model's weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors._arguments import with_hints
from steering_vectors.ablation import ablate_everywhere
from steering_vectors.merging.copies import (
    check_equal,
    check_mergeable,
    check_text_alone,
    in_whole_float32,
    logits_of,
    restore_dtypes,
    wide_copy,
)
from steering_vectors.merging.writers import check_complete, project, watched_places, writing_weights
from steering_vectors.steering_vector import SteeringVector

__all__ = ["merge_ablation", "unit_rows_of"]

_WHOLE = "weights write at every token and layer alike: ablate with ablate_everywhere"


@with_hints(
    tokens=_WHOLE, rows=_WHOLE, strength=_WHOLE, layer_config=_WHOLE, missing="the arguments are model, direction"
)
@in_whole_float32
def merge_ablation(model: PreTrainedModel, direction: Tensor | SteeringVector) -> PreTrainedModel:
    """Return a copy of ``model`` that can't write along ``direction``: an ordinary model, always ablated.

    The copy computes what ``model`` does inside ``ablate_everywhere(model, direction)``. All weights
    and biases that write to the residual stream become ``W − u uᵀW`` with ``u = d / ‖d‖``: the
    embeddings, and those of each block's attention and MLP, experts included. They are found by
    running a few tokens; no list of models is needed. The result is saved by ``save_pretrained`` and
    loaded by ``from_pretrained`` without this library. It is in evaluation mode, with the given
    model's dtypes and device; the given model is not changed.

    Embeddings that are tied to the head are untied, since the head stays as it is. The two models
    are compared on a few tokens before the copy is returned, in float32, and the copy is rounded to
    the model's dtype at the end. Memory is needed for the model and for a copy in float32.

    Source: weight orthogonalisation, arXiv 2406.11717, section 2.4 and appendix E.

    Args:
        model: A Hugging Face model.
        direction: A direction ``(hidden,)``, several ``(k, hidden)`` of which the span is removed,
            or a vector of one layer.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the direction is all zeros or doesn't fit the model, if several span the whole
            width, if no weights can do it, as where a norm follows attention or the MLP, if weights
            are quantized, not loaded or split over devices, if the model reads images, if it is
            being steered or has forward hooks, or if the copy computes something else.

    Warns:
        UserWarning: If the embeddings were tied to the head.

    >>> merged = merge_ablation(model, torch.ones(32))
    >>> merged.save_pretrained(folder / "ablated")
    """
    check_mergeable(model)
    check_text_alone(model)
    if not isinstance(direction, (Tensor, SteeringVector)):
        raise TypeError(
            f"direction must be a tensor (hidden,) or (k, hidden), or a vector of one layer, got "
            f"{type(direction).__name__}: weights can't remove other directions at each layer"
        )
    merged = wide_copy(model)
    expected = logits_of(merged, ablate_everywhere(merged, direction))
    unit_rows = unit_rows_of(direction)
    places = watched_places(merged)
    axes = writing_weights(merged, places)
    check_complete(merged, places, axes, unit_rows)
    if _untie(merged, axes):
        warnings.warn(
            "the embeddings are no longer tied to the head, which stays as it is, so the merged model has "
            "tie_word_embeddings=False and takes more memory",
            UserWarning,
            stacklevel=4,
        )
    for name, axis in axes.items():
        project(merged.get_parameter(name), unit_rows, axis)
    check_equal(logits_of(merged), expected, "the merged model")
    restore_dtypes(merged, model)
    return merged  # type: ignore[no-any-return]


def unit_rows_of(direction: Tensor | SteeringVector) -> Tensor:
    """Return orthonormal rows ``(rank, hidden)`` in float64 that span the directions, on the CPU.

    A row that is a combination of others, to the rounding of its dtype, adds none.

    Raises ValueError if they span the whole width.
    """
    if isinstance(direction, SteeringVector):
        (direction,) = direction.layer_activations.values()
    rows = direction.detach().cpu().double().reshape(-1, direction.shape[-1])
    rows = rows / rows.abs().amax(dim=-1, keepdim=True)  # norms of very small numbers would be zero
    rows = torch.nn.functional.normalize(rows[rows.isfinite().all(dim=-1)], dim=-1)
    _, sizes, spanning = torch.linalg.svd(rows, full_matrices=False)
    rounding = 2 * len(direction) ** 0.5 * torch.finfo(direction.dtype).eps
    kept: Tensor = spanning[sizes > rounding]
    if len(kept) == kept.shape[-1]:
        raise ValueError(
            f"the directions span all {len(kept)} dimensions of the residual stream, so weights without them would "
            f"write nothing: ablate fewer directions"
        )
    return kept


def _untie(model: Any, axes: dict[str, int]) -> bool:
    """Let the head have weights of its own if they are embeddings that write to the stream, and return True then."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not any(model.get_parameter(name) is weight for name in axes):
        return False
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}
    return True
