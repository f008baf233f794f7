"""Passes of a model inside its passes, passes that don't end, and hooks that other code clears."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from steering_vectors import active_patches, from_index, generated, trace_steering
from tests import tiny
from tests.test_no_trace import assert_no_trace
from tests.test_steering import answer, logits, padded, unchanged, vector
from tests.test_threads import in_threads

INPUTS = padded([11, 12, 13, 14, 15], [21, 22])
OTHER = torch.tensor([[31, 32, 33]])
TOKENS = [None, from_index(2), generated(INPUTS)]


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = tiny.build("llama")  # no other test uses it: some of these clear all hooks
    with unchanged(model):
        yield model


class Once:
    """A function that runs once within itself, so that a pass inside a pass does not begin another one."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.is_running, self.results = function, False, list[Any]()

    def __call__(self, *_: Any) -> None:
        if not self.is_running:
            self.is_running = True
            try:
                self.results.append(self.function())
            finally:
                self.is_running = False


class TestAPassInsideAPass:
    """The outer pass goes on with its own tokens, and the inner one has its own."""

    @pytest.mark.parametrize("tokens", [None, from_index(2)], ids=repr)
    def test_of_a_user_s_hook(self, model: PreTrainedModel, tokens: Any) -> None:
        for block in range(tiny.LAYERS):
            with vector(0, 1, 2, scale=3.0).apply(model, tokens=tokens):
                expected, inner = logits(model, **INPUTS), logits(model, OTHER)
                once = Once(lambda: logits(model, OTHER))
                for register in ("register_forward_pre_hook", "register_forward_hook"):
                    handle = getattr(tiny.blocks(model)[block], register)(once)
                    assert torch.equal(logits(model, **INPUTS), expected)
                    handle.remove()
                assert len(once.results) == 2
                assert all(torch.equal(one, inner) for one in once.results)

    @pytest.mark.parametrize("tokens", [None, from_index(2)], ids=repr)
    def test_of_an_operator(self, model: PreTrainedModel, tokens: Any) -> None:
        once = Once(lambda: logits(model, OTHER))

        def operator(_activation: Tensor, direction: Tensor) -> Tensor:
            once()
            return direction

        with vector(0, 1, scale=3.0).apply(model, tokens=tokens):
            expected, inner = logits(model, **INPUTS), logits(model, OTHER)
        with vector(0, 1, scale=3.0).apply(model, tokens=tokens, operator=operator):
            assert torch.equal(logits(model, **INPUTS), expected)
        assert len(once.results) == 2
        assert all(torch.equal(one, inner) for one in once.results)

    def test_of_a_selector(self, model: PreTrainedModel) -> None:
        once = Once(lambda: logits(model, OTHER))

        def selector(positions: Any) -> Tensor:
            once()
            return positions.index >= 2

        with vector(0, 1, scale=3.0).apply(model, tokens=from_index(2)):
            expected, inner = answer(model, INPUTS), logits(model, OTHER)
        with vector(0, 1, scale=3.0).apply(model, tokens=selector):
            assert torch.equal(answer(model, INPUTS), expected)
        assert len(once.results) == 4  # passes of the answer
        assert all(torch.equal(one, inner) for one in once.results)

    @pytest.mark.parametrize("tokens", [None, from_index(2)], ids=repr)
    def test_that_is_steered_more_than_the_outer_one(self, model: PreTrainedModel, tokens: Any) -> None:
        """The inner pass enters a steering of its own, which the outer pass never sees."""
        more = vector(1, seed=3, scale=5.0)

        def inner() -> Tensor:
            with more.apply(model, tokens=from_index(1)):
                return logits(model, OTHER)

        with vector(0, 1, 2, scale=3.0).apply(model, tokens=tokens):
            expected, alone, once = answer(model, INPUTS), inner(), Once(inner)
            handle = tiny.blocks(model)[1].register_forward_pre_hook(once)
            assert torch.equal(answer(model, INPUTS), expected)
            handle.remove()
        assert once.results
        assert all(torch.equal(one, alone) for one in once.results)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("tokens", [None, from_index(2)], ids=repr)
    def test_that_raises_or_is_interrupted(
        self, model: PreTrainedModel, tokens: Any, error: type[BaseException]
    ) -> None:
        def fail(*_: Any) -> None:
            if once.is_running:
                raise error

        def inner() -> None:
            with pytest.raises(error):
                logits(model, OTHER)

        once = Once(inner)
        with vector(0, 1, 2, scale=3.0).apply(model, tokens=tokens):
            expected = logits(model, **INPUTS)
            handles = [
                tiny.blocks(model)[2].register_forward_pre_hook(fail),
                tiny.blocks(model)[1].register_forward_pre_hook(once),
            ]
            assert torch.equal(logits(model, **INPUTS), expected)
            for handle in handles:
                handle.remove()
            assert torch.equal(logits(model, **INPUTS), expected)


