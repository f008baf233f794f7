"""Signatures of the public callables, as ``help()`` shows them."""

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc import plain, render_doc
from typing import Any

import pytest

import steering_vectors
from steering_vectors import SteeringVector, aggregators, layer_matching

MOST_CHARACTERS = 600
PACKAGE = Path(steering_vectors.__file__).parent
NAMES = [*sorted(path.stem for path in PACKAGE.glob("[a-z]*.py")), "interop"]
MODULES = [importlib.import_module(f"steering_vectors.{name}") for name in NAMES]
CLASSES = {name: cls for name in steering_vectors.__all__ if inspect.isclass(cls := getattr(steering_vectors, name))}
# By the alias, what it must stay: an object that users can import and look at.
ALIASES = {
    "LayerType": layer_matching.LayerType,
    "ModelLayerConfig": layer_matching.ModelLayerConfig,
    "Aggregator": aggregators.Aggregator,
}


def methods_of(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for base in cls.__mro__:
        if base.__module__.startswith("steering_vectors"):
            for name, value in vars(base).items():
                method = getattr(value, "__func__", value)  # of class methods and static ones
                if inspect.isfunction(method) and (not name.startswith("_") or _is_special(method)):
                    yield name, method


def _is_special(method: Callable[..., Any]) -> bool:
    return method.__name__.startswith("__") and bool(method.__doc__)


def public_callables() -> dict[str, Callable[..., Any]]:
    """Functions of all public modules, classes that the package exports, and their methods."""
    found: dict[str, Callable[..., Any]] = {}
    for module in MODULES:
        for name, function in vars(module).items():
            is_here = f"{getattr(function, '__module__', '')}.".startswith(f"{module.__name__}.")
            if inspect.isfunction(function) and is_here and not name.startswith("_"):
                found[f"{module.__name__.partition('.')[2]}.{name}"] = function
    found["active_patches"] = steering_vectors.active_patches
    for name, cls in CLASSES.items():
        if not getattr(cls, "_is_protocol", False):
            found[name] = cls
        found.update({f"{name}.{attribute}": method for attribute, method in methods_of(cls)})
    return found


CALLABLES = public_callables()


def test_all_that_is_public_is_looked_at() -> None:
    looked_at = {name.rpartition(".")[2] for name in CALLABLES} | CLASSES.keys() | ALIASES.keys() | {"LayerMatcher"}
    assert set(steering_vectors.__all__) <= looked_at
    assert {"SteeringVector.apply", "SteeringVector.load", "SteeringVector.norms", "Selector.__call__"} <= set(
        CALLABLES
    )
    assert {"hub.push_to_hub", "interop.from_sae", "torch_utils.get_module"} <= set(CALLABLES)


@pytest.mark.parametrize("name", CALLABLES)
def test_of_a_callable_is_short_and_names_the_aliases(name: str) -> None:
    shown = str(inspect.signature(CALLABLES[name]))
    assert len(shown) <= MOST_CHARACTERS
    assert not re.search(r"collections\.abc\.|torch\.nn\.modules\.|typing\.|steering_vectors\.", shown), shown


@pytest.mark.parametrize("name", [*CALLABLES, *CLASSES])
def test_has_types_that_can_be_resolved(name: str) -> None:
    typing.get_type_hints(CALLABLES.get(name) or CLASSES[name])


def test_types_resolve_to_the_aliases() -> None:
    hints = typing.get_type_hints(steering_vectors.train_steering_vector)
    assert hints["layer_type"] == layer_matching.LayerType
    assert hints["layer_config"] == layer_matching.ModelLayerConfig | None
    assert hints["aggregator"] == aggregators.Aggregator
    assert hints["return"] is SteeringVector


@pytest.mark.parametrize(
    "function", [steering_vectors.train_steering_vector, SteeringVector.apply, SteeringVector.patch]
)
def test_is_kept_by_the_decorator_for_hints(function: Any) -> None:
    assert inspect.signature(function) == inspect.signature(function.__wrapped__)
    assert function.__annotations__ == function.__wrapped__.__annotations__


def test_stands_in_help() -> None:
    page = plain(render_doc(steering_vectors.train_steering_vector)).replace("'", "")  # newer Pythons leave quotes out
    for part in (
        "training_samples: Iterable[TrainingSample] | PromptSets",
        "aggregator: Aggregator = mean_agg",
        "-> SteeringVector",
    ):
        assert part in page
