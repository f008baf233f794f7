"""Token selection: the positions of a forward pass's tokens, and selectors over them.

A selector is any callable from :class:`~steering_vectors.TokenPositions` to a tensor ``(batch, seq)``: a bool mask, or
weights.
:class:`~steering_vectors.Selector` lists the attributes that it may have.
Selectors combine by ``&``, ``|``, ``~`` and multiplication by a number, as
:class:`~steering_vectors.CombinableSelector` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering_vectors._arguments import check_takes, is_whole_number
from steering_vectors._tokens import (
    CombinableSelector,
    Prompt,
    Selector,
    TokenPositions,
    TokenSelection,
    integer,
    is_one_of,
    is_open,
    lifted,
    per_row,
    prompt_length,
    prompt_of,
    token_ids,
)

__all__ = [
    "CombinableSelector",
    "Selector",
    "TokenPositions",
    "after",
    "at",
    "completion",
    "from_index",
    "generated",
    "prompted",
    "select",
]


def from_index(n: int | Sequence[int]) -> CombinableSelector:
    """Select the own tokens from index ``n`` on: ``from_index(1)`` selects all but the first.

    Args:
        n: One index, counted from 0, or one per row of the batch.

    Raises:
        ValueError: If a number is negative, since a row's end is unknown while it is generated. To
            steer the answer, use :func:`generated`.

    >>> from_index(1)
    from_index(1)
    """
    return _FromIndex(_own_indices(n, "from_index"))


def at(indices: int | Sequence[int]) -> CombinableSelector:
    """Select the own tokens at ``indices``, counted from 0, the same in each row.

    Raises:
        ValueError: If an index is negative, as in :func:`from_index`.

    >>> at([0, 3])(TokenPositions(index=torch.tensor([[-1, 0, 1]]), column=torch.arange(3)))
    tensor([[False,  True, False]])
    """
    numbers = _own_indices(indices, "at")
    return _At((numbers,) if isinstance(numbers, int) else numbers)


def generated(
    inputs: Mapping[str, Any] | int | Sequence[int] | None = None,
    *,
    strength: Callable[[Tensor], Tensor] | None = None,
) -> CombinableSelector:
    """Select the tokens whose outputs decide the answer: those from the prompt's last token on.

    Without ``inputs``, the first pass over each cache is assumed to be the prompt. With chunked
    prefill, pass ``inputs``: a last chunk of a single token looks like a token of the answer. With
    ``guidance_scale``, pass none, since there are two prompts. In an encoder-decoder model, the
    decoder's tokens are steered: ``inputs`` must hold its ``decoder_input_ids``.

    Args:
        inputs: The mapping passed to ``model.generate``, with ``attention_mask`` ``(batch, seq)``,
            or the prompts' lengths in tokens: one number, or one per row. It shows where the
            prompts end.
        strength: A function from the steps ``(batch, seq)``, int64, to weights of that shape, as in
            ``lambda step: 0.8**step``. Step 0 is the prompt's last token, whose output decides the
            first token of the answer. Tokens before it have step 0 too and are not selected.

    Raises:
        TypeError: If ``inputs`` is a bare tensor, since token ids and masks look alike.
        ValueError: In the pass, if ``inputs`` holds ``input_ids`` and the pass begins with another
            prompt, since the selector was left over from an earlier one. Without ``inputs``, where
            the prompt's end can't be known: if the pass neither got a cache nor was called with
            ``use_cache=True``, with several tokens on a cache that is not empty, and in assisted
            decoding.

    >>> selector = generated(3)
    >>> selector(TokenPositions(index=torch.arange(5)[None], column=torch.arange(5)))
    tensor([[False, False,  True,  True,  True]])
    """
    if strength is not None:
        check_takes(strength, 1, "the strength", "lambda step: 0.8**step")
    return _Generated(prompt_of(inputs, "generated"), strength=strength)


def prompted(inputs: Mapping[str, Any] | int | Sequence[int] | None = None) -> CombinableSelector:
    """Select the prompt's tokens except the last: the own tokens that :func:`generated` leaves out.

    Args:
        inputs: The prompts, as in :func:`generated`, whose errors are raised here too.

    >>> prompted(3)(TokenPositions(index=torch.arange(5)[None], column=torch.arange(5)))
    tensor([[ True,  True, False, False, False]])
    """
    return _Generated(prompt_of(inputs, "prompted"), before=True)


def completion() -> CombinableSelector:
    """Select the tokens after the prompt.

    In training, these are the text of the last assistant turn, including its thinking block, if
    any. In generation, they are all that follows the first pass over a cache.

    Raises:
        ValueError: In the pass, if the prompt's length is unknown.

    >>> index, column = torch.arange(3)[None], torch.arange(3)
    >>> positions = TokenPositions(index, column, prompt_length=torch.tensor([2]))
    >>> completion()(positions)
    tensor([[False, False,  True]])
    """
    return _Completion()


def after(tokens: int | Sequence[int], *, until: int | Sequence[int] | None = None) -> CombinableSelector:
    """Select what follows a token or a sequence of tokens, wherever it stands in a row.

    The first selected token is the last one of the sequence, since its output decides the next
    token, as in :func:`generated`. The last selected token is the one before the last token of
    ``until``: until then it can't be known that ``until`` comes. Where the sequence comes again,
    tokens are selected again.

    In other words, a token is selected if among the row's tokens up to it and with it, ``tokens``
    ended later than ``until``; where both end at the same token, the longer of the two decides.
    Padding is passed over, and cached tokens count.

    Args:
        tokens: A token id, such as ``tokenizer.convert_tokens_to_ids("</think>")``, or a sequence
            of ids.
        until: An id or ids that end the selection. Without them it lasts to the row's end.

    Raises:
        TypeError: For a text: tokenize it first.
        ValueError: If there are no ids, or the same for both. In the pass, where the rows' token
            ids can't be known: if the model gets embeddings instead, or a cache that was filled
            before the steering was attached.

    >>> selector = after(7, until=9)
    >>> ids = torch.tensor([[5, 7, 6, 9, 7]])
    >>> selector(TokenPositions(torch.arange(5)[None], torch.arange(5), row_ids=ids))
    tensor([[False,  True,  True, False,  True]])
    """
    opening = token_ids(tokens, "after(tokens)")
    closing = None if until is None else token_ids(until, "after(…, until=…)")
    if opening == closing:
        raise ValueError(f"after(tokens, until=…) got the same ids for both, {list(opening)}: nothing lies between")
    return _After(opening, closing)


def select(tokens: TokenSelection) -> CombinableSelector:
    """Return a selector that combines with others, for whatever ``tokens=`` takes.

    Args:
        tokens: A list of token indices, a slice, a mask or a function, as in
            :meth:`SteeringVector.apply`.

    Raises:
        TypeError: For anything else.
        ValueError: For a mask that isn't one, and for a slice with a step below 1.

    >>> select([0, 1]) | generated(5)
    select([0, 1]) | generated([5])
    """
    return lifted(tokens)


@dataclass(frozen=True)
class _FromIndex(CombinableSelector):
    n: int | tuple[int, ...]
    counts_from_end = needs_prompt_length = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        return positions.index >= per_row(self.n, positions, "from_index")

    @property
    def rows(self) -> int:
        return 1 if isinstance(self.n, int) else len(self.n)

    def __repr__(self) -> str:
        return f"from_index({self.n if isinstance(self.n, int) else list(self.n)})"


@dataclass(frozen=True)
class _At(CombinableSelector):
    indices: tuple[int, ...]
    rows = 1
    counts_from_end = needs_prompt_length = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        return is_one_of(positions.index, self.indices)

    def __repr__(self) -> str:
        return f"at({list(self.indices)})"


@dataclass(frozen=True)
class _Generated(CombinableSelector):
    """The own tokens from each prompt's last one on or, with ``before``, those before it."""

    prompt: Prompt | None
    before: bool = False
    strength: Callable[[Tensor], Tensor] | None = None
    counts_from_end = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        last = prompt_length(self.prompt, positions, self._name) - 1
        if self.before:
            return (positions.index >= 0) & (positions.index < last)
        step = positions.index - last
        return step >= 0 if self.strength is None else self._weights(self.strength, step)

    @staticmethod
    def _weights(strength: Callable[[Tensor], Tensor], step: Tensor) -> Tensor:
        weights: Any = strength(step.clamp(min=0))
        if not isinstance(weights, Tensor) or weights.shape != step.shape:
            got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(
                f"generated(strength=…) needs a function that returns a weight for each of the steps (batch, seq) = "
                f"{tuple(step.shape)}, as lambda step: 0.8**step does; it returned {got}"
            )
        return torch.where(step >= 0, weights, torch.zeros_like(weights))

    @property
    def rows(self) -> int:
        return 1 if self.prompt is None else len(self.prompt.lengths)

    @property
    def needs_prompt_length(self) -> bool:
        return self.prompt is None

    @property
    def _name(self) -> str:
        return "prompted" if self.before else "generated"

    def __repr__(self) -> str:
        given = [] if self.prompt is None else [_short(self.prompt.lengths)]
        if self.strength is not None:
            given.append(f"strength={getattr(self.strength, '__name__', repr(self.strength))}")
        return f"{self._name}({', '.join(given)})"


