"""Work out the index of each of a pass's tokens in its row.

Models receive masks, position ids and caches in many combinations. These sources are tried in a fixed order, and the
first one that shows the indices is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from steering_vectors._passes.arguments import PassArguments


@dataclass(frozen=True, eq=False)
class Past:
    """The tokens that a pass finds in its cache.

    ``columns``: the number of columns, with padding; a scalar tensor if only the device knows it, as for static caches.
    ``is_token (batch, columns)``: False on padding; None if there is none.
    ``first_position (batch,)``: the position id of each row's first token. ``prompt_length (batch,)``: the number of
    tokens in the first pass over the cache, None if unknown; ``prompt_columns``: the columns of that pass.
    ``several_texts``: True if rows hold several texts each. ``row_ids (batch, columns)``: the token ids, -1 on padding;
    None if they are unknown or nobody asks for them.
    """

    columns: int | Tensor = 0
    is_token: Tensor | None = None
    first_position: Tensor | None = None
    prompt_length: Tensor | None = None
    prompt_columns: int = 0
    several_texts: bool = False
    row_ids: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """True if the cache is known to be empty without reading from a device."""
        return isinstance(self.columns, int) and self.columns == 0


@dataclass(frozen=True, eq=False)
class Located:
    """The tokens of a pass: ``index (batch, seq)`` and ``column (seq,)`` as in :class:`TokenPositions`."""

    index: Tensor
    column: Tensor
    several_texts: bool = False


def locate(call: PassArguments, past: Past) -> Located:
    """Return the indices and columns of a pass's tokens. Raises ValueError if they can't be determined.

    If a row holds several texts, which don't see each other, each text's tokens are counted from 0.
    """
    if call.packs_rows or past.several_texts:
        raise ValueError(
            "can't determine the token positions in a pass that has many prompts in one row and a cache, as in "
            "generate_batch; steer all tokens"
        )
    column = _columns(call, past)
    by_mask = _texts_by_mask(call, column.device) if _shows_texts(call, past) else None
    if past.is_empty and by_mask is not None:
        index, texts = by_mask
        return Located(index, column, several_texts=bool((texts > 1).any()))
    if past.is_empty and call.mask is None and (texts_by_ids := _texts_by_position_ids(call, column)) is not None:
        return Located(texts_by_ids, column, several_texts=True)
    if not past.is_empty or call.mask is not None:
        _check_ids_rise(call, past)
    found = (source(call, past, column) for source in _SOURCES)
    index = next(index for index in found if index is not None)
    if by_mask is not None:  # a static cache, which the device knows to be empty or not
        index = torch.where(column[0] == 0, by_mask[0], index)
    return Located(index, column)


def _shows_texts(call: PassArguments, past: Past) -> bool:
    """Return True if a 4-D mask alone shows which tokens see each other, in a pass that may be a cache's first."""
    may_be_first = past.is_empty or isinstance(past.columns, Tensor)
    return may_be_first and call.mask is None and call.query_mask is not None and call.query_mask.shape[-2] > 1


def first_position(call: PassArguments, index: Tensor) -> Tensor | None:
    """Return the position id of each row's first token ``(batch,)``: 0 in most models, 1 in PaliGemma.

    The caller's own ids may begin elsewhere in each row. None without ids.
    """
    if call.position_ids is None:
        return None
    offset = call.position_ids.to(index.device).expand_as(index) - index
    last = index.argmax(dim=1, keepdim=True)  # ids on padding show nothing
    return offset.gather(1, last).squeeze(1)


def _columns(call: PassArguments, past: Past) -> Tensor:
    """Return the columns ``(seq,)`` of a pass."""
    assert call.tokens is not None
    seq, device = call.tokens.shape[1], call.tokens.device
    if call.columns is not None:
        # A static cache of transformers 4 miscounts with padding, but generate passes the columns there.
        return call.columns.to(device)
    if isinstance(past.columns, int):
        return torch.arange(past.columns, past.columns + seq, device=device)
    return torch.arange(seq, device=device) + past.columns


