"""Selectors made of selectors, against plain Python over rows of weights."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors import (
    CombinableSelector,
    SteeringVector,
    TokenPositions,
    after,
    at,
    completion,
    extract_activations,
    from_index,
    generated,
    prompted,
    select,
    train_steering_vector,
)
from steering_vectors._tokens import goes_by_row_or_end, may_need_prompt_length, needs_row_ids
from tests import tiny
from tests.test_token_selection import Pass, passes, small, whole_rows

fast = settings(max_examples=60, deadline=None)
weights = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])


def of_rows(rows: list[list[float]]) -> CombinableSelector:
    """A selector that returns these weights."""
    return select(lambda positions: torch.tensor(rows))


@st.composite
def two_of_one_shape(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]]]:
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    row = st.lists(weights, min_size=seq, max_size=seq)
    rows = st.lists(row, min_size=batch, max_size=batch)
    return draw(rows), draw(rows)


class TestMasks:
    @given(passes(), small, st.lists(small, min_size=1, max_size=4))
    @fast
    def test_combine_as_sets_of_own_tokens(self, tokens: Pass, n: int, indices: list[int]) -> None:
        positions, one, other = tokens.positions(), from_index(n), at(indices)
        assert (one & other)(positions).tolist() == tokens.chosen(lambda _, i, __: i >= n and i in indices)
        assert (one | other)(positions).tolist() == tokens.chosen(lambda _, i, __: i >= n or i in indices)
        assert (~one)(positions).tolist() == tokens.chosen(lambda _, i, __: 0 <= i < n)

    @given(passes(), st.integers(1, 9))
    @fast
    def test_the_others_of_generated_are_the_prompt(self, tokens: Pass, length: int) -> None:
        positions = tokens.positions()
        assert torch.equal((~generated(length))(positions), prompted(length)(positions))
        assert torch.equal((~~generated(length))(positions), generated(length)(positions))

    @pytest.mark.parametrize(
        "other",
        [[0, 3], slice(0, 4, 3), torch.tensor([1, 0, 0, 1]), lambda positions: positions.index % 3 == 0, at([0, 3])],
        ids=["list", "slice", "mask", "function", "selector"],
    )
    def test_combine_with_all_that_selects_tokens_on_either_side(self, other: Any) -> None:
        positions = whole_rows(2, 5).positions()
        for combined, expected in (
            (from_index(2) & other, [3]),
            (other & from_index(2), [3]),
            (from_index(2) | other, [0, 2, 3, 4]),
            (other | from_index(2), [0, 2, 3, 4]),
            (select(other) | [2], [0, 2, 3]),
            (~select(other), [1, 2, 4]),
        ):
            assert combined(positions).nonzero()[:, 1].tolist() == 2 * expected

    def test_stay_masks(self) -> None:
        combined = (at(0) | ~from_index(2)) & select([1]) | generated(3)
        assert combined(whole_rows(1, 4).positions()).dtype is torch.bool


class TestWeights:
    @given(two_of_one_shape())
    @fast
    def test_both_is_the_product_and_either_the_one_farther_from_0(
        self, pair: tuple[list[list[float]], list[list[float]]]
    ) -> None:
        one, other = map(of_rows, pair)
        positions = whole_rows(len(pair[0]), len(pair[0][0])).positions()
        for row, (first, second) in enumerate(zip(*pair, strict=True)):
            assert (one & other)(positions)[row].tolist() == [a * b for a, b in zip(first, second, strict=True)]
            expected = [max(a, b, key=abs) for a, b in zip(first, second, strict=True)]
            assert (one | other)(positions)[row].tolist() == expected

    @given(passes(), small, weights)
    @fast
    def test_with_masks_keep_the_weights_of_what_is_selected(self, tokens: Pass, n: int, weight: float) -> None:
        positions = tokens.positions()
        for scaled in (weight * from_index(n), from_index(n) * weight):
            assert scaled(positions).tolist() == [[weight * (i >= n and i >= 0) for i in line] for line in tokens.index]
            assert (scaled & [1, 2])(positions).tolist() == [
                [weight * (i >= n and i in (1, 2)) for i in line] for line in tokens.index
            ]
            # Also a negative weight stays beside tokens that the other doesn't select.
            disjoint = scaled | select(lambda p: p.index == n - 1) if n else scaled
            expected = [
                [weight if i >= n and i >= 0 else float(i == n - 1 >= 0) for i in line] for line in tokens.index
            ]
            assert disjoint(positions).tolist() == (expected if n else scaled(positions).tolist())

    def test_the_others_of_weights_are_what_is_left_to_1(self) -> None:
        tokens = Pass([[-1, 0, 1, 2]], 0)
        assert (~(0.25 * from_index(1)))(tokens.positions()).tolist() == [[0, 1, 0.75, 0.75]]

    @pytest.mark.parametrize("weight", [-0.5, 1.5])
    def test_the_others_of_weights_outside_0_to_1_are_refused(self, weight: float) -> None:
        with pytest.raises(ValueError, match="~ means 1 - w for weights w from 0 to 1, but the selector"):
            (~(weight * from_index(1)))(whole_rows(1, 3).positions())

    @pytest.mark.parametrize(
        "number", [2, np.float32(2), np.int64(2), torch.tensor(2.0)], ids=lambda n: type(n).__name__
    )
    def test_are_scaled_by_any_number(self, number: Any) -> None:
        positions = whole_rows(1, 2).positions()
        assert (number * at(1))(positions).tolist() == (at(1) * number)(positions).tolist() == [[0, 2]]

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_are_not_scaled_by_what_is_not_finite(self, number: float) -> None:
        with pytest.raises(ValueError, match="the factor of a selector must be finite"):
            number * at(1)

    @pytest.mark.parametrize("factor", ["2", True, None, [2], at(0)], ids=repr)
    def test_are_not_scaled_by_what_is_no_number(self, factor: Any) -> None:
        with pytest.raises(TypeError, match="the factor of a selector must be a number"):
            at(1) * factor

    def test_of_either_are_learned_from_0_on_both_sides(self) -> None:
        one, other = (torch.zeros((), requires_grad=True) for _ in range(2))
        combined = select(lambda p: one * (p.index >= 0)) | (lambda p: other * (p.index >= 1))
        combined(whole_rows(1, 3).positions()).sum().backward()
        assert one.grad is not None
        assert other.grad is not None
        assert (float(one.grad), float(other.grad)) == (3, 2)


class TestStrength:
    @given(passes(), st.integers(1, 9))
    @fast
    def test_is_by_the_step_from_the_prompt_s_last_token(self, tokens: Pass, length: int) -> None:
        positions = tokens.positions()
        fading = generated(length, strength=lambda step: 0.5**step)
        expected = [[0.5 ** (i - length + 1) if i >= length - 1 else 0 for i in line] for line in tokens.index]
        assert fading(positions).tolist() == expected
        first_three = generated(length, strength=lambda step: step < 3)
        assert first_three(positions).tolist() == tokens.chosen(lambda _, i, __: length - 1 <= i < length + 2)

    def test_is_learned_though_it_would_be_infinite_before_the_prompt_s_end(self) -> None:
        rate = torch.tensor(0.5, requires_grad=True)
        weights = generated(299, strength=lambda step: rate**step)(whole_rows(1, 300).positions())
        assert weights[0, -2:].tolist() == [1, 0.5]
        weights.sum().backward()
        assert rate.grad is not None
        assert float(rate.grad) == 1

    @pytest.mark.parametrize(
        ("strength", "got"), [(lambda step: 0.5, "float"), (lambda step: torch.ones(3), r"shape \(3,\)")]
    )
    def test_of_another_shape_is_refused(self, strength: Any, got: str) -> None:
        with pytest.raises(TypeError, match=f"a weight for each of the steps .* = \\(2, 4\\), as .* it returned {got}"):
            generated(2, strength=strength)(whole_rows(2, 4).positions())

    @pytest.mark.parametrize("strength", [0.5, lambda: 1, "0.8"])
    def test_that_takes_no_steps_is_refused(self, strength: Any) -> None:
        with pytest.raises(TypeError, match="the strength must be callable"):
            generated(2, strength=strength)

    def test_without_inputs_counts_from_the_first_pass(self) -> None:
        positions = whole_rows(1, 4).positions(prompt_length=torch.tensor([2]))
        assert generated(strength=lambda step: step + 1.0)(positions).tolist() == [[0, 1, 2, 3]]


def every_other(positions: TokenPositions) -> Tensor:
    return positions.index % 2 == 0


class TestWhatTheySayOfThemselves:
    @pytest.mark.parametrize(
        ("selector", "rows", "by_row_or_end", "prompt", "ids"),
        [
            (at(0) | from_index(1), 1, False, False, False),
            (at(0) & generated(), 1, False, True, False),
            (0.5 * from_index([1, 2]), 2, True, False, False),
            (from_index([1, 2]) | prompted([1, 2, 3]), 6, True, False, False),
            (~select([0, -1]), 1, True, False, False),
            (at(0) | every_other, None, None, True, False),
            (from_index([1, 2]) | every_other, 2, True, True, False),
            (completion() & ~after(3), 1, False, True, True),
            (select(every_other), None, None, True, False),
        ],
        ids=repr,
    )
    def test_is_what_their_parts_say(
        self, selector: Any, rows: int | None, by_row_or_end: bool | None, prompt: bool, ids: bool
    ) -> None:
        assert selector.rows == rows
        assert goes_by_row_or_end(selector) is by_row_or_end
        assert may_need_prompt_length(selector) is prompt
        assert needs_row_ids(selector) is ids

    def test_lets_a_part_of_a_text_be_read_though_a_function_might_need_the_prompt(self) -> None:
        pairs = [("one text", "another one"), ("a third", "the last")]
        read = [
            train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), pairs, layers=1, tokens=tokens)
            for tokens in (from_index(1) & every_other, lambda p: (p.index >= 1) & (p.index % 2 == 0))
        ]
        assert read[0] == read[1]

    def test_lets_training_go_through_or_not(self) -> None:
        model, pairs = tiny.build("llama"), [("one text", "another one"), ("a third", "the last")]
        vector = SteeringVector({0: torch.ones(tiny.HIDDEN)})
        with vector.apply(model, tokens=at(0) | from_index(3)):
            expected = extract_activations(model, tiny.tokenizer(), pairs, layers=1)
        with vector.apply(model, tokens=select([0]) | slice(3, None)):
            got = extract_activations(model, tiny.tokenizer(), pairs, layers=1)
        torch.testing.assert_close(got[0][1], expected[0][1])
        with (
            vector.apply(model, tokens=at(0) | from_index([1, 2])),
            pytest.raises(ValueError, match="steered row by row or from a row's end"),
        ):
            extract_activations(model, tiny.tokenizer(), pairs, layers=1)

    @pytest.mark.parametrize(
        ("selector", "shown"),
        [
            (at(0) | ~from_index(2), "at([0]) | ~from_index(2)"),
            ((at(0) | at(1)) & ~(at(2) & at(3)), "(at([0]) | at([1])) & ~(at([2]) & at([3]))"),
            (0.5 * (at(0) | at(1)), "0.5 * (at([0]) | at([1]))"),
            (~(0.5 * at(0)), "~(0.5 * at([0]))"),
            (0.5 * ~at(0), "0.5 * ~at([0])"),
            (2 * (2 * at(0)) & at(1), "2 * 2 * at([0]) & at([1])"),
            (select([0, 1]) | generated(5), "select([0, 1]) | generated([5])"),
            ([0, 1] & generated(5), "[0, 1] & generated([5])"),
            (select(every_other) & every_other, "select(every_other) & every_other"),
            (generated(5, strength=torch.exp), "generated([5], strength=exp)"),
            (after(5), "after(5)"),
            (after([5, 6], until=7), "after([5, 6], until=7)"),
        ],
        ids=str,
    )
    def test_is_shown_as_the_calls_that_make_them(self, selector: Any, shown: str) -> None:
        assert repr(selector) == shown
        assert selector == copy.deepcopy(selector) == pickle.loads(pickle.dumps(selector))

    @pytest.mark.parametrize("other", [1, True, None, "text", 2.5], ids=repr)
    def test_excludes_what_is_no_selection(self, other: Any) -> None:
        for combine in (lambda: at(0) | other, lambda: other | at(0), lambda: at(0) & other, lambda: other & at(0)):
            with pytest.raises(TypeError, match=r"combines a selector with another one, a list, a slice, a mask or"):
                combine()

    @pytest.mark.parametrize("selector", [generated, generated(2) | at([0])], ids=["made", "not made"])
    def test_a_selector_that_was_not_called_is_refused(self, selector: Any) -> None:
        if selector is generated:
            with pytest.raises(TypeError, match="generated"):
                at(0) | selector

    def test_select_returns_what_combines_already_as_it_is(self) -> None:
        selector = at(0)
        assert select(selector) is selector


class TestRows:
    def test_of_masks_are_repeated_for_beams(self) -> None:
        combined = select(torch.tensor([[True, False], [False, True]])) | from_index([5, 1])
        assert combined(whole_rows(4, 2).positions()).tolist() == [[True, False]] * 2 + [[False, True]] * 2
