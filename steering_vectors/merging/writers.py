"""Find the weights that write to the residual stream, and the side on which they do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors.ablation import stream_writers
from steering_vectors.merging.copies import block_names, pass_inputs, wide_dtype

__all__ = ["check_complete", "copies", "inputs_of", "project", "watched_places", "writing_weights"]

# By dtype, the share of a change that rounding may turn away from a direction, and that of an output that it may leave
# along a removed one.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-2}

Place = tuple[str, nn.Module, tuple[Any, ...], dict[str, Any], list[nn.Module]]


class _Reached(BaseException):
    """The end of a pass that has reached the first block."""


@torch.no_grad()
def watched_places(model: PreTrainedModel) -> list[Place]:
    """Return what can be run to see what is written to the stream, with the inputs that it has for a few tokens.

    These are each block, with the modules inside it that write, and, under the name "", the model, up to the input of
    the first block.

    Raises ValueError if a block has no modules that write.
    """
    names = block_names(model)
    writers = stream_writers(model)
    if whole := [names[layer] for layer, parts in writers.items() if not parts]:
        raise ValueError(
            f"the output of {whole[0]}, a {type(model.get_submodule(whole[0])).__name__}, isn't the sum of its input "
            f"and of its parts' outputs, so no weights can keep a direction out of it: use ablate_everywhere"
        )
    blocks = [model.get_submodule(name) for name in names]
    given = inputs_of(model, blocks)
    found: list[Place] = [("", model, (), pass_inputs(model), [blocks[0]])]
    for name, block, parts in zip(names, blocks, writers.values(), strict=True):
        found.append((f"{name}.", block, *given[block], [model.get_submodule(part) for part in parts]))
    return found


@torch.no_grad()
def inputs_of(model: PreTrainedModel, blocks: list[nn.Module]) -> dict[nn.Module, tuple[Any, Any]]:
    """Return the arguments, by position and by keyword, with which blocks are called for a few tokens."""
    given: dict[nn.Module, tuple[Any, Any]] = {}
    handles = [
        block.register_forward_pre_hook(lambda m, args, kw: given.update({m: copies(args, kw)}), with_kwargs=True)
        for block in blocks
    ]
    try:
        model(**pass_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return given


def copies(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments with copies of the tensors, since some blocks change them in place."""
    return tuple(_copy_of(value) for value in args), {name: _copy_of(value) for name, value in kwargs.items()}