class TestAPassThatDoesNotEnd:
    """An interrupt leaves a pass without its last hooks."""

    def interrupted(self, model: Any) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = tiny.blocks(model)[1].register_forward_pre_hook(interrupt)
        with suppress(KeyboardInterrupt):
            logits(model, **INPUTS)
        handle.remove()

    @pytest.mark.parametrize("tokens", TOKENS, ids=repr)
    def test_does_not_change_the_next_pass(self, model: PreTrainedModel, tokens: Any) -> None:
        with vector(0, 1, 2, scale=3.0).apply(model, tokens=tokens):
            expected = answer(model, INPUTS)
            self.interrupted(model)
            assert torch.equal(answer(model, INPUTS), expected)
            self.interrupted(model)
        assert_no_trace(model)

    @pytest.mark.parametrize("tokens", [None, from_index(2)], ids=repr)
    def test_in_a_thread_that_has_ended_keeps_nothing(self, model: PreTrainedModel, tokens: Any) -> None:
        expected = logits(model)
        with vector(0, 1).apply(model, tokens=tokens):
            with pytest.warns(RuntimeWarning, match="in a thread other than the one that attached"):
                in_threads(lambda: self.interrupted(model))
            logits(model)
        assert_no_trace(model)
        assert torch.equal(logits(model), expected)

    def test_in_a_thread_that_goes_on_is_cleared_away_by_its_next_pass(self, model: PreTrainedModel) -> None:
        entered, interrupted, left = threading.Event(), threading.Event(), threading.Event()

        def work() -> Tensor:
            assert entered.wait(20)
            self.interrupted(model)
            interrupted.set()
            assert left.wait(20)
            return logits(model)

        def steer() -> None:
            with vector(0, 1).apply(model, tokens=from_index(1), this_thread_only=True):
                entered.set()
                assert interrupted.wait(20)
                logits(model)
            left.set()

        plain = logits(model)
        got, _ = in_threads(work, steer)
        assert torch.equal(got, plain)
        assert_no_trace(model)

    def test_keeps_neither_the_model_nor_the_thread(self) -> None:
        model = tiny.build("llama")
        with vector(0, 1).apply(model, tokens=from_index(1)):
            self.interrupted(model)
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None


class TestHooksThatOtherCodeClears:
    @pytest.mark.parametrize("cleared", ["all modules", "the layer", "the model"])
    @pytest.mark.parametrize("tokens", [None, from_index(2)], ids=repr)
    def test_are_said_to_be_gone_and_the_next_steering_works(
        self, model: PreTrainedModel, tokens: Any, cleared: str
    ) -> None:
        plain = logits(model)
        with vector(1, scale=3.0).apply(model, tokens=tokens):
            steered = logits(model)
        modules = {
            "all modules": list(model.modules()),
            "the layer": [tiny.blocks(model)[1]],
            "the model": [model, model.model],
        }[cleared]
        context = vector(1, scale=3.0).apply(model, tokens=tokens)
        context.__enter__()
        for module in modules:
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        (patch,) = active_patches(model)
        assert "hooks removed by other code" in repr(patch)
        if cleared == "all modules":  # where only some hooks are gone, the first steering goes on as far as it can
            with vector(1, scale=3.0).apply(model, tokens=tokens):
                assert torch.equal(logits(model), steered)
        with pytest.warns(RuntimeWarning, match="other code has removed hooks of this steering"):
            context.__exit__(None, None, None)
        with vector(1, scale=3.0).apply(model, tokens=tokens):
            assert torch.equal(logits(model), steered)
        assert torch.equal(logits(model), plain)
        for module in modules:  # what clearing left by itself, as it does without the library
            module._forward_hooks_with_kwargs.clear()
            module._forward_pre_hooks_with_kwargs.clear()
            module._forward_hooks_always_called.clear()
        assert_no_trace(model)

    def test_a_trace_says_nothing_of_them(self, model: PreTrainedModel) -> None:
        with trace_steering(model) as trace:
            model._forward_pre_hooks.clear()
            model._forward_pre_hooks_with_kwargs.clear()
            logits(model)
        assert trace.summary() == {}
