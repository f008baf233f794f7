"""The positions of a pass's tokens, and selectors over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from steering_vectors._arguments import call_hint


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """Positions of the tokens of one forward pass.

    All tensors but those of the call's arguments are on one device. A selector must not change any.

    Args:
        index: ``(batch, seq)``, int64: each token's place among its row's own tokens, from 0.
            Cached tokens are counted, padding is not; padding itself has -1.
        column: ``(seq,)``, int64: the place in the padded row, including cached columns.
        input_ids: ``(batch, seq)``: the token ids, or None if the pass got embeddings.
        prompt_length: ``(batch,)``, int64: the number of own tokens before the completion, or None
            if that is unknown.
        begins_sequence: True if the pass is known to have no cached tokens before it. It is False
            where only the device knows that: in a pass of one token over a static cache.
        several_texts: True if a row holds several texts, which don't see each other; each has
            indices from 0.
        beside_encoder: True if the tokens are a decoder's, beside an encoder's.
        beside_another: True if the pass begins a text right after another text's first pass, whose
            cache is in use.
        is_whole: True if no cache is kept, so that the pass holds its rows from the first token to
            the last so far.
        row_ids: ``(batch, past + seq)``, int64: the token ids of each row so far, cached ones too,
            with -1 on padding. The last ``seq`` columns are the pass's. None unless the selector
            says that it needs them.
        arguments: The arguments with which the model was called, by name, for as long as the pass
            lasts. Empty where no model is called, as in the choice of tokens to read in training.

    >>> positions = TokenPositions(index=torch.tensor([[-1, 0, 1]]), column=torch.arange(3))
    >>> from_index(1)(positions)
    tensor([[False, False,  True]])
    """

    index: Tensor
    column: Tensor
    input_ids: Tensor | None = None
    prompt_length: Tensor | None = None
    begins_sequence: bool = False
    several_texts: bool = False
    beside_encoder: bool = False
    beside_another: bool = False
    is_whole: bool = False
    row_ids: Tensor | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Selector(Protocol):
    """Any callable from :class:`TokenPositions` to a bool mask or to weights ``(batch, seq)``.

    A function or a lambda will do. It runs once a pass. With weights that require grad, such as a
    learned gate, it runs once for each layer, and the weights get their gradients even where they
    are 0.

    A selector may have the attributes below. Without them, the safe case is assumed: training
    inside such a steering runs each prompt alone, and the selector may read the prompt's length.
    Only the rows' token ids must be asked for.

    Attributes:
        rows: The number of batch rows that it distinguishes, or 1 if it applies the same rule to
            each row. Training forms its own batches, so inside such a steering it is refused for
            more than 1.
        counts_from_end: True if it counts columns from the end of a pass, which may be padding.
            Training inside such a steering is refused if it does.
        needs_prompt_length: False if it never reads ``positions.prompt_length``, which is then
            None.
        needs_row_ids: True if it reads ``positions.row_ids``, which is else None. The pass raises
            ValueError where the ids can't be known: if the model gets embeddings, or a cache that
            was filled before the steering was attached.

    >>> class EveryNth:
    ...     rows, counts_from_end, needs_prompt_length = 1, False, False
    ...
    ...     def __init__(self, step: int) -> None:
    ...         self.step = step
    ...
    ...     def __call__(self, positions: TokenPositions) -> torch.Tensor:
    ...         return positions.index % self.step == 0
    >>> EveryNth(2)(TokenPositions(index=torch.arange(3)[None], column=torch.arange(3)))
    tensor([[ True, False,  True]])
    """

    def __call__(self, positions: TokenPositions, /) -> Tensor:
        """Return a mask of the selected tokens, or the tokens' weights."""


def goes_by_row_or_end(selector: object) -> bool | None:
    """Return True if the selector, or an operator that asks for positions, distinguishes rows or counts from their end.

    The result is None if its attributes leave that open.
    """
    rows, counts_from_end = (getattr(selector, name, None) for name in ("rows", "counts_from_end"))
    if counts_from_end or rows not in (None, 1):
        return True
    return None if rows is None or counts_from_end is None else False


def may_need_prompt_length(selector: object) -> bool:
    """Return False only if the attributes of a selector or operator rule out that it reads the prompt's length."""
    needs = getattr(selector, "needs_prompt_length", None)
    return needs is None or bool(needs)


def needs_row_ids(selector: object) -> bool:
    """Return True for a selector, or an operator that asks for positions, that asks for the rows' token ids."""
    return bool(getattr(selector, "needs_row_ids", False))


def selected(selector: Selector, positions: TokenPositions) -> Tensor:
    """Return the selector's result for ``positions``, checked: a bool mask or float weights, ``(batch, seq)``.

    Raises TypeError or ValueError for any other result. Weights that aren't finite are noticed on the CPU only.
    """
    weights = selector(positions)
    if not isinstance(weights, Tensor):
        hint = call_hint(selector) if callable(weights) else ""
        raise TypeError(
            f"the selector {selector!r} returned {type(weights).__name__}, expected a tensor (batch, seq){hint}"
        )
    if weights.shape != positions.index.shape:
        raise ValueError(
            f"the selector {selector!r} returned a tensor of shape {tuple(weights.shape)}, "
            f"expected (batch, seq) = {tuple(positions.index.shape)}"
        )
    if weights.dtype is torch.bool:
        return weights
    if weights.dtype.is_floating_point:
        # Looking at weights on another device would wait for it.
        if weights.device.type == "cpu" and not bool(weights.isfinite().all()):
            raise ValueError(f"the selector {selector!r} returned weights that are NaN or infinite")
        return weights
    if weights.dtype.is_complex:
        raise TypeError(f"the selector {selector!r} returned complex numbers, expected a mask or real weights")
    return weights.to(torch.float32)
