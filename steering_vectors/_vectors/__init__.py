"""Directions as values and as files.

The modules check, add, compare and project on directions by layer.
The metadata of a vector record its origin.
One safetensors file holds both, and is treated as untrusted when it is read.
"""

from steering_vectors._vectors.algebra import are_equal, cosines, orthogonal, projections, span_of, united
from steering_vectors._vectors.by_layer import ByLayer
from steering_vectors._vectors.directions import (
    asked_layers,
    checked_direction,
    checked_directions,
    checked_factor,
    in_ranges,
    plain_number,
    scaled,
)
from steering_vectors._vectors.format import read, write
from steering_vectors._vectors.metadata import (
    Metadata,
    TrainingRecord,
    derived,
    inherited,
    of_libraries,
    of_model,
    of_template,
    type_and_depth,
    without_addresses,
)
from steering_vectors._vectors.shown import line_of, table_of
from steering_vectors._vectors.strength import of_norms, shares_of

__all__ = [
    "ByLayer",
    "Metadata",
    "TrainingRecord",
    "are_equal",
    "asked_layers",
    "checked_direction",
    "checked_directions",
    "checked_factor",
    "cosines",
    "derived",
    "in_ranges",
    "inherited",
    "line_of",
    "of_libraries",
    "of_model",
    "of_norms",
    "of_template",
    "orthogonal",
    "plain_number",
    "projections",
    "read",
    "scaled",
    "shares_of",
    "span_of",
    "table_of",
    "type_and_depth",
    "united",
    "without_addresses",
    "write",
]
