"""Remember the tokens that earlier passes put into each cache."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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
        # Without padding, the cache's length is the number of tokens.
        may_be_padded = past.tokens is not None or call.mask is not None or call.query_mask is not None
        tokens = positions.index.amax(dim=1) + 1 if may_be_padded or call.cached is None else None
        first = first_position(call, positions.index) if past.is_empty else past.first_position
        self._note(cache, Past(past.columns + positions.index.shape[1], tokens, first, positions.prompt_length))

    def _past(self, call: PassArguments) -> Past:
        """Return the tokens in the call's cache."""
        reference, noted = self._noted.get(id(_key(call.cache)), (None, Past()))
        if reference is None or reference() is not _key(call.cache):
            noted = Past()
        if call.cached is None:
            return noted
        known = isinstance(call.cached, int) and isinstance(noted.columns, int) and call.cached == noted.columns
        return noted if known else replace(noted, columns=call.cached, tokens=None)

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


def _cache_of(output: Any) -> Any:
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
