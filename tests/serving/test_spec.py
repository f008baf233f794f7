"""The text of requests: every string is a steering or a ValueError in words."""

import math
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steering_vectors.serving import request
from steering_vectors.serving.spec import Spec, parse

NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,20}", fullmatch=True)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
# Strings that are nearly a steering, and any others.
PIECES = [*"abz09:,@.-+eE_ \n\t\0é٣", "formal", "1.5", "nan", "inf", "all", "generated", "1e999", "0x1"]
STRINGS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=60))


@given(STRINGS)
@settings(max_examples=1_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_any_string_is_a_steering_or_a_value_error(text: str) -> None:
    check_parsed(text)


def test_any_of_ten_thousand_strings_is_a_steering_or_a_value_error() -> None:
    draw = random.Random(0)
    found = [check_parsed("".join(draw.choices(PIECES, k=draw.randint(0, 12)))) for _ in range(10_000)]
    assert found.count(True) > 10


def check_parsed(text: str) -> bool:
    """Check that a text is a steering or refused in words, and return whether it is one."""
    try:
        spec = parse(text)
    except ValueError as error:
        assert str(error)
        return False
    assert spec.multipliers
    assert all(math.isfinite(multiplier) for _, multiplier in spec.multipliers)
    assert spec.tokens in ("all", "generated")
    assert parse(str(spec)) == spec
    return True


@given(st.dictionaries(NAMES, NUMBERS, min_size=1, max_size=8), st.sampled_from(["all", "generated"]))
@settings(deadline=None)
def test_a_request_is_parsed_as_what_it_was_made_of(multipliers: dict[str, float], tokens: str) -> None:
    text = request(multipliers, tokens=tokens)["steering"]
    assert parse(text) == Spec(tuple(multipliers.items()), tokens)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (1.5, "steering must be a string, got float"),
        (None, "steering must be a string, got NoneType"),
        ("", "steering has '' without a multiplier: write it as 'formal:1.5,french:-0.5'"),
        ("formal", "steering has 'formal' without a multiplier"),
        ("formal:", "the multiplier of 'formal' must be a finite number, got ''"),
        ("formal:nan", "the multiplier of 'formal' must be a finite number, got 'nan'"),
        ("formal:inf", "must be a finite number, got 'inf'"),
        ("formal:1e999", "must be a finite number, got '1e999'"),
        ("formal:1_0", "must be a finite number, got '1_0'"),
        ("formal: 1", "must be a finite number, got ' 1'"),
        ("formal:1\n", "must be a finite number"),
        ("formal:1:2", "must be a finite number, got '1:2'"),
        ("../formal:1", "'../formal' can't be the name of a vector"),
        (":1", "'' can't be the name of a vector"),
        ("a:1,a:2", "names the vector 'a' twice: write it once, with the sum"),
        ("a:1,", "steering has '' without a multiplier"),
        ("a:1@last", "steering selects 'last': expected 'all' or 'generated' after '@'"),
        ("a:1@", "steering selects '': expected 'all' or 'generated'"),
        ("a:1@all@all", "steering selects 'all@all'"),
        ("a:1," * 2000, "steering has 8000 characters, and at most 4096 are allowed"),
    ],
)
def test_a_bad_text_is_refused_with_the_reason(text: object, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        parse(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        (["a"], TypeError, "multipliers must be a mapping from names to numbers, got list"),
        ({1: 1.0}, TypeError, "a vector's name must be a string, got 1"),
        ({"a": "1"}, TypeError, "the multiplier of 'a' must be a number, got '1'"),
        ({"a": True}, TypeError, "the multiplier of 'a' must be a number, got True"),
        ({"a": math.nan}, ValueError, "the multiplier of 'a' must be finite, got nan"),
        ({"a": 10**400}, ValueError, "the multiplier of 'a' must be finite"),
        ({"a b": 1}, ValueError, "'a b' can't be the name of a vector"),
        ({}, ValueError, "without a multiplier"),
    ],
)
def test_a_bad_request_is_refused_where_it_is_made(arguments: object, error: type[Exception], reason: str) -> None:
    with pytest.raises(error) as caught:
        request(arguments)  # type: ignore[arg-type]
    assert reason in str(caught.value)


def test_an_unknown_selection_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="steering selects 'last'"):
        request({"a": 1}, tokens="last")


def test_a_request_needs_no_vllm() -> None:
    assert request({"formal": 1.5, "french": -0.5}, tokens="generated") == {
        "steering": "formal:1.5,french:-0.5@generated"
    }
