"""Means that are kept while rows come in."""

import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors._statistics import RunningMean, SecondMoment

HIDDEN = 5


@st.composite
def portions(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """Some rows, and the same rows in portions of any size, empty ones too."""
    n = draw(st.integers(1, 12))
    rows = 10 * torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(draw(st.integers(0, 1000))))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return rows, list(rows.tensor_split(torch.tensor(cuts, dtype=torch.long)))


@settings(deadline=None)
@given(cut=portions())
def test_mean_does_not_depend_on_the_portions(cut: tuple[Tensor, list[Tensor]]) -> None:
    rows, parts = cut
    running = RunningMean()
    for part in parts:
        running.add(part)
    assert running.count == len(rows)
    torch.testing.assert_close(running.mean, rows.double().mean(dim=0))


@settings(deadline=None)
@given(cut=portions(), order=st.randoms())
def test_merging_in_any_order_is_adding(cut: tuple[Tensor, list[Tensor]], order: random.Random) -> None:
    rows, parts = cut
    means = [RunningMean() for _ in parts]
    for mean, part in zip(means, parts, strict=True):
        mean.add(part)
    means.append(RunningMean())
    order.shuffle(means)
    total, *others = means
    for other in others:
        total.merge(other)
    assert total.count == len(rows)
    torch.testing.assert_close(total.mean, rows.double().mean(dim=0))


def test_merging_does_not_change_what_is_merged() -> None:
    first, second = RunningMean(), RunningMean()
    first.add(torch.ones(2, HIDDEN))
    second.add(torch.zeros(1, HIDDEN))
    first.merge(second)
    first.add(torch.ones(5, HIDDEN))
    assert second.count == 1
    assert torch.equal(second.mean, torch.zeros(HIDDEN).double())


def test_an_accumulator_that_was_merged_into_an_empty_one_stays_apart() -> None:
    empty, full = RunningMean(), RunningMean()
    full.add(torch.ones(1, HIDDEN))
    empty.merge(full)
    empty.add(3 * torch.ones(1, HIDDEN))
    assert torch.equal(full.mean, torch.ones(HIDDEN).double())
    assert torch.equal(empty.mean, 2 * torch.ones(HIDDEN).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_lose_no_digits_of_narrow_rows(dtype: torch.dtype) -> None:
    rows = torch.full((3000, HIDDEN), 1.0, dtype=dtype)
    rows[0] = 4096.0  # in bfloat16 4096 + 1 is 4096
    running = RunningMean()
    for part in rows.split(7):
        running.add(part)
    assert running.mean.dtype is torch.float64
    assert torch.equal(running.mean, rows.double().mean(dim=0))


def test_sums_of_float16_do_not_overflow() -> None:
    running = RunningMean()
    running.add(torch.full((4, HIDDEN), 60000.0, dtype=torch.float16))
    assert torch.equal(running.mean, torch.full((HIDDEN,), 60000.0).double().half().double())


@pytest.mark.parametrize("rows", [None, torch.zeros(0, HIDDEN)], ids=["nothing added", "no rows added"])
def test_no_rows_have_no_mean(rows: Tensor | None) -> None:
    running = RunningMean()
    if rows is not None:
        running.add(rows)
    with pytest.raises(ValueError, match="no rows"):
        _ = running.mean


class TestSecondMoment:
    @given(rows=st.integers(1, 40), hidden=st.integers(1, 12), portion=st.integers(1, 15), seed=st.integers(0, 9))
    def test_its_component_is_that_of_all_rows_whatever_the_portions(
        self, rows: int, hidden: int, portion: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        everything = torch.randn(rows, hidden, generator=generator) + 2
        moments = [SecondMoment(), SecondMoment()]
        for number, part in enumerate(everything.split(portion)):
            moments[number % 2].add(part)
        if moments[1]._mean.count:
            moments[0].merge(moments[1])
        _, values, vectors = torch.linalg.svd(everything.double(), full_matrices=False)
        assume(len(values) == 1 or values[0] > 1.05 * values[1])
        expected = vectors[0] * torch.sign(everything.double().mean(dim=0) @ vectors[0])
        component = moments[0].principal_component()
        assert component is not None
        torch.testing.assert_close(component, expected, atol=1e-5, rtol=1e-5)

    def test_rows_of_zeros_have_none(self) -> None:
        for count in (1, 5):
            moment = SecondMoment()
            moment.add(torch.zeros(count, 3))
            assert moment.principal_component() is None

    def test_no_more_rows_are_kept_than_they_are_wide(self) -> None:
        moment = SecondMoment()
        for _ in range(50):
            moment.add(torch.randn(7, 8))
            assert sum(map(len, moment._rows)) < 8


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 60),
    hidden=st.integers(1, 60),
    spectrum=st.sampled_from(["random", "one direction", "decaying", "close", "equal"]),
    mean=st.sampled_from(["none", "along the second", "large"]),
    seed=st.integers(0, 10**6),
)
def test_the_principal_component_is_that_of_the_decomposition(
    n: int, hidden: int, spectrum: str, mean: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, hidden, generator=generator, dtype=torch.float64)
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    places = torch.arange(len(sizes), dtype=torch.float64)
    sizes = {
        "random": sizes,
        "one direction": torch.where(places == 0, 100.0, 0.01),
        "decaying": 0.7**places,
        "close": 1 - 1e-3 * places / len(sizes),
        "equal": torch.ones(len(sizes), dtype=torch.float64),
    }[spectrum]
    rows = left * sizes @ right
    if mean == "along the second" and len(sizes) > 1:
        rows = rows + 1e-6 * right[1]
    elif mean == "large":
        rows = rows + 3 * torch.randn(hidden, generator=generator, dtype=torch.float64)
    moment = SecondMoment()
    moment.add(rows)
    component = moment.principal_component()
    assert component is not None
    values = torch.linalg.svdvals(rows)
    # Among equal values any is right: what counts is how much of the second moment it holds.
    torch.testing.assert_close((rows @ component).norm(), values[0], atol=1e-9, rtol=1e-9)
    if len(values) > 1 and values[0] > 1.01 * values[1]:
        expected = torch.linalg.svd(rows)[2][0]
        torch.testing.assert_close(
            (component @ expected).abs(), torch.ones((), dtype=torch.float64), atol=1e-10, rtol=0
        )
