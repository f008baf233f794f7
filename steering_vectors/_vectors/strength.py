"""Compare directions with the activations that they are added to."""

import json
import math
from collections.abc import Mapping, Sequence

from steering_vectors._vectors.algebra import Directions, norms

_ENTRY = "activation_norms"


def of_norms(by_layer: Mapping[int, float]) -> dict[str, str]:
    """Return the metadata entry that records the median norms of a model's activations by layer."""
    known = {str(layer): float(f"{norm:.6g}") for layer, norm in sorted(by_layer.items()) if math.isfinite(norm)}
    return {_ENTRY: json.dumps(known)} if known else {}


def of_mean_norms(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the entry for a vector made of others, which were read from one model: the mean of their norms."""
    read = [_activation_norms(metadata) for metadata in sources]
    models = {
        tuple(metadata.get(name) for name in ("base_model", "model_type", "layers_of_model")) for metadata in sources
    }
    if len(models) != 1 or not all(read):
        return {}
    layers = set().union(*read)
    found = {layer: [one[layer] for one in read if layer in one] for layer in layers}
    return of_norms({layer: sum(values) / len(values) for layer, values in found.items()})


def without_norms(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries other than the norms."""
    return {name: value for name, value in metadata.items() if name != _ENTRY}


def shares_of(directions: Directions, metadata: Mapping[str, str]) -> dict[int, float]:
    """Return the directions' norms as shares of the activations' norms, for the layers where those are known."""
    known = _activation_norms(metadata)
    found = norms({layer: direction for layer, direction in directions.items() if known.get(layer, 0) > 0})
    return {layer: norm / known[layer] for layer, norm in found.items()}


def _activation_norms(metadata: Mapping[str, str]) -> dict[int, float]:
    try:  # a file may hold anything
        found = {int(layer): float(norm) for layer, norm in json.loads(metadata.get(_ENTRY, "{}")).items()}
    except (AttributeError, TypeError, ValueError):
        return {}
    return {layer: norm for layer, norm in found.items() if math.isfinite(norm)}
