"""From contrasting rows to a direction."""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import steering_vectors
from steering_vectors import (
    Accumulator,
    Aggregator,
    StreamingAggregator,
    aggregate_activations,
    geometric_median_aggregator,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    train_steering_vector,
    winsorized_aggregator,
)
from steering_vectors._statistics import geometric_median
from steering_vectors.aggregators import Side, accumulator_for, aggregate
from tests import families, tiny

HIDDEN = 6
AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
    **{name: case.make for name, case in families.AGGREGATORS.items()},
    "callable": lambda: median_of_differences,
}
SHIPPED = list(families.AGGREGATORS)
UNIT = [name for name, case in families.AGGREGATORS.items() if case.has_norm_1]


def median_of_differences(positive: Tensor, negative: Tensor) -> Tensor:
    return (positive - negative).median(dim=0).values


def sides(n: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(HIDDEN, generator=generator)
    positive, negative = (torch.randn(n, HIDDEN, generator=generator) for _ in range(2))
    return (positive + shift).to(dtype), negative.to(dtype)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


class TestMean:
    @pytest.mark.parametrize("n", [1, 2, 9])
    def test_is_the_mean_of_the_differences(self, n: int) -> None:
        positive, negative = sides(n)
        expected = (positive.double() - negative.double()).mean(dim=0).float()
        torch.testing.assert_close(mean_aggregator()(positive, negative), expected)

    def test_small_differences_of_large_rows_keep_their_digits(self) -> None:
        generator = torch.Generator().manual_seed(0)
        common = 1e4 * torch.randn(500, HIDDEN, generator=generator)
        positive, negative = common + 0.5, common
        expected = (positive.double() - negative.double()).mean(dim=0).float()
        torch.testing.assert_close(mean_aggregator()(positive, negative), expected, rtol=1e-6, atol=0)

    def test_streams(self) -> None:
        assert isinstance(mean_aggregator(), StreamingAggregator)

    def test_equal_sides_give_zero(self) -> None:
        positive, _ = sides()
        assert torch.equal(mean_aggregator()(positive, positive), torch.zeros(HIDDEN))


class TestPCA:
    @pytest.mark.parametrize("n", [1, 2, 5, 40])
    def test_is_the_first_right_singular_vector_of_the_differences(self, n: int) -> None:
        positive, negative = sides(n)
        differences = (positive - negative).double()
        expected = torch.linalg.svd(differences).Vh[0].float()
        direction = pca_aggregator()(positive, negative)
        assert abs(cosine(direction, expected)) == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("n", [1, 2, 40])
    def test_is_the_first_eigenvector_of_the_uncentred_second_moment(self, n: int) -> None:
        positive, negative = sides(n)
        differences = (positive - negative).double()
        expected = torch.linalg.eigh(differences.T @ differences).eigenvectors[:, -1]
        assert abs(cosine(pca_aggregator()(positive, negative), expected)) == pytest.approx(1, abs=1e-6)

    def test_finds_what_all_differences_share(self) -> None:
        positive, negative = sides(40)
        shift = 20 * torch.nn.functional.normalize(torch.ones(HIDDEN), dim=0)
        assert cosine(pca_aggregator()(positive + shift, negative), shift) > 0.95

    @settings(deadline=None)
    @given(n=st.integers(1, 12), seed=st.integers(0, 1000), flip=st.booleans())
    def test_points_towards_the_mean_difference(self, n: int, seed: int, flip: bool) -> None:
        positive, negative = sides(n, seed)
        if flip:
            positive, negative = negative, positive
        mean = (positive - negative).double().mean(dim=0)
        assert float(pca_aggregator()(positive, negative).double() @ mean) >= -1e-6

    def test_differences_of_mean_zero_still_give_a_direction(self) -> None:
        first = torch.eye(HIDDEN)[0]
        positive = torch.stack([3 * first, -3 * first])
        direction = pca_aggregator()(positive, torch.zeros(2, HIDDEN))
        torch.testing.assert_close(direction.abs(), first)

    def test_equal_sides_are_refused(self) -> None:
        positive, _ = sides()
        with pytest.raises(ValueError, match="all differences between the sides are zero"):
            pca_aggregator()(positive, positive)


class TestLogistic:
    @pytest.mark.parametrize("kwargs", [None, {}, {"C": 0.01}, {"C": 10.0, "max_iter": 500}])
    @pytest.mark.parametrize("n", [1, 8])
    def test_is_scikit_learns_normal_on_pairs_centred_on_their_means(
        self, n: int, kwargs: dict[str, Any] | None
    ) -> None:
        positive, negative = sides(n)
        means = (positive + negative) / 2
        rows = np.concatenate([(positive - means).numpy(), (negative - means).numpy()])
        regression = LogisticRegression(fit_intercept=False, **(kwargs or {})).fit(rows, [1] * n + [0] * n)
        assert cosine(logistic_aggregator(kwargs)(positive, negative), torch.tensor(regression.coef_[0])) > 1 - 1e-5

    def test_points_to_the_positive_side(self) -> None:
        positive, negative = sides(8)
        forth, back = logistic_aggregator()(positive, negative), logistic_aggregator()(negative, positive)
        assert float(forth @ (positive - negative).mean(dim=0)) > 0
        torch.testing.assert_close(forth, -back, atol=1e-4, rtol=1e-4)

    def test_the_callers_arguments_are_copied(self) -> None:
        kwargs = {"C": 0.01}
        aggregator = logistic_aggregator(kwargs)
        positive, negative = sides(8)
        before = aggregator(positive, negative)
        kwargs["C"] = 100.0
        assert torch.equal(aggregator(positive, negative), before)

    def test_an_intercept_may_be_asked_for(self) -> None:
        assert logistic_aggregator({"fit_intercept": True})(*sides(8)).shape == (HIDDEN,)

    def test_without_scikit_learn_the_error_names_the_extra_before_any_work(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
        with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'steering-vectors\[sklearn\]'"):
            logistic_aggregator()


class TestGeometricMedian:
    @pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
    def test_has_no_point_around_it_with_a_smaller_sum_of_distances(self, n: int) -> None:
        rows = torch.randn(n, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        median = geometric_median(rows)
        least = (rows - median).norm(dim=1).sum()
        for seed in range(20):
            step = 1e-4 * torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert (rows - median - step).norm(dim=1).sum() >= least - 1e-9

    def test_leaves_a_row_at_which_the_search_begins(self) -> None:
        """The mean of these is the row of zeros, and the median is where three of them are."""
        rows = torch.tensor([[-3.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        torch.testing.assert_close(geometric_median(rows), torch.tensor([1.0, 0.0]).double(), atol=1e-8, rtol=0)

    def test_stays_at_rows_that_hold_it_against_the_pull_of_the_others(self) -> None:
        rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])  # their mean is 0
        assert torch.equal(geometric_median(rows), torch.zeros(2).double())

    def test_may_be_one_of_the_rows(self) -> None:
        rows = torch.tensor([[0.0, 0.0], [4.0, 0.1], [-4.0, 0.1]])
        torch.testing.assert_close(geometric_median(rows), rows[0].double(), atol=1e-8, rtol=0)

    @pytest.mark.parametrize("rows", [[[3.0, 4.0]], [[3.0, 4.0]] * 5, [[2.0, 4.0], [4.0, 4.0]]], ids=str)
    def test_of_one_row_equal_rows_or_two_is_their_mean(self, rows: list[list[float]]) -> None:
        assert torch.equal(geometric_median(torch.tensor(rows)), torch.tensor([3.0, 4.0]).double())

    def test_stays_near_the_rows_beside_outliers_however_far(self) -> None:
        rows = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
        rows[:4] = 1e8
        assert float(geometric_median(rows).norm()) < 10

    def test_keeps_the_digits_beside_a_large_common_part(self) -> None:
        rows = torch.randn(11, 8, generator=torch.Generator().manual_seed(0)).double()
        torch.testing.assert_close(geometric_median(rows + 1e6) - 1e6, geometric_median(rows), atol=1e-8, rtol=0)

    def test_carries_no_gradients(self) -> None:
        rows = torch.ones(3, 2, requires_grad=True)
        assert not geometric_median_aggregator()(rows, 2 * rows).requires_grad


class TestWinsorizedMean:
    def test_is_scipys(self) -> None:
        stats = pytest.importorskip("scipy.stats")
        for n in (1, 4, 5, 19, 40):
            rows = torch.randn(n, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            for quantile in (0.0, 0.05, 0.1, 0.25, 0.49):
                expected = np.asarray(stats.mstats.winsorize(rows.numpy(), (quantile, quantile), axis=0)).mean(axis=0)
                found = winsorized_aggregator(quantile)(rows, torch.zeros(n, 6))
                torch.testing.assert_close(found.double(), torch.tensor(expected), atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("quantile", [-0.1, 0.5, 1, float("nan")])
    def test_refuses_quantiles_that_leave_nothing(self, quantile: float) -> None:
        with pytest.raises(ValueError, match=r"quantile must be (from 0 to below 0\.5|finite)"):
            winsorized_aggregator(quantile)

    @pytest.mark.parametrize("quantile", ["0.1", None, True])
    def test_refuses_what_is_no_number(self, quantile: Any) -> None:
        with pytest.raises(TypeError, match="quantile must be a number"):
            winsorized_aggregator(quantile)


class TestAllOfThem:
    @pytest.mark.parametrize("name", UNIT)
    @pytest.mark.parametrize("n", [1, 2, 7])
    def test_norm_is_one(self, name: str, n: int) -> None:
        direction = AGGREGATORS[name]()(*sides(n))
        assert direction.shape == (HIDDEN,)
        assert float(direction.norm()) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("name", SHIPPED)
    def test_narrow_rows_are_computed_widely(self, name: str, dtype: torch.dtype) -> None:
        positive, negative = sides(8, dtype=dtype)
        direction = AGGREGATORS[name]()(positive, negative)
        expected = AGGREGATORS[name]()(positive.double(), negative.double())
        assert torch.promote_types(direction.dtype, torch.float32) == direction.dtype
        torch.testing.assert_close(direction.double(), expected.double(), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("name", UNIT)
    def test_docstrings_of_those_of_norm_one_say_what_multiplier_one_does(self, name: str) -> None:
        text = " ".join((getattr(steering_vectors, name).__doc__ or "").split())
        assert "a multiplier of 1 rarely has a visible effect" in text

    @pytest.mark.parametrize("name", SHIPPED)
    def test_repr_is_the_call_that_made_it(self, name: str) -> None:
        assert repr(AGGREGATORS[name]()) == (families.AGGREGATORS[name].shown or f"{name}()")

    def test_repr_shows_arguments(self) -> None:
        assert repr(logistic_aggregator({"C": 0.5})) == "logistic_aggregator({'C': 0.5})"

    @pytest.mark.parametrize("name", SHIPPED)
    def test_two_of_a_kind_are_equal(self, name: str) -> None:
        assert AGGREGATORS[name]() == AGGREGATORS[name]()


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, int, list[tuple[Side, list[int]]]]:
    """A number of pairs, a seed, and any order and partition in which their rows come."""
    n = draw(st.integers(2, 8))
    rows: list[tuple[Side, int]] = [(side, number) for side in ("positive", "negative") for number in range(n)]
    order = draw(st.permutations(rows))
    portions: list[tuple[Side, list[int]]] = []
    for side, number in order:
        if portions and portions[-1][0] == side and draw(st.booleans()):
            portions[-1][1].append(number)
        else:
            portions.append((side, [number]))
    return n, draw(st.integers(0, 1000)), portions


def deliver(accumulator: Accumulator, rows: tuple[Tensor, Tensor], portions: Sequence[tuple[Side, list[int]]]) -> None:
    by_side = dict(zip(("positive", "negative"), rows, strict=True))
    for side, numbers in portions:
        accumulator.add(by_side[side][numbers], side, numbers)


class TestAccumulators:
    @pytest.mark.parametrize("name", AGGREGATORS)
    @settings(deadline=None, max_examples=25)
    @given(delivery=deliveries())
    def test_rows_may_come_in_any_order_and_portions(
        self, name: str, delivery: tuple[int, int, list[tuple[Side, list[int]]]]
    ) -> None:
        n, seed, portions = delivery
        aggregator, rows = AGGREGATORS[name](), sides(n, seed)
        accumulator = accumulator_for(aggregator, HIDDEN)
        deliver(accumulator, rows, portions)
        torch.testing.assert_close(accumulator.direction(), aggregator(*rows), atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("name", AGGREGATORS)
    @settings(deadline=None, max_examples=25)
    @given(n=st.integers(2, 8), seed=st.integers(0, 1000), parts=st.integers(1, 4), shuffle=st.integers(0, 1000))
    def test_pairs_may_be_shared_out_and_merged(self, name: str, n: int, seed: int, parts: int, shuffle: int) -> None:
        aggregator, rows = AGGREGATORS[name](), sides(n, seed)
        accumulators = [accumulator_for(aggregator, HIDDEN) for _ in range(parts)]
        for number in range(n):
            deliver(accumulators[number % parts], rows, [("negative", [number]), ("positive", [number])])
        random.Random(shuffle).shuffle(accumulators)
        total, *others = accumulators
        for other in others:
            total.merge(other)
        torch.testing.assert_close(total.direction(), aggregator(*rows), atol=1e-4, rtol=1e-3)

    def test_the_mean_keeps_no_row(self) -> None:
        accumulator = accumulator_for(mean_aggregator(), HIDDEN)
        positive, negative = sides(50)
        deliver(accumulator, (positive, negative), [("positive", list(range(50))), ("negative", list(range(50)))])
        assert largest_tensor(accumulator) <= HIDDEN


def largest_tensor(value: Any, seen: frozenset[int] = frozenset()) -> int:
    """The numbers in the largest tensor that ``value`` holds."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes() // value.element_size()
    if id(value) in seen:
        return 0
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    parts = [*inner, *getattr(value, "__dict__", {}).values()]
    return max((largest_tensor(part, seen | {id(value)}) for part in parts), default=0)


class TestCallables:
    def test_get_rows_by_pair_in_the_samples_order_in_float32(self) -> None:
        seen: list[tuple[Tensor, Tensor]] = []

        def look(positive: Tensor, negative: Tensor) -> Tensor:
            seen.append((positive, negative))
            return positive[0]

        positive, negative = sides(5, dtype=torch.bfloat16)
        accumulator = accumulator_for(look, HIDDEN)
        for number in (3, 0, 4, 1, 2):
            deliver(accumulator, (positive.float(), negative.float()), [("negative", [number]), ("positive", [number])])
        direction = accumulator.direction()
        assert torch.equal(seen[0][0], positive.float())
        assert torch.equal(seen[0][1], negative.float())
        assert torch.equal(direction, positive[0].float())

    def test_a_row_vector_is_taken_for_a_direction(self) -> None:
        positive, negative = sides()
        row = aggregate(lambda p, n: (p - n).mean(dim=0, keepdim=True), positive, negative)
        torch.testing.assert_close(row, mean_aggregator()(positive, negative))

    @pytest.mark.parametrize("shape", [(8, HIDDEN), (HIDDEN + 1,), (HIDDEN, 1), ()])
    def test_another_shape_is_an_error_that_names_the_aggregator(self, shape: tuple[int, ...]) -> None:
        def odd(positive: Tensor, negative: Tensor) -> Tensor:
            return torch.zeros(shape)

        with pytest.raises(
            ValueError, match=rf"the aggregator .*odd.* returned a tensor of shape .*expected \({HIDDEN},\)"
        ):
            aggregate(odd, *sides())

    @pytest.mark.parametrize("value", [None, [0.0] * HIDDEN, 1.0])
    def test_no_tensor_is_an_error_that_names_the_aggregator(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"the aggregator .* returned .*, expected a tensor"):
            aggregate(lambda p, n: value, *sides())

    def test_directions_are_float32_whatever_it_computes_in(self) -> None:
        assert aggregate(lambda p, n: p[0].double(), *sides()).dtype is torch.float32
        assert aggregate(lambda p, n: p[0].half(), *sides()).dtype is torch.float32

    def test_one_that_streams_is_fed_in_training(self) -> None:
        """Somebody's own streaming aggregator: nothing but the Protocol."""

        class Last:
            def __init__(self) -> None:
                self.rows: dict[str, Tensor] = {}

            def add(self, rows: Tensor, side: Side, samples: Sequence[int]) -> None:
                assert len(rows) == len(samples)
                assert rows.dtype is torch.float32
                self.rows[side] = rows[-1]

            def merge(self, other: Any) -> None:
                self.rows.update(other.rows)

            def direction(self) -> Tensor:
                return self.rows["positive"] - self.rows["negative"]

        class Streams:
            def accumulator(self, hidden: int) -> Last:
                assert hidden == tiny.HIDDEN
                return Last()

            def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
                raise AssertionError("its accumulator is asked")

        samples = [("good", "bad!")]
        model = tiny.build("llama").to(torch.bfloat16)
        vector = train_steering_vector(model, tiny.tokenizer(), samples, layers=1, aggregator=Streams())
        expected = train_steering_vector(model, tiny.tokenizer(), samples, layers=1)
        torch.testing.assert_close(vector.layer_activations[1], expected.layer_activations[1])


class TestAggregateActivations:
    @pytest.mark.parametrize("name", AGGREGATORS)
    def test_joins_the_batches_of_each_layer(self, name: str) -> None:
        positive, negative = sides(5)
        aggregator = AGGREGATORS[name]()
        directions = aggregate_activations(
            {3: list(positive.split(2)), 1: [positive * 2]}, {3: list(negative.split(4)), 1: [negative * 2]}, aggregator
        )
        assert directions.keys() == {1, 3}
        torch.testing.assert_close(directions[3], aggregator(positive, negative))
        torch.testing.assert_close(directions[1], aggregator(positive * 2, negative * 2))

    @pytest.mark.parametrize("name", AGGREGATORS)
    def test_directions_are_float32(self, name: str) -> None:
        for dtype in (torch.bfloat16, torch.float64):
            positive, negative = sides(5, dtype=dtype)
            assert (
                aggregate_activations({0: [positive]}, {0: [negative]}, AGGREGATORS[name]())[0].dtype is torch.float32
            )

    def test_other_layers_on_the_other_side_are_refused(self) -> None:
        positive, negative = sides()
        with pytest.raises(ValueError, match=r"both sides must have the same layers, got \[0\] and \[1\]"):
            aggregate_activations({0: [positive]}, {1: [negative]})

    def test_other_numbers_of_rows_are_refused(self) -> None:
        positive, negative = sides()
        with pytest.raises(ValueError, match=r"layer 0: sides must have one shape, got \(8, 6\) and \(7, 6\)"):
            aggregate_activations({0: [positive]}, {0: [negative[:7]]})

    def test_no_layers_give_no_directions(self) -> None:
        assert aggregate_activations({}, {}) == {}

    @pytest.mark.parametrize("side", [[torch.ones(2)], torch.ones(3), [[1.0, 2.0]], [torch.ones(1, 1, 2)]], ids=str)
    def test_refuses_what_is_no_list_of_rows(self, side: Any) -> None:
        with pytest.raises(ValueError, match=r"layer 0: each side must have a list of tensors \(n, hidden\)"):
            aggregate_activations({0: side}, {0: side})

    def test_refuses_sides_that_are_no_mappings(self) -> None:
        with pytest.raises(TypeError, match="activations must map layers to lists of tensors .*, got list"):
            aggregate_activations([torch.ones(1, 2)], {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("other", [(2, 4), (1, 4), (0, 4), (3, 1), (4,)], ids=str)
def test_sides_of_other_shapes_are_refused(name: str, other: tuple[int, ...]) -> None:
    for one, two in (((3, 4), other), (other, (3, 4))):
        with pytest.raises(ValueError, match=r"rows must have the same shape \(n, hidden\).*got \(") as error:
            AGGREGATORS[name]()(torch.rand(one), torch.rand(two))
        assert f"got {one} and {two}" in str(error.value)


@pytest.mark.parametrize("name", [name for name in AGGREGATORS if name != "mean_aggregator"])
@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_accumulator_of_pairs_refuses_a_row_without_its_partner(name: str, side: Side, merged: bool) -> None:
    rows, accumulator = sides(4), accumulator_for(AGGREGATORS[name](), HIDDEN)
    deliver(accumulator, rows, [("positive", [0, 1]), ("negative", [0, 1])])
    last = accumulator_for(AGGREGATORS[name](), HIDDEN) if merged else accumulator
    deliver(last, rows, [(side, [3])])
    if merged:
        accumulator.merge(last)
    with pytest.raises(ValueError, match="must have a positive and a negative row, but sample 3 has only one"):
        accumulator.direction()
