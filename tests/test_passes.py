"""Following passes: whose pass a thread is in, what it was given, and what is remembered of caches."""

import gc
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_vectors import TokenPositions
from steering_vectors._passes.tracker import Need, PassTracker


class Inner(nn.Module):
    """A decoder: calls ``during`` in the midst of its pass."""

    def __init__(self) -> None:
        super().__init__()
        self.during: Callable[[], None] = lambda: None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None, use_cache: bool | None = None
    ) -> Any:
        self.during()
        return {"hidden": input_ids, "cache": cache}


class Outer(nn.Module):
    """A model around it; ``before`` and ``after`` are called outside the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Inner()
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        self.before()
        output = self.decoder(input_ids, attention_mask, **kwargs)
        self.after()
        return output


class Cache:
    """A cache with or without a length; ``filled`` says of one without whether it holds tokens from elsewhere."""

    def __init__(self, length: Any = None, filled: bool = False) -> None:
        self.length = length
        self.filled = filled

    def has_previous_state(self) -> bool:
        if self.length is not None:
            raise ValueError
        return self.filled

    def get_seq_length(self) -> Any:
        if self.length is None:
            raise NotImplementedError
        return self.length


@contextmanager
def tracked(model: Outer, need: Need = Need.PROMPT_LENGTH) -> Generator[PassTracker, None, None]:
    tracker = PassTracker([model, model.decoder], need)
    tracker.start()
    try:
        yield tracker
    finally:
        tracker.stop()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def seen(model: Outer, tracker: PassTracker, *args: Any, **kwargs: Any) -> TokenPositions:
    """The positions in the midst of a pass."""
    found: list[TokenPositions] = []

    def look() -> None:
        assert tracker.current is not None
        found.append(tracker.current.positions)

    model.decoder.during = look
    model(*args, **kwargs)
    model.decoder.during = lambda: None
    return found[0]


def ids(batch: int, seq: int) -> Tensor:
    return torch.ones(batch, seq, dtype=torch.int64)


class TestWhichPass:
    def test_a_pass_lasts_from_its_outermost_module_to_its_end(self) -> None:
        model, states = Outer(), []
        with tracked(model) as tracker:
            model.before = model.after = model.decoder.during = lambda: states.append(tracker.current)
            assert tracker.current is None
            model(ids(1, 3))
            assert tracker.current is None
            model(ids(1, 3))
        assert states[0] is not None
        assert states[0] is states[1] is states[2]
        assert states[3] is not None
        assert states[3] is not states[0]

    def test_nested_modules_count_as_one_pass_and_the_inner_one_alone_as_one_too(self) -> None:
        model = Outer()
        with tracked(model) as tracker:
            model(ids(1, 3))
            assert tracker.completed == 1
            model.decoder(ids(1, 3))
            assert tracker.completed == 2
            assert tracker.current is None

    @pytest.mark.parametrize("place", ["before", "during", "after"])
    @pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
    def test_a_pass_that_raised_is_not_counted_and_the_next_one_is_seen_anew(
        self, place: str, error: BaseException
    ) -> None:
        model = Outer()

        def fail() -> None:
            raise error

        def reset() -> None:
            model.before = model.after = model.decoder.during = lambda: None

        with tracked(model) as tracker:
            setattr(model.decoder if place == "during" else model, place, fail)
            with pytest.raises(type(error)):
                model(ids(3, 7), attention_mask=torch.zeros(3, 7))
            assert tracker.completed == 0
            if isinstance(error, Exception):  # torch runs no hook after other errors
                assert tracker.current is None
            reset()
            assert seen(model, tracker, ids(1, 2)).index.tolist() == [[0, 1]]
            assert tracker.completed == 1
            assert tracker.current is None

    def test_positions_are_worked_out_once_for_a_pass(self) -> None:
        model, found = Outer(), []
        with tracked(model) as tracker:
            model.decoder.during = model.after = lambda: found.append(tracker.current and tracker.current.positions)
            model(ids(1, 3))
        assert found[0] is found[1]

    def test_two_threads_see_their_own_passes(self) -> None:
        model, barrier = Outer(), threading.Barrier(2, timeout=20)
        found: dict[int, list[tuple[int, ...]]] = {1: [], 2: []}
        errors: list[BaseException] = []

        with tracked(model) as tracker:

            def look() -> None:
                barrier.wait()  # both are in the midst of a pass
                assert tracker.current is not None
                found[threading.current_thread().batch].append(tuple(tracker.current.positions.index.shape))  # type: ignore[attr-defined]
                barrier.wait()

            model.decoder.during = look

            def work(batch: int) -> None:
                threading.current_thread().batch = batch  # type: ignore[attr-defined]
                try:
                    for seq in (2, 5, 3):
                        model(ids(batch, seq))
                except BaseException as error:
                    errors.append(error)
                    barrier.abort()

            threads = [threading.Thread(target=work, args=(batch,)) for batch in found]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=20)
            assert not errors
            assert tracker.completed == 6
        assert found == {batch: [(batch, 2), (batch, 5), (batch, 3)] for batch in found}


class TestPositions:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def test_arguments_count_by_position_and_by_name(self) -> None:
        model = Outer()
        with tracked(model) as tracker:
            by_place = seen(model, tracker, ids(2, 4), self.mask)
            by_name = seen(model, tracker, input_ids=ids(2, 4), attention_mask=self.mask)
        expected = [[-1, -1, 0, 1], [0, 1, 2, 3]]
        assert by_place.index.tolist() == by_name.index.tolist() == expected
        assert by_place.column.tolist() == [0, 1, 2, 3]

    def test_token_ids_are_passed_on(self) -> None:
        model, given_ids = Outer(), torch.tensor([[7, 8]])
        with tracked(model) as tracker:
            positions = seen(model, tracker, given_ids)
        assert positions.input_ids is not None
        assert torch.equal(positions.input_ids, given_ids)

    def test_a_pass_without_shape_is_an_error_that_names_the_model(self) -> None:
        model = Outer()
        with (
            tracked(model) as tracker,
            pytest.raises(ValueError, match="the token positions: Outer was called .* steer all tokens"),
        ):
            seen(model, tracker, torch.tensor(1.0))

    @pytest.mark.parametrize(
        ("cache", "begins"),
        [
            (None, True),
            (Cache(0), True),
            (Cache(3), False),
            (Cache(torch.tensor(0)), True),
            (Cache(torch.tensor(3)), False),
        ],
        ids=["none", "empty", "filled", "empty and static", "filled and static"],
    )
    def test_a_sequence_begins_where_nothing_is_cached(self, cache: Any, begins: bool) -> None:
        model = Outer()
        with tracked(model) as tracker:
            positions = seen(model, tracker, ids(1, 3), cache=cache)
        assert positions.begins_sequence is begins

    def test_a_step_over_a_static_cache_is_not_said_to_begin_a_sequence(self) -> None:
        model = Outer()
        with tracked(model) as tracker:
            assert not seen(model, tracker, ids(1, 1), cache=Cache(torch.tensor(0))).begins_sequence


class TestMemoryOfCaches:
    def test_what_was_fed_into_a_cache_that_does_not_tell_is_counted(self) -> None:
        model, cache, other = Outer(), Cache(), Cache()
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        with tracked(model) as tracker:
            assert seen(model, tracker, ids(2, 3), mask, cache=cache).index.tolist() == [[-1, 0, 1], [0, 1, 2]]
            cache.filled = True
            assert seen(model, tracker, ids(2, 1), cache=cache).index.tolist() == [[2], [3]]
            assert seen(model, tracker, ids(2, 1), cache=other).index.tolist() == [[0], [0]]
            later = seen(model, tracker, ids(2, 2), cache=cache)
            assert later.index.tolist() == [[3, 4], [4, 5]]
            assert later.column.tolist() == [4, 5]

    def test_what_another_fed_into_a_cache_without_a_length_is_counted_by_a_mask_or_refused(self) -> None:
        model, cache = Outer(), Cache(filled=True)
        with tracked(model) as tracker:
            with pytest.raises(
                ValueError, match="the Cache doesn't say how many tokens it holds, and some were put in"
            ):
                seen(model, tracker, ids(2, 1), torch.tensor([[1], [1]]), cache=cache)
            mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
            assert seen(model, tracker, ids(2, 1), mask, cache=cache).index.tolist() == [[2], [3]]
            assert seen(model, tracker, ids(2, 2), cache=cache).index.tolist() == [[3, 4], [4, 5]]

    def test_a_pass_that_raised_fed_nothing(self) -> None:
        model, cache = Outer(), Cache()

        def fail() -> None:
            raise RuntimeError

        with tracked(model) as tracker:
            seen(model, tracker, ids(1, 3), cache=cache)
            cache.filled = True
            model.decoder.during = fail
            with pytest.raises(RuntimeError):
                model(ids(1, 1), cache=cache)
            assert seen(model, tracker, ids(1, 1), cache=cache).index.tolist() == [[3]]

    def test_caches_are_not_kept_alive(self) -> None:
        model = Outer()
        with tracked(model) as tracker:
            for length in (None, 0, 3, torch.tensor(0)):
                cache = Cache(length)
                seen(model, tracker, ids(1, 3), cache=cache)
                reference = weakref.ref(cache)
                del cache
                gc.collect()
                assert reference() is None

    @staticmethod
    def prompt_lengths(positions: TokenPositions) -> list[int] | None:
        return None if positions.prompt_length is None else positions.prompt_length.tolist()

    @pytest.mark.parametrize("static", [False, True])
    def test_the_first_pass_over_a_cache_is_the_prompt(self, static: bool) -> None:
        model, mask = Outer(), torch.tensor([[0, 1, 1], [1, 1, 1]])
        cache = Cache(torch.tensor(0) if static else 0)
        with tracked(model) as tracker:
            assert self.prompt_lengths(seen(model, tracker, ids(2, 3), mask, cache=cache)) == [2, 3]
            for past in (3, 4):
                cache.length = torch.tensor(past) if static else past
                longer = torch.cat([mask, torch.ones(2, past - 2)], dim=1)
                assert self.prompt_lengths(seen(model, tracker, ids(2, 1), longer, cache=cache)) == [2, 3]

    def test_a_static_cache_that_was_emptied_begins_a_prompt_of_its_own(self) -> None:
        model, cache = Outer(), Cache(torch.tensor(0))
        with tracked(model) as tracker:
            seen(model, tracker, ids(1, 3), cache=cache)
            cache.length = torch.tensor(3)
            seen(model, tracker, ids(1, 1), cache=cache)
            cache.length = torch.tensor(0)
            assert self.prompt_lengths(seen(model, tracker, ids(1, 1), cache=cache)) == [1]

    def test_several_tokens_on_a_cache_that_is_not_empty_leave_the_prompt_unknown(self) -> None:
        model, cache = Outer(), Cache(0)
        with tracked(model) as tracker:
            seen(model, tracker, ids(1, 3), cache=cache)
            cache.length = 3
            assert self.prompt_lengths(seen(model, tracker, ids(1, 2), cache=cache)) is None
            cache.length = 5
            assert self.prompt_lengths(seen(model, tracker, ids(1, 1), cache=cache)) is None

    def test_a_cache_whose_first_pass_was_not_seen_leaves_the_prompt_unknown(self) -> None:
        model = Outer()
        with tracked(model) as tracker:
            assert self.prompt_lengths(seen(model, tracker, ids(1, 1), cache=Cache(4))) is None

    @pytest.mark.parametrize(("use_cache", "lengths"), [(True, [3]), (False, None), (None, None)])
    def test_without_a_cache_the_prompt_is_known_only_where_one_is_to_be_made(
        self, use_cache: bool | None, lengths: list[int] | None
    ) -> None:
        model = Outer()
        with tracked(model) as tracker:
            assert self.prompt_lengths(seen(model, tracker, ids(1, 3), use_cache=use_cache)) == lengths

    def test_a_cache_that_the_pass_made_is_remembered(self) -> None:
        model, made = Outer(), Cache(filled=True)
        hook = model.register_forward_hook(lambda _m, _a, output: {**output, "cache": made})
        with tracked(model) as tracker:
            seen(model, tracker, ids(1, 3), use_cache=True)
            later = seen(model, tracker, ids(1, 1), cache=made)
            hook.remove()
        assert later.index.tolist() == [[3]]
        assert self.prompt_lengths(later) == [3]
