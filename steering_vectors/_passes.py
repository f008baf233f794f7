"""Follow a model's forward passes: which one a thread is in, and where its tokens stand."""

import copy
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._hooks import Removable, after_forward, before_forward, unless_removed
from steering_vectors._positions import (
    CACHE_NAMES,
    Fed,
    PassArguments,
    first_position,
    merge_arguments,
    pass_arguments,
    say_the_same,
    token_index,
)
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

    def __init__(self, begun_by: nn.Module, memory: "_CacheMemory | None") -> None:
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
        """Note the tokens that this pass fed into its cache, which may be an object that the pass made."""
        call = None if self._memory is None else self._merged_arguments()
        if call is None or self._memory is None or call.packs_rows:
            return
        made = _cache_of(output)
        cache = call.cache if made is None else made
        if cache is not None and not isinstance(call.cached, Tensor):
            self._memory.remember(cache, call, self.positions)


class PassTracker:
    """Notes each forward pass through a model.

    A pass belongs to the thread that runs it; what gradient checkpointing runs again belongs to the pass that ran it
    first. ``need_positions`` keeps each pass's arguments until it ends; without ``need_prompt_length`` the positions
    leave that out. ``need_shape`` keeps them too, and ``need_thread`` the thread. Compiled code notes a pass where
    positions or thread are needed. ``completed`` counts the passes that were noted.
    """

    def __init__(
        self,
        *,
        need_positions: bool,
        need_prompt_length: bool = True,
        need_shape: bool = False,
        need_thread: bool = False,
    ) -> None:
        self.completed = 0
        self._need_arguments = need_positions or need_shape
        self._is_traceable = not need_positions and not need_thread
        self._memory = _CacheMemory(need_prompt_length) if need_positions else None
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
        if self._is_traceable and not self._need_arguments:
            return around
        again = [module for module in modules[0].modules() if _CHECKPOINT_FUNCTION in vars(module)]
        return [*around, *(partial(_attach_to_checkpoints, module, self) for module in again)]

    def _around(self, depth: int, module: nn.Module) -> list[Callable[[], Removable]]:
        names = _positional_names(module)
        # A pass that is only counted needn't be in compiled code; to call a hook after errors too, that would be made
        # anew for each hook.
        traceable = self._is_traceable

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
            if self._need_arguments:
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


# Where Hugging Face's models keep the function that runs a part of a pass, and again in the backward pass.
_CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
_LOCK = threading.Lock()


class _Checkpoints:
    """Stands for a module's checkpointing function: what it runs again belongs to the pass that ran it first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.trackers: tuple[PassTracker, ...] = ()

    def __call__(self, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        passes = [(tracker, tracker.current) for tracker in self.trackers]

        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for tracker, current in passes:
                    stack.enter_context(tracker.resumed(current))
                return part(*args, **kwargs)

        return self.function(run, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.function, memo)  # a copy of the model is not steered for long


@dataclass(frozen=True, eq=False)
class _AttachedToCheckpoints:
    module: "weakref.ref[nn.Module]"
    tracker: PassTracker

    def remove(self) -> None:
        with _LOCK:
            module = self.module()
            function = None if module is None else vars(module).get(_CHECKPOINT_FUNCTION)
            if module is None or not isinstance(function, _Checkpoints):  # somebody else's by now
                return
            function.trackers = tuple(tracker for tracker in function.trackers if tracker is not self.tracker)
            if not function.trackers:
                setattr(module, _CHECKPOINT_FUNCTION, function.function)


def _attach_to_checkpoints(module: nn.Module, tracker: PassTracker) -> _AttachedToCheckpoints:
    with _LOCK:
        function = vars(module)[_CHECKPOINT_FUNCTION]
        if not isinstance(function, _Checkpoints):
            function = _Checkpoints(function)
            setattr(module, _CHECKPOINT_FUNCTION, function)
        function.trackers = (*function.trackers, tracker)
    return _AttachedToCheckpoints(weakref.ref(module), tracker)


class _CacheMemory:
    """What is known of each cache, for as long as the cache lives."""

    def __init__(self, need_prompt_length: bool) -> None:
        self._need_prompt_length = need_prompt_length
        self._fed: dict[int, tuple[weakref.ref[Any], Fed]] = {}

    def positions(self, call: PassArguments) -> TokenPositions:
        fed = self.fed(call)
        index, column = token_index(call, fed)
        begins = fed.columns == 0 if call.cached is None else isinstance(call.cached, int) and call.cached == 0
        if begins:
            fed = replace(fed, first_position=first_position(call, index))
        if self._need_prompt_length:
            fed = replace(fed, prompt_length=_prompt_length(call, index, fed))
        if call.cache is not None:
            self._keep(call.cache, fed)
        fits = call.input_ids is not None and call.input_ids.shape == index.shape
        return TokenPositions(
            index=index,
            column=column,
            input_ids=call.input_ids if fits else None,
            prompt_length=fed.prompt_length,
            begins_sequence=begins,
        )

    def fed(self, call: PassArguments) -> Fed:
        """Return what earlier passes fed into the call's cache.

        The cache's own length is right. Where it disagrees with what was noted, as after cropping, the noted tokens are
        left out.
        """
        reference, fed = self._fed.get(id(_key(call.cache)), (None, None))
        if reference is None or fed is None or reference() is not _key(call.cache):
            return Fed()
        if call.cached is None or (isinstance(call.cached, int) and call.cached == fed.columns):
            return fed
        return replace(fed, columns=0, tokens=None)

    def remember(self, cache: Any, call: PassArguments, positions: TokenPositions) -> None:
        """Note that a pass fed tokens into ``cache``."""
        before = self.fed(call)
        past = before.columns if call.cached is None else int(call.cached)
        # Without padding the cache's own length says as much.
        may_be_padded = before.tokens is not None or call.mask is not None or call.query_mask is not None
        tokens = positions.index.amax(dim=1) + 1 if may_be_padded or call.cached is None else None
        columns = past + positions.index.shape[1]
        begins = first_position(call, positions.index) if past == 0 else before.first_position
        self._keep(cache, Fed(columns, tokens, positions.prompt_length, begins))

    def _keep(self, cache: Any, fed: Fed) -> None:
        key = _key(cache)
        if key is not None:
            number = id(key)
            self._fed[number] = (weakref.ref(key, lambda _ref: self._fed.pop(number, None)), fed)


def _key(cache: Any) -> Any:
    """What stands for a cache: the first tensor of lists and tuples, which can't be referred to weakly."""
    while isinstance(cache, (tuple, list)):
        cache = cache[0] if cache else None
    return cache


def _cache_of(output: Any) -> Any:
    if not isinstance(output, Mapping):
        return None
    names = list(output)  # to ask the output for a name that it lacks may warn of an older one
    return next((output[name] for name in CACHE_NAMES if name in names and output[name] is not None), None)


def _prompt_length(call: PassArguments, index: Tensor, fed: Fed) -> Tensor | None:
    """The own tokens of the first pass over a cache; None if there was none, or if more of the prompt came later."""
    if call.cache is None:
        return index.amax(dim=1) + 1 if call.makes_cache else None
    length = fed.columns if call.cached is None else call.cached
    if isinstance(length, Tensor):
        if index.shape[1] > 1:
            length = int(length)  # a prompt, so one device read
        elif fed.prompt_length is not None:
            return torch.where(length.to(index.device) == 0, index[:, 0] + 1, fed.prompt_length)
    if isinstance(length, int) and length == 0:
        return index.amax(dim=1) + 1
    return None if index.shape[1] > 1 else fed.prompt_length


def _positional_names(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
