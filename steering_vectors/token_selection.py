"""Which tokens: what a forward pass says of its tokens, and selectors over it.

A selector is any callable from :class:`TokenPositions` to a tensor ``(batch, seq)``: a bool mask, or weights.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """Where the tokens of one forward pass stand.

    ``index`` ``(batch, seq)``, int64: the place of each token in its row's own tokens, from 0. Padding is not counted,
    cached tokens are; padding itself has -1.
    ``column`` ``(seq,)``, int64: the place in the padded row, cached columns counted.
    ``input_ids`` ``(batch, seq)``, or None where the pass got embeddings.
    ``prompt_length`` ``(batch,)``, int64: how many own tokens stand before the completion, or None where that is
    unknown.
    ``begins_sequence``: whether the pass is known, without asking a device, to have no cached tokens before it.

    All tensors are on one device. A selector must not change them.

    >>> positions = TokenPositions(index=torch.tensor([[-1, 0, 1]]), column=torch.arange(3))
    >>> from_index(1)(positions)
    tensor([[False, False,  True]])
    """

    index: Tensor
    column: Tensor
    input_ids: Tensor | None = None
    prompt_length: Tensor | None = None
    begins_sequence: bool = False


Selector: TypeAlias = Callable[[TokenPositions], Tensor]
TokenSelection: TypeAlias = Selector | Sequence[int] | slice | Tensor


def from_index(n: int | Sequence[int]) -> Selector:
    """The own tokens from the ``n``-th on, counted from 0: ``from_index(1)`` is all but the first.

    ``n`` is one number or one per row of the batch. Negative numbers are a ValueError: where a row ends is not known
    while it is generated; :func:`generated` steers the answer.

    >>> from_index(1)
    from_index(1)
    """
    return _FromIndex(_own_indices(n, "from_index"))


def at(indices: int | Sequence[int]) -> Selector:
    """The own tokens at ``indices``, counted from 0, the same in each row.

    Negative numbers are a ValueError, as in :func:`from_index`.

    >>> at([0, 3])(TokenPositions(index=torch.tensor([[-1, 0, 1]]), column=torch.arange(3)))
    tensor([[False,  True, False]])
    """
    numbers = _own_indices(indices, "at")
    return _At((numbers,) if isinstance(numbers, int) else numbers)


def generated(inputs: Mapping[str, Any] | int | Sequence[int] | None = None) -> Selector:
    """The tokens whose outputs decide the answer: from the prompt's last token on.

    ``inputs`` says where the prompts end: what was given to ``model.generate``, a mapping with ``attention_mask``
    ``(batch, seq)``, or the prompts' lengths in tokens, one number or one per row. If it holds ``input_ids`` too, a
    pass that begins with another prompt is a ValueError: the selector was left over from an earlier one.

    Without ``inputs`` the first pass over each cache is taken as the prompt; where that cannot be known (no cache, or
    several tokens on a cache that is not empty), the pass raises a ValueError. A last piece of a chunked prefill that
    is one token long looks like an answer's token: with chunked prefill, give ``inputs``.

    A bare tensor is a TypeError, since token ids and masks look alike.

    >>> selector = generated(3)
    >>> selector(TokenPositions(index=torch.arange(5)[None], column=torch.arange(5)))
    tensor([[False, False,  True,  True,  True]])
    """
    return _Generated(_prompt(inputs, "generated"))


def prompted(inputs: Mapping[str, Any] | int | Sequence[int] | None = None) -> Selector:
    """The prompt's tokens but for the last: of all own tokens, just those that :func:`generated` leaves.

    ``inputs`` and errors are those of :func:`generated`.

    >>> prompted(3)(TokenPositions(index=torch.arange(5)[None], column=torch.arange(5)))
    tensor([[ True,  True, False, False, False]])
    """
    return _Prompted(_prompt(inputs, "prompted"))


def completion() -> Selector:
    """The tokens after the prompt.

    In training: the text of the last assistant turn, with the thinking block where there is one. Under generation: what
    follows the first pass over a cache. Where the prompt's length is unknown, the pass raises a ValueError.

    >>> positions = TokenPositions(torch.arange(3)[None], torch.arange(3), prompt_length=torch.tensor([2]))
    >>> completion()(positions)
    tensor([[False, False,  True]])
    """
    return _Completion()


def as_selector(tokens: TokenSelection) -> Selector:
    """The selector that a list, slice, mask tensor or callable stands for.

    Lists and slices count own tokens, where they are not negative; negative numbers count columns from the end of each
    pass. A mask ``(seq,)`` or ``(batch, seq)`` is by column; columns beyond it are not selected.

    Raises TypeError for anything else, ValueError for a mask that holds other numbers than 0 and 1 or has another
    number of dimensions, and for a slice with a step below 1.
    """
    if isinstance(tokens, Tensor):
        return _column_mask(tokens)
    if callable(tokens):
        return tokens
    if isinstance(tokens, slice):
        start, stop = (None if n is None else operator.index(n) for n in (tokens.start, tokens.stop))
        step = 1 if tokens.step is None else operator.index(tokens.step)
        if step < 1:
            raise ValueError(f"a slice of tokens needs a step of at least 1, got {tokens}")
        return _Slice(start, stop, step)
    if isinstance(tokens, Sequence) and not isinstance(tokens, str):
        return _Indices(tuple(_integer(n, "token_indices") for n in tokens))
    raise TypeError(
        f"tokens must be a selector such as generated(inputs), a list of token indices, a slice or a mask tensor, "
        f"got {type(tokens).__name__}"
    )


def one_selection(
    min_token_index: int | None, token_indices: TokenSelection | None, tokens: TokenSelection | None
) -> Selector | None:
    """The selector for the three ways in which ``apply`` takes one; None means all tokens.

    Raises ValueError if more than one is given, and as :func:`as_selector`.
    """
    given = {"min_token_index": min_token_index, "token_indices": token_indices, "tokens": tokens}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} were given: choose one of them")
    if min_token_index is not None:
        first = _integer(min_token_index, "min_token_index")
        return from_index(first) if first >= 0 else _Slice(first, None, 1)
    selection = token_indices if tokens is None else tokens
    return None if selection is None else as_selector(selection)


def selected(selector: Selector, positions: TokenPositions) -> Tensor:
    """What ``selector`` says of ``positions``: a bool mask or float weights, ``(batch, seq)``.

    Raises TypeError or ValueError if it gives anything else.
    """
    weights = selector(positions)
    if not isinstance(weights, Tensor):
        raise TypeError(f"the selector {selector!r} gave {type(weights).__name__}, expected a tensor (batch, seq)")
    if weights.shape != positions.index.shape:
        raise ValueError(
            f"the selector {selector!r} gave a tensor of shape {tuple(weights.shape)}, "
            f"expected (batch, seq) = {tuple(positions.index.shape)}"
        )
    if weights.dtype is torch.bool or weights.dtype.is_floating_point:
        return weights
    if weights.dtype.is_complex:
        raise TypeError(f"the selector {selector!r} gave complex numbers, expected a mask or real weights")
    return weights.to(torch.float32)


def expand_rows(rows: Tensor, batch: int, what: str) -> Tensor:
    """``rows`` ``(n, …)`` for a batch of ``batch`` rows: row i of the batch belongs to row i // (batch / n).

    Beams and several answers to a prompt repeat rows so. Raises ValueError unless ``batch`` is a multiple of ``n``.
    """
    n = rows.shape[0]
    if n in (1, batch):
        return rows.expand(batch, *rows.shape[1:])
    if n == 0 or batch % n:
        raise ValueError(
            f"{what} is given for {n} rows, and the model runs a batch of {batch}, which is no multiple of that"
        )
    return rows.repeat_interleave(batch // n, dim=0)


@dataclass(frozen=True)
class _Prompt:
    """Where prompts end: ``lengths`` one per row, and their tokens where those are known."""

    lengths: tuple[int, ...]
    input_ids: Tensor | None = field(default=None, compare=False, repr=False)
    attention_mask: Tensor | None = field(default=None, compare=False, repr=False)

    def check(self, positions: TokenPositions, selector: str) -> None:
        """Raise if the pass is known to begin with other tokens than these prompts'."""
        if self.input_ids is None or positions.input_ids is None or not positions.begins_sequence:
            return
        got = positions.input_ids
        width = min(got.shape[1], self.input_ids.shape[1])
        expected = expand_rows(self.input_ids, got.shape[0], f"{selector}(inputs)")[:, :width].to(got.device)
        differs = expected != got[:, :width]
        if self.attention_mask is not None:
            mask = expand_rows(self.attention_mask, got.shape[0], f"{selector}(inputs)")[:, :width]
            differs &= mask.to(got.device).bool()
        if bool(differs.any()):
            raise ValueError(
                f"{selector}(inputs) was made for another prompt than the one that the model now runs on: "
                f"give it the inputs of this call of generate"
            )


