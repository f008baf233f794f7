"""Attach hooks to modules so that copies, pickles and compiled code of the modules are as without them."""

import copy
import copyreg
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from steering_vectors._locks import locked

# Attributes that a module has while this library changes its output, or its input.
OUTPUT, INPUT = "_steering_vectors", "_steering_vectors_input"


class Wrapper:
    """A callable attribute of a module, wrapped by this library. Copies of the module get the ``function`` itself."""

    function: Callable[..., Any]


class Attachment(Protocol):
    """Anything attached to a module. Attaching it twice or removing it twice is the same as once."""

    @property
    def is_attached(self) -> bool:
        """True unless it was never attached, or removed, by other code too. It is with a module that is gone."""

    def attach(self) -> None: ...
    def remove(self) -> None: ...


class Hook:
    """A hook on a module's passes: ``function`` is called after each pass or, with ``before``, before it.

    A function called after a pass gets the module, its positional arguments and its output; an output that it returns
    replaces that. With ``before``, it gets the module and both kinds of arguments; arguments that it returns replace
    those. With ``first`` it is called before the module's earlier hooks, with ``always`` also if the pass raises.

    Compiled code calls it too. A ``traceable`` function becomes part of that code, so nothing that it closes over may
    ever change. Any other runs between pieces of the code.

    The module is not kept alive.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        before: bool = False,
        first: bool = False,
        always: bool = False,
        traceable: bool = False,
    ) -> None:
        self._module = weakref.ref(module)
        self._before = before
        self._options = {"prepend": first, **({"with_kwargs": True} if before else {"always_call": always})}
        plain = _unless_removed(function) if before else function
        # A function of this hook's own, by which the module's hooks show whether it is attached.
        self._function = functools.partial(plain) if traceable else never_compiled(plain)

    @property
    @locked
    def is_attached(self) -> bool:
        module = self._module()
        return module is None or any(self._function is hook for hook in self._hooks_of(module).values())

    @locked
    def attach(self) -> None:
        module = self._module()
        if module is not None and not self.is_attached:
            mark(module)
            register = module.register_forward_pre_hook if self._before else module.register_forward_hook
            register(self._function, **self._options)

    @locked
    def remove(self) -> None:
        module = self._module()
        if module is None:
            return
        _drop(module, lambda hook: hook is self._function)
        unmark(module)

    def _hooks_of(self, module: nn.Module) -> dict[int, Callable[..., Any]]:
        return module._forward_pre_hooks if self._before else module._forward_hooks


def attach_all(attachments: Sequence[Attachment]) -> None:
    """Attach all. If one can't be attached, or an interrupt comes between, remove all and raise the error."""
    try:
        for attachment in attachments:
            attachment.attach()
    except BaseException:
        remove_all(attachments)
        raise


def remove_all(attachments: Iterable[Attachment]) -> None:
    for attachment in attachments:
        attachment.remove()


class Attached:
    """A block in which all attachments are attached."""

    def __init__(self, attachments: Sequence[Attachment]) -> None:
        self._attachments = attachments

    def __enter__(self) -> None:
        attach_all(self._attachments)

    def __exit__(self, *_error: object) -> None:
        remove_all(self._attachments)
        self._attachments = ()

    def __del__(self) -> None:
        remove_all(self._attachments)  # after an interrupt while the block was left


def never_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``hook`` wrapped so that torch.compile calls it between two pieces of code and never compiles it."""
    apart: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    # The error under fullgraph=True shows this name, in all versions of PyTorch; disable(reason=…) came with 2.8.
    apart.__qualname__ = (
        "steering some of the tokens, or recording, runs outside compiled code: compile the model without "
        "fullgraph=True (in generate, with compile_config=CompileConfig(fullgraph=False)), or steer all tokens"
    )

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # In uncompiled code, calling through disable would take longer than the hook itself.
        return apart(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else hook(*args, **kwargs)

    return wrapped


@locked
def has_hooks_of_users(modules: Iterable[nn.Module]) -> bool:
    """Return True if a module has a forward hook that is not this library's, Hugging Face's or PyTorch's."""
    hooks = (
        hook for module in modules for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any(_package_of(hook) not in _PACKAGES for hook in hooks)


_PACKAGES = {"steering_vectors", "torch", "transformers", "accelerate"}


def _package_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]


def _is_ours(hook: Callable[..., Any]) -> bool:
    return _package_of(hook) == "steering_vectors"


