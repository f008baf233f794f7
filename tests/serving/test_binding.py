"""Admission: names become hashes, requests hold what they use, and cached blocks are told apart."""

import copy
import pickle

import pytest
import torch

from steering_vectors.serving.binding import Bound, Catalog
from steering_vectors.serving.store import StoredVector

A = StoredVector("a", {0: torch.tensor([1.0, -2.0])}, "hash-a")
B = StoredVector("b", {1: torch.tensor([3.0, 0.0])}, "hash-b")
SAME = StoredVector("same", A.directions, A.hash)


def catalog(largest: float = 1e38) -> Catalog:
    return Catalog([A, B, SAME], layers=[0, 1], capacity=8, largest=largest)


def bound(text: str) -> Bound:
    found = Bound.of(catalog().admit({"steering": text}))
    assert found is not None
    return found


def test_names_become_hashes_in_one_order_and_equal_contents_are_summed() -> None:
    assert bound("b:2,a:1") == bound("a:1,b:2") == Bound((("hash-a", 1.0), ("hash-b", 2.0)), "all")
    assert bound("a:1,same:0.5@generated") == Bound((("hash-a", 1.5),), "generated")
    assert bound("a:0,b:1").multipliers == (("hash-b", 1.0),)
    assert bound("a:1,same:-1").multipliers == ()


def test_other_arguments_are_kept_and_the_users_are_not_changed() -> None:
    asked = {"steering": "a:1", "other": [1, 2]}
    admitted = catalog().admit(asked)
    assert asked == {"steering": "a:1", "other": [1, 2]}
    assert {**asked, **admitted} == dict(admitted)


def test_a_copy_in_another_process_has_the_same_steering() -> None:
    admitted = catalog().admit({"steering": "a:1@generated"})
    for made in (copy.deepcopy(admitted), pickle.loads(pickle.dumps(admitted))):
        assert Bound.of(made) == Bound.of(admitted)
    plain = {"multipliers": [["hash-a", 1.0]], "tokens": "generated", "text": "a:1@generated"}
    assert Bound.of({**admitted, "steering_bound": plain}) == Bound.of(admitted)


def test_arguments_that_were_changed_or_admitted_elsewhere_are_not_admitted() -> None:
    served = catalog()
    admitted = served.admit({"steering": "a:1"})
    assert served.has_admitted(admitted)
    assert served.has_admitted(copy.deepcopy(admitted))
    assert not catalog().has_admitted(admitted)
    assert not served.has_admitted({"steering": "a:1"})
    changed = {**admitted, "steering": "a:2"}
    assert not served.has_admitted(changed)
    assert Bound.of(served.admit(changed)) == Bound((("hash-a", 2.0),), "all")


def test_a_request_without_steering_is_left_alone() -> None:
    assert Bound.of(None) is Bound.of({}) is Bound.of({"other": 1}) is None


def test_steering_that_was_never_admitted_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a request with steering='a:1' went around its admission"):
        Bound.of({"steering": "a:1"})
    with pytest.raises(ValueError, match="steering_bound can't be set by a request"):
        catalog().admit({"steering": "a:1", "steering_bound": [[["hash-a", 1.0]], "all"]})


def test_an_unknown_vector_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(ValueError, match="there is no steering vector 'c': this server has 'a', 'b', 'same'"):
        catalog().admit({"steering": "a:1,c:1"})
    with pytest.raises(ValueError, match="there is no steering vector 'a': this server has none"):
        Catalog([], layers=[], capacity=1, largest=1).admit({"steering": "a:1"})


def test_what_the_dtype_cannot_hold_is_refused() -> None:
    assert catalog(largest=65504.0).admit({"steering": "a:32752"})
    with pytest.raises(ValueError, match="steering adds numbers up to 6.55e.04: the model's dtype ends at 6.55e.04"):
        catalog(largest=65504.0).admit({"steering": "a:32752,b:1"})
    with pytest.raises(ValueError, match="steering adds numbers up to inf"):
        catalog().admit({"steering": "a:1e308,b:1e308"})


def test_steering_begins_at_the_prompts_last_token_or_at_the_first() -> None:
    assert [bound("a:1@generated").start(length) for length in (1, 5)] == [0, 4]
    assert bound("a:1").start(5) == 0


def test_blocks_before_the_first_steered_token_are_those_of_the_unsteered_prompt() -> None:
    generated = bound("a:1@generated")
    keys = [generated.block_key(39, begin, begin + 16) for begin in (0, 16, 32, 48)]
    assert keys[:2] == [None, None]
    assert keys[2:] == [("steering", "(('hash-a', 1.0),)@6"), ("steering", "(('hash-a', 1.0),)@0")]
    assert generated.block_key(33, 16, 32) is None
    assert bound("a:0@generated").block_key(1, 0, 16) is None


def test_blocks_that_begin_to_be_steered_elsewhere_or_otherwise_have_other_keys() -> None:
    keys = [
        *(bound("a:1@generated").block_key(length, 16, 32) for length in (20, 21)),
        *(bound(text).block_key(20, 16, 32) for text in ("a:1", "a:1.5@generated", "b:1@generated", "a:1,b:1")),
    ]
    assert len(set(keys)) == len(keys)


def test_blocks_of_a_prompt_of_one_token_are_the_same_under_both_selections() -> None:
    assert bound("a:1@generated").block_key(1, 0, 16) == bound("a:1").block_key(1, 0, 16)


def test_a_vector_is_unused_once_it_has_no_name_and_no_request() -> None:
    served = catalog()
    admitted = served.admit({"steering": "a:1"})
    del served.vectors["a"], served.vectors["same"], served.vectors["b"]
    assert served.unused() == {"hash-b"}
    with pytest.raises(ValueError, match="there is no steering vector 'a'"):
        served.admit({"steering": "a:1"})
    copied = copy.deepcopy(admitted)
    del admitted
    assert served.unused() == {"hash-b"}
    del copied
    assert served.unused() == {"hash-a", "hash-b"}


def test_what_is_served_is_described_in_plain_values() -> None:
    assert catalog().described() == {
        "vectors": {
            "a": {"layers": [0], "hash": "hash-a"},
            "b": {"layers": [1], "hash": "hash-b"},
            "same": {"layers": [0], "hash": "hash-a"},
        },
        "layers": [0, 1],
        "capacity": 8,
        "loaded": 2,
    }