@dataclass(frozen=True)
class _FromIndex:
    n: int | tuple[int, ...]

    def __call__(self, positions: TokenPositions) -> Tensor:
        return positions.index >= _per_row(self.n, positions, "from_index")

    def __repr__(self) -> str:
        return f"from_index({self.n if isinstance(self.n, int) else list(self.n)})"


@dataclass(frozen=True)
class _At:
    indices: tuple[int, ...]

    def __call__(self, positions: TokenPositions) -> Tensor:
        return _is_one_of(positions.index, self.indices)

    def __repr__(self) -> str:
        return f"at({list(self.indices)})"


@dataclass(frozen=True)
class _Generated:
    prompt: _Prompt | None

    def __call__(self, positions: TokenPositions) -> Tensor:
        return positions.index >= _prompt_length(self.prompt, positions, "generated") - 1

    def __repr__(self) -> str:
        return f"generated({'' if self.prompt is None else _short(self.prompt.lengths)})"


@dataclass(frozen=True)
class _Prompted:
    prompt: _Prompt | None

    def __call__(self, positions: TokenPositions) -> Tensor:
        return (positions.index >= 0) & (positions.index < _prompt_length(self.prompt, positions, "prompted") - 1)

    def __repr__(self) -> str:
        return f"prompted({'' if self.prompt is None else _short(self.prompt.lengths)})"


