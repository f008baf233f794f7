"""Prompts of a batch: their lengths, and the passes that begin with other tokens than theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from steering_vectors._arguments import is_whole_number
from steering_vectors._models import expand_rows
from steering_vectors._tokens.indices import integer, per_row
from steering_vectors._tokens.positions import TokenPositions


@dataclass(frozen=True)
class Prompt:
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
        expected = per_row(self.lengths, positions, f"{selector}(inputs)")
        expected = expected[:, 0] if isinstance(expected, Tensor) else torch.full_like(got, expected)
        differs = got < expected if positions.is_whole else got != expected
        if bool(differs.any()):
            where = "without a cache" if positions.is_whole else "right after another text's, whose cache is in use"
            raise ValueError(
                f"{selector}(inputs) got prompts of {expected.tolist()} tokens, but the model begins rows of "
                f"{got.tolist()} tokens, {where}. With guidance_scale, which runs a second prompt, use a cache and "
                f"{selector}(); for an unrelated text, pass an empty cache."
            )


def prompt_of(inputs: Mapping[str, Any] | int | Sequence[int] | None, selector: str) -> Prompt | None:
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
    return Prompt(_lengths(numbers, selector))


def _prompt_of_mapping(inputs: Mapping[str, Any], selector: str) -> Prompt:
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
    return Prompt(lengths, None if ids is None else _rows_tensor(ids), mask, is_encoder_input=not of_decoder)


def _lengths(numbers: Sequence[SupportsIndex], selector: str) -> tuple[int, ...]:
    lengths = tuple(integer(n, f"{selector}(inputs)") for n in numbers)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{selector}(inputs) needs prompts of at least one token, got lengths {list(lengths)}")
    return lengths


def prompt_length(prompt: Prompt | None, positions: TokenPositions, selector: str) -> Tensor:
    """Return the length of each row's prompt: ``(batch, 1)``, or one number for all rows."""
    if prompt is not None:
        prompt.check(positions, selector)
        return per_row(prompt.lengths, positions, f"{selector}(inputs)")
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


def _rows_tensor(rows: Any) -> Tensor:
    try:
        tensor = rows.detach() if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "inputs must hold tensors, or lists of rows of one length: call the tokenizer with padding=True and "
            "return_tensors='pt'"
        ) from error
    return tensor[None] if tensor.ndim == 1 else tensor
