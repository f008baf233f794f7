"""What rows have said: their token ids so far, and selections that begin after a sequence of them."""

import gc
import inspect
import threading
import weakref
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    TokenPositions,
    after,
    at,
    extract_activations,
    record_activations,
    train_steering_vector,
)
from tests import tiny
from tests.families import is_after
from tests.test_laws import PROMPTS, padded

few = st.integers(3, 5)  # ids that come again
sequences = st.lists(few, min_size=1, max_size=3)


@st.composite
def rows_of_ids(draw: st.DrawFn) -> list[list[int]]:
    """Rows of one width, with -1 on padding anywhere."""
    width = draw(st.integers(1, 12))
    row = st.lists(st.one_of(few, few, few, st.just(-1)), min_size=width, max_size=width)
    return draw(st.lists(row, min_size=1, max_size=3))


def positions_of(rows: list[list[int]], seq: int) -> TokenPositions:
    ids = torch.tensor(rows)
    index = torch.where(ids >= 0, (ids >= 0).cumsum(dim=1) - 1, -1)[:, -seq:]
    column = torch.arange(ids.shape[1])[-seq:]
    return TokenPositions(index, column, input_ids=ids[:, -seq:].clamp(min=0), row_ids=ids)


class TestSelections:
    @given(rows_of_ids(), sequences, st.none() | sequences, st.integers(1, 12))
    @settings(max_examples=400, deadline=None)
    def test_are_those_of_a_plain_scan(
        self, rows: list[list[int]], opening: list[int], closing: list[int] | None, seq: int
    ) -> None:
        if opening == closing:
            return
        seq = min(seq, len(rows[0]))
        expected = []
        for row in rows:
            own = [token for token in row if token >= 0]
            places = [sum(token >= 0 for token in row[: n + 1]) - 1 for n in range(len(row))]
            scan = [
                token >= 0 and is_after(own, place, opening, closing) for token, place in zip(row, places, strict=True)
            ]
            expected.append(scan[-seq:])
        assert after(opening, until=closing)(positions_of(rows, seq)).tolist() == expected

    @given(st.lists(st.lists(few, min_size=1, max_size=5), min_size=1, max_size=4), sequences, st.none() | sequences)
    @settings(max_examples=200, deadline=None)
    def test_in_a_row_of_several_texts_are_those_of_each_alone(
        self, texts: list[list[int]], opening: list[int], closing: list[int] | None
    ) -> None:
        if opening == closing:
            return
        index = torch.tensor([[n for text in texts for n in range(len(text))]])
        ids = torch.tensor([[token for text in texts for token in text]])
        packed = TokenPositions(index, torch.arange(ids.shape[1]), several_texts=True, row_ids=ids)
        alone = [is_after(text, n, opening, closing) for text in texts for n in range(len(text))]
        assert after(opening, until=closing)(packed).tolist() == [alone]

    def test_begin_with_the_last_token_of_the_sequence_and_end_before_that_of_until(self) -> None:
        ids = [9, 1, 2, 9, 9, 3, 4, 9, 1, 2, 9]
        chosen = after([1, 2], until=[3, 4])(positions_of([ids], len(ids)))[0].nonzero().flatten()
        assert chosen.tolist() == [2, 3, 4, 5, 9, 10]

    def test_at_a_token_that_ends_both_go_by_the_longer_one(self) -> None:
        ids = [7, 8, 7, 7, 8, 8]
        assert after([7, 8], until=8)(positions_of([ids], 6))[0].tolist() == [False, True, True, True, True, False]
        assert after(7, until=[7, 7])(positions_of([ids], 6))[0].tolist() == [True, True, True, False, False, False]


class TestIds:
    @pytest.mark.parametrize("ids", [7, [7], (7,), torch.tensor(7), torch.tensor([7])], ids=repr)
    def test_come_alone_or_in_a_sequence(self, ids: Any) -> None:
        assert after(ids) == after(7)

    @pytest.mark.parametrize("ids", ["</think>", b"x", None])
    def test_are_asked_for_instead_of_texts(self, ids: Any) -> None:
        with pytest.raises(TypeError, match=r"after\(tokens\) takes token ids, got .* tokenizer.convert_tokens_to_ids"):
            after(ids)

    def test_of_until_too(self) -> None:
        with pytest.raises(TypeError, match=r"after\(…, until=…\) takes token ids, got '</s>'"):
            after(1, until="</s>")  # type: ignore[arg-type]

    @pytest.mark.parametrize("ids", [[], -1, [3, -1]], ids=repr)
    def test_are_numbers_from_0(self, ids: Any) -> None:
        with pytest.raises(ValueError, match="needs token ids, which are numbers from 0"):
            after(ids)

    def test_differ(self) -> None:
        with pytest.raises(ValueError, match=r"got the same ids for both, \[4\]"):
            after(4, until=[4])

    def test_must_be_asked_for(self) -> None:
        with pytest.raises(ValueError, match="must say needs_row_ids = True of itself"):
            after(4)(TokenPositions(torch.arange(2)[None], torch.arange(2)))