@dataclass(frozen=True)
class _Completion:
    def __call__(self, positions: TokenPositions) -> Tensor:
        return positions.index >= _prompt_length(None, positions, "completion")

    def __repr__(self) -> str:
        return "completion()"


@dataclass(frozen=True)
class _Indices:
    """A list of token indices: own tokens where not negative, columns from the end of each pass where negative."""

    indices: tuple[int, ...]

    def __call__(self, positions: TokenPositions) -> Tensor:
        own = _is_one_of(positions.index, tuple(n for n in self.indices if n >= 0))
        return own | _is_one_of(_from_end(positions), tuple(n for n in self.indices if n < 0))


@dataclass(frozen=True)
class _Slice:
    """A slice of tokens, its bounds read as in :class:`_Indices`."""

    start: int | None
    stop: int | None
    step: int

    def __call__(self, positions: TokenPositions) -> Tensor:
        own, from_end = positions.index, _from_end(positions)
        counted = from_end - self.start if self.start is not None and self.start < 0 else own - (self.start or 0)
        mask = (counted >= 0) & (counted % self.step == 0)
        if self.start is None or self.start >= 0:
            mask = mask & (own >= 0)
        if self.stop is not None:
            mask = mask & ((own if self.stop >= 0 else from_end) < self.stop)
        return mask


@dataclass(frozen=True, eq=False)
class _ColumnMask:
    mask: Tensor  # (rows, columns + 1), bool; the last column stands for all beyond
    copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def __call__(self, positions: TokenPositions) -> Tensor:
        device = positions.index.device
        if device not in self.copies:
            self.copies[device] = self.mask.to(device)
        mask = expand_rows(self.copies[device], positions.index.shape[0], "the mask of tokens")
        return mask[:, positions.column.clamp(max=mask.shape[1] - 1)]

    def __repr__(self) -> str:
        rows, columns = self.mask.shape
        return f"mask of shape {(rows, columns - 1)}"


