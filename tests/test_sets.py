"""Two sets of prompts in the place of pairs."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    aggregate_activations,
    completion,
    extract_activations,
    from_index,
    geometric_median_aggregator,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    read_activations,
    train_steering_vector,
    winsorized_aggregator,
)
from steering_vectors._extraction import walk
from steering_vectors.aggregators import accumulator_for
from tests import families, tiny

POSITIVE = ["I love this film", "Great!", "So good", "It was a joy to watch", "yes"]
NEGATIVE = ["I hate this film", "Awful, and far too long", "no"]
SETS: dict[str, Any] = {"positive": POSITIVE, "negative": NEGATIVE}
SIZES = [(5, 3), (1, 3), (5, 1), (3, 3)]


def ids_of(text: str) -> list[int]:
    ids: list[int] = tiny.tokenizer()(text)["input_ids"]
    return ids


def by_hand(
    model: Any, sets: dict[str, Any] = SETS, read: Callable[[Tensor], Tensor] = lambda rows: rows[-1]
) -> dict[int, Tensor]:
    """The difference of the means of what ``read`` takes of (seq, hidden), prompt by prompt."""
    means: list[dict[int, Tensor]] = []
    for side in ("positive", "negative"):
        rows = [[read(layer) for layer in tiny.hidden_states(model, ids_of(text))] for text in sets[side]]
        means.append({n: torch.stack(of_layer).mean(dim=0) for n, of_layer in enumerate(zip(*rows, strict=True))})
    return {layer: means[0][layer] - means[1][layer] for layer in means[0]}


def train(sets: Any, **options: Any) -> SteeringVector:
    return train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), sets, **options)


def assert_directions(vector: SteeringVector, expected: dict[int, Tensor]) -> None:
    for layer, direction in vector.layer_activations.items():
        torch.testing.assert_close(direction, expected[layer], atol=1e-5, rtol=1e-5)


class TestDirections:
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
    def test_are_differences_of_the_means_of_each_prompt_alone(self, architecture: str, sizes: tuple[int, int]) -> None:
        sets = {"positive": POSITIVE[: sizes[0]], "negative": NEGATIVE[: sizes[1]]}
        model = tiny.shared(architecture)
        vector = train_steering_vector(model, tiny.tokenizer(), sets, batch_size=2)
        assert_directions(vector, by_hand(model, sets))

    @settings(deadline=None, max_examples=15)
    @given(
        positive=st.permutations(POSITIVE),
        negative=st.permutations(NEGATIVE),
        batch_size=st.integers(1, 6),
        window=st.integers(1, 6),
    )
    def test_do_not_depend_on_order_or_partition(
        self, positive: list[str], negative: list[str], batch_size: int, window: int
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(walk, "WINDOW", window)
            vector = train({"negative": negative, "positive": positive}, layers=[0, 2], batch_size=batch_size)
        assert_directions(vector, by_hand(tiny.shared("llama")))

    @pytest.mark.parametrize("name", families.TAKE_SETS)
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_of_an_aggregator_are_those_of_the_rows_that_are_read(self, name: str, sizes: tuple[int, int]) -> None:
        case = families.AGGREGATORS[name]
        sets = {"positive": POSITIVE[: sizes[0]], "negative": NEGATIVE[: sizes[1]]}
        vector = train(sets, layers=1, aggregator=case.make())
        sides = [read_activations(tiny.shared("llama"), tiny.tokenizer(), sets[side], layers=1) for side in sets]
        assert_directions(vector, aggregate_activations(sides[0], sides[1], case.make()))
        assert case.of_sets_by_hand is not None
        expected = case.of_sets_by_hand(sides[0][1].double(), sides[1][1].double()).float()
        torch.testing.assert_close(vector.layer_activations[1], expected, atol=2e-3, rtol=2e-3)

    def test_of_sets_of_one_size_are_not_those_of_pairs(self) -> None:
        pairs = list(zip(POSITIVE, NEGATIVE, strict=False))
        vectors = [
            train(samples, layers=1, aggregator=logistic_aggregator())
            for samples in (pairs, {"positive": POSITIVE[:3], "negative": NEGATIVE})
        ]
        assert vectors[0].cosine_similarity(vectors[1])[1] < 0.999

    def test_steered_are_read_steered(self) -> None:
        with SteeringVector({0: torch.ones(tiny.HIDDEN)}).apply(tiny.shared("llama"), operator=lambda a, d: -a):
            assert not any(map(float, train(SETS, layers=0).norms().values()))


class TestPrompts:
    def test_may_be_chats_token_ids_and_arrays(self) -> None:
        plain = train(SETS)
        for make in (
            lambda texts: [ids_of(text) for text in texts],
            lambda texts: [tiny.tokenizer()(text, return_tensors="pt") for text in texts],
            np.array,
            tuple,
        ):
            vector = train({side: make(texts) for side, texts in SETS.items()})
            assert_directions(vector, plain.layer_activations)
        chats = {side: [[{"role": "user", "content": text}] for text in texts] for side, texts in SETS.items()}
        tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
        vector = train_steering_vector(tiny.shared("llama"), tokenizer, chats, layers=1)
        rows = [read_activations(tiny.shared("llama"), tokenizer, chats[side], layers=1)[1] for side in chats]
        torch.testing.assert_close(vector.layer_activations[1], rows[0].mean(dim=0) - rows[1].mean(dim=0))

    def test_are_read_where_pairs_are(self) -> None:
        model = tiny.shared("llama")
        assert_directions(train(SETS, read_token_index=0), by_hand(model, read=lambda rows: rows[0]))
        assert_directions(
            train(SETS, read_token_index=lambda text: len(text) // 2),
            by_hand(model, read=lambda rows: rows[len(rows) // 2]),
        )
        assert_directions(train(SETS, tokens=from_index(1)), by_hand(model, read=lambda rows: rows[1:].mean(dim=0)))

    @pytest.mark.parametrize("window", [1, 2, 3])
    @pytest.mark.parametrize("sides", [(iter, iter), (list, iter)], ids=str)
    def test_of_iterators_are_taken_in_windows_of_both_sides(
        self, window: int, sides: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(walk, "WINDOW", window)
        model = tiny.build("llama")
        taken = {"positive": 0, "negative": 0}
        taken_at_pass: list[dict[str, int]] = []
        model.register_forward_hook(lambda _m, _a, _o: taken_at_pass.append(dict(taken)))

        def stream(side: str) -> Iterator[str]:
            for text in SETS[side]:
                taken[side] += 1
                yield text

        given = {side: make(stream(side)) for side, make in zip(SETS, sides, strict=True)}
        assert_directions(train_steering_vector(model, tiny.tokenizer(), given), by_hand(model))
        assert taken == {"positive": 5, "negative": 3}
        assert min(counts["negative"] for counts in taken_at_pass) <= window

    @pytest.mark.parametrize("sized", [True, False])
    def test_move_the_progress_bar_one_by_one(self, sized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        bars: list[Any] = []

        class Bar:
            def __init__(self, **options: Any) -> None:
                self.options, self.moved = options, 0
                bars.append(self)

            def __enter__(self) -> "Bar":
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, count: int) -> None:
                self.moved += count

        monkeypatch.setattr(walk, "progress_bar", Bar)
        train({side: texts if sized else iter(texts) for side, texts in SETS.items()}, show_progress=True)
        assert (bars[0].options["total"], bars[0].options["unit"], bars[0].moved) == (8 if sized else None, "prompt", 8)


class TestMetadata:
    def test_has_the_sizes_of_both_sets_and_hashes_that_tell_them_apart(self) -> None:
        metadata = train(SETS).metadata
        assert metadata["samples"] == "5 + 3"
        assert (
            metadata["samples_hash"]
            == train({side: iter(texts) for side, texts in SETS.items()}).metadata["samples_hash"]
        )
        moved = train({"positive": POSITIVE[:4], "negative": [*NEGATIVE, POSITIVE[4]]}).metadata
        assert (moved["samples"], moved["samples_hash"]) != (metadata["samples"], metadata["samples_hash"])
        assert "[mean_aggregator() of 5 + 3 samples" in (2 * train(SETS)).metadata["derivation"]

    def test_does_not_depend_on_the_window(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = train(SETS).metadata
        monkeypatch.setattr(walk, "WINDOW", 2)
        assert train(SETS).metadata == expected


class Watched:
    """A model that counts its passes."""

    def __init__(self) -> None:
        self.model, self.passes = tiny.build("llama"), 0
        self.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1


class Table:
    columns = ("text",)

    def to_dict(self, orient: str) -> Any:
        raise AssertionError(orient)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


SINGLE_PAIR = "training_samples is a single pair: put it in a list, [{…}]; sets have a list on each side"


class TestMistakes:
    @pytest.mark.parametrize("function", [train_steering_vector, extract_activations])
    @pytest.mark.parametrize(
        ("samples", "message"),
        [
            ({"positive": "I love", "negative": "I hate"}, SINGLE_PAIR),
            ({"positive": chat("a"), "negative": chat("b")}, SINGLE_PAIR),
            ({"positive": [1, 2], "negative": torch.tensor([1, 3, 4])}, SINGLE_PAIR),
            ({"positive": {"input_ids": [1]}, "negative": {"input_ids": [2]}}, SINGLE_PAIR),
            ({"positive": POSITIVE, "negative": "I hate"}, "the negative side of training_samples is a single prompt"),
            ({"positive": chat("a"), "negative": [chat("b")]}, "the positive side of training_samples is a single"),
            (
                {"good": [], "bad": []},
                "a mapping with the keys ['bad', 'good'], expected the keys positive and negative",
            ),
            ({"positive": ["a"]}, "a mapping with the keys ['positive'], expected the keys positive and negative"),
            ({**SETS, "neutral": ["a"]}, "expected the keys positive and negative"),
            (
                {"positive": ["a"], "negative": Table()},
                "the negative side of training_samples is a table: pass the column",
            ),
            ({"positive": 3, "negative": ["a"]}, "the positive side of training_samples must be prompts, got int"),
        ],
    )
    def test_of_another_form(self, function: Any, samples: Any, message: str) -> None:
        watched = Watched()
        with pytest.raises(TypeError, match=re.escape(message)):
            function(watched.model, tiny.tokenizer(), samples)
        assert watched.passes == 0

    @pytest.mark.parametrize("make", [list, iter], ids=str)
    @pytest.mark.parametrize("side", ["positive", "negative"])
    def test_an_empty_side(self, side: str, make: Any) -> None:
        watched = Watched()
        samples = {**SETS, side: []}
        with pytest.raises(ValueError, match=f"the {side} side of training_samples is empty: give at least one prompt"):
            train_steering_vector(watched.model, tiny.tokenizer(), {name: make(of) for name, of in samples.items()})
        assert watched.passes == 0

    def test_two_empty_sides(self) -> None:
        with pytest.raises(ValueError, match="training_samples is empty: give at least one positive and one negative"):
            train({"positive": [], "negative": iter(())})

    @pytest.mark.parametrize("prompt", ["", 3, float("nan"), {"role": "user", "content": "a"}], ids=str)
    def test_a_prompt_names_its_side_and_number(self, prompt: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="^negative prompt 2: "):
            train({"positive": ["a"], "negative": ["b", "c", prompt]})

    def test_a_set_of_chats_beside_one_of_texts(self) -> None:
        with pytest.raises(TypeError, match="training_samples has a chat on one side and a text on the other"):
            train({"positive": [chat("a")], "negative": ["b"]})

    @pytest.mark.parametrize(
        "aggregator", [pca_aggregator(), lambda p, n: (p - n).mean(dim=0)], ids=["pca", "callable"]
    )
    def test_an_aggregator_that_needs_pairs(self, aggregator: Any) -> None:
        watched = Watched()
        message = (
            f"{re.escape(repr(aggregator))} needs pairs, in which row i of one side .* but got two sets: give pairs"
        )
        with pytest.raises(ValueError, match=message):
            train_steering_vector(watched.model, tiny.tokenizer(), SETS, aggregator=aggregator)
        assert watched.passes == 0
        with pytest.raises(ValueError, match=message):
            aggregate_activations({0: torch.ones(3, 2)}, {0: torch.zeros(3, 2)}, aggregator)

    def test_sets_for_extract_activations(self) -> None:
        with pytest.raises(TypeError, match=r"extract_activations takes pairs: call read_activations for .* each set"):
            extract_activations(tiny.shared("llama"), tiny.tokenizer(), SETS)

    def test_a_completion_of_texts(self) -> None:
        with pytest.raises(ValueError, match="^positive prompt 0: .* which only a chat shows"):
            train(SETS, tokens=completion())

    def test_sides_that_read_the_same_are_warned_of(self) -> None:
        samples = {"positive": ["I love", "I see"], "negative": ["I hate", "I do", "I go"]}
        message = (
            "zeros: both sides read the same. Of the first positive and the first negative prompt, 'I' and 'I' were"
        )
        with pytest.warns(UserWarning, match=message) as found:
            train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), samples, read_token_index=0)
        assert found[0].filename == __file__


class TestAggregators:
    @pytest.mark.parametrize("name", families.TAKE_SETS)
    @settings(deadline=None, max_examples=15)
    @given(order=st.permutations([("positive", n) for n in range(6)] + [("negative", n) for n in range(4)]))
    @pytest.mark.parametrize("merged", [False, True])
    def test_take_the_rows_of_sets_in_any_order_and_partition(self, name: str, merged: bool, order: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = {
            "positive": torch.randn(6, 5, generator=generator) + 1,
            "negative": torch.randn(4, 5, generator=generator),
        }
        aggregator: Any = families.AGGREGATORS[name].make()
        parts = [accumulator_for(aggregator, 5, paired=False) for _ in range(2 if merged else 1)]
        for n, (side, number) in enumerate(order):
            parts[n % len(parts)].add(rows[side][number : number + 1], side, [number])
        for other in parts[1:]:
            parts[0].merge(other)
        expected = aggregator.of_sets(rows["positive"], rows["negative"]).float()
        torch.testing.assert_close(parts[0].direction(), expected, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("name", families.TAKE_SETS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_compute_narrow_sets_widely(self, name: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        positive, negative = (torch.randn(n, 5, generator=generator).to(dtype) for n in (7, 4))
        aggregator: Any = families.AGGREGATORS[name].make()
        direction = aggregator.of_sets(positive, negative)
        assert torch.promote_types(direction.dtype, torch.float32) == direction.dtype
        wide = aggregator.of_sets(positive.double(), negative.double())
        torch.testing.assert_close(direction.double(), wide.double(), atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("name", families.TAKE_SETS)
    @pytest.mark.parametrize("shapes", [((0, 4), (3, 4)), ((3, 4), (0, 4)), ((3, 4), (3, 1)), ((3, 4), (4,))], ids=str)
    def test_refuse_sets_without_rows_or_of_two_widths(self, name: str, shapes: Any) -> None:
        aggregator: Any = families.AGGREGATORS[name].make()
        with pytest.raises(
            ValueError, match=r"must be \(n, hidden\) and \(m, hidden\), at least one on each side, got"
        ):
            aggregator.of_sets(*map(torch.rand, shapes))

    @pytest.mark.parametrize(
        "aggregator", [mean_aggregator(), geometric_median_aggregator(), winsorized_aggregator(0.2)]
    )
    def test_of_sides_alone_have_the_same_direction_of_pairs_and_of_sets(self, aggregator: Any) -> None:
        positive, negative = (torch.randn(9, 5, generator=torch.Generator().manual_seed(n)) for n in range(2))
        assert torch.equal(aggregator(positive, negative), aggregator.of_sets(positive, negative))

    def test_a_logistic_direction_of_equal_rows_is_refused(self) -> None:
        aggregator: Any = logistic_aggregator()
        with pytest.raises(ValueError, match="all rows of the two sets are the same"):
            aggregator.of_sets(torch.full((3, 4), 0.1), torch.full((2, 4), 0.1))

    def test_a_logistic_direction_does_not_depend_on_what_all_rows_share(self) -> None:
        aggregator: Any = logistic_aggregator()
        positive, negative = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)).double() for n in (9, 5))
        torch.testing.assert_close(
            aggregator.of_sets(positive + 1000, negative + 1000), aggregator.of_sets(positive, negative)
        )

    def test_a_function_takes_sets_by_its_attribute(self) -> None:
        def medians(positive: Tensor, negative: Tensor) -> Tensor:
            return positive.median(dim=0).values - negative.median(dim=0).values

        medians.of_sets = medians  # type: ignore[attr-defined]
        vector = train(SETS, layers=1, aggregator=medians)
        sides = [read_activations(tiny.shared("llama"), tiny.tokenizer(), SETS[side], layers=1)[1] for side in SETS]
        torch.testing.assert_close(vector.layer_activations[1], medians(*sides), atol=1e-5, rtol=1e-5)


class TestAggregateActivations:
    def test_takes_tensors_of_any_sizes(self) -> None:
        positive, negative = torch.randn(5, 4), torch.randn(2, 4)
        found = aggregate_activations({3: positive, 0: positive}, {0: negative, 3: negative})
        for direction in found.values():
            torch.testing.assert_close(direction, positive.mean(dim=0) - negative.mean(dim=0))
        assert list(found) == [3, 0]

    @pytest.mark.parametrize(
        ("positive", "negative", "message"),
        [
            (torch.ones(2, 4), [torch.ones(2, 4)], "layer 0 has a list on one side and a tensor on the other"),
            (torch.ones(2, 4), torch.ones(2, 1), r"layer 0: rows of both sides must have one width, got \(2, 4\) and"),
            (torch.ones(0, 4), torch.ones(2, 4), "layer 0 has no rows"),
            (
                torch.ones(2, 2, 4),
                torch.ones(2, 2, 4),
                r"must have a list of tensors \(n, hidden\), or one such tensor",
            ),
            ([torch.ones(2, 4)], [torch.ones(3, 4)], "lists of tensors are pairs; for two sets, give one tensor each"),
        ],
    )
    def test_refuses_sides_that_do_not_fit(self, positive: Any, negative: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            aggregate_activations({0: positive}, {0: negative})
