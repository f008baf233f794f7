"""Directions as values and as files.

Directions by layer are checked, added, compared and projected on.
A vector's metadata say where it comes from.
One safetensors file holds both, and is read without trust.
"""

from steering_vectors._vectors.algebra import are_equal, cosines, norms, orthogonal, projections, united
from steering_vectors._vectors.directions import asked_layers, checked_direction, checked_directions, in_ranges
from steering_vectors._vectors.format import read, write
from steering_vectors._vectors.metadata import (
    Metadata,
    TrainingRecord,
    derived,
    of_another,
    of_libraries,
    of_model,
    of_template,
    type_and_depth,
    without_addresses,
)

__all__ = [
    "Metadata",
    "TrainingRecord",
    "are_equal",
    "asked_layers",
    "checked_direction",
    "checked_directions",
    "cosines",
    "derived",
    "in_ranges",
    "norms",
    "of_another",
    "of_libraries",
    "of_model",
    "of_template",
    "orthogonal",
    "projections",
    "read",
    "type_and_depth",
    "united",
    "without_addresses",
    "write",
]
