"""Streaming, mergeable statistics of rows."""

import torch
from torch import Tensor


class RunningMean:
    """The mean of rows ``(n, hidden)`` that come in portions, whatever the portions.

    Sums are kept in float64 where the device has it, else in float32, on the device of the first rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None  # (hidden,)

    def add(self, rows: Tensor) -> None:
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        self._join(rows.shape[0], rows.sum(dim=0, dtype=wide))

    def merge(self, other: "RunningMean") -> None:
        """Take in what another one has seen."""
        if other._sum is not None:
            self._join(other.count, other._sum)

    @property
    def mean(self) -> Tensor:
        """``(hidden,)``. Raises ValueError before any row came."""
        if self._sum is None or self.count == 0:
            raise ValueError("no rows: there is no mean")
        return self._sum / self.count

    def _join(self, count: int, total: Tensor) -> None:
        self.count += count
        self._sum = total if self._sum is None else self._sum + total.to(self._sum.device)


class SecondMoment:
    """The uncentred second moment of rows ``(n, hidden)`` that come in portions, in float64 where the device has it.

    Rows are kept until there are as many as they are wide, and then as their sum of squares ``(hidden, hidden)``.
    """

    def __init__(self) -> None:
        self._mean = RunningMean()
        self._rows: list[Tensor] = []
        self._squares: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        self._mean.add(rows)
        self._rows.append(rows)
        self._compress()

    def merge(self, other: "SecondMoment") -> None:
        """Take in what another one has seen."""
        self._mean.merge(other._mean)
        if other._squares is not None:
            self._squares = other._squares if self._squares is None else self._squares + other._squares
        self._rows.extend(other._rows)
        self._compress()

    def principal_component(self) -> Tensor | None:
        """The direction ``(hidden,)`` of norm 1 of most second moment, towards the mean; None if all rows are zero."""
        if self._mean.count == 0:
            raise ValueError("no rows: there is no principal component")
        rows = _wide(torch.cat(self._rows)) if self._rows else None
        if self._squares is None and rows is not None:
            values, vectors = torch.linalg.eigh(rows @ rows.T)  # (n, n): fewer rows than they are wide
            component = vectors[:, -1] @ rows
        else:
            assert self._squares is not None
            values, vectors = torch.linalg.eigh(self._squares if rows is None else self._squares + rows.T @ rows)
            component = vectors[:, -1]
        norm = component.norm()
        if not bool(values[-1] > 0) or not bool(norm > 0):
            return None
        component = component / norm
        return torch.where(component @ _wide(self._mean.mean) < 0, -component, component)

    def _compress(self) -> None:
        count = sum(map(len, self._rows))
        if count == 0 or (self._squares is None and count < self._rows[0].shape[-1]):
            return
        rows = _wide(torch.cat(self._rows))
        self._squares = rows.T @ rows if self._squares is None else self._squares + rows.T @ rows
        self._rows = []


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.device.type == "mps" else rows.double()
