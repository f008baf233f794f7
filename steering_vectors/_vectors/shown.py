"""Show vectors: in a line of text, and as a table in notebooks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from steering_vectors._html import block, facts, table
from steering_vectors._vectors.algebra import Directions, norms
from steering_vectors._vectors.directions import in_ranges
from steering_vectors._vectors.strength import shares_of
from steering_vectors.layer_matching import is_at_input

_LABELS = {  # of the metadata that the table shows
    "base_model": "model",
    "method": "method",
    "read": "read",
    "samples": "samples",
    "derivation": "made as",
    "layer_config": "modules",
}


def line_of(directions: Directions, layer_type: str) -> str:
    """Return the text that ``repr`` shows."""
    if not directions:
        return f"SteeringVector(layers=[], layer_type={layer_type!r})"
    found = norms(_with_numbers(directions)).values()
    low, high = (f"{norm:.3g}" for norm in (min(found, default=0), max(found, default=0)))
    shown = f", norms={low if low == high else f'{low} to {high}'}" if found else ""
    width = f"{'width' if is_at_input(layer_type) else 'hidden_size'}={_width(directions)}"
    return f"SteeringVector(layers={in_ranges(sorted(directions))}, {width}, layer_type={layer_type!r}{shown})"


def table_of(directions: Directions, layer_type: str, metadata: Mapping[str, str]) -> str:
    """Return HTML: the vector's origin, and the norm of each direction, also as a share of the activations' norm."""
    known = {"layers": in_ranges(sorted(directions)), "layer type": layer_type}
    if directions:
        known["width" if is_at_input(layer_type) else "hidden size"] = _width(directions)
    known |= {label: metadata[name] for name, label in _LABELS.items() if name in metadata}
    found, shares = norms(_with_numbers(directions)), shares_of(_with_numbers(directions), metadata)
    columns = ["layer", "norm", *(["share of the activations' norm"] if shares else [])]
    rows = [
        [
            str(layer),
            f"{found[layer]:.4g}" if layer in found else "unknown",
            f"{shares[layer]:.1%}" if layer in shares else "unknown",
        ][: len(columns)]
        for layer in sorted(directions)
    ]
    return block("SteeringVector", facts(known), table(columns, rows))


def _with_numbers(directions: Directions) -> dict[int, Tensor]:
    """Return the directions that have numbers, on the CPU: those on the device ``meta`` have none."""
    return {
        layer: torch.as_tensor(direction, device="cpu")
        for layer, direction in directions.items()
        if not (isinstance(direction, Tensor) and direction.is_meta)
    }


def _width(directions: Directions) -> str:
    return str(next(iter(directions.values())).shape[-1])
