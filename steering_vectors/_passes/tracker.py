"""Follow a model's forward passes: the pass that each thread is in, and the positions of its tokens."""

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._models import Removable, after_forward, before_forward, parameters_of, unless_removed
from steering_vectors._passes.arguments import PassArguments, describe_same_tokens, merge_arguments, pass_arguments
from steering_vectors._passes.caches import CacheMemory
from steering_vectors._passes.checkpointing import checkpoint_registrations
from steering_vectors.token_selection import TokenPositions

_NUMBERS = itertools.count()
_THREAD = threading.local()


def this_thread() -> object:
    """Return a mark of the calling thread that no other thread ever has; thread ids are reused."""
    mark: object = getattr(_THREAD, "mark", None)
    if mark is None:
        mark = _THREAD.mark = object()
    return mark


class ForwardPass:
    """A forward pass; its :attr:`positions` are computed on first access."""

    def __init__(self, begun_by: nn.Module, memory: CacheMemory | None) -> None:
        self.begun_by = begun_by
        self.number = next(_NUMBERS)
        self.thread = this_thread()  # a backward pass may rerun parts of it in another thread
        self.ended = False
        self.depth = -1
        self.weights: dict[torch.device, Tensor | bool] = {}  # the selection in this pass, once computed
        self._calls: list[PassArguments] = []
        self._memory = memory
        self._given: Mapping[str, Any] | None = None
        self._merged: PassArguments | None = None
        self._positions: TokenPositions | None = None

    def enter(self, depth: int, arguments: Mapping[str, Any] | None, parameters: Sequence[str]) -> None:
        """Record the call of a module that is ``depth`` steps inside the outermost one."""
        self.depth = depth
        if arguments is not None and (self._given is None or not describe_same_tokens(arguments, self._given)):
            self._given = arguments
            self._calls.append(pass_arguments(arguments, parameters))
            self._merged = None

    def leave(self) -> None:
        """End the pass and drop its arguments; parts that gradient checkpointing reruns don't need them."""
        self._given = None
        self.ended = True

    @property
    def shape(self) -> tuple[int, int]:
        """The pass's ``(batch, seq)``. Raises ValueError if no module's arguments show it."""
        shape = self._arguments().shape
        assert shape is not None
        return shape

    @property
    def positions(self) -> TokenPositions:
        """The positions of the pass's tokens. Raises ValueError if they can't be determined."""
        assert self._memory is not None
        if self._positions is None:
            self._positions = self._memory.positions(self._arguments())
        return self._positions

    def _arguments(self) -> PassArguments:
        call = self._merged_arguments()
        if call is None:
            raise ValueError(
                f"can't determine the token positions: {type(self.begun_by).__name__} was called without input_ids "
                f"and without inputs_embeds. Call it with one of them, or steer all tokens."
            )
        return call

    def _merged_arguments(self) -> PassArguments | None:
        if self._merged is None:
            self._merged = merge_arguments(self._calls)
        return self._merged

    def remember(self, output: Any) -> None:
        """Record the tokens that this pass put into its cache."""
        call = None if self._memory is None else self._merged_arguments()
        if call is not None and self._memory is not None and not call.packs_rows:
            self._memory.remember(call, output, lambda: self.positions)


class Need(IntEnum):
    """The facts about a pass that a tracker records; each includes those before it."""

    PASSES = 0  # only that it took place
    SHAPE = 1
    THREAD = 2
    POSITIONS = 3
    PROMPT_LENGTH = 4


class PassTracker:
    """A tracker of the forward passes through a model.

    A pass belongs to the thread that runs it. A part that gradient checkpointing reruns belongs to the pass that ran it
    first. Passes of compiled code are recorded only from ``Need.THREAD`` on. ``completed`` counts the recorded passes.
    """

    def __init__(self, need: Need) -> None:
        self.completed = 0
        self._need = need
        self._memory = CacheMemory(need_prompt_length=need >= Need.PROMPT_LENGTH) if need >= Need.POSITIONS else None
        self._thread = threading.local()

    @property
    def current(self) -> ForwardPass | None:
        """The pass that this thread is in; None between passes."""
        current: ForwardPass | None = getattr(self._thread, "current", None)
        return current

    @contextmanager
    def resumed(self, earlier: ForwardPass | None) -> Iterator[None]:
        """Put this thread into an earlier pass inside the block."""
        before, self._thread.current = self.current, earlier
        try:
            yield
        finally:
            self._thread.current = before

    def registrations(self, modules: Sequence[nn.Module]) -> list[Callable[[], Removable]]:
        """Return calls that each attach one hook of the tracker.

        The hooks go on the modules that take a whole pass, outermost first, and on the modules inside them that rerun
        parts of it.
        """
        around = [attach for depth, module in enumerate(modules) for attach in self._around(depth, module)]
        return around if self._need is Need.PASSES else [*around, *checkpoint_registrations(modules[0], self)]

    def _around(self, depth: int, module: nn.Module) -> list[Callable[[], Removable]]:
        names = _positional_names(module)
        # Compiled code needn't record a pass that is only counted. A hook that also runs after errors would have the
        # code compiled again for each hook.
        traceable = self._need < Need.THREAD

        # Plain functions, so that a deepcopy of the model shares them.

        @unless_removed
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_dynamo_compiling():
                return
            current = self.current
            # A module that is entered a second time is in a new pass: the old one was abandoned.
            if current is None or depth <= current.depth:
                current = self._thread.current = ForwardPass(module, self._memory)
            given: dict[str, Any] | None = None
            if self._need > Need.PASSES:
                given = dict(zip(names, args, strict=False)) | kwargs
                given.setdefault("use_cache", getattr(getattr(module, "config", None), "use_cache", None))
            current.enter(depth, given, names)

        def end(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if torch.compiler.is_dynamo_compiling():
                return
            current = self.current
            if current is None or current.begun_by is not module:
                return
            self._thread.current = None
            current.leave()
            if output is not None:  # else the pass raised
                self.completed += 1
                current.remember(output)

        return [
            lambda: before_forward(module, begin, traceable=traceable),
            lambda: after_forward(module, end, always=not traceable, traceable=traceable),
        ]


def _positional_names(module: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, kind in parameters_of(module).items() if kind in kinds]
