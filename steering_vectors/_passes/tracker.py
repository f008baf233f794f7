"""Follow a model's forward passes: which one a thread is in, and where its tokens stand."""

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
from steering_vectors._passes.arguments import PassArguments, merge_arguments, pass_arguments, say_the_same
from steering_vectors._passes.caches import CacheMemory
from steering_vectors._passes.checkpointing import checkpoint_registrations
from steering_vectors.token_selection import TokenPositions

_NUMBERS = itertools.count()
_THREAD = threading.local()


def this_thread() -> object:
    """What stands for the thread that asks, and for no other: the numbers of threads are used again."""
    mark: object = getattr(_THREAD, "mark", None)
    if mark is None:
        mark = _THREAD.mark = object()
    return mark


class ForwardPass:
    """One forward pass that is under way; :attr:`positions` are worked out when first asked for."""

    def __init__(self, begun_by: nn.Module, memory: CacheMemory | None) -> None:
        self.begun_by = begun_by
        self.number = next(_NUMBERS)
        self.thread = this_thread()  # a backward pass may run some of it again in another
        self.ended = False
        self.depth = -1
        self.weights: dict[torch.device, Tensor | bool] = {}  # the selection of this pass, once it was asked for
        self._calls: list[PassArguments] = []
        self._memory = memory
        self._given: Mapping[str, Any] | None = None
        self._merged: PassArguments | None = None
        self._positions: TokenPositions | None = None

    def enter(self, depth: int, arguments: Mapping[str, Any] | None, parameters: Sequence[str]) -> None:
        """A module that is ``depth`` steps inside the outermost one has been called."""
        self.depth = depth
        if arguments is not None and (self._given is None or not say_the_same(arguments, self._given)):
            self._given = arguments
            self._calls.append(pass_arguments(arguments, parameters))
            self._merged = None

    def leave(self) -> None:
        """The pass has ended; what gradient checkpointing may run of it again needs no arguments."""
        self._given = None
        self.ended = True

    @property
    def shape(self) -> tuple[int, int]:
        """``(batch, seq)``. Raises ValueError where no module was told."""
        shape = self._arguments().shape
        assert shape is not None
        return shape

    @property
    def positions(self) -> TokenPositions:
        """Raises ValueError where no module was told the shape of the pass."""
        assert self._memory is not None
        if self._positions is None:
            self._positions = self._memory.positions(self._arguments())
        return self._positions

    def _arguments(self) -> PassArguments:
        call = self._merged_arguments()
        if call is None:
            raise ValueError(
                f"can't tell where the tokens stand: {type(self.begun_by).__name__} was called without input_ids "
                f"and without inputs_embeds. Call it with one of them, or steer all tokens."
            )
        return call

    def _merged_arguments(self) -> PassArguments | None:
        if self._merged is None:
            self._merged = merge_arguments(self._calls)
        return self._merged

    def remember(self, output: Any) -> None:
        """Note the tokens that this pass fed into its cache."""
        call = None if self._memory is None else self._merged_arguments()
        if call is not None and self._memory is not None and not call.packs_rows:
            self._memory.remember(call, output, lambda: self.positions)


class Need(IntEnum):
    """The facts of a pass that are asked of a tracker; each includes those before it."""

    PASSES = 0  # that one took place
    SHAPE = 1
    THREAD = 2
    POSITIONS = 3
    PROMPT_LENGTH = 4


class PassTracker:
    """The forward passes through a model, each noted while it lasts.

    A pass belongs to the thread that runs it. What gradient checkpointing runs again belongs to the pass that ran it
    first. Compiled code notes a pass only where its thread or more is needed. ``completed`` counts the noted passes.
    """

    def __init__(self, need: Need) -> None:
        self.completed = 0
        self._need = need
        self._memory = CacheMemory(need_prompt_length=need >= Need.PROMPT_LENGTH) if need >= Need.POSITIONS else None
        self._thread = threading.local()

    @property
    def current(self) -> ForwardPass | None:
        """The pass that this thread is in."""
        current: ForwardPass | None = getattr(self._thread, "current", None)
        return current

    @contextmanager
    def resumed(self, earlier: ForwardPass | None) -> Iterator[None]:
        """A block in which this thread is in an earlier pass."""
        before, self._thread.current = self.current, earlier
        try:
            yield
        finally:
            self._thread.current = before

    def registrations(self, modules: Sequence[nn.Module]) -> list[Callable[[], Removable]]:
        """Calls that attach the tracker, one each: to the modules that take a whole pass, outermost first, and to those
        inside them that run parts of it again.
        """
        around = [attach for depth, module in enumerate(modules) for attach in self._around(depth, module)]
        return around if self._need is Need.PASSES else [*around, *checkpoint_registrations(modules[0], self)]

    def _around(self, depth: int, module: nn.Module) -> list[Callable[[], Removable]]:
        names = _positional_names(module)
        # A pass that is only counted needn't be in compiled code; to call a hook after errors too, that would be made
        # anew for each hook.
        traceable = self._need < Need.THREAD

        # Plain functions: a copy of the model made by deepcopy shares them.

        @unless_removed
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_dynamo_compiling():
                return
            current = self.current
            # A module that was entered already belongs to a new pass: the old one was abandoned.
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
