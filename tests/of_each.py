"""Run a test for each of many values at once, where tests of their own would take longer to begin than to run."""

from collections.abc import Callable, Iterable
from typing import Any


def of_each(values: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: the test is called with each value, and fails with all that failed."""
    listed = list(values)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(*instance: Any) -> None:
            failures = []
            for value in listed:
                try:
                    test(*instance, value)
                except AssertionError as error:
                    failures.append(f"{value}: {error}")
            assert listed
            assert not failures, "\n".join(failures)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate
