"""Statistics of rows. Those that are classes take them in batches, and merge."""

from collections.abc import Callable

import torch
from torch import Tensor

# The most steps of Lanczos' method, and the error in radians at which it has converged.
_STEPS, _CONVERGED = 40, 1e-9
# The same for Weiszfeld's algorithm, whose error is a share of the rows' mean distance.
_MEDIAN_STEPS, _MEDIAN_CONVERGED = 1000, 1e-10


class RunningMean:
    """The mean of rows ``(n, hidden)`` that are added in batches of any size.

    Sums are kept in float64 if the device has it, else in float32, on the device of the first rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None  # (hidden,)

    def add(self, rows: Tensor) -> None:
        dtype = torch.float32 if rows.device.type == "mps" else torch.float64
        self._join(rows.shape[0], rows.sum(dim=0, dtype=dtype))

    def merge(self, other: "RunningMean") -> None:
        """Add the rows that ``other`` has seen."""
        if other._sum is not None:
            self._join(other.count, other._sum)

    @property
    def mean(self) -> Tensor:
        """The mean ``(hidden,)``. Raises ValueError before any row was added."""
        if self._sum is None or self.count == 0:
            raise ValueError("no rows: a mean needs at least one")
        return self._sum / self.count

    def _join(self, count: int, total: Tensor) -> None:
        self.count += count
        self._sum = total if self._sum is None else self._sum + total.to(self._sum.device)


class SecondMoment:
    """The uncentred second moment of rows ``(n, hidden)`` added in batches, in float64 if the device has it.

    Rows are kept until there are ``hidden`` of them, and then as their sum of squares ``(hidden, hidden)``.
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
        """Add the rows that ``other`` has seen."""
        self._mean.merge(other._mean)
        if other._squares is not None:
            self._squares = other._squares if self._squares is None else self._squares + other._squares
        self._rows.extend(other._rows)
        self._compress()

    def principal_component(self) -> Tensor | None:
        """Return the direction ``(hidden,)`` of norm 1 with the largest second moment, signed towards the mean.

        None if all rows are zero. Raises ValueError before any row was added.
        """
        if self._mean.count == 0:
            raise ValueError("no rows: a principal component needs at least one")
        mean = _double(self._mean.mean).detach()
        rows = _double(torch.cat(self._rows)).detach() if self._rows else mean.new_zeros(0, len(mean))
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
        rows = _double(torch.cat(self._rows))
        self._squares = rows.T @ rows if self._squares is None else self._squares + rows.T @ rows
        self._rows = []


def geometric_median(rows: Tensor) -> Tensor:
    """Return the point ``(hidden,)`` with the least sum of distances to rows ``(n, hidden)``, in float64 if possible.

    By Weiszfeld's algorithm as changed by Vardi and Zhang (2000): it doesn't stall at a row.
    """
    rows = _double(rows).detach()
    mean = rows.mean(dim=0)
    rows = rows - mean  # what the rows share would cost digits
    median = torch.zeros_like(mean)
    converged = max(_MEDIAN_CONVERGED, 10 * torch.finfo(rows.dtype).eps)
    for _ in range(_MEDIAN_STEPS):
        away = rows - median
        distances = away.norm(dim=1)
        weights = torch.where(distances > 0, 1 / distances, 0)
        pull = weights @ away  # (hidden,)
        # The rows at the median hold it with a force of 1 each.
        free = pull.norm() - (distances == 0).sum()
        if not bool(free > 0):
            break
        step = free / pull.norm() * pull / weights.sum()
        median = median + step
        if bool(step.norm() <= converged * distances.mean()):
            break
    return mean + median


def winsorized_mean(rows: Tensor, quantile: float) -> Tensor:
    """Return the mean of rows ``(n, hidden)`` whose extreme values are replaced, in float64 if the device has it.

    In each column the k lowest values become the next one, and so the k highest, with k = ⌊quantile · n⌋.
    """
    rows = _double(rows).detach()
    k = int(quantile * len(rows))
    ordered = rows.sort(dim=0).values
    return rows.clamp(ordered[k], ordered[-1 - k]).mean(dim=0)


def _dominant_eigenvector(times: Callable[[Tensor], Tensor], near: Tensor) -> Tensor | None:
    """Return the eigenvector of the largest eigenvalue of a symmetric matrix, by Lanczos' method with all vectors kept.

    ``times`` multiplies a vector by the matrix; ``near`` is the starting point. None if the method hasn't converged
    after a few steps, since the eigenvalues are too close for it.
    """
    # The start has a component in every direction, so that none is overlooked.
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(near.shape, generator=generator, dtype=torch.float64, device="cpu").to(near)
    start = near / near.norm().clamp(min=torch.finfo(near.dtype).tiny) + 0.1 * noise / noise.norm()
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(_STEPS, len(near))):
        product = times(basis[-1])
        diagonal.append(float(product @ basis[-1]))
        kept = torch.stack(basis)
        for _twice in range(2):  # a single subtraction leaves too much rounding error
            product = product - kept.T @ (kept @ product)
        rest = float(product.norm())
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
        small += torch.diag(
            torch.tensor(off_diagonal, dtype=torch.float64, device="cpu"), -1
        )  # eigh reads the lower half
        values, vectors = torch.linalg.eigh(small)
        gap = float(values[-1] - values[-2]) if len(values) > 1 else float(values[-1])
        if len(values) > 1 and rest * abs(float(vectors[-1, -1])) <= _CONVERGED * gap:
            found: Tensor = kept.T @ vectors[:, -1].to(near)
            return found
        off_diagonal.append(rest)
        basis.append(product / max(rest, torch.finfo(near.dtype).tiny))
    return None


def _by_decomposition(rows: Tensor, squares: Tensor | None) -> Tensor:
    """Return the same by decomposing the smaller of two matrices; zeros if all rows are zero."""
    if squares is None:
        values, vectors = torch.linalg.eigh(rows @ rows.T)  # (n, n): fewer rows than they are wide
        component = vectors[:, -1] @ rows
    else:
        values, vectors = torch.linalg.eigh(squares + rows.T @ rows)
        component = vectors[:, -1]
    return component if bool(values[-1] > 0) else torch.zeros_like(component)


def _double(rows: Tensor) -> Tensor:
    """Return the rows in float64, or in float32 on Apple's GPUs, which lack it."""
    return rows.float() if rows.device.type == "mps" else rows.double()
