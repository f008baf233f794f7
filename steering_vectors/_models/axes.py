"""Find the batch axis and the token axis of an activation."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class _Layout(NamedTuple):
    """An order of an activation's axes before the last one."""

    axes: Callable[[int, int], tuple[int, ...]]  # of batch and seq
    arrange: Callable[[Tensor], Tensor]  # (batch, seq, n) → this order
    restore: Callable[[Tensor, int, int], Tensor]  # this order → (batch, seq, n)


_ROWS_FIRST = _Layout(
    lambda batch, seq: (batch, seq), lambda values: values, lambda activation, _batch, _seq: activation
)
# Some feed-forward parts have all tokens on one axis.
_FLAT = _Layout(
    lambda batch, seq: (batch * seq,),
    lambda values: values.flatten(0, 1),
    lambda activation, batch, seq: activation.reshape(batch, seq, -1),
)
_COLUMNS_FIRST = _Layout(
    lambda batch, seq: (seq, batch),
    lambda values: values.transpose(0, 1),
    lambda activation, _batch, _seq: activation.transpose(0, 1),
)


def along_tokens(values: Tensor, activation: Tensor, *, columns_first: bool = False) -> Tensor:
    """Return ``values (batch, seq, n)`` shaped to broadcast to the activation.

    Activations are ``(batch, seq, hidden)`` in most models, and ``(batch * seq, hidden)`` in some feed-forward parts.
    A few models have ``(seq, batch, hidden)``, or one more axis for parallel streams. With ``columns_first``,
    ``(seq, batch, hidden)`` is tried first. Raises ValueError if the axes of batch and seq can't be determined.
    """
    batch, seq, n = values.shape
    layout = _layout_of(activation, batch, seq, columns_first)
    if layout is not None:
        return layout.arrange(values)
    axes = activation.shape[:-1]
    pairs = [(i, j) for i, j in itertools.combinations(range(len(axes)), 2) if (axes[i], axes[j]) == (batch, seq)]
    if len(pairs) != 1:
        raise ValueError(
            f"can't find the tokens of a pass of {batch} rows and {seq} columns in an activation of shape "
            f"{tuple(activation.shape)}; steer all tokens of this layer, with the same multiplier for all rows"
        )
    sizes = [axes[axis] if axis in pairs[0] else 1 for axis in range(len(axes))]
    return values.reshape(*sizes, n)


def are_columns_first(activation: Tensor, batch: int, seq: int) -> bool | None:
    """Return True for an activation ``(seq, batch, …)``, False for another; None if the axes are equally long."""
    axes = tuple(activation.shape[:2])
    if activation.ndim != 3 or axes not in ((batch, seq), (seq, batch)) or (batch, seq) == (1, 1):
        return False
    return None if batch == seq else axes == (seq, batch)


def by_tokens(activation: Tensor, batch: int, seq: int) -> Tensor:
    """Return ``activation`` as a view ``(batch, seq, hidden)``. Raises ValueError if it has no such view."""
    layout = _layout_of(activation, batch, seq)
    if layout is None:
        raise ValueError(
            f"can't find the tokens of a pass of {batch} rows and {seq} columns in an activation of shape "
            f"{tuple(activation.shape)}; this layer can't be read token by token"
        )
    return layout.restore(activation, batch, seq)


def _layout_of(activation: Tensor, batch: int, seq: int, columns_first: bool = False) -> _Layout | None:
    layouts = (_ROWS_FIRST, _FLAT, _COLUMNS_FIRST)
    for layout in (_COLUMNS_FIRST, *layouts) if columns_first else layouts:
        if layout.axes(batch, seq) == tuple(activation.shape[:-1]):
            return layout
    return None


def expand_rows(rows: Tensor, batch: int, what: str) -> Tensor:
    """Return ``rows (n, …)`` repeated for a batch of ``batch`` rows: row i of the batch gets row i // (batch / n).

    Beams and several answers to a prompt repeat rows in this way. Raises ValueError unless ``batch`` is a multiple of
    ``n``.
    """
    n = rows.shape[0]
    if n in (1, batch):
        return rows.expand(batch, *rows.shape[1:])
    if n == 0 or batch % n:
        raise ValueError(
            f"{what} is given for {n} rows, but the model runs a batch of {batch}, which is not a multiple of {n}: "
            f"pass one entry for each row of the batch"
        )
    return rows.repeat_interleave(batch // n, dim=0)