def vector() -> SteeringVector:
    return SteeringVector({1: torch.linspace(-2, 2, tiny.HIDDEN)})


def cache_of(output: Any) -> dict[str, Any]:
    name = next(name for name in ("cache", "cache_params", "past_key_values") if name in output)
    return {name: output[name]}


class TestWhereTheIdsCanNotBeKnown:
    def test_embeddings_are_refused(self) -> None:
        model = tiny.shared("llama")
        embeddings = model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
        with vector().apply(model, tokens=after(12)), pytest.raises(ValueError, match="but the model got embeddings"):
            model(inputs_embeds=embeddings)

    def test_a_cache_that_was_filled_before_is_refused(self) -> None:
        model = tiny.shared("llama")
        cache = cache_of(model(torch.tensor([PROMPTS[0]]), use_cache=True))
        with (
            vector().apply(model, tokens=after(12)),
            pytest.raises(ValueError, match="were put in while this steering wasn't attached"),
        ):
            model(torch.tensor([[9]]), **cache)

    def test_a_cache_that_another_model_filled_up_is_refused(self) -> None:
        model, other = tiny.shared("llama"), tiny.build("llama")
        if tiny.ON_TRANSFORMERS_4:
            pytest.skip("there the model makes tuples of tensors")
        with vector().apply(model, tokens=after(12)):
            cache = cache_of(model(torch.tensor([PROMPTS[0]]), use_cache=True))
            other(torch.tensor([[9]]), **cache)
            with pytest.raises(ValueError, match="were put in while this steering wasn't attached"):
                model(torch.tensor([[9]]), **cache)

    def test_a_static_cache_that_was_filled_before_is_refused_and_an_emptied_one_begins_anew(self) -> None:
        model, prompt = tiny.shared("llama"), torch.tensor([PROMPTS[0]])
        name = next(
            name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters
        )
        sizes = {"max_cache_len": 16, "max_batch_size": 1, "batch_size": 1, "device": "cpu", "dtype": torch.float32}
        known = inspect.signature(transformers.StaticCache.__init__).parameters
        cache = transformers.StaticCache(model.config, **{key: value for key, value in sizes.items() if key in known})
        columns = {} if not tiny.ON_TRANSFORMERS_4 else {"cache_position": torch.arange(5)}
        model(prompt, **{name: cache}, **columns)
        seen: list[Any] = []

        def note(positions: TokenPositions) -> Tensor:
            seen.append(positions.row_ids)
            return positions.index >= 0

        note.needs_row_ids = True  # type: ignore[attr-defined]
        columns = {} if not tiny.ON_TRANSFORMERS_4 else {"cache_position": torch.tensor([5])}
        with vector().apply(model, tokens=note):
            with pytest.raises(ValueError, match="were put in while this steering wasn't attached"):
                model(torch.tensor([[9]]), **{name: cache}, **columns)
            for ids in ([[21]], [[22, 23]]):
                cache.reset()
                columns = {} if not tiny.ON_TRANSFORMERS_4 else {"cache_position": torch.arange(len(ids[0]))}
                model(torch.tensor(ids), **{name: cache}, **columns)
                columns = {} if not tiny.ON_TRANSFORMERS_4 else {"cache_position": torch.tensor([len(ids[0])])}
                model(torch.tensor([[9]]), **{name: cache}, **columns)
                assert seen[-1].tolist() == [[*ids[0], 9]]

    def test_rows_that_can_not_be_recognized_are_refused(self) -> None:
        model = tiny.shared("llama")
        if tiny.ON_TRANSFORMERS_4:
            pytest.skip("there the model makes tuples of tensors")
        with vector().apply(model, tokens=after(22)):
            cache = cache_of(model(torch.tensor([PROMPTS[1], PROMPTS[1][::-1]]), use_cache=True))
            for layer in next(iter(cache.values())).layers:
                layer.keys = torch.randn_like(layer.keys)
            with pytest.raises(ValueError, match="rows of the cache were changed since its last pass"):
                model(torch.tensor([[9], [9]]), **cache, attention_mask=torch.ones(2, 9))