def _column_mask(mask: Tensor) -> _ColumnMask:
    if mask.ndim not in (1, 2) or mask.numel() == 0:
        raise ValueError(f"a mask of tokens has the shape (seq,) or (batch, seq), got {tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("a mask of tokens holds only 0 and 1; for token indices, give a list")
    rows = mask.detach().bool().reshape(-1, mask.shape[-1])
    return _ColumnMask(torch.nn.functional.pad(rows, (0, 1)))


def _prompt(inputs: Mapping[str, Any] | int | Sequence[int] | None, selector: str) -> _Prompt | None:
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        if inputs.get("attention_mask") is None:
            raise ValueError(
                f"{selector}(inputs) needs an attention_mask in inputs, to tell tokens from padding; "
                f"got {sorted(inputs)}. The prompts' lengths will do too."
            )
        mask = _rows_tensor(inputs["attention_mask"])
        ids = inputs.get("input_ids")
        return _Prompt(_lengths(mask.sum(dim=1).tolist(), selector), None if ids is None else _rows_tensor(ids), mask)
    if isinstance(inputs, Tensor):
        raise TypeError(
            f"{selector}(inputs) got a bare tensor, which may be token ids or a mask: give what goes into "
            f"model.generate, a mapping with attention_mask, or the prompts' lengths as an int or a list"
        )
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, (SupportsIndex, Sequence)):
        raise TypeError(
            f"{selector}(inputs) takes a mapping with attention_mask, or the prompts' lengths as an int or a list, "
            f"got {type(inputs).__name__}"
        )
    numbers = [inputs] if isinstance(inputs, SupportsIndex) else list(inputs)
    return _Prompt(_lengths(numbers, selector))


def _lengths(numbers: Sequence[SupportsIndex], selector: str) -> tuple[int, ...]:
    lengths = tuple(_integer(n, f"{selector}(inputs)") for n in numbers)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{selector}(inputs) needs prompts of at least one token, got lengths {list(lengths)}")
    return lengths


def _prompt_length(prompt: _Prompt | None, positions: TokenPositions, selector: str) -> Tensor:
    """How long each row's prompt is: ``(batch, 1)``."""
    if prompt is not None:
        prompt.check(positions, selector)
        return _per_row(prompt.lengths, positions, f"{selector}(inputs)")
    if positions.prompt_length is None:
        advice = "generated(inputs)" if selector == "completion" else f"{selector}(inputs)"
        raise ValueError(
            f"{selector}() can't tell where the prompt ends in this pass: it needs a chat sample in training, and "
            f"under generation a cache whose first pass was the whole prompt. {advice} takes what you give to "
            f"model.generate."
        )
    return positions.prompt_length[:, None]


def _per_row(numbers: int | tuple[int, ...], positions: TokenPositions, what: str) -> Tensor | Any:
    if isinstance(numbers, int) or len(numbers) == 1:
        return numbers if isinstance(numbers, int) else numbers[0]
    rows = _rows_on(numbers, positions.index.device)
    return expand_rows(rows, positions.index.shape[0], what)[:, None]


@lru_cache(maxsize=64)  # a decoding step must not copy from host to device
def _rows_on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


def _is_one_of(values: Tensor, numbers: tuple[int, ...]) -> Tensor:
    mask = torch.zeros_like(values, dtype=torch.bool)
    for number in numbers:
        mask = mask | (values == number)
    return mask


def _from_end(positions: TokenPositions) -> Tensor:
    """Columns counted from the end of the pass, as negative numbers: ``(batch, seq)``."""
    seq = positions.index.shape[1]
    return torch.arange(-seq, 0, device=positions.index.device).expand_as(positions.index)


def _own_indices(n: int | Sequence[int], selector: str) -> int | tuple[int, ...]:
    numbers = _integer(n, selector) if isinstance(n, SupportsIndex) else tuple(_integer(i, selector) for i in n)
    if min((numbers,) if isinstance(numbers, int) else numbers, default=0) < 0:
        raise ValueError(
            f"{selector} counts a row's own tokens from 0, got {n}: where a row ends is not known while it is "
            f"generated. To steer the answer, use generated(inputs)."
        )
    return numbers


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{what} takes token indices, got {value}; for a mask, give a tensor")
    if not isinstance(value, SupportsIndex):
        raise TypeError(f"{what} takes whole numbers, got {type(value).__name__}")
    return operator.index(value)


def _rows_tensor(rows: Any) -> Tensor:
    tensor = torch.as_tensor(rows).detach()
    return tensor[None] if tensor.ndim == 1 else tensor


def _short(numbers: tuple[int, ...]) -> str:
    return str(list(numbers)) if len(numbers) <= 4 else f"{len(numbers)} prompts"
