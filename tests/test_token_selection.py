"""Selectors over token positions, against plain Python over rows of numbers."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BatchEncoding

from steering_vectors import (
    Selector,
    SteeringVector,
    TokenPositions,
    after,
    at,
    completion,
    extract_activations,
    from_index,
    generated,
    prompted,
)
from steering_vectors._models import expand_rows
from steering_vectors._steering.token_indices import one_selection
from steering_vectors._tokens import as_selector, selected
from tests import tiny

fast = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Pass:
    """The last columns of some padded rows, by hand: ``index[row][column]``, −1 on padding."""

    index: list[list[int]]
    first_column: int

    @property
    def batch(self) -> int:
        return len(self.index)

    @property
    def seq(self) -> int:
        return len(self.index[0])

    def positions(self, **known: Any) -> TokenPositions:
        column = torch.arange(self.first_column, self.first_column + self.seq)
        return TokenPositions(index=torch.tensor(self.index), column=column, **known)

    def chosen(self, is_chosen: Callable[[int, int, int], bool]) -> list[list[bool]]:
        """``is_chosen(row, index, place in the pass)`` for each token and padding."""
        return [[is_chosen(row, i, place) for place, i in enumerate(line)] for row, line in enumerate(self.index)]


@st.composite
def passes(draw: st.DrawFn, batch: int | None = None, max_past: int = 5) -> Pass:
    """A pass after cached columns, with padding anywhere."""
    rows = draw(st.integers(1, 4)) if batch is None else batch
    past, seq = draw(st.integers(0, max_past)), draw(st.integers(1, 8))
    index = []
    for _ in range(rows):
        counted, line = 0, []
        for is_token in draw(st.lists(st.booleans(), min_size=past + seq, max_size=past + seq)):
            line.append(counted if is_token else -1)
            counted += is_token
        index.append(line[past:])
    return Pass(index, past)


def whole_rows(batch: int, seq: int) -> Pass:
    return Pass([list(range(seq)) for _ in range(batch)], 0)


small = st.integers(0, 9)


class TestShippedSelectors:
    @given(passes(), small)
    @fast
    def test_from_index_is_the_own_tokens_from_there_on(self, tokens: Pass, n: int) -> None:
        expected = tokens.chosen(lambda row, i, place: i >= n and i != -1)
        assert from_index(n)(tokens.positions()).tolist() == expected

    @given(passes(), st.lists(small, min_size=1, max_size=4))
    @fast
    def test_at_is_the_own_tokens_in_the_list(self, tokens: Pass, indices: list[int]) -> None:
        expected = tokens.chosen(lambda row, i, place: i in indices)
        assert at(indices)(tokens.positions()).tolist() == expected

    def test_at_takes_one_number_too(self) -> None:
        tokens = whole_rows(2, 4)
        assert torch.equal(at(2)(tokens.positions()), at([2])(tokens.positions()))

    @given(st.data())
    @fast
    def test_numbers_per_row_serve_the_rows_that_each_was_expanded_to(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        copies = data.draw(st.integers(1, 3))
        tokens = data.draw(passes(batch=len(numbers) * copies))
        per_row = [n for n in numbers for _ in range(copies)]
        positions = tokens.positions()
        assert from_index(numbers)(positions).tolist() == tokens.chosen(lambda row, i, _: i >= per_row[row])
        assert generated(numbers)(positions).tolist() == tokens.chosen(lambda row, i, _: i >= per_row[row] - 1)
        assert prompted(numbers)(positions).tolist() == tokens.chosen(lambda row, i, _: 0 <= i < per_row[row] - 1)

    @given(passes(), st.integers(1, 9))
    @fast
    def test_prompted_is_the_exact_complement_of_generated_on_own_tokens(self, tokens: Pass, length: int) -> None:
        positions = tokens.positions()
        both = torch.stack([generated(length)(positions), prompted(length)(positions)])
        assert torch.equal(both.sum(dim=0) == 1, positions.index >= 0)
        assert int(both.sum(dim=0).max()) <= 1

    @given(passes(), st.integers(1, 9))
    @fast
    def test_without_inputs_the_known_prompt_length_counts(self, tokens: Pass, length: int) -> None:
        known = tokens.positions(prompt_length=torch.full((tokens.batch,), length))
        assert torch.equal(generated()(known), generated(length)(known))
        assert torch.equal(prompted()(known), prompted(length)(known))
        assert completion()(known).tolist() == tokens.chosen(lambda row, i, _: i >= length)

    @pytest.mark.parametrize("padding", ["left", "right"])
    @pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
    @pytest.mark.parametrize("dtype", ["int64", "bool", "float32"])
    def test_a_mapping_tells_lengths_by_its_attention_mask(
        self, padding: str, kind: Callable[[Any], Any], dtype: str
    ) -> None:
        rows = [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
        if padding == "right":
            rows = [row[::-1] for row in rows]
        mask = kind(np.array(rows).astype(dtype).tolist())
        tokens = whole_rows(2, 7)
        expected = generated([3, 4])(tokens.positions())
        for inputs in ({"attention_mask": mask}, BatchEncoding({"attention_mask": mask})):
            assert torch.equal(generated(inputs)(tokens.positions()), expected)

    def test_one_number_serves_every_row(self) -> None:
        tokens = whole_rows(3, 5)
        assert torch.equal(generated(2)(tokens.positions()), generated([2, 2, 2])(tokens.positions()))
        assert torch.equal(generated(np.int64(2))(tokens.positions()), generated(2)(tokens.positions()))
        assert torch.equal(from_index(np.int64(2))(tokens.positions()), from_index(2)(tokens.positions()))

    @pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
    def test_numbers_may_come_in_arrays(self, kind: Callable[[Any], Any]) -> None:
        assert from_index(kind([1, 2])) == from_index([1, 2])
        assert at(kind([1, 2])) == at([1, 2])

    def test_rows_that_are_no_multiple_are_refused(self) -> None:
        for selector in (from_index([1, 2]), generated([1, 2]), as_selector(torch.ones(2, 4))):
            with pytest.raises(ValueError, match=r"given for 2 rows, but the model runs a batch of 3, .*multiple"):
                selector(whole_rows(3, 4).positions())

    @pytest.mark.parametrize("selector", [generated(), prompted(), completion()], ids=repr)
    def test_where_the_prompt_is_unknown_inputs_are_asked_for(self, selector: Selector) -> None:
        with pytest.raises(ValueError, match=r"can't tell where the prompt ends .*(generated|prompted)\(inputs\)"):
            selector(whole_rows(1, 3).positions())

    @pytest.mark.parametrize(
        ("selector", "shown"),
        [
            (from_index(1), "from_index(1)"),
            (from_index([1, 2]), "from_index([1, 2])"),
            (at(3), "at([3])"),
            (at([3, 1]), "at([3, 1])"),
            (generated(), "generated()"),
            (generated(4), "generated([4])"),
            (prompted([4, 5]), "prompted([4, 5])"),
            (completion(), "completion()"),
        ],
    )
    def test_selectors_are_values_that_show_how_they_were_made(self, selector: Selector, shown: str) -> None:
        assert repr(selector) == shown
        assert selector == copy.deepcopy(selector) == pickle.loads(pickle.dumps(selector))

    def test_selectors_of_the_same_prompts_are_equal(self) -> None:
        assert generated(PROMPTS) == generated(copy.deepcopy(PROMPTS))
        assert generated(PROMPTS) != prompted(PROMPTS)
        assert repr(generated(PROMPTS)) == "generated([3, 5])"

    def test_the_repr_of_many_prompts_is_short(self) -> None:
        assert repr(generated([3] * 100)) == "generated(100 prompts)"

    @given(passes())
    @fast
    def test_selectors_do_not_change_positions(self, tokens: Pass) -> None:
        positions = tokens.positions(prompt_length=torch.ones(tokens.batch, dtype=torch.int64))
        before = copy.deepcopy((positions.index, positions.column, positions.prompt_length))
        for selection in (from_index(1), at([0]), generated(), prompted(), completion(), [0, -1], slice(1, -1)):
            as_selector(selection)(positions)
        after = (positions.index, positions.column, positions.prompt_length)
        assert [t.tolist() for t in after if t is not None] == [t.tolist() for t in before if t is not None]


class TestListsAndSlices:
    bound = st.none() | st.integers(-10, 10)

    @given(st.integers(1, 8), bound, bound, st.none() | st.integers(1, 3))
    @settings(max_examples=300, deadline=None)
    def test_a_slice_over_whole_rows_is_python_s(
        self, seq: int, start: int | None, stop: int | None, step: int | None
    ) -> None:
        wanted = slice(start, stop, step)
        expected = list(range(seq))[wanted]
        mask = as_selector(wanted)(whole_rows(2, seq).positions())
        assert [row.nonzero().flatten().tolist() for row in mask] == [expected, expected]

    @given(st.integers(1, 8), st.lists(st.integers(-8, 8), max_size=4))
    @fast
    def test_a_list_over_whole_rows_is_python_s(self, seq: int, numbers: list[int]) -> None:
        row = list(range(seq))
        expected = sorted({row[n] for n in numbers if -seq <= n < seq})
        mask = as_selector(numbers)(whole_rows(2, seq).positions())
        assert [line.nonzero().flatten().tolist() for line in mask] == [expected, expected]

    @given(passes(), st.none() | small, st.none() | small, st.none() | st.integers(1, 3))
    @fast
    def test_a_slice_counts_own_tokens_over_padding_and_cache(
        self, tokens: Pass, start: int | None, stop: int | None, step: int | None
    ) -> None:
        wanted = range(100)[slice(start, stop, step)]
        expected = tokens.chosen(lambda row, i, place: i in wanted)
        assert as_selector(slice(start, stop, step))(tokens.positions()).tolist() == expected

    @given(passes(), st.lists(small, max_size=4))
    @fast
    def test_a_list_counts_own_tokens_over_padding_and_cache(self, tokens: Pass, numbers: list[int]) -> None:
        expected = tokens.chosen(lambda row, i, place: i in numbers)
        assert as_selector(numbers)(tokens.positions()).tolist() == expected

    @given(passes(), st.integers(-9, -1))
    @fast
    def test_negative_numbers_count_the_columns_of_the_pass_from_its_end(self, tokens: Pass, n: int) -> None:
        columns = list(range(tokens.seq))
        from_there = tokens.chosen(lambda row, i, place: place in columns[n:])
        assert as_selector(slice(n, None))(tokens.positions()).tolist() == from_there
        selector = one_selection(n, None, None)
        assert selector is not None
        assert selector(tokens.positions()).tolist() == from_there
        only_there = tokens.chosen(lambda row, i, place: place == tokens.seq + n)
        assert as_selector([n])(tokens.positions()).tolist() == only_there

    def test_numpy_numbers_and_ranges_are_taken(self) -> None:
        positions = whole_rows(1, 5).positions()
        for numbers in ([np.int64(1), 3], (1, 3), range(1, 4, 2)):
            assert as_selector(numbers)(positions).tolist() == [[False, True, False, True, False]]


class TestMasks:
    @given(st.data())
    @fast
    def test_a_mask_is_by_column_and_nothing_beyond_it_is_selected(self, data: st.DataObject) -> None:
        tokens = data.draw(passes())
        width = data.draw(st.integers(1, 14))
        row = st.lists(st.integers(0, 1), min_size=width, max_size=width)
        rows = data.draw(st.lists(row, min_size=tokens.batch, max_size=tokens.batch))

        def expected(row: int, i: int, place: int) -> bool:
            column = tokens.first_column + place
            return column < width and rows[row][column] == 1

        assert as_selector(torch.tensor(rows))(tokens.positions()).tolist() == tokens.chosen(expected)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
    def test_a_mask_of_one_row_serves_all_in_any_dtype(self, dtype: torch.dtype) -> None:
        mask = torch.tensor([1, 0, 1]).to(dtype)
        for given_mask in (mask, mask[None]):
            chosen = as_selector(given_mask)(whole_rows(3, 5).positions())
            assert chosen.dtype is torch.bool
            assert chosen.tolist() == [[True, False, True, False, False]] * 3

    def test_rows_of_a_mask_serve_the_rows_that_each_was_expanded_to(self) -> None:
        chosen = as_selector(torch.tensor([[1, 0], [0, 1]]))(whole_rows(4, 2).positions())
        assert chosen.int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]

    def test_a_mask_is_read_when_it_is_given(self) -> None:
        mask = torch.tensor([1, 0])
        selector = as_selector(mask)
        mask.zero_()
        assert selector(whole_rows(1, 2).positions()).tolist() == [[True, False]]

    @pytest.mark.parametrize("selection", [[1, -1], slice(1, None, 2)], ids=repr)
    def test_lists_and_slices_are_shown_as_they_were_given(self, selection: Any) -> None:
        assert eval(repr(as_selector(selection))) == selection

    def test_the_repr_tells_the_shape(self) -> None:
        assert repr(as_selector(torch.ones(2, 5))) == "mask of shape (2, 5)"

    @pytest.mark.parametrize("shape", [(), (1, 2, 3), (0,), (2, 0)])
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"a mask of tokens must have the shape \(seq,\) or \(batch, seq\), got "):
            as_selector(torch.ones(shape))

    @pytest.mark.parametrize("values", [[0, 2], [3, 5], [0.0, 0.5], [-1, 1], [1.0, float("nan")]])
    def test_other_numbers_than_0_and_1_are_refused(self, values: list[float]) -> None:
        with pytest.raises(ValueError, match=r"a mask of tokens must hold only 0 and 1; to select .* pass a list"):
            as_selector(torch.tensor(values))


class DeviceReads(TorchDispatchMode):
    """Counts the operations for which the host waits until a device has the answer."""

    waiting = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.waiting
        return func(*args, **(kwargs or {}))


PROMPTS = {
    "input_ids": torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}


def at_work(input_ids: Tensor, **known: Any) -> TokenPositions:
    batch, seq = input_ids.shape
    index = torch.arange(seq).expand(batch, seq)
    return TokenPositions(index, torch.arange(seq), input_ids=input_ids, **{"begins_sequence": True, **known})


class TestLeftOver:
    """``generated(inputs)`` of another prompt is told by one comparison, where a sequence begins."""

    selectors = pytest.mark.parametrize("make", [generated, prompted])

    @selectors
    @pytest.mark.parametrize(
        ("row", "column", "is_error"),
        [(0, 2, True), (0, 4, True), (1, 0, True), (0, 0, False), (0, 1, False)],
        ids=["token", "last token", "other row", "padding", "padding too"],
    )
    def test_another_token_is_an_error_and_other_padding_is_none(
        self, make: Callable[[Any], Selector], row: int, column: int, is_error: bool
    ) -> None:
        ids = PROMPTS["input_ids"].clone()
        ids[row, column] = 99
        if is_error:
            with pytest.raises(ValueError, match=rf"{make.__name__}\(inputs\) was made for another prompt"):
                make(PROMPTS)(at_work(ids))
        else:
            make(PROMPTS)(at_work(ids))

    @selectors
    def test_the_pass_may_hold_a_first_piece_or_more_than_the_prompt(self, make: Callable[[Any], Selector]) -> None:
        ids = PROMPTS["input_ids"]
        make(PROMPTS)(at_work(ids[:, :3]))
        make(PROMPTS)(at_work(torch.cat([ids, torch.tensor([[50], [51]])], dim=1)))

    @selectors
    def test_beams_hold_each_prompt_several_times(self, make: Callable[[Any], Selector]) -> None:
        ids = PROMPTS["input_ids"]
        make(PROMPTS)(at_work(ids.repeat_interleave(3, dim=0)))
        with pytest.raises(ValueError, match="another prompt"):
            make(PROMPTS)(at_work(ids.repeat(3, 1)))

    @selectors
    def test_a_pass_that_continues_is_not_compared(self, make: Callable[[Any], Selector]) -> None:
        with DeviceReads() as reads:
            make(PROMPTS)(at_work(torch.full((2, 5), 99), begins_sequence=False))
        assert reads.count == 0

    @selectors
    def test_one_device_read_where_a_sequence_begins(self, make: Callable[[Any], Selector]) -> None:
        selector = make(PROMPTS)
        with DeviceReads() as reads:
            selector(at_work(PROMPTS["input_ids"]))
        assert reads.count == 1

    @selectors
    @pytest.mark.parametrize("inputs", [{"attention_mask": PROMPTS["attention_mask"]}, [3, 5], 4])
    def test_lengths_alone_are_not_compared(self, make: Callable[[Any], Selector], inputs: Any) -> None:
        selector = make(inputs)
        with DeviceReads() as reads:
            selector(at_work(torch.full((2, 5), 99)))
        assert reads.count == 0

    def test_embeddings_are_not_compared(self) -> None:
        tokens = whole_rows(2, 5)
        generated(PROMPTS)(tokens.positions(begins_sequence=True))

    @pytest.mark.parametrize(
        "selection",
        [
            *(from_index(1), from_index([1, 2]), at([0]), [1, -1], slice(1, -1), torch.tensor([1, 0])),
            *(after([22, 23], until=24), ~at(0) & from_index([1, 2]) | [1]),
            generated(3, strength=lambda step: 0.5**step),
        ],
        ids=repr,
    )
    def test_no_other_selection_reads_the_device(self, selection: Any) -> None:
        selector = as_selector(selection)
        with DeviceReads() as reads:
            selector(at_work(PROMPTS["input_ids"], row_ids=PROMPTS["input_ids"]))
        assert reads.count == 0


class TestRefusals:
    @pytest.mark.parametrize("make", [generated, prompted])
    def test_a_bare_tensor_is_refused_as_ids_and_masks_look_alike(self, make: Callable[[Any], Selector]) -> None:
        for tensor in (torch.tensor([[1, 2]]), torch.tensor([3, 4])):
            with pytest.raises(
                TypeError, match=r"got a bare tensor, which may be token ids or a mask: pass .* mapping"
            ):
                make(tensor)

    def test_a_mapping_without_attention_mask_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"needs an attention_mask in inputs.*got \['input_ids'\].*lengths"):
            generated({"input_ids": torch.tensor([[1, 2]])})

    @pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
    def test_rows_of_several_lengths_are_refused(self, name: str) -> None:
        inputs = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]], name: [[1, 1], [1]]}
        with pytest.raises(
            ValueError, match=r"inputs must hold tensors, or lists of rows of one length: .*padding=True"
        ):
            generated(inputs)

    @pytest.mark.parametrize("lengths", [0, [3, 0], [], [-1]])
    def test_prompts_without_tokens_are_refused(self, lengths: Any) -> None:
        with pytest.raises(ValueError, match=r"generated\(inputs\) needs prompts of at least one token, got lengths"):
            generated(lengths)

    def test_a_row_of_padding_only_is_refused(self) -> None:
        with pytest.raises(ValueError, match="needs prompts of at least one token"):
            generated({"attention_mask": torch.tensor([[1, 1], [0, 0]])})

    @pytest.mark.parametrize("inputs", ["Hello", b"Hello", 1.5, object(), np.array([3, 4])])
    def test_other_things_are_refused(self, inputs: Any) -> None:
        with pytest.raises(
            TypeError, match=r"generated\(inputs\) takes a mapping with attention_mask, or the prompts'"
        ):
            generated(inputs)

    @pytest.mark.parametrize("make", [at, from_index])
    @pytest.mark.parametrize("numbers", [-1, [0, -2]])
    def test_negative_numbers_are_refused_by_at_and_from_index_which_name_generated(
        self, make: Callable[[Any], Selector], numbers: Any
    ) -> None:
        with pytest.raises(ValueError, match=rf"{make.__name__} counts a row's own tokens from 0.*generated\(inputs\)"):
            make(numbers)

    @pytest.mark.parametrize("make", [at, from_index])
    @pytest.mark.parametrize("numbers", [True, [True, False], 1.5, [1.5], "3", None, torch.tensor([[1, 2]])])
    def test_what_is_no_number_is_refused_by_name(self, make: Callable[[Any], Selector], numbers: Any) -> None:
        with pytest.raises(TypeError, match=make.__name__):
            make(numbers)

    @pytest.mark.parametrize("make", [at, from_index])
    def test_no_number_at_all_is_refused(self, make: Callable[[Any], Selector]) -> None:
        with pytest.raises(ValueError, match=f"{make.__name__} needs at least one token index"):
            make([])

    @pytest.mark.parametrize("numbers", [[True, False], [1.5], ["a"], [None]])
    def test_lists_of_other_things_are_refused(self, numbers: Any) -> None:
        with pytest.raises(TypeError, match="takes (whole numbers|token indices), got"):
            as_selector(numbers)

    @pytest.mark.parametrize("tokens", [3, "all", 1.5, {"a": 1}, object()])
    def test_what_is_no_selection_is_refused(self, tokens: Any) -> None:
        with pytest.raises(
            TypeError, match=r"tokens must be a selector such as generated\(inputs\), a list of token ind"
        ):
            as_selector(tokens)

    @pytest.mark.parametrize("step", [0, -1])
    def test_a_slice_runs_forward(self, step: int) -> None:
        with pytest.raises(ValueError, match="a slice of tokens needs a step of at least 1"):
            as_selector(slice(None, None, step))

    @pytest.mark.parametrize(
        "given_names",
        [("min_token_index", "tokens"), ("token_indices", "tokens"), ("min_token_index", "token_indices")],
    )
    def test_two_selections_at_once_are_refused(self, given_names: tuple[str, str]) -> None:
        values = {"min_token_index": 0, "token_indices": [1], "tokens": at(1)}
        arguments: dict[str, Any] = {name: values[name] if name in given_names else None for name in values}
        with pytest.raises(ValueError, match=f"{given_names[0]} and {given_names[1]} were given: choose one of them"):
            one_selection(**arguments)

    def test_no_selection_means_all_tokens(self) -> None:
        assert one_selection(None, None, None) is None

    def test_min_token_index_is_from_index(self) -> None:
        assert one_selection(2, None, None) == from_index(2)


class TestWeights:
    positions = whole_rows(2, 3).positions()

    def test_bool_and_float_pass_as_they_are_and_whole_numbers_become_float(self) -> None:
        for dtype in (torch.bool, torch.float32, torch.bfloat16, torch.float64):
            assert selected(lambda p: torch.ones(2, 3, dtype=dtype), self.positions).dtype is dtype  # noqa: B023
        whole = selected(lambda p: torch.full((2, 3), 2), self.positions)
        assert whole.dtype is torch.float32
        assert whole.tolist() == [[2.0] * 3] * 2

    def test_a_selector_that_gives_no_tensor_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"returned list, expected a tensor \(batch, seq\)"):
            selected(lambda p: p.index.tolist(), self.positions)

    @pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1), (2, 3, 1), ()])
    def test_a_selector_that_gives_another_shape_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"returned a tensor of shape .*, expected \(batch, seq\) = \(2, 3\)"):
            selected(lambda p: torch.ones(shape), self.positions)

    def test_a_selector_that_gives_complex_numbers_is_refused(self) -> None:
        with pytest.raises(TypeError, match="returned complex numbers, expected a mask or real weights"):
            selected(lambda p: torch.ones(2, 3, dtype=torch.complex64), self.positions)

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused(self, number: float) -> None:
        positions = TokenPositions(index=torch.arange(2)[None], column=torch.arange(2))
        with pytest.raises(ValueError, match="returned weights that are NaN or infinite"):
            selected(lambda _positions: torch.tensor([[1.0, number]]), positions)


@given(st.integers(1, 4), st.integers(1, 4))
@fast
def test_expanded_rows_stand_next_to_each_other(n: int, copies: int) -> None:
    rows = torch.arange(n)[:, None].expand(n, 3)
    expanded = expand_rows(rows, n * copies, "x")
    assert expanded.tolist() == [[i // copies] * 3 for i in range(n * copies)]


class EveryOther:
    """A user's own selector, which says of itself what it is."""

    rows = 1
    counts_from_end = needs_prompt_length = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        self.prompt_length = positions.prompt_length
        return positions.index % 2 == 0


