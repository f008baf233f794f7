"""Tables of what is added to the tokens of each request: a row for each different steering of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Bank", "Multipliers"]

# Hashes of vectors with their multipliers; empty without steering.
Multipliers = tuple[tuple[str, float], ...]


class Bank:
    """Directions of loaded vectors, and rows of their sums for the requests of a step.

    Memory is reserved once: ``capacity`` vectors in float32, and a row for each of ``requests`` requests in the model's
    dtype, at each of ``layers``. Row 0 is all zeros, for requests without steering. Requests of the same steering share
    a row, and a row keeps its numbers until a step needs it for another steering.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        *,
        capacity: int,
        requests: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers, self.capacity, self.requests = tuple(layers), capacity, requests
        # (layers, 1 + requests, hidden): the rows of one layer lie together.
        self._rows = torch.zeros(len(layers), 1 + requests, width, dtype=dtype, device=device)
        self._directions = torch.zeros(capacity, len(layers), width, dtype=torch.float32, device=device)
        self._slots: dict[str, int] = {}
        self._row_of: dict[Multipliers, int] = {}

    @property
    def loaded(self) -> frozenset[str]:
        """The hashes of the loaded vectors."""
        return frozenset(self._slots)

    def rows(self, layer: int) -> Tensor:
        """Return a layer's table ``(1 + requests, hidden)``, whose numbers change from step to step."""
        return self._rows[self.layers.index(layer)]

    def load(self, key: str, directions: Mapping[int, Tensor]) -> None:
        """Keep a vector's directions under its hash; those at layers that the bank lacks are left out.

        Raises RuntimeError if the table is full.
        """
        if key in self._slots:
            return
        free = sorted(set(range(self.capacity)) - set(self._slots.values()))
        if not free:
            raise RuntimeError(f"the table of directions is full: it holds {self.capacity} vectors")
        slot = self._directions[free[0]].zero_()  # (layers, hidden)
        for place, layer in enumerate(self.layers):
            if layer in directions:
                slot[place].copy_(directions[layer].reshape(-1))
        self._slots[key] = free[0]

    def unload(self, key: str) -> None:
        """Forget a vector, if it is loaded."""
        self._slots.pop(key, None)
        self._row_of = {wanted: row for wanted, row in self._row_of.items() if key not in dict(wanted)}

    def assign(self, wanted: Sequence[Multipliers]) -> list[int]:
        """Return the row of each request's steering, in a step of at most ``requests`` requests.

        Raises LookupError if a vector isn't loaded.
        """
        new = {one: None for one in wanted if one and one not in self._row_of}
        if new:
            kept = {one: self._row_of[one] for one in set(wanted) & self._row_of.keys()}
            unused = {row: one for one, row in self._row_of.items() if one not in kept}
            # First the rows that no steering has, then those that this step does not need.
            free = [row for row in range(1, 1 + self.requests) if row not in unused and row not in kept.values()]
            free += unused
            for one, row in zip(new, free, strict=False):
                self._fill(row, one)
                self._row_of.pop(unused.get(row, ()), None)
                self._row_of[one] = row
        return [self._row_of[one] if one else 0 for one in wanted]

    def _fill(self, row: int, multipliers: Multipliers) -> None:
        if missing := [key for key, _ in multipliers if key not in self._slots]:
            raise LookupError(f"the vectors with the hashes {missing} are not loaded")
        total = torch.zeros_like(self._directions[0])  # (layers, hidden)
        for key, multiplier in multipliers:
            total += multiplier * self._directions[self._slots[key]]
        self._rows[:, row].copy_(total)
