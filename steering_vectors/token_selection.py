"""Token selection: the positions of a forward pass's tokens, and selectors over them.

A selector is any callable from :class:`TokenPositions` to a tensor ``(batch, seq)``: a bool mask, or weights.
:class:`Selector` lists the attributes that it may have.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, SupportsIndex

import torch
from torch import Tensor

from steering_vectors._arguments import call_hint, is_whole_number
from steering_vectors._models import expand_rows


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """Positions of the tokens of one forward pass.

    All tensors are on one device. A selector must not change them.

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


class Selector(Protocol):
    """Any callable from :class:`TokenPositions` to a bool mask or to weights ``(batch, seq)``.

    A function or a lambda will do. It runs once a pass. With weights that require grad, such as a
    learned gate, it runs once for each layer, and the weights get their gradients even where they
    are 0.

    A selector may have the attributes below. Without them, the safe case is assumed: training
    inside such a steering runs each prompt alone, and the selector may read the prompt's length.

    Attributes:
        rows: The number of batch rows that it distinguishes, or 1 if it applies the same rule to
            each row. Training forms its own batches, so inside such a steering it is refused for
            more than 1.
        counts_from_end: True if it counts columns from the end of a pass, which may be padding.
            Training inside such a steering is refused if it does.
        needs_prompt_length: False if it never reads ``positions.prompt_length``, which is then
            None.

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
    return bool(getattr(selector, "needs_prompt_length", True))


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
    return _Generated(_prompt(inputs, "generated"))


def prompted(inputs: Mapping[str, Any] | int | Sequence[int] | None = None) -> Selector:
    """Select the prompt's tokens except the last: the own tokens that :func:`generated` leaves out.

    Args:
        inputs: The prompts, as in :func:`generated`, whose errors are raised here too.

    >>> prompted(3)(TokenPositions(index=torch.arange(5)[None], column=torch.arange(5)))
    tensor([[ True,  True, False, False, False]])
    """
    return _Generated(_prompt(inputs, "prompted"), before=True)


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


@dataclass(frozen=True)
class _Prompt:
    """Prompts of a batch: ``lengths``, one per row, and the prompts' tokens if known.

    ``is_encoder_input`` is True if in an encoder-decoder model they are the encoder's.
    """

    lengths: tuple[int, ...]
    input_ids: Tensor | None = field(default=None, compare=False, repr=False)
    attention_mask: Tensor | None = field(default=None, compare=False, repr=False)
    is_encoder_input: bool = False

    def check(self, positions: TokenPositions, selector: str) -> None:
        """Raise ValueError if the pass is known to begin with other tokens than these prompts'."""
        if positions.several_texts:
            raise ValueError(
                f"{selector}(inputs) can't tell the prompts in rows that hold several texts: steer by index"
            )
        if positions.beside_encoder and self.is_encoder_input:
            raise ValueError(
                f"{selector}(inputs) got the encoder's inputs, but the steered tokens are the decoder's, which begin "
                f"with its own start token: pass the number of tokens that the decoder starts with, as in "
                f"{selector}(1), or inputs with decoder_input_ids"
            )
        if not positions.begins_sequence:
            return
        if positions.input_ids is not None and self.input_ids is not None:
            self._check_ids(positions.input_ids, self.input_ids, selector)
        if positions.beside_another or positions.is_whole:
            self._check_lengths(positions, selector)

    def _check_ids(self, got: Tensor, ids: Tensor, selector: str) -> None:
        width = min(got.shape[1], ids.shape[1])
        differs = expand_rows(ids, got.shape[0], f"{selector}(inputs)")[:, :width].to(got.device) != got[:, :width]
        if self.attention_mask is not None:
            mask = expand_rows(self.attention_mask, got.shape[0], f"{selector}(inputs)")[:, :width]
            differs &= mask.to(got.device).bool()
        if bool(differs.any()):
            raise ValueError(
                f"{selector}(inputs) was made for another prompt than the one that the model now runs on: pass it the "
                f"inputs of this call of generate. With guidance_scale, which runs a second prompt, use {selector}()."
            )

    def _check_lengths(self, positions: TokenPositions, selector: str) -> None:
        got = positions.index.amax(dim=1) + 1
        expected = _per_row(self.lengths, positions, f"{selector}(inputs)")
        expected = expected[:, 0] if isinstance(expected, Tensor) else torch.full_like(got, expected)
        differs = got < expected if positions.is_whole else got != expected
        if bool(differs.any()):
            where = "without a cache" if positions.is_whole else "right after another text's, whose cache is in use"
            raise ValueError(
                f"{selector}(inputs) got prompts of {expected.tolist()} tokens, but the model begins rows of "
                f"{got.tolist()} tokens, {where}. With guidance_scale, which runs a second prompt, use a cache and "
                f"{selector}(); for an unrelated text, pass an empty cache."
            )


