"""Every member of a family is tested, exported and documented: nothing of CONTRIBUTING's recipe was forgotten."""

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch

import steering_vectors
from steering_vectors import (
    Aggregator,
    CombinableSelector,
    PatchDeltaOperator,
    SetAggregator,
    aggregators,
    steering_operators,
    token_selection,
)
from tests.families import AGGREGATORS, FIRST_PASS, OPERATORS, SELECTIONS, TAKE_SETS
from tests.test_structure import PUBLIC_SINCE_0_12_2

ROOT = Path(__file__).parent.parent

# module → (what its factories return, the table of tests/families.py and its keys, the page that has their table)
FAMILIES: dict[ModuleType, tuple[Any, str, list[str], str]] = {
    steering_operators: (PatchDeltaOperator, "OPERATORS", [*OPERATORS], "docs/advanced_usage.rst"),
    token_selection: (
        CombinableSelector,
        "SELECTIONS or FIRST_PASS",
        [*SELECTIONS, *FIRST_PASS],
        "docs/concepts/tokens.rst",
    ),
    aggregators: (Aggregator, "AGGREGATORS", [*AGGREGATORS], "docs/advanced_usage.rst"),
}


def factories() -> list[tuple[ModuleType, str]]:
    """The functions of each family's module that return one of its members."""
    return [
        (module, name)
        for module, (made, *_) in FAMILIES.items()
        for name, function in vars(module).items()
        if inspect.isfunction(function) and not name.startswith("_") and function.__module__ == module.__name__
        if get_type_hints(function).get("return") == made
    ]


def forgotten(module: ModuleType, name: str, root: Path = ROOT) -> list[str]:
    """The places of CONTRIBUTING's recipe that lack the factory, each with what belongs there."""
    _, table, keys, page = FAMILIES[module]
    api = f"docs/api/{module.__name__.rpartition('.')[2]}.rst"
    shown = f"``{name}("
    places = {
        f"steering_vectors/__init__.py: import {name}, and put it into __all__ and _NAMES": name
        in {*steering_vectors.__all__} & {*steering_vectors._MODULE_OF},
        f"tests/families.py: an entry in {table}": any(re.fullmatch(rf"{name}(\(.*\))?", key) for key in keys),
        f"{page}: a line {shown}…)`` in the table or list": shown in (root / page).read_text(),
        f"{api}: .. autofunction:: {name}": f".. autofunction:: {name}\n" in (root / api).read_text(),
        f"CHANGELOG.rst: ``{name}``": name in PUBLIC_SINCE_0_12_2
        or f"``{name}``" in (root / "CHANGELOG.rst").read_text(),
    }
    return [place for place, is_there in places.items() if not is_there]


@pytest.mark.parametrize(("module", "name"), factories(), ids=lambda value: getattr(value, "__name__", value))
def test_is_in_every_place_of_the_recipe(module: ModuleType, name: str) -> None:
    missing = forgotten(module, name)
    assert not missing, "\n".join([f"{name} is missing (see How to add in CONTRIBUTING.rst):", *missing])


def test_the_three_families_are_found() -> None:
    found = [name for _, name in factories()]
    assert {"addition_operator", "at", "completion", "mean_aggregator", "norm_preserving_operator"} <= set(found)


@pytest.mark.parametrize("module", FAMILIES, ids=lambda module: module.__name__)
def test_what_is_in_no_place_is_missed_in_all(module: ModuleType) -> None:
    assert len(forgotten(module, "nowhere")) == 5


def test_the_recipe_names_every_place() -> None:
    recipe = (ROOT / "CONTRIBUTING.rst").read_text().partition("How to add")[2]
    for module in FAMILIES:
        for place in forgotten(module, "nowhere"):
            assert f"``{place.partition(':')[0]}``" in recipe, place


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_aggregators_give_their_formulas(name: str, n: int) -> None:
    case = AGGREGATORS[name]
    generator = torch.Generator().manual_seed(n)
    positive, negative = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = case.by_hand(positive + 1, negative)
    torch.testing.assert_close(case.make()(positive + 1, negative).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TAKE_SETS)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (9, 4), (12, 12)], ids=str)
def test_aggregators_give_their_formulas_of_sets(name: str, sizes: tuple[int, int]) -> None:
    case = AGGREGATORS[name]
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(n, 6, generator=generator, dtype=torch.float64) + 3 for n in sizes)
    assert case.of_sets_by_hand is not None
    aggregator = case.make()
    assert isinstance(aggregator, SetAggregator)
    expected = case.of_sets_by_hand(positive + 1, negative)
    torch.testing.assert_close(aggregator.of_sets(positive + 1, negative).double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_take_sets_where_they_have_a_formula_for_them(name: str) -> None:
    assert isinstance(AGGREGATORS[name].make(), SetAggregator) == (name in TAKE_SETS)
