"""Streaming, mergeable statistics of rows."""

from collections.abc import Callable

import torch
from torch import Tensor

# Lanczos' method is given up after so many steps; its error is below _CONVERGED, in radians.
_STEPS, _CONVERGED = 40, 1e-9


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
        mean = _wide(self._mean.mean).detach()
        rows = _wide(torch.cat(self._rows)).detach() if self._rows else mean.new_zeros(0, len(mean))
        squares = None if self._squares is None else self._squares.detach()

        def times(vector: Tensor) -> Tensor:
            product = rows.T @ (rows @ vector)
            return product if squares is None else product + squares @ vector

        component = _dominant_eigenvector(times, mean)
        if component is None:
            component = _by_decomposition(rows, squares)
        norm = component.norm()
        if not bool(norm > 0):
            return None
        component = component / norm
        return torch.where(component @ mean < 0, -component, component)

    def _compress(self) -> None:
        count = sum(map(len, self._rows))
        if count == 0 or (self._squares is None and count < self._rows[0].shape[-1]):
            return
        rows = _wide(torch.cat(self._rows))
        self._squares = rows.T @ rows if self._squares is None else self._squares + rows.T @ rows
        self._rows = []


def _dominant_eigenvector(times: Callable[[Tensor], Tensor], near: Tensor) -> Tensor | None:
    """The eigenvector of the largest eigenvalue of a symmetric matrix, by Lanczos' method with all vectors kept.

    ``times`` multiplies with the matrix; ``near`` is where to begin. None where it hasn't converged after a few steps:
    the eigenvalues are too close for it.
    """
    # Something of every direction, so that none is overlooked.
    noise = torch.randn(near.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(near)
    start = near / near.norm().clamp(min=torch.finfo(near.dtype).tiny) + 0.1 * noise / noise.norm()
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(_STEPS, len(near))):
        product = times(basis[-1])
        diagonal.append(float(product @ basis[-1]))
        kept = torch.stack(basis)
        for _twice in range(2):  # once leaves too much
            product = product - kept.T @ (kept @ product)
        rest = float(product.norm())
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        small += torch.diag(torch.tensor(beside, dtype=torch.float64), -1)  # eigh reads the lower half
        values, vectors = torch.linalg.eigh(small)
        gap = float(values[-1] - values[-2]) if len(values) > 1 else float(values[-1])
        if len(values) > 1 and rest * abs(float(vectors[-1, -1])) <= _CONVERGED * gap:
            found: Tensor = kept.T @ vectors[:, -1].to(near)
            return found
        beside.append(rest)
        basis.append(product / max(rest, torch.finfo(near.dtype).tiny))
    return None


def _by_decomposition(rows: Tensor, squares: Tensor | None) -> Tensor:
    """The same by the whole decomposition, of the smaller of two matrices; zeros where all is zero."""
    if squares is None:
        values, vectors = torch.linalg.eigh(rows @ rows.T)  # (n, n): fewer rows than they are wide
        component = vectors[:, -1] @ rows
    else:
        values, vectors = torch.linalg.eigh(squares + rows.T @ rows)
        component = vectors[:, -1]
    return component if bool(values[-1] > 0) else torch.zeros_like(component)


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.device.type == "mps" else rows.double()
