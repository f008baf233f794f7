"""Token indices from a pass's arguments, against rows counted by hand."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors._models.axes import along_tokens, by_tokens
from steering_vectors._passes.arguments import cached_columns, merge_arguments, pass_arguments
from steering_vectors._passes.positions import Past, locate

fast = settings(max_examples=120, deadline=None)


class Cache:
    """A cache that tells its length, by a number or, as static ones do, by a tensor; or raises."""

    def __init__(self, length: int | Tensor | Exception) -> None:
        self.length = length

    def get_seq_length(self) -> int | Tensor:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length


@dataclass(frozen=True)
class Rows:
    """Padded rows ``mask[row][column]``, of which the columns from ``past`` on are one pass's."""

    mask: list[list[int]]
    past: int

    @property
    def batch(self) -> int:
        return len(self.mask)

    @property
    def seq(self) -> int:
        return len(self.mask[0]) - self.past

    @property
    def index(self) -> list[list[int]]:
        counted = [[sum(row[:column]) if row[column] else -1 for column in range(len(row))] for row in self.mask]
        return [row[self.past :] for row in counted]

    @property
    def column(self) -> list[int]:
        return list(range(self.past, self.past + self.seq))

    @property
    def input_ids(self) -> Tensor:
        return torch.ones(self.batch, self.seq, dtype=torch.int64)

    def position_ids(self, on_padding: int) -> Tensor:
        return torch.tensor([[i if i >= 0 else on_padding for i in row] for row in self.index])

    def query_mask(self, keys: int, *, unattended: str = "nothing", window: int = 99) -> Tensor:
        """``(batch, 1, seq, keys)``, bool: which keys each query sees; padding sees nothing, or "everything"."""
        visible = [
            [
                [key <= query and key > query - window and key < len(row) and row[key] == 1 for key in range(keys)]
                for query in self.column
            ]
            for row in self.mask
        ]
        mask = torch.tensor(visible)
        if unattended == "everything":
            mask |= ~mask.any(dim=-1, keepdim=True)
        return mask[:, None]

    def check(self, arguments: dict[str, Any], fed: Tensor | None = None, fed_columns: int = 0) -> None:
        call = pass_arguments(arguments)
        columns = fed_columns if call.cached is None else call.cached
        located = locate(call, Past(columns, fed))
        index, column = located.index, located.column
        assert index.tolist() == self.index
        assert column.tolist() == self.column
        assert index.dtype == column.dtype == torch.int64
        assert not located.several_texts


@st.composite
def rows(draw: st.DrawFn, sides: tuple[str, ...] = ("left", "right", "none")) -> Rows:
    """Prompts padded on a side, then a few columns of answer, cut anywhere in a cached part and a pass."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    answer = draw(st.integers(0, 4))
    side = draw(st.sampled_from(sides))
    width = max(lengths)
    if side == "none":
        lengths = [width] * len(lengths)
    prompts = [[0] * (width - n) + [1] * n if side == "left" else [1] * n + [0] * (width - n) for n in lengths]
    mask = [row + [1] * answer for row in prompts]
    return Rows(mask, draw(st.integers(0, width + answer - 1)))


@st.composite
def any_rows(draw: st.DrawFn) -> Rows:
    """Padding anywhere, also in the midst."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    line = st.lists(st.integers(0, 1), min_size=width, max_size=width)
    return Rows(draw(st.lists(line, min_size=batch, max_size=batch)), draw(st.integers(0, width - 1)))


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


as_bool_or_additive = st.sampled_from([lambda mask: mask, additive, lambda mask: additive(mask, torch.bfloat16)])