class TestWhatIsKept:
    def test_no_ids_unless_a_selector_asks_for_them(self) -> None:
        model, seen = tiny.shared("llama"), []

        def note(positions: TokenPositions) -> Tensor:
            seen.append(positions.row_ids)
            return positions.index >= 0

        with vector().apply(model, tokens=note):
            model.generate(**padded(PROMPTS), max_new_tokens=3, do_sample=False)
        assert seen == [None] * 3

    def test_nothing_of_a_cache_that_is_gone(self) -> None:
        model = tiny.shared("llama")
        if tiny.ON_TRANSFORMERS_4:
            pytest.skip("there the model makes tuples of tensors")
        with vector().apply(model, tokens=after(12)) as handle, torch.no_grad():
            output = model(torch.tensor([PROMPTS[0]]), use_cache=True)
            (note,) = handle._tracker._memory._notes.values()
            kept = weakref.ref(note.past.row_ids)
            assert kept().tolist() == [PROMPTS[0]]
            del output, note
            gc.collect()
            assert kept() is None


@pytest.mark.filterwarnings("ignore:layers .* are steered in a thread other:RuntimeWarning")
def test_threads_follow_the_rows_of_their_own_caches() -> None:
    model, alone, together = tiny.shared("llama"), {}, {}
    tokens = after([12, 13]) | after(22, until=25) | after(31)

    def run(number: int, results: dict[int, Tensor]) -> None:
        inputs = padded([PROMPTS[number]])
        results[number] = model.generate(**inputs, max_new_tokens=12, do_sample=False)

    for number in range(3):
        with vector().apply(model, tokens=tokens):
            run(number, alone)
    threads = [threading.Thread(target=run, args=(number, together)) for number in range(3)]
    with vector().apply(model, tokens=tokens):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {number: answer.tolist() for number, answer in together.items()} == {
        number: answer.tolist() for number, answer in alone.items()
    }


@pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="transformers 4.46 doesn't run packed texts on the CPU")
def test_packed_texts_are_steered_each_as_alone() -> None:
    model, texts = tiny.shared("llama"), [[12, 13, 5], [5, 12], [13, 5, 12, 13]]
    packed = {
        "input_ids": torch.tensor([[token for text in texts for token in text]]),
        "position_ids": torch.tensor([[n for text in texts for n in range(len(text))]]),
    }
    with vector().apply(model, tokens=after([12, 13]) | at(0)), record_activations(model, layers=1) as together:
        model(**packed, use_cache=False)
    rows = []
    for text in texts:
        with vector().apply(model, tokens=after([12, 13]) | at(0)), record_activations(model, layers=1) as one:
            model(torch.tensor([text]), use_cache=False)
        rows.append(one[1][0][0])
    torch.testing.assert_close(together[1][0][0], torch.cat(rows), atol=1e-5, rtol=1e-4)


class TestTraining:
    PAIRS = (("some text that is", "more text than that is"), ("a text", "longer text than a window"))

    def ids_of(self, word: str) -> list[int]:
        ids = tiny.tokenizer()(word, add_special_tokens=False)["input_ids"]
        assert ids
        return list(ids)

    def test_reads_the_mean_over_what_follows_a_sequence(self) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
        opening = self.ids_of("ext")
        rows = []
        for pair in self.PAIRS:
            means = []
            for text in pair:
                ids = list(tokenizer(text)["input_ids"])
                chosen = [n for n in range(len(ids)) if is_after(ids, n, opening)]
                means.append(tiny.hidden_states(model, ids)[1][chosen].mean(dim=0))
            rows.append(means[0] - means[1])
        read = train_steering_vector(model, tokenizer, [*self.PAIRS], layers=1, tokens=after(opening))
        torch.testing.assert_close(read.layer_activations[1], torch.stack(rows).mean(dim=0), atol=1e-5, rtol=1e-5)

    def test_runs_inside_such_a_steering(self) -> None:
        model, tokenizer, opening = tiny.build("llama"), tiny.tokenizer(), self.ids_of("ext")
        steering = SteeringVector({0: torch.ones(tiny.HIDDEN)})
        with steering.apply(model, tokens=after(opening)):
            got = extract_activations(model, tokenizer, [*self.PAIRS], layers=1, batch_size=2)
            expected = [
                [tiny.hidden_states(model, tokenizer(text)["input_ids"])[1][-1] for text in side]
                for side in zip(*self.PAIRS, strict=True)
            ]
        for side, rows in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.cat(list(side[1])), torch.stack(rows), atol=1e-5, rtol=1e-5)