def _from_mask(call: PassArguments, past: Past, column: Tensor) -> Tensor | None:
    """Count the tokens of a mask ``(batch, past + seq)`` that reaches back to the first column."""
    if call.mask is None:
        return None
    length, seq = call.mask.shape[1], column.shape[0]
    if isinstance(past.columns, int) and length < past.columns + seq:
        return None
    tokens = call.mask != 0
    now: slice | Tensor
    if isinstance(past.columns, int):
        now = slice(past.columns, past.columns + seq)
    elif length == seq and int(past.columns) > 0:  # a mask of the pass alone
        return None
    else:  # the mask may be as long as a static cache
        now = column.to(tokens.device).clamp(max=length - 1)
    index = torch.where(tokens[:, now], tokens.cumsum(dim=1)[:, now] - 1, -1)
    return index.expand(_batch(call), seq).to(column.device)


def _from_position_ids(call: PassArguments, past: Past, column: Tensor) -> Tensor | None:
    """Use position ids as indices, minus the id of the first tokens."""
    if call.position_ids is None or _no_padding_before(call, past):
        return None
    first = 0 if past.first_position is None else past.first_position.to(column.device)[:, None]
    ids = call.position_ids.to(column.device).long()
    return _without_padding(ids.expand(_batch(call), column.shape[0]) - first, call, column)


def _from_query_mask(call: PassArguments, past: Past, column: Tensor) -> Tensor | None:
    """Count the tokens that each query of a mask ``(batch, heads, seq, keys)`` sees up to itself."""
    if call.query_mask is None or call.cached is None or _no_padding_before(call, past):
        return None
    visible = _visible(call.query_mask).to(column.device)  # (batch or 1, seq, keys)
    keys = torch.arange(visible.shape[-1], device=column.device)
    index = (visible & (keys <= column[:, None])).sum(dim=-1) - 1
    return _without_padding(index.expand(_batch(call), column.shape[0]), call, column)


def _from_count(call: PassArguments, past: Past, column: Tensor) -> Tensor:
    """Count on from the tokens of earlier passes."""
    before = past.columns if past.is_token is None else past.is_token.sum(dim=1, keepdim=True).to(column.device)
    tokens = _is_token(call, column)
    return torch.where(tokens, before + tokens.cumsum(dim=1) - 1, -1)


def _texts_by_position_ids(call: PassArguments, column: Tensor) -> Tensor | None:
    """Return the indices in the texts of each row, each of which begins again at the row's first position id.

    None for one text a row. Raises ValueError for other ids that don't count on by one. Waits for the device.
    """
    ids = None if call.position_ids is None else call.position_ids.to(column.device)
    if ids is None or ids.shape[1] == 1 or not bool((breaks := ids.diff(dim=1) != 1).any()):
        return None
    if bool((breaks & (ids[:, 1:] != ids[:, :1])).any()):
        raise ValueError(
            "can't determine the token positions: the position_ids neither count on by one nor begin again at the "
            "row's first id, as those of several texts in one row do. Pass an attention_mask that shows the padding, "
            "or steer all tokens."
        )
    starts = functional.pad(torch.where(breaks, column[1:], 0), (1, 0)).cummax(dim=1).values
    return (column - starts).expand(_batch(call), -1)