class TestTokenIndex:
    @given(any_rows(), st.sampled_from([torch.int64, torch.bool, torch.float32]), st.booleans())
    @fast
    def test_a_mask_of_all_columns_tells_wherever_padding_stands(
        self, tokens: Rows, dtype: torch.dtype, static: bool
    ) -> None:
        length: int | Tensor = torch.tensor(tokens.past) if static else tokens.past
        mask = torch.tensor(tokens.mask).to(dtype)
        tokens.check({"input_ids": tokens.input_ids, "attention_mask": mask, "cache": Cache(length)})

    @given(any_rows(), st.integers(0, 3))
    @fast
    def test_a_mask_may_reach_beyond_the_pass(self, tokens: Rows, beyond: int) -> None:
        mask = torch.tensor([[*row, *[0] * beyond] for row in tokens.mask])
        tokens.check({"input_ids": tokens.input_ids, "attention_mask": mask, "cache": Cache(tokens.past)})

    @given(any_rows())
    @fast
    def test_the_mask_tells_more_than_position_ids(self, tokens: Rows) -> None:
        wrong = torch.full((tokens.batch, tokens.seq), 7)
        mask = torch.tensor(tokens.mask)
        arguments = {"input_ids": tokens.input_ids, "attention_mask": mask, "position_ids": wrong}
        tokens.check({**arguments, "past_key_values": Cache(tokens.past)})

    @given(any_rows())
    @fast
    def test_without_a_cache_a_pass_is_a_whole_row(self, tokens: Rows) -> None:
        whole = Rows(tokens.mask, 0)
        whole.check({"input_ids": whole.input_ids, "attention_mask": torch.tensor(whole.mask)})

    @given(
        rows(),
        st.sampled_from([0, 1]),
        st.integers(0, 6),
        as_bool_or_additive,
        st.booleans(),
        st.sampled_from(["nothing", "everything"]),
    )
    @fast
    def test_under_a_query_mask_position_ids_tell_and_the_mask_says_what_is_padding(
        self, tokens: Rows, on_padding: int, spare: int, kind: Any, static: bool, unattended: str
    ) -> None:
        keys = tokens.past + tokens.seq + spare
        length: int | Tensor = torch.tensor(tokens.past) if static else tokens.past
        arguments = {
            "input_ids": tokens.input_ids,
            "attention_mask": kind(tokens.query_mask(keys, unattended=unattended)),
            "position_ids": tokens.position_ids(on_padding),
            "cache": Cache(length),
        }
        tokens.check(arguments)

    @given(rows(), st.integers(0, 6), as_bool_or_additive, st.sampled_from(["nothing", "everything"]), st.booleans())
    @fast
    def test_a_query_mask_alone_tells_where_nothing_else_does(
        self, tokens: Rows, spare: int, kind: Any, unattended: str, static: bool
    ) -> None:
        keys = tokens.past + tokens.seq + spare
        length: int | Tensor = torch.tensor(tokens.past) if static else tokens.past
        mask = kind(tokens.query_mask(keys, unattended=unattended))
        tokens.check({"input_ids": tokens.input_ids, "attention_mask": mask, "cache": Cache(length)})

    @given(rows(), st.integers(2, 4), as_bool_or_additive)
    @fast
    def test_of_masks_by_kind_of_layer_full_attention_tells(self, tokens: Rows, window: int, kind: Any) -> None:
        keys = tokens.past + tokens.seq
        masks = {
            "chunked_attention": kind(tokens.query_mask(keys, window=window)),
            "sliding_attention": kind(tokens.query_mask(keys, window=window)),
            "linear_attention": None,
            "full_attention": kind(tokens.query_mask(keys)),
        }
        tokens.check({"input_ids": tokens.input_ids, "attention_mask": masks, "cache": Cache(tokens.past)})

    @given(rows(sides=("none",)), st.booleans())
    @fast
    def test_with_the_cache_s_length_alone_all_are_tokens(self, tokens: Rows, embeds: bool) -> None:
        given_tokens = {"inputs_embeds": torch.ones(tokens.batch, tokens.seq, 4)}
        arguments: dict[str, Any] = given_tokens if embeds else {"input_ids": tokens.input_ids}
        tokens.check({**arguments, "cache": Cache(tokens.past)})
        tokens.check({**arguments, "cache": Cache(tokens.past), "position_ids": tokens.position_ids(0)})
        tokens.check({**arguments, "cache": Cache(tokens.past), "position_ids": tokens.position_ids(0)[:1]})

    @given(rows())
    @fast
    def test_where_a_cache_does_not_tell_what_was_fed_into_it_counts(self, tokens: Rows) -> None:
        mask = torch.tensor(tokens.mask)
        fed = mask[:, : tokens.past] == 1
        arguments = {"input_ids": tokens.input_ids, "cache_params": Cache(NotImplementedError())}
        tokens.check({**arguments, "attention_mask": mask}, fed, tokens.past)
        tokens.check({**arguments, "attention_mask": mask[:, tokens.past :]}, fed, tokens.past)

    @given(rows())
    @fast
    def test_columns_that_the_caller_gave_win_over_the_cache_s_length(self, tokens: Rows) -> None:
        columns = torch.arange(tokens.past, tokens.past + tokens.seq)
        miscounted = torch.tensor(max(0, tokens.past - 1))
        arguments = {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.query_mask(12),
            "position_ids": tokens.position_ids(1),
            "cache": Cache(miscounted),
        }
        tokens.check({**arguments, "cache_position": columns})

    def test_a_window_s_cache_holds_fewer_keys_than_there_are_columns(self) -> None:
        tokens = Rows([[1] * 9, [1] * 9], past=8)
        for newest in (True, False):  # the window may be kept as a ring, with its newest key anywhere
            mask = torch.tensor([True, True, True, newest]).expand(2, 1, 1, 4)
            arguments = {"input_ids": tokens.input_ids, "attention_mask": mask, "position_ids": tokens.position_ids(0)}
            tokens.check({**arguments, "cache": Cache(8)})

    @given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 6), as_bool_or_additive, st.booleans())
    @fast
    def test_tokens_that_see_what_follows_them_are_counted_in_their_order(
        self, batch: int, seq: int, seeing: int, kind: Any, told: bool
    ) -> None:
        tokens = Rows([[1] * seq] * batch, past=0)
        mask = tokens.query_mask(seq)
        mask[..., :seeing, :seeing] = True  # images, and the prompts of prefix language models
        arguments = {"input_ids": tokens.input_ids, "attention_mask": kind(mask)}
        tokens.check({**arguments, **({"position_ids": tokens.position_ids(0)} if told else {})})

    def test_a_row_of_one_mask_serves_the_whole_batch(self) -> None:
        tokens = Rows([[0, 1, 1], [0, 1, 1]], past=0)
        tokens.check({"input_ids": tokens.input_ids, "attention_mask": torch.tensor([[0, 1, 1]])})
        one = {"attention_mask": tokens.query_mask(3)[:1], "position_ids": tokens.position_ids(1)[:1]}
        tokens.check({"input_ids": tokens.input_ids, **one})


