"""Remember the tokens that earlier passes put into each cache."""

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from steering_vectors._passes.arguments import CACHE_NAMES, PassArguments
from steering_vectors._passes.contents import Contents, contents_of
from steering_vectors._passes.positions import Past, first_position, locate
from steering_vectors._passes.row_ids import first_columns, row_ids
from steering_vectors._tokens import TokenPositions


class _Note(NamedTuple):
    """The tokens in a cache, and its contents, after the last of the ``passes`` that ``thread`` ran over it."""

    cache: weakref.ref[Any]
    past: Past
    contents: Contents | None
    passes: int
    thread: int


class CacheMemory:
    """The known contents of each cache, kept for as long as the cache lives.

    A cache's length is always right if it has one. The other records are renewed after each pass. They follow rows that
    were reordered, repeated or selected since, and copies of a cache; both are recognized by their contents.
    """

    def __init__(self, *, need_prompt_length: bool, need_row_ids: bool) -> None:
        self._need_prompt_length = need_prompt_length
        self._need_row_ids = need_row_ids
        self._notes: dict[int, _Note] = {}

    def positions(self, call: PassArguments) -> TokenPositions:
        """Return the positions of a pass's tokens. Raises ValueError if they can't be determined."""
        past = self._past(call)
        located = locate(call, past)
        past = _begun(call, past, located.index, located.several_texts)
        if self._need_prompt_length:
            past = replace(past, prompt_length=_prompt_length(call, located.index, past))
        note = self._note_of(call.cache)
        self._note(call.cache, past, call.contents, 0 if note is None else note.passes)
        fits = call.input_ids is not None and call.input_ids.shape == located.index.shape
        return TokenPositions(
            index=located.index,
            column=located.column,
            input_ids=call.input_ids if fits else None,
            prompt_length=past.prompt_length,
            begins_sequence=_is_empty(call, past),
            several_texts=located.several_texts,
            beside_encoder=call.beside_encoder,
            beside_another=past.is_empty and not call.is_given_cache and self._has_begun_another(),
            is_whole=call.cache is None and call.use_cache is False,
            row_ids=row_ids(call, past, located.index) if self._need_row_ids else None,
        )

    def knows(self, cache: Any) -> bool:
        """Return True if a pass has put tokens into the cache."""
        return self._note_of(cache) is not None

    def remember(self, call: PassArguments, output: Any, positions_of_pass: Callable[[], TokenPositions]) -> None:
        """Record the tokens that a pass put into its cache, which may be an object that the pass made."""
        made = _cache_of(output)
        cache = call.cache if made is None else made
        if cache is None:
            return
        positions = positions_of_pass()
        past = _begun(call, self._past(call), positions.index, positions.several_texts)
        if isinstance(past.columns, int):  # a static cache keeps count itself
            columns = past.columns + positions.index.shape[1]
            is_token = _tokens_of_cache(call, past, positions.index, columns)
            past = replace(past, columns=columns, is_token=is_token)
        note = self._note_of(call.cache)
        past = replace(past, prompt_length=positions.prompt_length, row_ids=positions.row_ids)
        self._note(cache, past, contents_of(cache), 1 if note is None else note.passes + 1)

    def _past(self, call: PassArguments) -> Past:
        """Return the tokens in the call's cache. Raises ValueError if they are unknown."""
        note = self._note_of(call.cache)
        if note is not None and call.cached is None and _was_changed_in_place(note.contents, call.contents):
            note = None
        note = note or self._note_of_original(call)
        past = _unnoted(call) if note is None else note.past
        if isinstance(call.cached, int):
            past = _cut(past, call.cached)
        elif call.cached is not None:
            columns = self._static_columns(call, call.cached)
            past = replace(past, columns=columns, is_token=None, row_ids=first_columns(past.row_ids, columns))
        if isinstance(past.columns, int) and past.columns == 0:
            return Past()
        return past if note is None else _with_rows_of(call, past, note.contents)

    def _note_of_original(self, call: PassArguments) -> _Note | None:
        """Return the note of the cache that the call's cache is a copy of; None for an empty cache or no copy."""
        now = call.contents
        if now is None or (isinstance(call.cached, int) and call.cached == 0):
            return None
        notes = list(self._notes.values())
        return next((note for note in notes if note.contents is not None and now.is_copy_of(note.contents)), None)

    def _static_columns(self, call: PassArguments, cached: Tensor) -> int | Tensor:
        """Return the columns of a static cache.

        To find a prompt's length, the host reads them once for each prompt; to find the rows' ids, in each pass.
        """
        assert call.shape is not None
        if not self._need_row_ids and (not self._need_prompt_length or call.shape[1] == 1):
            return cached
        # A static cache of transformers 4 miscounts with padding, but generate passes the columns there.
        return int(cached if call.columns is None else call.columns[0])

    def _has_begun_another(self) -> bool:
        """Return True if this thread has run the first pass over a cache, which is still in use, and no other since."""
        mine = [note for note in list(self._notes.values()) if note.thread == threading.get_ident()]
        return any(note.passes == 1 for note in mine)

    def _note_of(self, cache: Any) -> _Note | None:
        key = _key(cache)
        note = self._notes.get(id(key))
        return note if note is not None and note.cache() is key else None

    def _note(self, cache: Any, past: Past, contents: Contents | None, passes: int) -> None:
        key = _key(cache)
        if key is not None:
            number = id(key)
            reference = weakref.ref(key, lambda _ref: self._notes.pop(number, None))
            self._notes[number] = _Note(reference, past, contents, passes, threading.get_ident())


