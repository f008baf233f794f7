"""Which of a block's modules write to the residual stream: told by what the block makes of other outputs of theirs."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._models import (
    activation_of,
    after_forward,
    anatomy_of,
    attach_all,
    before_forward,
    input_of,
    kept_states,
    read_pass,
    remove_all,
    stateful_modules,
    unless_removed,
    with_activation,
)

_TOKENS = 5
# The block's output must be a sum of its input and its modules' outputs up to so much; rounding makes it less exact.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# A module whose output stands in that sum with a smaller factor doesn't write to the stream.
_LEAST_FACTOR = 0.02


def written_parts(model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """For each block, the modules inside it whose outputs are added to the stream: its attention, its MLP.

    Where there is a norm after such a part, it is the norm. A block is given back itself, alone, where its output is no
    sum of its input and such parts.

    Passes over a few tokens are run, in which the modules' outputs are replaced by random numbers: what a block makes
    of them tells which it adds. Nothing of the model is changed.
    """
    found: dict[nn.Module, list[nn.Module]] = {}
    for depth in (1, 2, 3):  # some models add the stream inside their attention and MLP
        left = [block for block in dict.fromkeys(blocks) if block not in found]
        found |= {block: parts for block, parts in _adding(model, left, depth) if parts}
    return [found.get(block, [block]) for block in blocks]


def _adding(model: nn.Module, blocks: Sequence[nn.Module], depth: int) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Each block with its modules at a depth whose outputs it adds to the stream; none where that can't be told."""
    blends = {block: _Blend() for block in blocks}
    running: list[_Blend] = []
    thread = threading.get_ident()  # passes of others go on as they are

    @unless_removed
    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            running[:] = [blends[block]]
            blends[block].begin(input_of(args, kwargs))

    def replace(part: nn.Module, _args: Any, output: Any) -> Any:
        return running[0].replace(part, output) if running and threading.get_ident() == thread else None

    def end(block: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            running.clear()
            blends[block].end(activation_of(output))

    parts = dict.fromkeys(part for block in blocks for part in _at_depth(block, depth))
    handles = attach_all(
        [
            *(partial(before_forward, block, begin) for block in blocks),
            *(partial(after_forward, part, replace) for part in parts),
            # First, before a steering of the block.
            *(partial(after_forward, block, end, first=True) for block in blocks),
        ]
    )
    device = anatomy_of(model).input_device
    ids = torch.arange(1, _TOKENS + 1, device=device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    try:
        with kept_states(stateful_modules(model)):
            read_pass(model, {}, inputs, activation_of, stop_early=False)
    except Exception as error:  # a model that can't be run so raises what it likes
        warnings.warn(
            f"{type(model).__name__} can't be run on a few tokens alone, so that its blocks' parts can't be told, and "
            f"only the blocks' outputs are ablated: {type(error).__name__}: {error}",
            UserWarning,
            stacklevel=2,
        )
        return
    finally:
        remove_all(handles)
    yield from ((block, blend.writers()) for block, blend in blends.items())


def _at_depth(module: nn.Module, depth: int) -> Iterator[nn.Module]:
    for child in module.children():
        if depth > 1 and any(True for _ in child.children()):
            yield from _at_depth(child, depth - 1)
        else:
            yield child


class _Blend:
    """What a block makes of its input and of its modules' outputs, all random but the first."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._given: Tensor | None = None
        self._made: Tensor | None = None
        self._outputs: list[tuple[nn.Module, Tensor]] = []  # some are called twice

    def begin(self, given: Tensor) -> None:
        self._given, self._made = given, None
        self._outputs.clear()

    def replace(self, part: nn.Module, output: Any) -> Any:
        """The output with random numbers as large as the block's input in it; None where it is of another shape."""
        given = self._given
        try:
            activation = activation_of(output)
        except TypeError:
            return None
        if given is None or activation.shape[-1] != given.shape[-1] or activation.numel() != given.numel():
            return None
        size = given.float().square().mean(dim=-1, keepdim=True).sqrt()  # tokens differ by a hundred times
        random = torch.randn(given.shape, generator=self._generator).to(given.device) * size
        self._outputs.append((part, random.to(given.dtype)))
        # A copy, since some models add to it in place.
        return with_activation(output, random.to(given.dtype).to(activation.dtype, copy=True).reshape(activation.shape))

    def end(self, made: Tensor) -> None:
        self._made = made

    def writers(self) -> list[nn.Module]:
        """The modules whose outputs are added to the stream; none where that can't be told."""
        if self._given is None or self._made is None or self._made.shape != self._given.shape or not self._outputs:
            return []
        size = self._given.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
        outputs = [output for _, output in self._outputs]
        terms = torch.stack([self._flat(term, size) for term in (self._given, *outputs)], dim=1)
        total = self._flat(self._made, size)
        factors = torch.linalg.lstsq(terms, total[:, None]).solution[:, 0]
        rounding = _ROUNDING.get(self._made.dtype, 6e-2)
        is_sum = bool((terms @ factors - total).norm() <= rounding * total.norm())
        adds = (factors.abs() > _LEAST_FACTOR).tolist()
        if not is_sum or not adds[0]:
            return []
        return list(dict.fromkeys(part for (part, _), writes in zip(self._outputs, adds[1:], strict=True) if writes))

    @staticmethod
    def _flat(term: Tensor, size: Tensor) -> Tensor:
        return (term.float() / size).flatten().cpu().double()


def parts_inside(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[tuple[int, nn.Module]]:
    """The parts of blocks that write to the stream, each with its block's number, as far as they can be told."""
    for number, (block, parts) in enumerate(zip(blocks, written_parts(model, blocks), strict=True)):
        yield from ((number, part) for part in parts if part is not block)
