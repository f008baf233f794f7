"""Check users' arguments: numbers, and callables such as operators, selectors and aggregators."""

import inspect
import math
import operator
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, get_origin, get_type_hints

from torch import nn

P = ParamSpec("P")
T = TypeVar("T")


def check_takes(
    function: object, arguments: int, what: str, example: str, *, keywords: Iterable[str] = (), hint: str = ""
) -> None:
    """Raise TypeError unless ``function`` can be called with this number of arguments, and with these ``keywords``.

    The message about another number ends with ``hint``.

    >>> check_takes(len, 1, "selector", "from_index(1)")
    """
    if not callable(function):
        raise TypeError(f"{what} must be callable, such as {example}, got {type(function).__name__}")
    wanted = f"{what} must be callable with {arguments} argument{'s' if arguments > 1 else ''}, such as {example}"
    if _makes_callables(function):
        raise TypeError(f"{wanted}, but {_name(function)} returns one instead{call_hint(function)}")
    try:
        _signature_of(function).bind(*range(arguments), **dict.fromkeys(keywords))
    except TypeError as error:
        raise TypeError(f"{wanted}, but {_name(function)} is not ({error}){call_hint(function)}{hint}") from error
    except ValueError:  # some functions written in C have no signature
        return


def asked_keywords(function: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Return those of the ``names`` that are keyword-only parameters of ``function``, unless a partial binds them.

    Neither ``**kwargs`` nor a parameter that may be positional counts, as in ``lambda h, layer=layer: …``.

    >>> asked_keywords(sorted, ["key", "iterable"])
    ('key',)
    """
    bound: set[str] = set()
    inner = inspect.unwrap(function)
    while isinstance(inner, partial):
        bound.update(inner.keywords)
        inner = inspect.unwrap(inner.func)
    try:
        parameters = _signature_of(inner).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
        return ()
    only = {name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    return tuple(name for name in names if name in only - bound)


def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature by which a callable is called: a module's is that of its ``forward``."""
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function)


def call_hint(function: object) -> str:
    """Return the end of an error message for a factory of operators, selectors or the like that was not called."""
    return f"; did you forget to call it: {_name(function)}(…)?"


def _name(function: object) -> str:
    return str(getattr(function, "__name__", repr(function)))


def _makes_callables(function: Callable[..., Any]) -> bool:
    """Return True for a class whose objects are callable, and for a function annotated to return a callable."""
    made: Any = function
    if not isinstance(function, type):
        while isinstance(function, partial):
            function = function.func
        called = function if inspect.isroutine(function) else type(function).__call__
        try:
            made = get_type_hints(called).get("return")
        except (AttributeError, NameError, SyntaxError, TypeError):  # annotations that can't be evaluated here
            return False
    if get_origin(made) is Callable:
        return True
    return isinstance(made, type) and any("__call__" in vars(base) for base in made.__mro__)


def with_hints(**hints: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function so that a call with wrong arguments raises a TypeError that says what to write instead.

    ``hints`` are by the name of an argument that the function doesn't have or, for ``missing``, of one that is missing.
    Other unknown names get the nearest name of a parameter.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                unknown = [name for name in kwargs if name not in signature.parameters]
                raise TypeError(f"{function.__name__}(): {error}{_hint(unknown, hints, signature)}") from None
            return function(*args, **kwargs)

        return checked

    return decorate


def _hint(unknown: list[str], hints: dict[str, str], signature: inspect.Signature) -> str:
    if not unknown:
        return f"; {hints['missing']}" if "missing" in hints else ""
    if unknown[0] in hints:
        return f"; {hints[unknown[0]]}"
    near = get_close_matches(unknown[0], list(signature.parameters), n=1)
    return f"; did you mean {near[0]}=?" if near else ""


def is_whole_number(value: object) -> bool:
    """Return True if ``value`` is one whole number, of Python or of an array library; a bool is not one."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors raise unless they hold one integer
        return False
    return not isinstance(value, bool)


def finite_number(value: object, what: str) -> float:
    """Return ``value`` as a float. Raises TypeError unless it is one number, and ValueError unless it is finite.

    >>> finite_number(2, "the angle")
    2.0
    """
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(f"{what} must be a number, got {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be a number, got {type(value).__name__}") from error
    except OverflowError as error:
        raise ValueError(f"{what} must be finite, got a number too large for a float") from error
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, got {number}")
    return number
