"""Run the blocks below a steered layer once: what they return is the same at all multipliers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from steering_vectors.evaluation.running import Undone
from steering_vectors.layer_matching import get_num_matching_layers, guess_and_enhance_layer_config
from steering_vectors.steering_vector import SteeringVector


class _Reached(BaseException):
    """A signal that ends a pass once a block's output is known."""


class LowerBlocks:
    """The decoder blocks of a model, of which the lowest can return what they returned before instead of running.

    That needs blocks that pass one tensor on, with or without others beside it in a tuple.
    """

    def __init__(self, model: nn.Module) -> None:
        template = guess_and_enhance_layer_config(model, layer_type="decoder_block").get("decoder_block")
        names = [] if not isinstance(template, str) else range(get_num_matching_layers(model, template))
        compiled = any(getattr(module, "_compiled_call_impl", None) for module in model.modules())
        if compiled or hasattr(model, "_orig_mod"):  # compiled code doesn't look at a block's forward again
            names = []
        self._blocks = [model.get_submodule(str(template).format(num=number)) for number in names]
        self._beside: list[int | None] = []  # by block, the number of its output's other parts; None for no tuple

    def below(self, vector: SteeringVector) -> int:
        """Return the number of the lowest blocks whose outputs, before steering, don't depend on the steering.

        A block with hooks is none of them, since its hooks would run again on what they had returned.
        """
        if not self._blocks or not vector.layers:
            return 0
        lowest = min(layer % len(self._blocks) for layer in vector.layers)
        hooked = [number for number, block in enumerate(self._blocks) if block._forward_hooks]
        return min([lowest + (vector.layer_type == "decoder_block"), *hooked])

    def output(self, count: int, run: Callable[[], Any], known: tuple[int, Tensor] | None = None) -> Tensor:
        """Return what the lowest ``count`` blocks return, ``(rows, seq, hidden)``, in a pass that ``run`` begins.

        The pass ends there. ``known`` is what fewer blocks return, which don't run then.
        """
        start, state = known or (0, None)
        found: list[Tensor] = []
        thread = threading.get_ident()

        def note(_module: nn.Module, _args: object, output: Any) -> None:
            if threading.get_ident() != thread:
                return
            first = output if isinstance(output, Tensor) else output[0]
            self._beside.append(None if isinstance(output, Tensor) else len(output) - 1)
            if len(self._beside) == count:
                found.append(first)
                raise _Reached

        del self._beside[start:]
        with ExitStack() as stack:
            for block in self._blocks[start:count]:
                stack.callback(block.register_forward_hook(note).remove)
            if state is not None:
                stack.enter_context(self.returning(start, state))
            with suppress(_Reached):
                run()
        return found[0]

    def returning(self, count: int, state: Tensor) -> Undone:
        """Return a block in which the lowest ``count`` blocks return ``state`` in passes of this thread.

        They don't run then.
        """
        replaced = [(block, block.__dict__.get("forward")) for block in self._blocks[:count]]

        def replace() -> None:
            for (block, _), beside in zip(replaced, self._beside, strict=False):
                block.forward = _returns(block.forward, state if beside is None else (state, *[None] * beside))

        def restore() -> None:
            for block, forward in replaced:
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = forward

        return Undone(replace, restore)


def _returns(forward: Callable[..., Any], output: Any) -> Callable[..., Any]:
    """Return a function that returns ``output`` in this thread, and calls ``forward`` in others."""
    thread = threading.get_ident()

    def returned(*args: Any, **kwargs: Any) -> Any:
        return output if threading.get_ident() == thread else forward(*args, **kwargs)

    return returned