@dataclass(frozen=True)
class _Completion(CombinableSelector):
    rows = 1
    counts_from_end = False
    needs_prompt_length = True

    def __call__(self, positions: TokenPositions) -> Tensor:
        return positions.index >= prompt_length(None, positions, "completion")

    def __repr__(self) -> str:
        return "completion()"


@dataclass(frozen=True)
class _After(CombinableSelector):
    tokens: tuple[int, ...]
    until: tuple[int, ...] | None
    rows = 1
    counts_from_end = needs_prompt_length = False
    needs_row_ids = True

    def __call__(self, positions: TokenPositions) -> Tensor:
        return is_open(positions, self.tokens, self.until)

    def __repr__(self) -> str:
        until = "" if self.until is None else f", until={_one_or_list(self.until)}"
        return f"after({_one_or_list(self.tokens)}{until})"


def _own_indices(n: int | Sequence[int], selector: str) -> int | tuple[int, ...]:
    numbers: int | tuple[int, ...]
    if isinstance(n, Iterable) and not is_whole_number(n):
        numbers = tuple(integer(i, selector) for i in n)
    else:
        numbers = integer(n, selector)
    if numbers == ():
        raise ValueError(f"{selector} needs at least one token index, got {n!r}")
    if min((numbers,) if isinstance(numbers, int) else numbers) < 0:
        raise ValueError(
            f"{selector} counts a row's own tokens from 0, got {n}: negative indices don't work, since a row's end is "
            f"unknown while it is generated. To steer the answer, use generated(inputs)."
        )
    return numbers


def _short(numbers: tuple[int, ...]) -> str:
    return str(list(numbers)) if len(numbers) <= 4 else f"{len(numbers)} prompts"


def _one_or_list(numbers: tuple[int, ...]) -> str:
    return str(numbers[0] if len(numbers) == 1 else list(numbers))
