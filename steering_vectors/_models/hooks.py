"""Read or replace a module's output; attach all hooks or none."""

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
    """What takes a hook off again; a second call does nothing."""

    def remove(self) -> None: ...


def before_forward(module: nn.Module, hook: Callable[..., Any], *, traceable: bool = False) -> Removable:
    """Call ``hook`` with the module's arguments before each of its passes; arguments that it returns replace them.

    Code that torch.compile makes calls it too: as a part of itself if the hook is ``traceable``, which it is only if
    nothing that it closes over ever changes, and else in between. It must be one of :func:`unless_removed`.
    """
    own = hook if traceable else never_compiled(hook)
    return _attach(module, lambda: module.register_forward_pre_hook(own, with_kwargs=True))


def unless_removed(hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return ``hook``, which does nothing in a pass that another thread removed it from.

    PyTorch lists a module's hooks first, and looks up in each one's turn whether it takes keyword arguments. One that
    was removed meanwhile is still called, without them.
    """

    @functools.wraps(hook)
    def own(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        return None if kwargs is None else hook(module, args, kwargs)

    return own


def after_forward(
    module: nn.Module,
    hook: Callable[[nn.Module, tuple[Any, ...], Any], Any],
    *,
    first: bool = False,
    always: bool = False,
    traceable: bool = False,
) -> Removable:
    """Call ``hook`` with the module's output after each of its passes; what it returns replaces the output.

    With ``first`` it comes before the hooks that are there, with ``always`` also where the pass raises; ``traceable``
    is that of :func:`before_forward`.
    """
    own = hook if traceable else never_compiled(hook)
    return _attach(module, lambda: module.register_forward_hook(own, prepend=first, always_call=always))


def never_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, for torch.compile to call between two pieces of code instead of making it a part of one."""
    apart: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    apart._torchdynamo_disable_msg = (  # type: ignore[attr-defined]  # disable(reason=…) came with PyTorch 2.7
        "steering some of the tokens, or recording, goes on between two pieces of compiled code: compile the model "
        "without fullgraph=True, or steer all tokens"
    )

    def own(*args: Any, **kwargs: Any) -> Any:
        # Elsewhere the way around the compiler would take longer than a hook.
        return apart(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else hook(*args, **kwargs)

    return own


def activation_of(output: Any) -> Tensor:
    """The activation in a module's output: itself, the first of a tuple or list, or the first tensor of a ModelOutput.

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
    """A copy of ``output`` with ``activation`` in its place; ``output`` is not changed."""
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
    """The activation among a block's arguments. Raises TypeError if there is none."""
    activation = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(activation, Tensor):
        raise TypeError("a block must get its input as its first argument or as hidden_states")
    return activation


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], activation: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``activation`` in its place."""
    return ((activation, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": activation})


def attach_all(registrations: Iterable[Callable[[], Removable]]) -> list[Removable]:
    """Run all ``registrations``; if one raises, what the earlier ones attached is removed."""
    handles: list[Removable] = []
    try:
        for register in registrations:
            handles.append(register())
    except BaseException:
        remove_all(handles)
        raise
    return handles


def has_hooks_of_users(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of the modules has a forward hook that is not this library's, Hugging Face's or PyTorch's."""
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


class _OwnForward:
    """Gives a module a ``forward`` of its own as long as it has hooks of ours.

    Code that torch.compile made of a module without hooks doesn't look for hooks again. What it does look at, each
    time that it runs, is whether ``forward`` is the class's own method: so that code is left aside while the hooks are
    there, and used again afterwards. (``guard_to_detect_forward_monkeypatching`` in PyTorch's
    ``torch/_dynamo/variables/nn_module.py``.)
    """

    def __init__(self, module: nn.Module) -> None:
        before = module.__dict__.get("forward")
        # A method again where it can be: code that was compiled with it then serves all later ones.
        own = module.forward if before is None else functools.partial(before)
        module.__dict__["forward"] = own
        self._own = weakref.ref(own)  # the module must not be kept alive
        self.hooks = 0

    def remove(self, module: nn.Module) -> None:
        own = module.__dict__.get("forward")
        if own is None or own is not self._own():  # somebody else's by now
            return
        del module.__dict__["forward"]
        if isinstance(own, functools.partial):
            module.__dict__["forward"] = own.func


_OWN_FORWARDS: "weakref.WeakKeyDictionary[nn.Module, _OwnForward]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class _Attached:
    """A hook, with its share in the module's own ``forward``."""

    module: "weakref.ref[nn.Module]"
    handle: RemovableHandle

    def remove(self) -> None:
        module = self.module()
        with _LOCK:
            if module is None or self.handle.id not in (self.handle.hooks_dict_ref() or {}):
                return
            self.handle.remove()
            own = _OWN_FORWARDS[module]
            own.hooks -= 1
            if own.hooks == 0:
                _OWN_FORWARDS.pop(module).remove(module)


def _attach(module: nn.Module, register: Callable[[], RemovableHandle]) -> Removable:
    with _LOCK:
        handle = register()
        own = _OWN_FORWARDS.get(module)
        if own is None:
            own = _OWN_FORWARDS[module] = _OwnForward(module)
        own.hooks += 1
    return _Attached(weakref.ref(module), handle)


def _activation_key(output: Mapping[str, Any]) -> str:
    key = next((key for key, value in output.items() if isinstance(value, Tensor)), None)
    if key is None:
        raise TypeError(
            f"a layer's output must be a tensor or begin with one, got {type(output).__name__} without tensors"
        )
    return key