class TestPassArguments:
    ids = torch.ones(2, 3, dtype=torch.int64)

    def test_a_decoder_beside_an_encoder_has_names_of_its_own(self) -> None:
        call = pass_arguments(
            {
                "input_ids": torch.ones(2, 9),
                "attention_mask": torch.ones(2, 9),
                "decoder_input_ids": self.ids,
                "decoder_attention_mask": torch.tensor([[0, 1, 1]]),
            }
        )
        assert call.input_ids is self.ids
        assert call.mask is not None
        assert call.mask.tolist() == [[0, 1, 1]]

    @pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params", "state", "layer_past"])
    def test_a_cache_is_found_under_each_of_its_names(self, name: str) -> None:
        cache = Cache(4)
        call = pass_arguments({"input_ids": self.ids, name: cache})
        assert call.cache is cache
        assert call.cached == 4

    @pytest.mark.parametrize(("use_cache", "keeps"), [(True, True), (False, False), (None, False)])
    def test_a_cache_is_kept_only_where_the_caller_gave_one_or_asked_for_it(
        self, use_cache: bool | None, keeps: bool
    ) -> None:
        assert pass_arguments({"input_ids": self.ids, "use_cache": use_cache}).keeps_cache is keeps
        assert pass_arguments({"input_ids": self.ids, "use_cache": use_cache, "cache": Cache(0)}).keeps_cache

    def test_embeddings_tell_the_shape_before_ids(self) -> None:
        call = pass_arguments({"input_ids": self.ids, "inputs_embeds": torch.ones(2, 7, 4)})
        assert call.shape == (2, 7)

    def test_what_says_nothing_has_no_shape(self) -> None:
        assert pass_arguments({}).shape is None
        assert pass_arguments({"input_ids": None, "pixel_values": torch.ones(1)}).shape is None

    def test_a_static_length_is_noted_before_the_pass_changes_it(self) -> None:
        length = torch.tensor(3)
        call = pass_arguments({"input_ids": self.ids, "cache": Cache(length)})
        length.add_(1)
        assert isinstance(call.cached, Tensor)
        assert call.cached.item() == 3

    @pytest.mark.parametrize("error", [NotImplementedError(), ValueError("no"), TypeError("no"), AttributeError("no")])
    def test_a_cache_that_raises_does_not_tell(self, error: Exception) -> None:
        assert cached_columns(Cache(error)) is None

    def test_tuples_of_keys_and_values_tell_their_length_and_lists_of_states_do_not(self) -> None:
        keys = torch.ones(2, 4, 5, 8)
        assert cached_columns(((keys, keys), (keys, keys))) == 5
        assert cached_columns([torch.ones(2, 8), torch.ones(2, 8)]) is None
        assert cached_columns(None) == 0


