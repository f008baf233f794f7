"""Find the linear layer of a block whose output is added to the residual stream last, as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors.merging.copies import block_names
from steering_vectors.merging.writers import copies, inputs_of

__all__ = ["last_linears"]

# By dtype, the share of what is added that rounding may turn into something else.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}


@torch.no_grad()
def last_linears(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, tuple[str, float]]:
    """Return each block's last linear layer, and the factor with which what is added to its output reaches the stream.

    The model is in float32 or wider, since rounding would hide what else an addition changes.

    Raises ValueError for a block in which there is none.
    """
    names = block_names(model)
    blocks = {layer: model.get_submodule(names[layer]) for layer in layers}
    given = inputs_of(model, list(blocks.values()))
    found = {}
    for layer, block in blocks.items():
        for path, part in reversed(list(block.named_modules())):
            factor = _factor(block, part, *given[block]) if isinstance(part, nn.Linear) else None
            if factor is not None:
                found[layer] = (f"{names[layer]}.{path}", factor)
                break
        else:
            raise ValueError(
                f"no linear layer of {names[layer]}, a {type(block).__name__}, is added to the stream as it is: a norm "
                f"or a mixture of experts comes after the last one, or it is of a kind to which PEFT can't add a bias. "
                f"Steer with vector.apply"
            )
    return found


def _factor(block: nn.Module, linear: nn.Linear, args: Any, kwargs: Any) -> float | None:
    """Return the factor, or None if more than a multiple of what is added reaches the block's output."""
    before = _output(block, linear, None, args, kwargs)
    if before.shape[-1] != linear.out_features:
        return None
    size = float(before.square().mean().sqrt())
    generator = torch.Generator("cpu").manual_seed(0)
    added = size * torch.randn(linear.out_features, generator=generator, device="cpu")
    change = _output(block, linear, added.to(before), args, kwargs) - before
    added = added.to(before)
    factor = float((change @ added).mean() / (added @ added))
    apart = float((change - factor * added).norm() / (added.norm() * max(1, change.shape[:-1].numel()) ** 0.5))
    return factor if abs(factor) > 1e-2 and apart <= _ROUNDING[linear.weight.dtype] * abs(factor) else None


def _output(block: nn.Module, linear: nn.Linear, added: Tensor | None, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Return what the block computes with something added to the linear layer's output."""
    handle = linear.register_forward_hook(lambda _m, _a, out: out if added is None else out + added)
    args, kwargs = copies(args, kwargs)
    try:
        output = block(*args, **kwargs)
    finally:
        handle.remove()
    return output if isinstance(output, Tensor) else output[0]
