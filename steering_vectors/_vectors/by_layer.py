"""Directions as a collection by layer number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from steering_vectors._vectors.algebra import norms


class ByLayer:
    """A collection of directions, ``layer_activations``, by layer number."""

    layer_activations: dict[int, Tensor]

    @property
    def layers(self) -> list[int]:
        """The layers' numbers, ascending."""
        return sorted(self.layer_activations)

    def __contains__(self, layer: object) -> bool:
        """Return True if the vector has a direction for this layer number.

        >>> 1 in SteeringVector({1: [3.0, 4.0]})
        True
        """
        return layer in self.layer_activations

    def __iter__(self) -> Iterator[int]:
        """Iterate over the layers' numbers, ascending."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layer_activations)

    @property
    def hidden_size(self) -> int:
        """The width of the directions. Raises ValueError for a vector without directions."""
        widths = [direction.shape[-1] for direction in self.layer_activations.values()]
        if not widths:
            raise ValueError("this steering vector has no directions, so it has no hidden_size")
        return int(widths[0])

    def norms(self) -> dict[int, float]:
        """Return the Euclidean norm of each direction, by layer.

        >>> SteeringVector({1: [3.0, 4.0]}).norms()
        {1: 5.0}
        """
        on_cpu = {n: torch.as_tensor(direction, device="cpu") for n, direction in self.layer_activations.items()}
        return norms(on_cpu)
