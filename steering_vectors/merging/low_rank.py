"""The low-rank factors that remove directions from weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steering_vectors.merging.copies import wide_dtype

__all__ = ["Factors", "factors_of"]


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of a change ``b @ a`` of a weight, laid out as PEFT keeps them."""

    a: Tensor
    b: Tensor
    of_experts: bool = False
    is_transposed: bool = False


def factors_of(model: nn.Module, axes: Mapping[str, int], units: Tensor, strength: float) -> dict[str, Factors]:
    """Return the factors of ``−strength · U Uᵀ W`` for each weight that writes to the stream, by its name.

    ``axes`` has the axis that is written for each; ``units`` are orthonormal rows ``(k, hidden)``.

    Raises ValueError for a weight of which no adapter can change what it writes.
    """
    found = {}
    for name, axis in axes.items():
        weight, owner = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
        rows = units.to(weight.device, wide_dtype(weight))
        if weight.ndim == 1 or name.endswith("bias"):
            _check_at_right_angles(name, weight.detach().to(rows.dtype).movedim(axis, -1) @ rows.T, weight)
            continue
        matrices = weight.detach().to(rows.dtype).movedim(axis, -2)  # (…, hidden, in)
        down, up = rows @ matrices, -strength * rows.T
        if weight.ndim == 3:
            experts = weight.shape[0]
            repeated = up[..., None].expand(*up.shape, experts)
            found[name] = Factors(down.flatten(0, 1), repeated.flatten(1), of_experts=True)
        elif isinstance(owner, (nn.Linear, nn.Embedding)) or type(owner).__name__ == "Conv1D":
            found[name] = Factors(down, up, is_transposed=type(owner).__name__ == "Conv1D")
        else:
            raise ValueError(
                f"{name} writes to the stream, and PEFT has no low-rank adapter for a {type(owner).__name__}: merge "
                f"the ablation into the weights with merge_ablation"
            )
    return found


def _check_at_right_angles(name: str, along: Any, bias: Tensor) -> None:
    if float(along.abs().max()) > 1e-6 * float(bias.detach().float().norm().clamp(min=1e-30)):
        raise ValueError(
            f"{name} is a bias with a part along the direction, which a low-rank adapter can't reach: merge the "
            f"ablation into the weights with merge_ablation"
        )