def _copy_of(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def writing_weights(model: PreTrainedModel, places: list[Place]) -> dict[str, int]:
    """Return the weights whose products, or which themselves, are added to the stream, and the axis that is added.

    A weight writes if to change it along a random direction, on one of its axes, changes what is written along that
    direction alone.
    """
    found: dict[str, int] = {}
    in_blocks = {id(weight) for _, block, *_ in places[1:] for weight in block.parameters()}
    for place in places:
        name, root, *_ = place
        before = _written(place)
        width = next(iter(before.values())).shape[-1]
        direction = torch.nn.functional.normalize(torch.randn(width, generator=_generator(), device="cpu"), dim=0)
        for path, weight in root.named_parameters():
            if name or id(weight) not in in_blocks:
                for axis in _axes(root, path, weight, width):
                    with _changed(weight, direction, axis):
                        after = _written(place)
                    if _is_along(direction, before, after):
                        found[name + path] = axis
    return found | _other_experts(model, found)


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _axes(root: nn.Module, path: str, weight: Tensor, width: int) -> list[int]:
    """Return the axes of a weight that could be added to the stream."""
    owner = root.get_submodule(path.rpartition(".")[0])
    if isinstance(owner, nn.Linear) and weight.ndim == 2:
        return [0] if weight.shape[0] == width else []  # the other is that of the input
    return [axis for axis, size in enumerate(weight.shape) if size == width]


@contextmanager
def _changed(weight: nn.Parameter, direction: Tensor, axis: int) -> Iterator[None]:
    """Add random multiples of the direction to the weight, as large as it is, inside the block."""
    kept = weight.detach().clone()
    shape = [1 if number == axis else size for number, size in enumerate(weight.shape)]
    factors = torch.randn(shape, generator=_generator(), device="cpu")
    along = direction.reshape([-1 if number == axis else 1 for number in range(weight.ndim)])
    scale = float(kept.float().square().mean().sqrt().clamp(min=1e-2)) * direction.numel() ** 0.5
    weight.copy_(kept + (scale * factors * along).to(weight.device, weight.dtype))
    try:
        yield
    finally:
        weight.copy_(kept)


def _written(place: Place) -> dict[nn.Module, Tensor]:
    """Return what a place writes ``(tokens, hidden)`` by module, in the order in which the modules run."""
    name, root, args, kwargs, modules = place
    made: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        made[module] = first.detach().flatten(0, -2).clone()

    def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        made[module] = first.detach().flatten(0, -2).clone()
        raise _Reached

    if name:
        handles = [module.register_forward_hook(keep) for module in modules]
    else:
        handles = [modules[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    args, kwargs = copies(args, kwargs)
    try:
        root(*args, **kwargs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return made


def _is_along(direction: Tensor, before: Mapping[nn.Module, Tensor], after: Mapping[nn.Module, Tensor]) -> bool:
    """Return True if the first output that changed did so along the direction alone."""
    for module, was in before.items():
        change = after[module] - was
        size = float(change.norm())
        if size > 1e-3 * float(was.norm()):
            unit = direction.to(change)
            return float((change - (change @ unit)[:, None] * unit).norm()) <= _ROUNDING[was.dtype] * size
        if size > 0:
            return False
    return False


def _other_experts(model: nn.Module, found: Mapping[str, int]) -> dict[str, int]:
    """Return the weights of experts that no token was sent to: those named as the others of their block are."""
    patterns = {re.sub(r"(experts\.)\d+\.", r"\1#.", name): axis for name, axis in found.items()}
    others = {}
    for name, _ in model.named_parameters():
        pattern = re.sub(r"(experts\.)\d+\.", r"\1#.", name)
        if pattern != name and pattern in patterns:
            others[name] = patterns[pattern]
    return others


@torch.no_grad()
def check_complete(model: PreTrainedModel, places: list[Place], axes: Mapping[str, int], unit_rows: Tensor) -> None:
    """Raise ValueError if weights without the directions ``(k, hidden)`` still write something along them.

    ``axes`` are those of the weights that write. They are projected place by place, and put back.
    """
    names = {module: name for name, module in model.named_modules()}
    in_blocks = tuple(place[0] for place in places[1:])
    for place in places:
        mine = {
            name: axis
            for name, axis in axes.items()
            if (name.startswith(place[0]) if place[0] else not name.startswith(in_blocks))
        }
        kept = {name: model.get_parameter(name).detach().clone() for name in mine}
        try:
            for name, axis in mine.items():
                project(model.get_parameter(name), unit_rows, axis)
            written = _written(place)
        finally:
            for name, weight in kept.items():
                model.get_parameter(name).copy_(weight)
        for module, output in written.items():
            if _share_along(output, unit_rows) > _ROUNDING[output.dtype]:
                what = f"{names[module]}, a {type(module).__name__}," if place[0] else "the input of the first block"
                raise ValueError(
                    f"{what} is not computed by a linear layer alone: a norm, or something else that isn't linear, "
                    f"comes after it, so no weights of {type(model).__name__} can keep a direction out of it. Use "
                    f"ablate_everywhere"
                )


def _share_along(output: Tensor, unit_rows: Tensor) -> float:
    """Return the size of the part along the directions, as a multiple of that along random ones."""
    along = (output @ unit_rows.to(output).T).norm() / output.norm().clamp(min=1e-30)
    return float(along) * math.sqrt(output.shape[-1] / len(unit_rows))


@torch.no_grad()
def project(weight: nn.Parameter, unit_rows: Tensor, axis: int) -> None:
    """Remove the directions ``(k, hidden)`` from an axis of the weight, in place."""
    moved = weight.movedim(axis, -1)
    units = unit_rows.to(weight.device, wide_dtype(weight))
    wide = moved.to(units.dtype)
    moved.copy_(wide - (wide @ units.T) @ units)
