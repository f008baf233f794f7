"""Docstrings of what the reference describes: parameters, errors and examples stand in lists and in order."""

import builtins
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import steering_vectors
from tests.of_each import of_each
from tests.test_signatures import CALLABLES, CLASSES, MODULES

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns")
OF_0_12_2 = {"layer_matching.collect_matching_layers", "torch_utils.get_module"}


def reference() -> Iterator[tuple[str, Any]]:
    """Yield what the reference describes: exported names, their methods, and the functions of two modules."""
    listed = {module.__name__.rpartition(".")[2]: getattr(module, "__all__", ()) for module in MODULES}
    for name, function in CALLABLES.items():
        owner, _, last = name.rpartition(".")
        is_listed = owner in ("hub", "interop") and last in listed[owner]
        if last in steering_vectors.__all__ or owner in CLASSES or is_listed or name in OF_0_12_2:
            yield name, function
    yield from CLASSES.items()


REFERENCE = dict(reference())


def sections_of(docstring: str) -> dict[str, dict[str, str]]:
    """Return the entries of each section by name; those of results have the name ''."""
    found: dict[str, dict[str, str]] = {}
    for title, body in re.findall(rf"^({'|'.join(SECTIONS)}):\n((?:    .*\n?)+)", docstring, re.MULTILINE):
        entries = re.split(r"^    (?! )", body, flags=re.MULTILINE)[1:]
        if title in ("Returns", "Yields"):
            found[title] = {"": " ".join(body.split())}
        else:
            parts = [" ".join(entry.split()).partition(": ") for entry in entries]
            found[title] = {name: text for name, _, text in parts}
            assert len(found[title]) == len(entries), f"two entries of one name in {title}"
    return found


def docstring_of(name: str) -> str:
    """Return a docstring; for the call of a protocol that of its class, which users look at."""
    owner, _, last = name.rpartition(".")
    documented = CLASSES[owner] if last == "__call__" and getattr(CLASSES[owner], "_is_protocol", False) else None
    return inspect.getdoc(documented or REFERENCE[name]) or ""


def parameters_of(documented: Any) -> list[str]:
    if inspect.isclass(documented):
        return [field.name for field in dataclasses.fields(documented)] if dataclasses.is_dataclass(documented) else []
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(documented).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, one in parameters.items() if one.kind not in variable and name not in ("self", "cls")]


def test_the_reference_is_looked_at() -> None:
    assert set(OF_0_12_2) <= REFERENCE.keys()
    assert {"train_steering_vector.train_steering_vector", "SteeringVector.apply", "hub.from_pretrained"} <= set(
        REFERENCE
    )
    assert {"SteeringVector", "TokenPositions", "Accumulator.add", "active_patches", "interop.from_sae"} <= set(
        REFERENCE
    )
    assert "layer_matching.find_layers" not in REFERENCE


def test_sections_are_read() -> None:
    text = (
        "Do it.\n\nArgs:\n    a: One: two,\n        three.\n    b: Four.\n\nReturns:\n    Five\n    six.\n\n>>> f()\n"
    )
    assert sections_of(text) == {"Args": {"a": "One: two, three.", "b": "Four."}, "Returns": {"": "Five six."}}


@of_each(REFERENCE)
def test_parameters_are_listed_as_in_the_signature(name: str) -> None:
    sections = sections_of(docstring_of(name))
    listed = sections.get("Args", sections.get("Attributes", {}) if name in CLASSES else {})
    parameters = parameters_of(REFERENCE[name])
    if name in CLASSES and not parameters:  # an object that the library makes, or a protocol
        return
    if listed or len(parameters) > 1:
        assert list(listed) == parameters


@of_each(REFERENCE)
def test_errors_and_warnings_are_those_of_python(name: str) -> None:
    sections = sections_of(docstring_of(name))
    for error in sections.get("Raises", {}):
        assert issubclass(getattr(builtins, error, object), Exception), error
        assert not issubclass(getattr(builtins, error), Warning), error
    for warning in sections.get("Warns", {}):
        assert issubclass(getattr(builtins, warning, object), Warning), warning


@of_each(REFERENCE)
def test_errors_are_not_in_the_prose(name: str) -> None:
    assert not re.search(r"\b(Raises|raises|Warns with a?) [A-Z]\w+(Error|Warning)", _prose(docstring_of(name)))


@of_each(REFERENCE)
def test_descriptions_are_sentences(name: str) -> None:
    for title, entries in sections_of(docstring_of(name)).items():
        for entry, text in entries.items():
            assert text.endswith("."), f"{title}: {entry}"
            assert text[0].isupper() or text.startswith("``"), f"{title}: {entry}"
        if title in ("Returns", "Yields"):  # Sphinx would take what stands before a colon for a type
            assert ": " not in entries[""].replace("``", ""), title


@of_each(REFERENCE)
def test_lines_fit_a_terminal_of_100_columns(name: str) -> None:
    longest = max(inspect.getdoc(REFERENCE[name]).splitlines() if REFERENCE[name].__doc__ else [""], key=len)
    assert len(longest) + 4 <= 100, longest  # which help() indents by 4


@of_each(REFERENCE)
def test_sections_stand_in_order_before_the_example(name: str) -> None:
    docstring = docstring_of(name)
    titles = re.findall(rf"^({'|'.join(SECTIONS)}):$", docstring, re.MULTILINE)
    assert titles == sorted(titles, key=SECTIONS.index)
    assert not re.search(rf"^>>> .*^({'|'.join(SECTIONS)}):$", docstring, re.MULTILINE | re.DOTALL)


def _prose(docstring: str) -> str:
    before_sections = re.split(rf"^(?:{'|'.join(SECTIONS)}):$", docstring, maxsplit=1, flags=re.MULTILINE)[0]
    return before_sections.partition(">>> ")[0]
