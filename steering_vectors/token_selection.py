"""Token selection: the positions of a forward pass's tokens, and selectors over them.

A selector is any callable from :class:`TokenPositions` to a tensor ``(batch, seq)``: a bool mask, or weights.
:class:`Selector` lists the attributes that it may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steering_vectors._arguments import is_whole_number
from steering_vectors._tokens import (
    Prompt,
    Selector,
    TokenPositions,
    integer,
    is_one_of,
    per_row,
    prompt_length,
    prompt_of,
)

__all__ = ["Selector", "TokenPositions", "at", "completion", "from_index", "generated", "prompted"]


def from_index(n: int | Sequence[int]) -> Selector:
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


def at(indices: int | Sequence[int]) -> Selector:
    """Select the own tokens at ``indices``, counted from 0, the same in each row.

    Raises:
        ValueError: If an index is negative, as in :func:`from_index`.

    >>> at([0, 3])(TokenPositions(index=torch.tensor([[-1, 0, 1]]), column=torch.arange(3)))
    tensor([[False,  True, False]])
    """
    numbers = _own_indices(indices, "at")
    return _At((numbers,) if isinstance(numbers, int) else numbers)


def generated(inputs: Mapping[str, Any] | int | Sequence[int] | None = None) -> Selector:
    """Select the tokens whose outputs decide the answer: those from the prompt's last token on.

    Without ``inputs``, the first pass over each cache is assumed to be the prompt. With chunked
    prefill, pass ``inputs``: a last chunk of a single token looks like a token of the answer. With
    ``guidance_scale``, pass none, since there are two prompts. In an encoder-decoder model, the
    decoder's tokens are steered: ``inputs`` must hold its ``decoder_input_ids``.

    Args:
        inputs: The mapping passed to ``model.generate``, with ``attention_mask`` ``(batch, seq)``,
            or the prompts' lengths in tokens: one number, or one per row. It shows where the
            prompts end.

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
    return _Generated(prompt_of(inputs, "generated"))


def prompted(inputs: Mapping[str, Any] | int | Sequence[int] | None = None) -> Selector:
    """Select the prompt's tokens except the last: the own tokens that :func:`generated` leaves out.

    Args:
        inputs: The prompts, as in :func:`generated`, whose errors are raised here too.

    >>> prompted(3)(TokenPositions(index=torch.arange(5)[None], column=torch.arange(5)))
    tensor([[ True,  True, False, False, False]])
    """
    return _Generated(prompt_of(inputs, "prompted"), before=True)


def completion() -> Selector:
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


@dataclass(frozen=True)
class _FromIndex:
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
class _At:
    indices: tuple[int, ...]
    rows = 1
    counts_from_end = needs_prompt_length = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        return is_one_of(positions.index, self.indices)

    def __repr__(self) -> str:
        return f"at({list(self.indices)})"


@dataclass(frozen=True)
class _Generated:
    """The own tokens from each prompt's last one on or, with ``before``, those before it."""

    prompt: Prompt | None
    before: bool = False
    counts_from_end = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        last = prompt_length(self.prompt, positions, self._name) - 1
        return (positions.index >= 0) & (positions.index < last) if self.before else positions.index >= last

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
        return f"{self._name}({'' if self.prompt is None else _short(self.prompt.lengths)})"


@dataclass(frozen=True)
class _Completion:
    rows = 1
    counts_from_end = False
    needs_prompt_length = True

    def __call__(self, positions: TokenPositions) -> Tensor:
        return positions.index >= prompt_length(None, positions, "completion")

    def __repr__(self) -> str:
        return "completion()"


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