def _unless_removed(hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return ``hook`` wrapped to do nothing in a pass during which another thread removes it.

    PyTorch lists a module's hooks first, and looks up in each one's turn whether it takes keyword arguments. A hook
    that was removed in between is still called, but without them.
    """

    @functools.wraps(hook)
    def wrapped(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        return None if kwargs is None else hook(module, args, kwargs)

    return wrapped


def _drop(module: nn.Module, is_unwanted: Callable[[Callable[..., Any]], bool]) -> None:
    """Remove hooks from a module, or from an attribute-for-attribute copy of one."""
    for hooks, *flags in _hooks_and_flags(module):
        for number in [number for number, hook in hooks.items() if is_unwanted(hook)]:
            for found in (*flags, hooks):  # the hook last, so that a removal that was interrupted can be repeated
                found.pop(number, None)


def _hooks_and_flags(module: nn.Module) -> list[tuple[dict[int, Any], ...]]:
    return [
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ]


# A module with hooks of this library has a class of its own: a subclass of its class with the same name, as PyTorch's
# parametrizations have one. Copies are made by that class's methods, so they can be made without the hooks. And code
# that torch.compile made for the module without hooks, which doesn't look for hooks again, does check the class.


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def mark(module: nn.Module) -> None:
    """Give a module the class of hooked modules. The lock must be held."""
    if _hooked_class_of(module) is None:
        base = type(module)
        if base not in _CLASSES:  # kept, so that code that was compiled for it can be used again
            _CLASSES[base] = _hooked_class(base)
        module.__class__ = _CLASSES[base]


def unmark(module: nn.Module) -> None:
    """Return a module to its own class, once nothing of this library is attached to it. The lock must be held."""
    hooked = _hooked_class_of(module)
    if hooked is not None and not _is_in_use(module):
        # Compiled code looks at the class again only if it knows of a change of the module's attributes.
        module.__dict__[OUTPUT] = None
        _leave_out(hooked, module)
    if module.__dict__.get(OUTPUT, module) is None:
        del module.__dict__[OUTPUT]


def _leave_out(hooked: type[nn.Module], module: nn.Module) -> None:
    """Take the class of hooked modules out of a module's classes."""
    (base,) = hooked.__bases__
    if type(module) is hooked:
        module.__class__ = base
        return
    # Other code has derived a class from it meanwhile, as parametrizations and FSDP do.
    for kind in type(module).__mro__:
        if hooked in kind.__bases__:
            kind.__bases__ = tuple(base if parent is hooked else parent for parent in kind.__bases__)


def _is_in_use(module: nn.Module) -> bool:
    hooks = (hook for hooks, *_ in _hooks_and_flags(module) for hook in hooks.values())
    return (
        any(module.__dict__.get(name) is not None for name in (OUTPUT, INPUT))
        or any(_is_ours(hook) for hook in hooks)
        or any(isinstance(value, Wrapper) for value in module.__dict__.values())
    )


def _hooked_class_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of hooked modules among a module's classes."""
    return next((kind for kind in type(module).__mro__ if "_is_hooked_by_steering_vectors" in kind.__dict__), None)


def _hooked_class(base: type[nn.Module]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _reduced(_unhooked(self, hooked, base), protocol, base)

    def shallow(self: nn.Module) -> Any:
        return copy.copy(_unhooked(self, hooked, base))

    def deep(self: nn.Module, memo: dict[Any, Any]) -> Any:
        # One twin for all references to the module, also for those inside it.
        twin = memo.setdefault((hooked, id(self)), _unhooked(self, hooked, base))
        return copy.deepcopy(twin, memo)

    def replicate(self: nn.Module) -> nn.Module:
        raise RuntimeError(
            f"nn.DataParallel runs copies of {base.__name__}, which would run without the hooks that steering_vectors "
            f"has attached: use DistributedDataParallel, run on one device, or leave the steering first"
        )

    own: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "_replicate_for_data_parallel": replicate,
        "_is_hooked_by_steering_vectors": True,
    }
    copying = {"__copy__": shallow, "__deepcopy__": deep}  # methods that copy without __reduce_ex__
    own |= {name: method for name, method in copying.items() if hasattr(base, name)}
    hooked = types.new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(own))
    return hooked


def _unhooked(module: nn.Module, hooked: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """Return a module that shares all attributes with ``module`` except this library's hooks and wrappers.

    It is of the class ``base``, or of the class that other code has derived from ``hooked``.
    """
    twin: nn.Module = object.__new__(base if type(module) is hooked else type(module))
    for name, value in module.__dict__.items():
        twin.__dict__[name] = value.function if isinstance(value, Wrapper) else value
    for name in copyreg._slotnames(type(twin)):  # type: ignore[attr-defined]
        if hasattr(module, name):
            object.__setattr__(twin, name, getattr(module, name))
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        twin.__dict__[name] = module.__dict__[name].copy()
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        twin.__dict__[name] = module.__dict__[name].copy()
    for name in (OUTPUT, INPUT):
        twin.__dict__.pop(name, None)
    _drop(twin, _is_ours)
    return twin


def _reduced(module: nn.Module, protocol: Any, base: type[nn.Module]) -> Any:
    """Return what ``base`` reduces a module to, in a form that pickle takes for an object of another class."""
    reduced = base.__reduce_ex__(module, protocol)
    if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
        return (copyreg._reconstructor, (type(module), object, None), *reduced[2:])  # type: ignore[attr-defined]
    return reduced