class TestMergedArguments:
    ids, embeds = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, 4)

    def test_the_innermost_module_says_what_the_shape_is(self) -> None:
        longer = torch.ones(2, 8, 4)
        outer, inner = pass_arguments({"input_ids": self.ids}), pass_arguments({"inputs_embeds": longer})
        merged = merge_arguments([outer, inner])
        assert merged is not None
        assert merged.shape == (2, 8)
        assert merged.input_ids is None

    def test_what_the_innermost_lacks_comes_from_further_out(self) -> None:
        mask = torch.ones(2, 3)
        outer = pass_arguments({"input_ids": self.ids, "attention_mask": mask, "use_cache": True})
        inner = pass_arguments({"inputs_embeds": self.embeds, "position_ids": torch.ones(3, 2, 3)})
        merged = merge_arguments([outer, inner])
        assert merged is not None
        assert merged.input_ids is self.ids
        assert merged.mask is mask
        assert merged.position_ids is None  # three dimensions: no token indices
        assert merged.keeps_cache

    def test_a_cache_that_one_module_was_given_is_the_pass_s(self) -> None:
        cache = Cache(5)
        outer = pass_arguments({"input_ids": self.ids, "use_cache": True})
        inner = pass_arguments({"inputs_embeds": self.embeds, "cache": cache})
        merged = merge_arguments([outer, inner])
        assert merged is not None
        assert merged.cache is cache
        assert merged.cached == 5

    def test_what_the_caller_left_open_stays_open(self) -> None:
        outer = pass_arguments({"input_ids": self.ids})
        inner = pass_arguments({"inputs_embeds": self.embeds, "cache": Cache(0), "use_cache": True})
        merged = merge_arguments([outer, inner])
        assert merged is not None
        assert merged.cache is inner.cache
        assert not merged.keeps_cache

    def test_without_any_shape_there_is_nothing(self) -> None:
        assert merge_arguments([]) is None
        assert merge_arguments([pass_arguments({}), pass_arguments({"attention_mask": torch.ones(2, 3)})]) is None


class TestAxesOfTokens:
    """Which axes of an activation are the batch and the sequence."""

    def check(self, activation: Tensor, place: Any, batch: int, seq: int) -> None:
        """``place(row, token)`` indexes what belongs to a token; all else must stay."""
        weights = torch.arange(batch * seq).reshape(batch, seq).float()
        along = along_tokens(weights[..., None], activation).expand_as(activation)
        seen = torch.zeros_like(activation, dtype=torch.bool)
        for row in range(batch):
            for token in range(seq):
                assert (along[place(row, token)] == weights[row, token]).all()
                seen[place(row, token)] = True
        assert seen.all()

    @given(st.integers(1, 4), st.integers(1, 4))
    @settings(max_examples=30, deadline=None)
    def test_batch_before_sequence(self, batch: int, seq: int) -> None:
        self.check(torch.zeros(batch, seq, 5), lambda b, s: (b, s), batch, seq)
        self.check(torch.zeros(batch * seq, 5), lambda b, s: b * seq + s, batch, seq)

    def test_sequence_before_batch(self) -> None:
        self.check(torch.zeros(3, 2, 5), lambda b, s: (s, b), 2, 3)

    def test_parallel_streams_before_or_after(self) -> None:
        self.check(torch.zeros(2, 3, 4, 5), lambda b, s: (b, s), 2, 3)
        self.check(torch.zeros(4, 2, 3, 5), lambda b, s: (slice(None), b, s), 2, 3)

    @pytest.mark.parametrize("shape", [(2, 4, 5), (1, 3, 5), (2, 2, 3, 5), (2, 3, 3, 5), (5,), (12, 5)])
    def test_what_can_not_be_told_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(
            ValueError, match=r"can't find the tokens of a pass of 2 rows and 3 columns in an activation"
        ):
            along_tokens(torch.ones(2, 3, 1), torch.zeros(shape))

    def test_rows_are_read_from_the_same_axes(self) -> None:
        activation = torch.randn(2, 3, 5)
        assert torch.equal(by_tokens(activation, 2, 3), activation)
        assert torch.equal(by_tokens(activation.reshape(6, 5), 2, 3), activation)
        assert torch.equal(by_tokens(activation.transpose(0, 1), 2, 3), activation)
        with pytest.raises(ValueError, match=r"can't find the tokens of a pass of 2 rows and 3 columns"):
            by_tokens(torch.zeros(2, 3, 4, 5), 2, 3)
