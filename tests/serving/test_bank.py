"""The table of directions: each request's row holds its steering, however requests come and go."""

import random
from collections.abc import Sequence

import pytest
import torch

from steering_vectors.serving.bank import Bank, Multipliers

WIDTH, LAYERS = 3, [1, 4]


def direction(key: str, layer: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(100 * ord(key) + layer))


def bank(keys: str = "abc", *, requests: int = 3, **options: int) -> Bank:
    made = Bank(LAYERS, WIDTH, capacity=options.get("capacity", 4), requests=requests)
    for key in keys:
        made.load(key, {layer: direction(key, layer) for layer in LAYERS})
    return made


def expected(wanted: Multipliers, layer: int) -> torch.Tensor:
    return sum((m * direction(key, layer) for key, m in wanted), start=torch.zeros(WIDTH))


def assert_right(table: Bank, step: Sequence[Multipliers]) -> None:
    rows = table.assign(step)
    for wanted, row in zip(step, rows, strict=True):
        for layer in LAYERS:
            assert torch.allclose(table.rows(layer)[row], expected(wanted, layer), atol=1e-6)
    assert {row == 0 for wanted, row in zip(step, rows) if not wanted} <= {True}


def test_every_step_has_the_rows_of_its_requests() -> None:
    table, chance = bank(requests=5), random.Random(0)
    pool: list[Multipliers] = [(), *(((key, m),) for key in "abc" for m in (1.0, -0.5)), (("a", 1.0), ("b", 2.0))]
    for _ in range(500):
        assert_right(table, chance.choices(pool, k=chance.randint(1, 5)))


def test_equal_steering_shares_a_row_and_keeps_it_while_there_is_room() -> None:
    table = bank()
    one, two = (("a", 1.0),), (("b", 1.0),)
    rows = table.assign([one, one, two])
    assert rows[0] == rows[1] != rows[2]
    assert table.assign([two, ()]) == [rows[2], 0]
    assert table.assign([one]) == rows[:1]


def test_as_many_requests_as_announced_never_exhaust_the_rows() -> None:
    table = bank(requests=2)
    for n in range(20):
        assert_right(table, [(("a", float(n)),), (("b", float(n)),)])
        assert_right(table, [(("b", float(n)),), (("c", float(n)),)])


def test_row_zero_stays_zero() -> None:
    table = bank()
    table.assign([(("a", 5.0),), ()])
    assert not table.rows(1)[0].any()


def test_a_layer_that_a_vector_lacks_gets_nothing_from_it() -> None:
    table = bank("")
    table.load("x", {1: torch.ones(WIDTH), 2: torch.ones(WIDTH)})
    (row,) = table.assign([(("x", 2.0),)])
    assert table.rows(1)[row].tolist() == [2.0] * WIDTH
    assert not table.rows(4)[row].any()


def test_the_slot_of_an_unloaded_vector_is_free_and_clean() -> None:
    table = bank("", capacity=1)
    table.load("x", {1: torch.ones(WIDTH), 4: torch.ones(WIDTH)})
    table.assign([(("x", 1.0),)])
    table.unload("x")
    table.unload("x")
    table.load("y", {1: 3 * torch.ones(WIDTH)})
    (row,) = table.assign([(("y", 1.0),)])
    assert table.loaded == {"y"}
    assert table.rows(1)[row].tolist() == [3.0] * WIDTH
    assert not table.rows(4)[row].any()


def test_a_full_table_is_refused_and_what_is_there_may_be_loaded_again() -> None:
    table = bank("ab", capacity=2)
    table.load("a", {1: torch.zeros(WIDTH)})
    with pytest.raises(RuntimeError, match="the table of directions is full: it holds 2 vectors"):
        table.load("c", {1: torch.zeros(WIDTH)})
    assert_right(table, [(("a", 1.0),)])


def test_an_unloaded_vector_is_no_longer_found() -> None:
    table = bank()
    table.assign([(("a", 1.0),)])
    table.unload("a")
    with pytest.raises(LookupError, match=r"the vectors with the hashes \['a'\] are not loaded"):
        table.assign([(("b", 1.0),), (("a", 1.0),)])
    assert_right(table, [(("b", 1.0),)])


def test_sums_are_made_in_float32_and_then_rounded() -> None:
    table = Bank([0], 1, capacity=2, requests=1, dtype=torch.bfloat16)
    table.load("a", {0: torch.tensor([1.0])})
    table.load("b", {0: torch.tensor([1.0])})
    (row,) = table.assign([(("a", 256.0), ("b", 1.0))])
    assert table.rows(0)[row].item() == torch.tensor(257.0).bfloat16().item()
    (row,) = table.assign([(("a", 256.0), ("b", -255.5))])
    assert table.rows(0)[row].item() == 0.5
