"""Check the callables that users give: operators, selectors, aggregators."""

import inspect


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
