"""Work out where a pass's tokens stand in their rows.

Models are given masks, position ids and caches in many combinations. The sources stand in an order: the first one that
can say where the tokens stand does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from steering_vectors._passes.arguments import PassArguments


@dataclass(frozen=True, eq=False)
class Past:
    """The tokens that a pass finds in its cache.

    ``columns``: how many columns, padding included; a scalar tensor where only the device knows, as for static caches.
    ``tokens (batch,)``: how many tokens of each row, where padding may stand among them or the cache has no length.
    ``first_position``: a scalar, the position id of each row's first token. ``prompt_length (batch,)``: the tokens of
    the first pass over the cache; None where that is unknown.
    """

    columns: int | Tensor = 0
    tokens: Tensor | None = None
    first_position: Tensor | None = None
    prompt_length: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Say whether there is known to be nothing, without asking a device."""
        return isinstance(self.columns, int) and self.columns == 0


def token_index(call: PassArguments, past: Past) -> tuple[Tensor, Tensor]:
    """Return ``index (batch, seq)`` and ``column (seq,)`` of :class:`TokenPositions` for a pass.

    Raises ValueError for a pass that doesn't take a row's tokens in their order.
    """
    if call.packs_rows:
        raise ValueError(
            "can't tell where the tokens stand in a pass that has many prompts in one row, as in generate_batch; "
            "steer all tokens"
        )
    column = _columns(call, past)
    found = (source(call, past, column) for source in _SOURCES)
    return next(index for index in found if index is not None), column


def first_position(call: PassArguments, index: Tensor) -> Tensor | None:
    """Return the position id at which rows begin, a scalar: 0 in most models, 1 in PaliGemma. None without ids."""
    if call.position_ids is None:
        return None
    offset = call.position_ids.to(index.device).expand_as(index) - index
    return torch.where(index >= 0, offset, 0).amax()


def _columns(call: PassArguments, past: Past) -> Tensor:
    """Return the columns ``(seq,)`` of a pass."""
    assert call.tokens is not None
    seq, device = call.tokens.shape[1], call.tokens.device
    if call.columns is not None:
        # A static cache of transformers 4 counts wrongly over padding; there generate gives the columns.
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
    else:  # the mask may be as long as a static cache
        now = column.to(tokens.device).clamp(max=length - 1)
    index = torch.where(tokens[:, now], tokens.cumsum(dim=1)[:, now] - 1, -1)
    return index.expand(_batch(call), seq).to(column.device)


def _from_position_ids(call: PassArguments, past: Past, column: Tensor) -> Tensor | None:
    """Take position ids as indices, less the id at which rows begin."""
    if call.position_ids is None or _no_padding_before(call, past):
        return None
    first = 0 if past.first_position is None else past.first_position.to(column.device)
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
    """Go on counting after the tokens that were fed before."""
    before = past.columns if past.tokens is None else past.tokens[:, None].to(column.device)
    tokens = _is_token(call, column)
    return torch.where(tokens, before + tokens.cumsum(dim=1) - 1, -1)


_Source: TypeAlias = Callable[[PassArguments, Past, Tensor], Tensor | None]
_SOURCES: tuple[_Source, ...] = (_from_mask, _from_position_ids, _from_query_mask, _from_count)


def _batch(call: PassArguments) -> int:
    assert call.shape is not None
    return call.shape[0]


def _no_padding_before(call: PassArguments, past: Past) -> bool:
    """Say whether the cache's length alone tells how many tokens stand before the pass."""
    return past.is_empty or (isinstance(past.columns, int) and call.mask is None and call.query_mask is None)


def _without_padding(index: Tensor, call: PassArguments, column: Tensor) -> Tensor:
    return torch.where(_is_token(call, column), index, -1)


def _is_token(call: PassArguments, column: Tensor) -> Tensor:
    """Return the columns of the pass that are no padding ``(batch, seq)``.

    They show in a mask of the pass alone, or in what the queries see.
    """
    batch, seq = _batch(call), column.shape[0]
    if call.mask is not None and call.mask.shape[1] == seq:
        return (call.mask != 0).to(column.device).expand(batch, seq)
    if call.query_mask is None:
        return torch.ones(batch, seq, dtype=torch.bool, device=column.device)
    visible = _visible(call.query_mask).to(column.device)  # (batch or 1, seq, keys)
    keys = visible.shape[-1]
    sees_itself = visible.gather(-1, column.clamp(max=keys - 1).expand(len(visible), 1, seq).mT).squeeze(-1)
    # A query on padding sees nothing, or everything: kernels that can't have nothing are given everything. So does a
    # prefix's token in a prefix language model, but that one is seen by the last token.
    sees_all = visible.all(dim=-1)
    seen_by_last = visible[:, -1, :].gather(-1, column.clamp(max=keys - 1).expand(len(visible), seq))
    # A key beyond the mask stands in a sliding window's cache, where the pass is past its prompt.
    return ((sees_itself & (seen_by_last | ~sees_all)) | (column >= keys)).expand(batch, seq)


def _visible(query_mask: Tensor) -> Tensor:
    """Return the keys that each query sees, by the first head: ``(batch or 1, seq, keys)``."""
    mask = query_mask[:, 0]
    return mask if mask.dtype is torch.bool else mask > -1e4  # additive masks hold the dtype's minimum
