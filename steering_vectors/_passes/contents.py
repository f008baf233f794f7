"""Look into a cache: its length, and a part of its contents by which changes and rows are recognized."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FACTOR = -0x61C8864680B583EB  # 2 ** 64 times the golden ratio, as a signed number: Fibonacci hashing


@dataclass(frozen=True, eq=False)
class Contents:
    """The keys or the state of a cache's last layer, rows first, as they were at some moment.

    The tensor is the cache's own, not a copy. ``version`` counts its changes in place.
    """

    tensor: Tensor
    version: int

    def is_same(self, other: "Contents") -> bool:
        """Return True if nothing was changed in between; the time that this takes doesn't depend on the size."""
        return self.is_at_place_of(other) and self.version == other.version

    def is_at_place_of(self, other: "Contents") -> bool:
        """Return True if both are the same tensor, whether or not it was changed in place."""
        return (self.tensor.data_ptr(), self.tensor.shape) == (other.tensor.data_ptr(), other.tensor.shape)

    def is_copy_of(self, other: "Contents") -> bool:
        """Return True if both are equal, and neither was changed since it was looked at. Waits for the device."""
        mine, its = self.tensor, other.tensor
        if (mine.shape, mine.dtype, mine.device) != (its.shape, its.dtype, its.device):
            return False
        unchanged = all(part.version == _version(part.tensor) for part in (self, other))
        return unchanged and torch.equal(mine, its)

    def rows_among(self, other: "Contents") -> tuple[Tensor, Tensor]:
        """Return the first row of ``other`` that each row equals ``(rows,)``, and a mask of the rows that equal one.

        Keys are compared in the columns that both have.
        """
        columns = min(self.tensor.shape[-2], other.tensor.shape[-2]) if self.tensor.ndim == 4 else None
        equal = _hashes(self.tensor, columns)[:, None] == _hashes(other.tensor, columns).to(self.tensor.device)
        return equal.to(torch.uint8).argmax(dim=1), equal.any(dim=1)


def contents_of(cache: Any) -> Contents | None:
    """Return a part of a cache's contents; None if it is empty or of an unknown kind."""
    tensor = next((part for part in _parts(cache) if isinstance(part, Tensor) and part.ndim > 1 and part.numel()), None)
    return None if tensor is None else Contents(tensor, _version(tensor))


def cached_columns(cache: Any) -> int | Tensor | None:
    """Return the number of columns in a cache: 0 for no cache.

    It is an int if the host knows it, a scalar tensor for a static cache, and None for a cache without a length, unless
    it is known to be empty.
    """
    if cache is None or _is_known_to_be_empty(cache):
        return 0
    if isinstance(cache, (tuple, list)):
        return _columns_of_tuples(cache)
    try:
        length = cache.get_seq_length()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return 0 if _has_no_state(cache) else None
    if isinstance(length, Tensor):
        return length.clone()  # the pass changes a static cache's counter in place
    return length if isinstance(length, int) else None


def _version(tensor: Tensor) -> int:
    """Return the number of a tensor's changes in place, which those made in inference mode don't count."""
    return 0 if tensor.is_inference() else tensor._version


def _columns_of_tuples(cache: Sequence[Any]) -> int | None:
    """Return the length of transformers 4's tuples of keys and values ``(…, seq, head)``; None for a list of states."""
    layer = cache[0] if cache else None
    if isinstance(layer, (tuple, list)) and len(layer) >= 2 and isinstance(layer[1], Tensor):
        return int(layer[1].shape[-2])
    return None


def _is_known_to_be_empty(cache: Any) -> bool:
    """Return True if an attribute of a recurrent or hybrid cache says that it holds no token."""
    return getattr(cache, "has_previous_state", None) is False or getattr(cache, "seqlen_offset", None) == 0


def _has_no_state(cache: Any) -> bool:
    try:
        return not cache.has_previous_state()
    except (AttributeError, TypeError, ValueError):
        return False


def _parts(cache: Any) -> Iterator[Any]:
    """Yield the parts that a cache may have, from the last layer on: keys, or else the states of a recurrent layer."""
    if isinstance(cache, (tuple, list)):
        yield from (_last(layer) if isinstance(layer, (tuple, list)) else layer for layer in reversed(cache))
        return
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder model
    for layer in reversed(getattr(cache, "layers", None) or ()):
        yield getattr(layer, "keys", None)
        yield from (_last(getattr(layer, name, None)) for name in ("recurrent_states", "conv_states"))
    yield from (_last(getattr(cache, name, None)) for name in ("key_cache", "ssm_states", "rnn_state"))


def _last(items: Any) -> Any:
    """Return the last item of a list, dictionary or tensor over layers, however deep."""
    while isinstance(items, (tuple, list, Mapping)) and items:
        items = list(items.values())[-1] if isinstance(items, Mapping) else items[-1]
        if isinstance(items, Tensor):
            return items
    return items[-1] if isinstance(items, Tensor) and len(items) else None


def _hashes(tensor: Tensor, columns: int | None) -> Tensor:
    """Return a 64-bit hash of each row's bits ``(rows,)``; of keys, one head in the first ``columns``."""
    rows = tensor if columns is None else tensor[:, 0, :columns]
    rows = rows.detach().flatten(1).contiguous()
    bits = rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]).long()
    factors = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _FACTOR | 1
    return (bits * factors).sum(dim=1)  # int64 wraps around, so the order of summation doesn't matter
