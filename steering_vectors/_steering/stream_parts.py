"""Find the modules inside a block whose outputs it adds to the residual stream.

The modules' outputs are replaced in test passes, and the block's outputs show which of them it adds.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    part_path,
    read_pass,
    stateful_modules,
    with_activation,
)

_TOKENS = 5
# The relative error up to which a block's output is a sum of its input and its modules' outputs, given rounding.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# A module whose output has a smaller factor in that sum doesn't write to the stream.
_LEAST_FACTOR = 0.02


def written_parts(model: nn.Module, blocks: Sequence[nn.Module]) -> list[dict[nn.Module, str | None]]:
    """Return, for each block, the modules inside it whose outputs it adds to the stream, and their layer types.

    A type is ``"self_attn"``, also for what a block has in attention's place, or ``"mlp"``; None if it is unknown.
    A norm that follows such a module is returned instead of it. Where a block's output is not the sum of its input and
    such modules' outputs, the block itself is returned alone.

    In passes over a few tokens, the modules' outputs are replaced by random numbers, and the blocks' outputs show which
    of them are added. The model is not changed.
    """
    found, shared = _found(model, blocks, ())
    if shared:
        found, _ = _found(model, blocks, shared)
    return [found.get(block, {block: None}) for block in blocks]


def _found(
    model: nn.Module, blocks: Sequence[nn.Module], left_out: Collection[nn.Module]
) -> tuple[dict[nn.Module, dict[nn.Module, str | None]], set[nn.Module]]:
    """Return the parts of the blocks in which some are found, and the dropouts that attention and MLP share."""
    found: dict[nn.Module, dict[nn.Module, str | None]] = {}
    shared: set[nn.Module] = set()
    for depth in (1, 2, 3):  # some models add the stream inside their attention and MLP
        left = [block for block in dict.fromkeys(blocks) if block not in found]
        for block, blend in _blends(model, left, depth, left_out):
            if parts := blend.writers():
                found[block] = parts
                shared |= blend.shared_dropouts()
    return found, shared


def _blends(
    model: nn.Module, blocks: Sequence[nn.Module], depth: int, left_out: Collection[nn.Module]
) -> Iterator[tuple[nn.Module, "_Blend"]]:
    """Yield each block with what a test pass made of its modules at a depth; none if the pass fails."""
    blends = {block: _Blend(block) for block in blocks}
    running: list[_Blend] = []
    thread = threading.get_ident()  # other threads' passes must stay as they are

    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            running[:] = [blends[block]]
            blends[block].begin(input_of(args, kwargs))

    def begin_part(part: nn.Module, _args: Any, _kwargs: Any) -> None:
        if running and threading.get_ident() == thread:
            running[0].begin_part(part)

    def replace(part: nn.Module, _args: Any, output: Any) -> Any:
        return running[0].replace(part, output) if running and threading.get_ident() == thread else None

    def end(block: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            running.clear()
            blends[block].end(activation_of(output))

    parts = dict.fromkeys(part for block in blocks for part in _at_depth(block, depth) if part not in left_out)
    hooks = [
        *(Hook(block, begin, before=True) for block in blocks),
        *(Hook(part, begin_part, before=True) for blend in blends.values() for part in blend.known if _takes_it(part)),
        *(Hook(part, replace) for part in parts),
        *(Hook(block, end, first=True) for block in blocks),  # so that it sees the output before the block is steered
    ]
    ids = torch.arange(1, _TOKENS + 1, device=anatomy_of(model).input_device)[None]
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
    yield from blends.items()


def _takes_it(part: nn.Module) -> bool:
    """Return True if PyTorch allows a hook before the module: those of TorchScript have none."""
    return not isinstance(part, torch.jit.ScriptModule)


def _at_depth(module: nn.Module, depth: int) -> Iterator[nn.Module]:
    for child in module.children():
        if depth > 1 and any(True for _ in child.children()):
            yield from _at_depth(child, depth - 1)
        else:
            yield child


class _Blend:
    """A block's input and output in a test pass, with the random outputs put in place of its modules' outputs.

    ``known`` are the block's attention and MLP, as far as found, with their layer types.
    """

    def __init__(self, block: nn.Module) -> None:
        paths = {layer_type: part_path(block, layer_type) for layer_type in ("self_attn", "mlp")}
        self.known = {block.get_submodule(path): layer_type for layer_type, path in paths.items() if path is not None}
        self._attention = {
            module for part, kind in self.known.items() if kind == "self_attn" for module in part.modules()
        }
        self._began: str | None = None
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        # Each with the part that began last; some are called twice.
        self._replaced: list[tuple[nn.Module, Tensor, str | None]] = []

    def begin(self, block_input: Tensor) -> None:
        self._input, self._output, self._began = block_input, None, None
        self._replaced.clear()

    def begin_part(self, part: nn.Module) -> None:
        self._began = self.known[part]

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
        self._replaced.append((part, written, self.known.get(part, self._began)))
        # A copy, since some models add to it in place.
        return with_activation(output, written.to(activation.dtype, copy=True).reshape(activation.shape))

    def end(self, block_output: Tensor) -> None:
        self._output = block_output

    def writers(self) -> dict[nn.Module, str | None]:
        """Return the modules whose outputs the block adds to the stream; none if that is unknown."""
        given, made = self._input, self._output
        if given is None or made is None or made.shape != given.shape or not self._replaced:
            return {}
        size = given.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
        outputs = [output for _, output, _ in self._replaced]
        terms = torch.stack([self._flat(term, size) for term in (given, *outputs)], dim=1)
        total = self._flat(made, size)
        finite = terms.isfinite().all(dim=1) & total.isfinite()  # in float16, sums at the largest tokens overflow
        terms, total = terms[finite], total[finite]
        if len(total) < terms.shape[1]:
            return {}
        factors = torch.linalg.lstsq(terms, total[:, None]).solution[:, 0]
        rounding = _ROUNDING.get(made.dtype, 6e-2)
        is_sum = bool((terms @ factors - total).norm() <= rounding * total.norm())
        adds = (factors.abs() > _LEAST_FACTOR).tolist()
        if not is_sum or not adds[0]:
            return {}
        writing = {part: began for (part, _, began), writes in zip(self._replaced, adds[1:], strict=True) if writes}
        return {part: self._type_of(part, began, alone=len(writing) == 1) for part, began in writing.items()}

    def shared_dropouts(self) -> set[nn.Module]:
        """Return the dropouts that run after several parts of the block, as in Phi."""
        began = {(part, kind) for part, _, kind in self._replaced if isinstance(part, nn.Dropout)}
        times = Counter(part for part, _ in began)
        return {part for part, count in times.items() if count > 1}

    def _type_of(self, part: nn.Module, began: str | None, *, alone: bool) -> str | None:
        """Return the layer type of a module that runs after the part ``began``, such as its norm, and before another.

        Without a known MLP, it is unknown which of several modules stands in its place.
        """
        is_clear = alone or part in self._attention or "mlp" in self.known.values()
        return (began or "self_attn") if is_clear else None

    @staticmethod
    def _flat(term: Tensor, size: Tensor) -> Tensor:
        return (term.float() / size).flatten().cpu().double()


def parts_inside(model: nn.Module, blocks: Mapping[int, nn.Module]) -> Iterator[tuple[int, nn.Module, str | None]]:
    """Yield the modules inside blocks that write to the stream, as far as found, with the layer's number and the type.

    The type is ``"self_attn"``, ``"mlp"``, or None if it is unknown.
    """
    for (layer, block), parts in zip(blocks.items(), written_parts(model, list(blocks.values())), strict=True):
        yield from ((layer, part, kind) for part, kind in parts.items() if part is not block)
