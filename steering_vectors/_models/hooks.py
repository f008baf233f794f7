"""Attach hooks to modules, and read or replace the modules' inputs and outputs."""

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Removable(Protocol):
    """A handle that removes a hook; a second call does nothing."""

    def remove(self) -> None: ...


def before_forward(module: nn.Module, hook: Callable[..., Any], *, traceable: bool = False) -> Removable:
    """Call ``hook`` with the module's arguments before each of its passes; arguments that it returns replace them.

    Compiled code calls it too. A ``traceable`` hook becomes part of that code, so nothing that it closes over may ever
    change. Any other hook runs between pieces of the code. ``hook`` must be a result of :func:`unless_removed`.
    """
    attached = hook if traceable else never_compiled(hook)
    return _attach(module, lambda: module.register_forward_pre_hook(attached, with_kwargs=True))


def unless_removed(hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return ``hook`` wrapped to do nothing in a pass during which another thread removes it.

    PyTorch lists a module's hooks first, and looks up in each one's turn whether it takes keyword arguments. A hook
    that was removed in between is still called, but without them.
    """

    @functools.wraps(hook)
    def wrapped(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        return None if kwargs is None else hook(module, args, kwargs)

    return wrapped


def after_forward(
    module: nn.Module,
    hook: Callable[[nn.Module, tuple[Any, ...], Any], Any],
    *,
    first: bool = False,
    always: bool = False,
    traceable: bool = False,
) -> Removable:
    """Call ``hook`` with the module's output after each of its passes; an output that it returns replaces it.

    With ``first`` the hook runs before the module's earlier hooks. With ``always`` it also runs if the pass raises.
    ``traceable`` is as in :func:`before_forward`.
    """
    attached = hook if traceable else never_compiled(hook)
    return _attach(module, lambda: module.register_forward_hook(attached, prepend=first, always_call=always))


def never_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``hook`` wrapped so that torch.compile calls it between two pieces of code and never compiles it."""
    apart: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    apart._torchdynamo_disable_msg = (  # type: ignore[attr-defined]  # disable(reason=…) came with PyTorch 2.7
        "steering some of the tokens, or recording, runs outside compiled code: compile the model without "
        "fullgraph=True, or steer all tokens"
    )

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # In uncompiled code, calling through disable would take longer than the hook itself.
        return apart(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else hook(*args, **kwargs)

    return wrapped


def activation_of(output: Any) -> Tensor:
    """Return the activation in a module's output.

    It is the output itself, the first item of a tuple or list, or the first tensor of a ModelOutput.
    Raises TypeError if there is none.
    """
    if isinstance(output, (tuple, list)) and output:
        return activation_of(output[0])
    if isinstance(output, Mapping):
        return activation_of(output[_activation_key(output)])
    if not isinstance(output, Tensor):
        raise TypeError(f"a layer's output must be a tensor or begin with one, got {type(output).__name__}")
    return output


def with_activation(output: Any, activation: Tensor) -> Any:
    """Return a copy of ``output`` with its activation replaced by ``activation``; ``output`` is not changed."""
    if isinstance(output, tuple) and hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: with_activation(output[0], activation)})  # type: ignore[attr-defined]
    if isinstance(output, (tuple, list)):
        return type(output)([with_activation(output[0], activation), *output[1:]])
    if isinstance(output, Mapping):
        replaced = copy.copy(output)
        replaced[_activation_key(output)] = activation  # type: ignore[index]
        return replaced
    return activation


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the activation among a block's arguments. Raises TypeError if there is none."""
    activation = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(activation, Tensor):
        raise TypeError(
            f"a block's first argument, or its hidden_states, must be a tensor, got {type(activation).__name__}"
        )
    return activation


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], activation: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with the block's input replaced by ``activation``."""
    return ((activation, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": activation})


def attach_all(registrations: Iterable[Callable[[], Removable]]) -> list[Removable]:
    """Run all ``registrations`` and return their handles; if one raises, the hooks attached so far are removed."""
    handles: list[Removable] = []
    try:
        for register in registrations:
            handles.append(register())
    except BaseException:
        remove_all(handles)
        raise
    return handles


def has_hooks_of_users(modules: Iterable[nn.Module]) -> bool:
    """Return True if a module has a forward hook that is not this library's, Hugging Face's or PyTorch's."""
    hooks = (
        hook for module in modules for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any(_package_of(hook) not in _PACKAGES for hook in hooks)


def remove_all(handles: Iterable[Removable]) -> None:
    for handle in handles:
        handle.remove()


_PACKAGES = {"steering_vectors", "torch", "transformers", "accelerate"}


def _package_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]


class _InstanceForward:
    """A ``forward`` attribute that a module instance has while it has hooks of this library.

    Code that was compiled for a module without hooks doesn't look for hooks again. But each time it runs, it checks
    that ``forward`` is the class's method. So the attribute disables that code while the hooks are there, and the code
    is used again afterwards. Source: ``guard_to_detect_forward_monkeypatching`` in PyTorch's
    ``torch/_dynamo/variables/nn_module.py``.
    """

    def __init__(self, module: nn.Module) -> None:
        before = module.__dict__.get("forward")
        # A bound method if possible: code that was compiled with one also fits all later ones.
        ours = module.forward if before is None else functools.partial(before)
        module.__dict__["forward"] = ours
        self._ours = weakref.ref(ours)  # the module must not be kept alive
        self.hooks = 0

    def remove(self, module: nn.Module) -> None:
        current = module.__dict__.get("forward")
        if current is None or current is not self._ours():  # other code has replaced it
            return
        del module.__dict__["forward"]
        if isinstance(current, functools.partial):
            module.__dict__["forward"] = current.func


_FORWARDS: "weakref.WeakKeyDictionary[nn.Module, _InstanceForward]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class _Attached:
    """A hook that keeps its module's instance ``forward`` in place."""

    module: "weakref.ref[nn.Module]"
    handle: RemovableHandle

    def remove(self) -> None:
        module = self.module()
        with _LOCK:
            if module is None or self.handle.id not in (self.handle.hooks_dict_ref() or {}):
                return
            self.handle.remove()
            forward = _FORWARDS[module]
            forward.hooks -= 1
            if forward.hooks == 0:
                _FORWARDS.pop(module).remove(module)


def _attach(module: nn.Module, register: Callable[[], RemovableHandle]) -> Removable:
    with _LOCK:
        handle = register()
        forward = _FORWARDS.get(module)
        if forward is None:
            forward = _FORWARDS[module] = _InstanceForward(module)
        forward.hooks += 1
    return _Attached(weakref.ref(module), handle)


def _activation_key(output: Mapping[str, Any]) -> str:
    key = next((key for key, value in output.items() if isinstance(value, Tensor)), None)
    if key is None:
        raise TypeError(
            f"a layer's output must be a tensor or begin with one, got {type(output).__name__} without tensors"
        )
    return key
