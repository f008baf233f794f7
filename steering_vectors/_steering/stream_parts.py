"""Find the modules inside a block whose outputs it adds to the residual stream.

The modules' outputs are replaced in test passes, and the block's outputs show which of them it adds.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._models import (
    Attached,
    Hook,
    activation_of,
    anatomy_of,
    input_of,
    kept_states,
    read_pass,
    stateful_modules,
    with_activation,
)

_TOKENS = 5
# The relative error up to which a block's output is a sum of its input and its modules' outputs, given rounding.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# A module whose output has a smaller factor in that sum doesn't write to the stream.
_LEAST_FACTOR = 0.02


def written_parts(model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Return, for each block, the modules inside it whose outputs it adds to the stream: its attention, its MLP.

    A norm that follows such a module is returned instead of it. Where a block's output is not the sum of its input and
    such modules' outputs, the block itself is returned alone.

    In passes over a few tokens, the modules' outputs are replaced by random numbers, and the blocks' outputs show which
    of them are added. The model is not changed.
    """
    found: dict[nn.Module, list[nn.Module]] = {}
    for depth in (1, 2, 3):  # some models add the stream inside their attention and MLP
        left = [block for block in dict.fromkeys(blocks) if block not in found]
        found |= {block: parts for block, parts in _adding(model, left, depth) if parts}
    return [found.get(block, [block]) for block in blocks]


def _adding(model: nn.Module, blocks: Sequence[nn.Module], depth: int) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield each block with the modules at a depth whose outputs it adds to the stream; none if that is unknown."""
    blends = {block: _Blend() for block in blocks}
    running: list[_Blend] = []
    thread = threading.get_ident()  # other threads' passes must stay as they are

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
    hooks = [
        *(Hook(block, begin, before=True) for block in blocks),
        *(Hook(part, replace) for part in parts),
        *(Hook(block, end, first=True) for block in blocks),  # so that it sees the output before the block is steered
    ]
    device = anatomy_of(model).input_device
    ids = torch.arange(1, _TOKENS + 1, device=device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    try:
        with Attached(hooks), kept_states(stateful_modules(model)):
            read_pass(anatomy_of(model).pass_modules, {}, inputs, activation_of, stop_early=False)
    except Exception as error:  # a model that can't be run this way may raise anything
        warnings.warn(
            f"{type(model).__name__} can't be run on a few tokens alone, so the modules that write to the residual "
            f"stream can't be found, and only the blocks' outputs are ablated: {type(error).__name__}: {error}",
            UserWarning,
            stacklevel=2,
        )
        return
    yield from ((block, blend.writers()) for block, blend in blends.items())


def _at_depth(module: nn.Module, depth: int) -> Iterator[nn.Module]:
    for child in module.children():
        if depth > 1 and any(True for _ in child.children()):
            yield from _at_depth(child, depth - 1)
        else:
            yield child


class _Blend:
    """A block's input and output in a test pass, with the random outputs put in place of its modules' outputs."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._replaced: list[tuple[nn.Module, Tensor]] = []  # some are called twice

    def begin(self, block_input: Tensor) -> None:
        self._input, self._output = block_input, None
        self._replaced.clear()

    def replace(self, part: nn.Module, output: Any) -> Any:
        """Return the output with random numbers as large as the block's input, or None if the shapes differ."""
        given = self._input
        try:
            activation = activation_of(output)
        except TypeError:
            return None
        if given is None or activation.shape[-1] != given.shape[-1] or activation.numel() != given.numel():
            return None
        size = given.float().square().mean(dim=-1, keepdim=True).sqrt()  # tokens' sizes differ by a factor of a hundred
        random = torch.randn(given.shape, generator=self._generator, device="cpu").to(given.device) * size
        written = random.to(activation.dtype).to(given.dtype)  # as the stream gets it: autocast rounds some outputs
        self._replaced.append((part, written))
        # A copy, since some models add to it in place.
        return with_activation(output, written.to(activation.dtype, copy=True).reshape(activation.shape))

    def end(self, block_output: Tensor) -> None:
        self._output = block_output

    def writers(self) -> list[nn.Module]:
        """Return the modules whose outputs the block adds to the stream; none if that is unknown."""
        given, made = self._input, self._output
        if given is None or made is None or made.shape != given.shape or not self._replaced:
            return []
        size = given.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
        outputs = [output for _, output in self._replaced]
        terms = torch.stack([self._flat(term, size) for term in (given, *outputs)], dim=1)
        total = self._flat(made, size)
        factors = torch.linalg.lstsq(terms, total[:, None]).solution[:, 0]
        rounding = _ROUNDING.get(made.dtype, 6e-2)
        is_sum = bool((terms @ factors - total).norm() <= rounding * total.norm())
        adds = (factors.abs() > _LEAST_FACTOR).tolist()
        if not is_sum or not adds[0]:
            return []
        return list(dict.fromkeys(part for (part, _), writes in zip(self._replaced, adds[1:], strict=True) if writes))

    @staticmethod
    def _flat(term: Tensor, size: Tensor) -> Tensor:
        return (term.float() / size).flatten().cpu().double()


def parts_inside(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[tuple[int, nn.Module]]:
    """Yield the modules inside blocks that write to the stream, as far as found, each with its block's number."""
    for number, (block, parts) in enumerate(zip(blocks, written_parts(model, blocks), strict=True)):
        yield from ((number, part) for part in parts if part is not block)