def every_other(positions: TokenPositions) -> Tensor:
    return positions.index % 2 == 0


class TestWhatASelectorSaysOfItself:
    PAIRS: ClassVar = [("one text", "another one"), ("a third", "the last")]

    def test_training_goes_through_one_that_goes_by_index_alone(self) -> None:
        model, steering = tiny.build("llama"), SteeringVector({0: torch.ones(tiny.HIDDEN)})
        expected = []
        for texts in zip(*self.PAIRS, strict=True):
            for text in texts:
                with steering.apply(model, tokens=list(range(0, 40, 2))):
                    expected.append(tiny.hidden_states(model, tiny.tokenizer()(text)["input_ids"])[1][-1])
        with steering.apply(model, tokens=EveryOther()):
            positive, negative = extract_activations(model, tiny.tokenizer(), self.PAIRS, layers=1)
        torch.testing.assert_close(torch.cat([*positive[1], *negative[1]]), torch.stack(expected), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        "attributes",
        [{"rows": 2}, {"counts_from_end": True}, {"rows": None, "counts_from_end": True}],
        ids=str,
    )
    def test_training_is_refused_through_one_that_goes_by_rows_or_their_ends(self, attributes: dict[str, Any]) -> None:
        model, selector = tiny.build("llama"), EveryOther()
        for name, value in attributes.items():
            setattr(selector, name, value)
        with (
            SteeringVector({0: torch.ones(tiny.HIDDEN)}).apply(model, tokens=selector),
            pytest.raises(ValueError, match="steered row by row or from a row's end"),
        ):
            extract_activations(model, tiny.tokenizer(), self.PAIRS, layers=1)

    @pytest.mark.parametrize(
        ("selector", "is_selected"),
        [
            (every_other, lambda n, length: n % 2 == 0),
            (lambda positions: (positions.column > 1).expand_as(positions.index), lambda n, length: n > 1),
        ],
        ids=["by index", "by column"],
    )
    def test_training_runs_prompts_alone_through_one_that_says_nothing(
        self, selector: Selector, is_selected: Callable[[int, int], bool]
    ) -> None:
        model, expected = tiny.build("llama"), []
        for texts in zip(*[("ab", "longer than that"), ("a third one", "x")], strict=True):
            for text in texts:
                ids = tiny.tokenizer()(text)["input_ids"]
                mask = torch.tensor([is_selected(n, len(ids)) for n in range(len(ids))])

                def add(_m: Any, _a: Any, output: Any, mask: Tensor = mask) -> Any:
                    return (
                        output + mask[:, None]
                        if isinstance(output, Tensor)
                        else (output[0] + mask[:, None], *output[1:])
                    )

                handle = tiny.blocks(model)[0].register_forward_hook(add)
                expected.append(tiny.hidden_states(model, ids)[1][-1])
                handle.remove()
        with SteeringVector({0: torch.ones(tiny.HIDDEN)}).apply(model, tokens=selector):
            pairs = [("ab", "longer than that"), ("a third one", "x")]
            positive, negative = extract_activations(model, tiny.tokenizer(), pairs, layers=1, batch_size=2)
        torch.testing.assert_close(torch.cat([*positive[1], *negative[1]]), torch.stack(expected), atol=1e-5, rtol=1e-5)

    def test_training_is_refused_through_one_that_counts_from_the_end_without_saying_so(self) -> None:
        def last_three(positions: TokenPositions) -> Tensor:
            return (positions.column >= positions.column[-1] - 2).expand_as(positions.index)

        model = tiny.build("llama")
        with (
            SteeringVector({0: torch.ones(tiny.HIDDEN)}).apply(model, tokens=last_three),
            pytest.raises(ValueError, match="remove the steering whose selector counts from a row's end"),
        ):
            extract_activations(model, tiny.tokenizer(), self.PAIRS, layers=1)

    @pytest.mark.parametrize("needs", [True, False, None])
    def test_the_prompt_s_length_is_found_out_unless_it_says_that_it_never_looks(self, needs: bool | None) -> None:
        model, selector = tiny.build("llama"), EveryOther()
        if needs is None:
            selector = type("Silent", (), {"__call__": EveryOther.__call__})()
        else:
            selector.needs_prompt_length = needs
        ids = torch.tensor([[11, 12, 13]])
        with SteeringVector({0: torch.ones(tiny.HIDDEN)}).apply(model, tokens=selector), torch.no_grad():
            model(ids, use_cache=True)
        assert (selector.prompt_length is not None) == (needs is not False)

    def test_the_library_s_own_say_all_three(self) -> None:
        made = [from_index(1), from_index([1, 2]), at([1]), generated(3), generated(), prompted([1, 2]), completion()]
        made += [as_selector(given) for given in ([1, -1], slice(1, -1), torch.tensor([[True], [False]]))]
        said = [(s.rows, s.counts_from_end, s.needs_prompt_length) for s in made]  # type: ignore[attr-defined]
        no, yes = False, True
        assert said == [
            *[(1, no, no), (2, no, no), (1, no, no), (1, no, no), (1, no, yes), (2, no, no), (1, no, yes)],
            *[(1, yes, no), (1, yes, no), (2, no, no)],
        ]