def _unnoted(call: PassArguments) -> Past:
    """Return the past of a cache that no pass has been noted of. Raises ValueError if nothing shows its length."""
    if call.cached is not None:
        return Past(call.cached)
    assert call.shape is not None
    mask, seq = call.mask, call.shape[1]
    if mask is not None and mask.shape[1] > seq:
        return Past(mask.shape[1] - seq, is_token=mask[:, :-seq] != 0)
    raise ValueError(
        f"can't determine the token positions: the {type(call.cache).__name__} doesn't say how many tokens it holds, "
        f"and some were put in while this steering wasn't attached, or were copied before they were changed. "
        f"Run the model on the whole text inside the steering, pass an attention_mask that covers the cached tokens "
        f"too, or steer all tokens."
    )


def _begun(call: PassArguments, past: Past, index: Tensor, several_texts: bool) -> Past:
    """Return the past with the facts that a pass shows if it is a cache's first; else return it as it is."""
    first, columns = past.first_position, index.shape[1]
    if past.is_empty:
        first = first_position(call, index)
        return replace(past, first_position=first, prompt_columns=columns, several_texts=several_texts)
    if isinstance(past.columns, int) or columns == 1 or (begun := first_position(call, index)) is None:
        return past
    before = torch.zeros_like(begun) if first is None else first
    return replace(past, first_position=torch.where(past.columns.to(begun.device) == 0, begun, before))


def _is_empty(call: PassArguments, past: Past) -> bool:
    """Return True if the cache before a pass is known to be empty. A decoding step reads nothing from a device."""
    # Under generate of transformers 4, which passes the columns, one read in a prompt.
    if isinstance(past.columns, Tensor) and call.columns is not None:
        return len(call.columns) > 1 and int(past.columns) == 0
    return past.is_empty


def _was_changed_in_place(before: Contents | None, now: Contents | None) -> bool:
    """Return True if another pass has changed the cache since; reordering its rows makes other tensors."""
    if before is None or now is None:
        return before is not now
    return before.is_at_place_of(now) and not before.is_same(now)


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
    ids = first_columns(past.row_ids, columns)
    return replace(past, columns=columns, is_token=is_token, prompt_length=prompt_length, row_ids=ids)


def _with_rows_of(call: PassArguments, past: Past, before: Contents | None) -> Past:
    """Return the past for the rows of a pass, which may have been reordered, repeated or selected since.

    Raises ValueError if it depends on the row, and the rows can't be recognized. Only on the CPU is it noticed that
    they can't: reading other devices would wait for them.
    """
    assert call.shape is not None
    (batch, seq), now = call.shape, call.contents
    rows = {name: value for name in _BY_ROW if (value := getattr(past, name)) is not None}
    has_as_many = all(len(value) == batch for value in rows.values())
    if has_as_many and (batch == 1 or before is None or now is None or now.is_same(before)):
        return past
    if call.mask is not None and call.mask.shape[1] > seq:  # it shows the cached tokens again
        past = replace(past, is_token=None, first_position=None)
        rows = {name: value for name, value in rows.items() if name in ("prompt_length", "row_ids")}
    if all(_are_equal_on_cpu(value) for value in rows.values()):
        return replace(past, **{name: value[:1].expand(batch, *value.shape[1:]) for name, value in rows.items()})
    if before is None or now is None or len(now.tensor) != batch:
        raise _unknown_rows(batch)
    numbers, found = now.rows_among(before)
    if found.device.type == "cpu" and not bool(found.all()):
        raise _unknown_rows(batch)
    return replace(past, **{name: value[numbers.to(value.device)] for name, value in rows.items()})


_BY_ROW = ("is_token", "first_position", "prompt_length", "row_ids")


def _are_equal_on_cpu(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and bool((rows == rows[:1]).all())


def _unknown_rows(batch: int) -> ValueError:
    return ValueError(
        f"can't determine the token positions: the rows of the cache were changed since its last pass, so it is "
        f"unknown to which prompts the {batch} rows of this pass belong. Pass an attention_mask that covers the "
        f"cached columns too, and generated(inputs) instead of generated(), or steer all tokens."
    )


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

    None if there was no such pass, if more of the prompt came later, or if it may have held a draft of the answer.
    """
    columns = past.columns
    if isinstance(columns, Tensor):
        if past.prompt_length is None:
            return None
        return torch.where(columns.to(index.device) == 0, index[:, 0] + 1, past.prompt_length)
    if columns > 0:
        return None if index.shape[1] > 1 else past.prompt_length
    return index.amax(dim=1) + 1 if call.keeps_cache and not call.may_hold_drafts and not past.several_texts else None
