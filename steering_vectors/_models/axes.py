"""Find the batch and the columns of a pass among an activation's axes."""

import itertools

from torch import Tensor


def along_tokens(values: Tensor, activation: Tensor, *, columns_first: bool = False) -> Tensor:
    """``values (batch, seq, n)`` with the activation's axes, so that they broadcast to it.

    Activations are ``(batch, seq, hidden)`` in most models; ``(batch * seq, hidden)`` in some feed-forward parts,
    ``(seq, batch, hidden)``, for sure with ``columns_first``, or with one more axis for parallel streams in a few.
    Raises ValueError where it can't be told which axes are batch and seq.
    """
    batch, seq, n = values.shape
    axes = tuple(activation.shape[:-1])
    if columns_first and axes == (seq, batch):
        return values.transpose(0, 1)
    if axes == (batch, seq):
        return values
    if axes == (batch * seq,):
        return values.reshape(-1, n)
    if axes == (seq, batch):
        return values.transpose(0, 1)
    pairs = [(i, j) for i, j in itertools.combinations(range(len(axes)), 2) if (axes[i], axes[j]) == (batch, seq)]
    if len(pairs) != 1:
        raise ValueError(
            f"can't tell the tokens of a pass of {batch} rows and {seq} columns in an activation of shape "
            f"{tuple(activation.shape)}; steer all tokens of this layer, and all rows alike"
        )
    sizes = [1] * len(axes)
    for axis in pairs[0]:
        sizes[axis] = axes[axis]
    return values.reshape(*sizes, n)


def by_tokens(activation: Tensor, batch: int, seq: int) -> Tensor:
    """``activation`` as a view ``(batch, seq, hidden)``. Raises ValueError where it has no such view."""
    axes = tuple(activation.shape[:-1])
    if axes == (batch, seq):
        return activation
    if axes == (batch * seq,):
        return activation.reshape(batch, seq, -1)
    if axes == (seq, batch):
        return activation.transpose(0, 1)
    raise ValueError(
        f"can't tell the tokens of a pass of {batch} rows and {seq} columns in an activation of shape "
        f"{tuple(activation.shape)}"
    )
