"""Check what users give: numbers, and callables such as operators, selectors and aggregators."""

import inspect
import math
import operator


def check_takes(function: object, arguments: int, what: str, example: str) -> None:
    """Raise TypeError unless ``function`` can be called with so many arguments.

    >>> check_takes(len, 1, "selector", "from_index(1)")
    """
    if not callable(function):
        raise TypeError(f"{what} must be callable, such as {example}, got {type(function).__name__}")
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError as error:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(
            f"{what} must be callable with {arguments} argument{'s' * (arguments > 1)}, such as {example}, and {name} "
            f"is not ({error}); did you mean {name}(…), what it gives?"
        ) from error
    except ValueError:  # some functions written in C don't tell
        return


def is_whole_number(value: object) -> bool:
    """Whether ``value`` is one whole number, of Python's or of an array library's; a bool is none."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors claim to be, and are if they hold just one
        return False
    return not isinstance(value, bool)


def finite_number(value: object, what: str) -> float:
    """``value`` as a float. Raises TypeError unless it is one number, and ValueError unless it is finite.

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
        raise ValueError(f"{what} must be finite, got a number beyond all floats") from error
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, got {number}")
    return number
