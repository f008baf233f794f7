"""Follow a model's forward passes: the pass that each thread is in, and the positions of its tokens."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from steering_vectors._locks import locked
from steering_vectors._models import Attachment, Hook, attach_all, parameters_of, remove_all
from steering_vectors._passes.caches import CacheMemory
from steering_vectors._passes.checkpointing import checkpoint_attachments
from steering_vectors._passes.forward_pass import ForwardPass
from steering_vectors._passes.threads import Thread, calls_in_progress, this_thread


class Need(IntEnum):
    """The facts about a pass that a tracker records; each includes those before it."""

    PASSES = 0  # only that it took place
    SHAPE = 1
    THREAD = 2
    POSITIONS = 3
    PROMPT_LENGTH = 4


class PassTracker:
    """A tracker of the passes through a model that begin between :meth:`start` and :meth:`stop`.

    ``modules`` are those that take a whole pass, outermost first. A pass belongs to the thread that runs it, and passes
    may run inside each other. A part that gradient checkpointing reruns belongs to the pass that ran it first. Passes
    of compiled code are recorded only from ``Need.THREAD`` on. With ``need_row_ids``, positions hold the rows' token
    ids. ``when_completed`` is called at the end of each recorded pass. ``begun`` and ``completed`` count them.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        need: Need,
        when_completed: Callable[[ForwardPass], None] | None = None,
        *,
        need_row_ids: bool = False,
    ) -> None:
        self.begun = self.completed = 0
        self.is_on = False
        self._is_over = False  # True once it has been on, or could not be started
        # Compiled code needn't record a pass that is only counted.
        self.is_traceable = need < Need.THREAD
        self._need = need
        self._when_completed = when_completed
        self._memory = (
            CacheMemory(need_prompt_length=need >= Need.PROMPT_LENGTH, need_row_ids=need_row_ids)
            if need >= Need.POSITIONS
            else None
        )
        self._modules = [weakref.ref(module) for module in modules]
        self._names = _positional_names(modules)
        self._stacks: dict[Thread, list[ForwardPass]] = {}  # each thread's passes, outermost first
        self._thread = threading.local()  # this thread's, which are looked up for each layer
        self._hooks: list[Attachment] = [
            hook for depth, module in enumerate(modules) for hook in self._hooks_on(depth, module)
        ]
        self._attachments = [*self._hooks, *checkpoint_attachments(modules[0], self)]

    def start(self, attachments: Sequence[Attachment] = ()) -> None:
        """Begin to follow passes. If an error or an interrupt comes between, nothing stays attached.

        The ``attachments`` are attached too, and stay until :meth:`stop` was called and the last of the passes has
        ended, so that each pass runs with all of them or with none.
        """
        # Known before any is attached.
        self._hooks = [*self._hooks, *attachments]
        self._attachments = [*self._attachments, *attachments]
        try:
            attach_all(self._attachments)
            self.is_on = True
        except BaseException:
            self.stop()
            raise

    @locked
    def stop(self) -> None:
        """Follow no more passes. A second call does nothing, and finishes a first one that was interrupted."""
        self.is_on, self._is_over = False, True
        self._detach_if_idle()

    @property
    def is_attached(self) -> bool:
        """True if no other code has removed hooks since :meth:`start`."""
        return all(hook.is_attached for hook in self._hooks)

    @property
    def current(self) -> ForwardPass | None:
        """The pass that this thread is in; None between passes."""
        stack: list[ForwardPass] | None = getattr(self._thread, "stack", None)
        if not stack:
            return None
        if len(stack) > 1:  # an interrupt may have ended an inner pass, and not the outer one
            stack[:] = _still_running(stack, calls_in_progress())
        return stack[-1] if stack else None

    @property
    def is_between_passes(self) -> bool:
        """True if this thread is in no pass of the model at all, not even in one that began before :meth:`start`."""
        if self.current is not None:
            return False
        calls = calls_in_progress()
        return not any(call is module() for call in calls for module in self._modules)

    @contextmanager
    def resumed(self, earlier: ForwardPass | None) -> Iterator[None]:
        """Put this thread into an earlier pass inside the block, with all that was attached during that pass."""
        if earlier is None:
            yield
            return
        thread = this_thread()
        self._resume(thread, earlier)
        try:
            yield
        finally:
            self._suspend(thread, earlier)

    @locked
    def _resume(self, thread: Thread, earlier: ForwardPass) -> None:
        attach_all(self._attachments)
        self._stack_of(thread).append(earlier)
        earlier.reruns += 1

    @locked
    def _suspend(self, thread: Thread, earlier: ForwardPass) -> None:
        earlier.reruns -= 1
        self._end(thread, earlier)
        self._detach_if_idle()

    @locked
    def _begin(self, module: nn.Module) -> ForwardPass | None:
        """Put this thread into a new pass; return None if the tracker is off."""
        if not self.is_on:  # not yet, or no more
            self._detach_if_idle()
            return None
        stack = self._stack_of(this_thread())
        if stack:  # a pass in which this one runs, or one that an interrupt has ended
            calls = calls_in_progress()
            stack[:] = _still_running(stack, calls[:-1] if calls and calls[-1] is module else calls)
        if module.training:  # gradient checkpointing may have been enabled since the last pass
            new = [one for one in checkpoint_attachments(module, self) if not one.is_attached]
            self._attachments += new
            attach_all(new)
        current = ForwardPass(module, self._memory)
        stack.append(current)
        self.begun += 1
        return current

    def _stack_of(self, thread: Thread) -> list[ForwardPass]:
        """Return the passes of a thread, which is this one, to add another."""
        self._thread.stack = self._stacks.setdefault(thread, [])
        return self._thread.stack  # type: ignore[no-any-return]

    def _end(self, thread: Thread, current: ForwardPass) -> None:
        """Take a thread out of a pass, and out of those that began inside it. The lock must be held."""
        stack = self._stacks[thread]
        while stack.pop() is not current:
            pass
        if not stack:
            del self._stacks[thread]

    def _detach_if_idle(self) -> None:
        if not self._is_over:
            return
        for thread, stack in list(self._stacks.items()):
            if thread is this_thread():
                stack[:] = _still_running(stack, calls_in_progress())
            elif thread.has_ended:
                stack.clear()
            if not stack:
                del self._stacks[thread]
        if not self._stacks:
            remove_all(reversed(self._attachments))

    def _hooks_on(self, depth: int, module: nn.Module) -> list[Hook]:
        """Return the hooks on a module that takes a whole pass, ``depth`` steps inside the outermost one."""
        names = self._names[depth]

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_dynamo_compiling():
                self._enter(module, depth, names, args, kwargs)

        def end(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if not torch.compiler.is_dynamo_compiling():
                self._exit(module, output)

        return [
            Hook(module, begin, before=True, traceable=self.is_traceable),
            # A hook that also runs after errors would have code that it is part of compiled again for each hook.
            Hook(module, end, always=not self.is_traceable, traceable=self.is_traceable),
        ]

    def _enter(
        self, module: nn.Module, depth: int, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        current = self.current
        if current is None or depth <= current.depth:  # a module that is entered a second time is in a new pass
            current = self._begin(module)
        if current is None:
            return
        if self._need >= Need.POSITIONS and torch.compiler.is_compiling():
            raise RuntimeError(
                "torch.export keeps the operations of one pass, but a selection of tokens is made anew in each pass: "
                "export the model outside the block, or steer all tokens"
            )
        given = dict(zip(names, args, strict=False)) | kwargs if self._need > Need.PASSES else None
        current.enter(depth, given, names)

    def _exit(self, module: nn.Module, output: Any) -> None:
        thread = this_thread()
        stack = self._stacks.get(thread, [])
        current = next((one for one in reversed(stack) if one.begun_by() is module), None)
        if current is None:
            return
        current.leave()
        self._complete(thread, current, raised=output is None)
        if output is not None:
            current.remember(output)

    @locked
    def _complete(self, thread: Thread, current: ForwardPass, *, raised: bool) -> None:
        self._end(thread, current)
        if raised:  # PyTorch is iterating over the hooks, so none can be removed
            return
        self.completed += 1
        if self._when_completed is not None:
            self._when_completed(current)
        self._detach_if_idle()


def _still_running(stack: Sequence[ForwardPass], calls: Sequence[nn.Module]) -> list[ForwardPass]:
    """Return the passes that haven't been ended by an interrupt, which are the outer ones, from a thread's calls."""
    remaining = iter(calls)
    return [one for one in stack if one.reruns or any(call is one.begun_by() for call in remaining)]


def _positional_names(modules: Sequence[nn.Module]) -> list[list[str]]:
    """Return the names of the positional arguments of modules that are inside each other, outermost first.

    A wrapper such as DistributedDataParallel passes on what it gets, by position too.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names: list[list[str]] = []
    for module in reversed(modules):
        parameters = parameters_of(module)
        own = [name for name, kind in parameters.items() if kind in kinds]
        passes_on = inspect.Parameter.VAR_POSITIONAL in parameters.values() and names
        names.append([*own, *names[-1][len(own) :]] if passes_on else own)
    return names[::-1]