def _texts_by_mask(call: PassArguments, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Count each token on from the last one that it sees before itself: a text begins where there is none.

    Return the indices ``(batch, seq)``, and the number of texts in each row; None for a mask of fewer columns.
    """
    assert call.query_mask is not None
    batch, seq = _batch(call), call.query_mask.shape[-2]
    column = torch.arange(seq, device=device)
    visible = _visible(call.query_mask).to(device)  # (batch or 1, seq, keys)
    if visible.shape[-1] < seq:
        return None
    before = visible[..., :seq] & (column < column[:, None])
    begins = ~before.any(dim=-1)
    nearest = seq - 1 - before.flip(-1).to(torch.uint8).argmax(dim=-1)
    parent, index = torch.where(begins, column, nearest), (~begins).long()
    for _ in range((seq - 1).bit_length()):  # each step doubles the distance to the parent
        index, parent = index + index.gather(1, parent), parent.gather(1, parent)
    tokens = _is_token(call, column)[: len(visible)]
    # A column that no other one sees may be padding that sees itself, so that no row of the mask is empty.
    texts = (begins & tokens & (before & tokens[..., None]).any(dim=1)).sum(dim=1)
    return torch.where(tokens, index, -1).expand(batch, seq), texts


def _check_ids_rise(call: PassArguments, past: Past) -> None:
    """Raise ValueError if the position ids of a row begin again, though the row is one text by its mask or cache.

    Ids beside a mask, as generate passes both, are looked at only on the CPU: reading other devices would wait.
    """
    ids, now = call.position_ids, past.columns
    if ids is None or ids.shape[1] == 1 or isinstance(now, Tensor):
        return
    if call.query_mask is not None if call.mask is None else ids.device.type != "cpu":
        return
    tokens = torch.ones_like(ids, dtype=torch.bool)
    if call.mask is not None:
        length = call.mask.shape[1]
        shown = call.mask[:, now : now + ids.shape[1]] if length > ids.shape[1] else call.mask
        if shown.shape[1] != ids.shape[1]:
            return
        tokens = shown.to(ids.device) != 0
    before = torch.where(tokens, ids, ids.amin()).cummax(dim=1).values
    if bool((tokens & (ids < before)).any()):
        raise ValueError(
            "can't determine the token positions: the position_ids begin again within a row, as for several texts in "
            "one row, but its attention_mask or its cache make one text of it. Leave out both, as transformers needs "
            "for packed texts, or steer all tokens."
        )


_Source: TypeAlias = Callable[[PassArguments, Past, Tensor], Tensor | None]
_SOURCES: tuple[_Source, ...] = (_from_mask, _from_position_ids, _from_query_mask, _from_count)


def _batch(call: PassArguments) -> int:
    assert call.shape is not None
    return call.shape[0]


def _no_padding_before(call: PassArguments, past: Past) -> bool:
    """Return True if the cache's length alone is the number of tokens before the pass."""
    return past.is_empty or (isinstance(past.columns, int) and call.mask is None and call.query_mask is None)


def _without_padding(index: Tensor, call: PassArguments, column: Tensor) -> Tensor:
    return torch.where(_is_token(call, column), index, -1)


def _is_token(call: PassArguments, column: Tensor) -> Tensor:
    """Return a mask ``(batch, seq)`` of the pass's columns that are not padding.

    They are found from a mask of the pass alone, or from the keys that the queries see.
    """
    batch, seq = _batch(call), column.shape[0]
    if call.mask is not None and call.mask.shape[1] == seq:
        return (call.mask != 0).to(column.device).expand(batch, seq)
    if call.query_mask is None:
        return torch.ones(batch, seq, dtype=torch.bool, device=column.device)
    visible = _visible(call.query_mask).to(column.device)  # (batch or 1, seq, keys)
    keys = visible.shape[-1]
    sees_itself = visible.gather(-1, column.clamp(max=keys - 1).expand(len(visible), 1, seq).mT).squeeze(-1)
    # A query on padding sees nothing, or everything if the kernel needs something to see. A prefix's token in a prefix
    # language model sees everything too, but the last token sees it.
    sees_all = visible.all(dim=-1)
    seen_by_last = visible[:, -1, :].gather(-1, column.clamp(max=keys - 1).expand(len(visible), seq))
    # A key beyond the mask means a sliding window's cache after the prompt, and so no padding.
    return ((sees_itself & (seen_by_last | ~sees_all)) | (column >= keys)).expand(batch, seq)


def _visible(query_mask: Tensor) -> Tensor:
    """Return the keys that each query of the first head sees: ``(batch or 1, seq, keys)``."""
    mask = query_mask[:, 0]
    return mask if mask.dtype is torch.bool else mask > -1e4  # additive masks hold the dtype's minimum
