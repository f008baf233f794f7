"""Remember the tokens that earlier passes put into each cache."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steering_vectors._passes.arguments import CACHE_NAMES, PassArguments
from steering_vectors._passes.positions import Past, first_position, token_index
from steering_vectors.token_selection import TokenPositions


class CacheMemory:
    """The known contents of each cache, kept for as long as the cache lives.

    A cache's length is always right if it has one. The other records are renewed after each pass.
    """

    def __init__(self, *, need_prompt_length: bool) -> None:
        self._need_prompt_length = need_prompt_length
        self._noted: dict[int, tuple[weakref.ref[Any], Past]] = {}

    def positions(self, call: PassArguments) -> TokenPositions:
        """Return the positions of a pass's tokens. Raises ValueError if they can't be determined."""
        past = self._past(call)
        index, column = token_index(call, past)
        if past.is_empty:
            past = replace(past, first_position=first_position(call, index))
        if self._need_prompt_length:
            past = replace(past, prompt_length=_prompt_length(call, index, past))
        self._note(call.cache, past)
        fits = call.input_ids is not None and call.input_ids.shape == index.shape
        return TokenPositions(
            index=index,
            column=column,
            input_ids=call.input_ids if fits else None,
            prompt_length=past.prompt_length,
            begins_sequence=past.is_empty,
        )

    def remember(self, call: PassArguments, output: Any, positions_of_pass: Callable[[], TokenPositions]) -> None:
        """Record the tokens that a pass put into its cache, which may be an object that the pass made."""
        made = _cache_of(output)
        past, cache = self._past(call), call.cache if made is None else made
        if cache is None or not isinstance(past.columns, int):  # a static cache keeps count itself
            return
        positions = positions_of_pass()
        columns = past.columns + positions.index.shape[1]
        if past.is_empty:
            past = replace(past, first_position=first_position(call, positions.index), prompt_columns=columns)
        is_token = _tokens_of_cache(call, past, positions.index, columns)
        self._note(cache, replace(past, columns=columns, is_token=is_token, prompt_length=positions.prompt_length))

    def _past(self, call: PassArguments) -> Past:
        """Return the tokens in the call's cache."""
        reference, noted = self._noted.get(id(_key(call.cache)), (None, Past()))
        if reference is None or reference() is not _key(call.cache):
            noted = Past()
        if isinstance(call.cached, int):
            noted = _cut(noted, call.cached)
        elif call.cached is not None:
            noted = replace(noted, columns=call.cached, is_token=None)
        return noted if call.shape is None else _for_batch(noted, call.shape[0], call.mask)

    def _note(self, cache: Any, past: Past) -> None:
        key = _key(cache)
        if key is not None:
            number = id(key)
            self._noted[number] = (weakref.ref(key, lambda _ref: self._noted.pop(number, None)), past)


def _key(cache: Any) -> Any:
    """Return the object that identifies a cache. Lists and tuples allow no weak reference: it is their first tensor."""
    while isinstance(cache, (tuple, list)):
        cache = cache[0] if cache else None
    return cache


def _cut(past: Past, columns: int) -> Past:
    """Return the past of a cache that has another length by now, since it was cropped or filled by others."""
    if not isinstance(past.columns, int) or past.columns == columns:
        return replace(past, columns=columns)
    is_token = past.is_token
    if is_token is not None:
        is_token = functional.pad(is_token[:, :columns], (0, max(0, columns - past.columns)), value=True)
    # Without some of the first pass, it is unknown which of the next tokens belong to the prompt.
    prompt_length = past.prompt_length if columns >= past.prompt_columns else None
    return replace(past, columns=columns, is_token=is_token, prompt_length=prompt_length)


def _for_batch(past: Past, batch: int, mask: Tensor | None) -> Past:
    """Return the past for a batch whose rows may have been repeated, selected or dropped since.

    Raises ValueError if it depends on the row, and the ``mask`` doesn't reach back to show it again.
    """
    is_token, prompt_length = past.is_token, past.prompt_length
    if prompt_length is not None and prompt_length.shape[0] != batch:
        same = bool((prompt_length == prompt_length[0]).all())
        prompt_length = prompt_length[:1].expand(batch) if same else None
    if is_token is not None and is_token.shape[0] != batch:
        reaches_back = mask is not None and mask.shape[1] > is_token.shape[1]
        if not reaches_back and not bool(is_token.all()):
            raise ValueError(
                f"can't determine the token positions: the cache had {is_token.shape[0]} rows with padding, and the "
                f"pass has {batch}. Pass an attention_mask that covers the cached columns too, or steer all tokens."
            )
        is_token = None
    return replace(past, is_token=is_token, prompt_length=prompt_length)


def _tokens_of_cache(call: PassArguments, past: Past, index: Tensor, columns: int) -> Tensor | None:
    """Return the tokens ``(batch, columns)`` of a cache after a pass; None if no mask has shown any padding."""
    batch = index.shape[0]
    if call.mask is not None and call.mask.shape[1] >= columns:
        return (call.mask[:, :columns] != 0).expand(batch, columns)
    if past.is_token is None and call.mask is None and call.query_mask is None:
        return None
    before = past.is_token
    if before is None:
        before = torch.ones(batch, columns - index.shape[1], dtype=torch.bool, device=index.device)
    return torch.cat([before.to(index.device), index >= 0], dim=1)


def _cache_of(output: Any) -> Any:
    if isinstance(output, tuple):  # with return_dict=False
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    if not isinstance(output, Mapping):
        return None
    names = list(output)  # looking up a missing name in the output may warn about an older name
    return next((output[name] for name in CACHE_NAMES if name in names and output[name] is not None), None)


def _prompt_length(call: PassArguments, index: Tensor, past: Past) -> Tensor | None:
    """Return each row's number of tokens ``(batch,)`` in the first pass over a cache.

    None if there was no such pass, or if more of the prompt came later.
    """
    seq = index.shape[1]
    if call.cache is None:
        return index.amax(dim=1) + 1 if call.makes_cache else None
    columns = past.columns
    if isinstance(columns, Tensor):
        if seq == 1 and past.prompt_length is not None:
            return torch.where(columns.to(index.device) == 0, index[:, 0] + 1, past.prompt_length)
        if seq > 1:
            columns = int(columns)  # a prompt, so this costs one device read per generation
    if isinstance(columns, int) and columns == 0:
        return index.amax(dim=1) + 1
    return None if seq > 1 else past.prompt_length
