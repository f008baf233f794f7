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