@dataclass(frozen=True)
class _FromIndex:
    n: int | tuple[int, ...]
    counts_from_end = needs_prompt_length = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        return positions.index >= _per_row(self.n, positions, "from_index")

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

    prompt: _Prompt | None
    before: bool = False
    counts_from_end = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        last = _prompt_length(self.prompt, positions, self._name) - 1
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
        return positions.index >= _prompt_length(None, positions, "completion")

    def __repr__(self) -> str:
        return "completion()"


def _prompt(inputs: Mapping[str, Any] | int | Sequence[int] | None, selector: str) -> _Prompt | None:
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        return _prompt_of_mapping(inputs, selector)
    if isinstance(inputs, Tensor):
        raise TypeError(
            f"{selector}(inputs) got a bare tensor, which may be token ids or a mask: pass the mapping that "
            f"model.generate gets, with attention_mask, or the prompts' lengths as an int or a list"
        )
    if isinstance(inputs, (str, bytes)) or not (is_whole_number(inputs) or isinstance(inputs, Sequence)):
        raise TypeError(
            f"{selector}(inputs) takes a mapping with attention_mask, or the prompts' lengths as an int or a list, "
            f"got {type(inputs).__name__}"
        )
    numbers = list(inputs) if isinstance(inputs, Sequence) else [inputs]
    return _Prompt(_lengths(numbers, selector))


def _prompt_of_mapping(inputs: Mapping[str, Any], selector: str) -> _Prompt:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    of_decoder = inputs.get("decoder_input_ids") is not None
    if of_decoder:
        ids, mask = inputs["decoder_input_ids"], inputs.get("decoder_attention_mask")
        mask = torch.ones_like(_rows_tensor(ids)) if mask is None else mask
    if mask is None:
        raise ValueError(
            f"{selector}(inputs) needs an attention_mask in inputs, to tell tokens from padding, "
            f"got {sorted(inputs)}: add it, or pass the prompts' lengths instead"
        )
    mask = _rows_tensor(mask)
    lengths = _lengths((mask != 0).sum(dim=1).tolist(), selector)
    return _Prompt(lengths, None if ids is None else _rows_tensor(ids), mask, is_encoder_input=not of_decoder)


def _lengths(numbers: Sequence[SupportsIndex], selector: str) -> tuple[int, ...]:
    lengths = tuple(integer(n, f"{selector}(inputs)") for n in numbers)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{selector}(inputs) needs prompts of at least one token, got lengths {list(lengths)}")
    return lengths


def _prompt_length(prompt: _Prompt | None, positions: TokenPositions, selector: str) -> Tensor:
    """Return the length of each row's prompt: ``(batch, 1)``, or one number for all rows."""
    if prompt is not None:
        prompt.check(positions, selector)
        return _per_row(prompt.lengths, positions, f"{selector}(inputs)")
    if positions.several_texts:
        raise ValueError(f"{selector}() can't tell the prompts in rows that hold several texts: steer by token index")
    if positions.prompt_length is None:
        advice = "generated(inputs)" if selector == "completion" else f"{selector}(inputs)"
        raise ValueError(
            f"{selector}() can't tell where the prompt ends in this pass: it needs a chat sample in training, and in "
            f"generation a cache, given or asked for with use_cache=True, whose first pass was the prompt and no more. "
            f"Use {advice} with the inputs that you pass to model.generate."
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


def is_one_of(values: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Return a mask, of the same shape, of the ``values`` that are among ``numbers``."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    for number in numbers:
        mask = mask | (values == number)
    return mask


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


def integer(value: object, what: str) -> int:
    """Return ``value`` as an int. Raises TypeError unless it is one whole number."""
    if isinstance(value, bool):
        raise TypeError(f"{what} takes token indices, got {value}; for a mask, pass a tensor")
    if not is_whole_number(value):
        raise TypeError(f"{what} takes whole numbers, got {value!r}")
    return operator.index(value)  # type: ignore[arg-type]


def _rows_tensor(rows: Any) -> Tensor:
    try:
        tensor = rows.detach() if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "inputs must hold tensors, or lists of rows of one length: call the tokenizer with padding=True and "
            "return_tensors='pt'"
        ) from error
    return tensor[None] if tensor.ndim == 1 else tensor


def _short(numbers: tuple[int, ...]) -> str:
    return str(list(numbers)) if len(numbers) <= 4 else f"{len(numbers)} prompts"
