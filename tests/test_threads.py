"""One model in several threads: whose passes a steering changes."""

import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TextIteratorStreamer

from steering_vectors import (
    ablate_everywhere,
    active_patches,
    from_index,
    generated,
    read_activations,
    trace_steering,
    train_steering_vector,
)
from steering_vectors._passes import tracker
from tests import tiny
from tests.test_steering import answer, logits, padded, unchanged, vector

INPUTS = padded([11, 12, 13, 14, 15], [21, 22])


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = tiny.shared("llama")
    with unchanged(model):
        yield model


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return, each in a thread of its own, all at once."""
    results: list[Any] = [None] * len(functions)

    def work(number: int) -> None:
        try:
            results[number] = functions[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("tokens", [None, from_index(1), generated(INPUTS), generated()], ids=repr)
def test_threads_at_once_have_their_own_multipliers(model: PreTrainedModel, tokens: Any) -> None:
    multipliers = (3.0, -3.0, 0.0)
    expected = []
    for multiplier in multipliers:
        with vector(0, 1, 2).apply(model, multiplier=multiplier, tokens=tokens):
            expected.append((logits(model, **INPUTS_TO_PASS), answer(model, INPUTS)))
    meeting = threading.Barrier(len(multipliers), timeout=20)

    def run(multiplier: float) -> tuple[Tensor, Tensor]:
        with vector(0, 1, 2).apply(model, multiplier=multiplier, tokens=tokens, this_thread_only=True):
            meeting.wait()  # all steerings are attached
            got = logits(model, **INPUTS_TO_PASS), answer(model, INPUTS)
            meeting.wait()
        return got

    def meet(*_: Any) -> None:
        meeting.wait()  # all are in the midst of a pass

    hooks = [block.register_forward_hook(meet) for block in tiny.blocks(model)[:2]]
    try:
        got = in_threads(*(lambda m=m: run(m) for m in multipliers))  # type: ignore[misc]
    finally:
        for hook in hooks:
            hook.remove()
    for (got_logits, got_answer), (expected_logits, expected_answer) in zip(got, expected, strict=True):
        assert torch.equal(got_logits, expected_logits)
        assert torch.equal(got_answer, expected_answer)


INPUTS_TO_PASS: dict[str, Any] = {**INPUTS, "use_cache": True}


@pytest.mark.parametrize("tokens", [None, generated(INPUTS)], ids=repr)
def test_a_thread_started_inside_the_block_is_not_steered_and_the_warning_says_so(
    model: PreTrainedModel, tokens: Any
) -> None:
    expected = answer(model, INPUTS)
    message = r"not in the thread that attached this steering with this_thread_only=True: layers \[1\] were not steered"
    with pytest.warns(RuntimeWarning, match=message), vector().apply(model, tokens=tokens, this_thread_only=True):
        (got,) = in_threads(lambda: answer(model, INPUTS))
    assert torch.equal(got, expected)


def test_without_it_a_thread_started_inside_the_block_is_steered(model: PreTrainedModel) -> None:
    with vector(scale=3.0).apply(model):
        expected = answer(model, INPUTS)
        with pytest.warns(RuntimeWarning, match="a thread other than the one that attached this steering") as told:
            (got,) = in_threads(lambda: answer(model, INPUTS))
        assert len(told) == 1  # for all passes and layers
    assert torch.equal(got, expected)
    assert not torch.equal(got, answer(model, INPUTS))


@pytest.mark.parametrize("this_thread_only", [False, True])
@pytest.mark.parametrize("tokens", [None, from_index(1)], ids=repr)
def test_leaving_in_the_midst_of_another_thread_s_pass_does_not_break_it(
    model: PreTrainedModel, tokens: Any, this_thread_only: bool
) -> None:
    expected = logits(model, **INPUTS_TO_PASS)
    entered, left = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        entered.set()
        left.wait(20)

    holding = model.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a steering in this thread alone changed nothing
        with vector().apply(model, tokens=tokens, this_thread_only=this_thread_only):
            bystander = pool.submit(logits, model, **INPUTS_TO_PASS)
            entered.wait(20)
        left.set()
        got = bystander.result(timeout=60)
    holding.remove()
    assert torch.equal(got, expected)


def streamed(model: Any, prompt: Tensor, multiplier: float) -> Iterator[str]:
    """The pieces of a steered answer, generated in a thread of its own."""
    streamer = TextIteratorStreamer(tiny.tokenizer(), skip_prompt=True, timeout=30)
    generate = vector(0, 1).apply(model, multiplier=multiplier, tokens=generated(), this_thread_only=True)(
        model.generate
    )
    arguments = {"input_ids": prompt, "streamer": streamer, "max_new_tokens": 8, "do_sample": False}
    thread = threading.Thread(target=generate, kwargs=arguments)
    thread.start()
    yield from streamer
    thread.join(timeout=30)


def test_answers_streamed_at_once_are_steered_apart(model: PreTrainedModel) -> None:
    prompt = torch.tensor([[41, 42, 43, 44]])
    expected = []
    for multiplier in (4.0, -4.0):
        with vector(0, 1).apply(model, multiplier=multiplier, tokens=generated()):
            out = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
        expected.append(tiny.tokenizer().decode(out[0, 4:]))
    assert expected[0] != expected[1]
    got = in_threads(*(lambda m=m: "".join(streamed(model, prompt, m)) for m in (4.0, -4.0)))  # type: ignore[misc]
    assert got == expected


def test_a_handler_that_is_stepped_from_several_threads(model: PreTrainedModel) -> None:
    prompt = torch.tensor([[41, 42, 43, 44]])
    expected = "".join(streamed(model, prompt, 4.0))
    handler = streamed(model, prompt, 4.0)
    pieces: list[str] = []

    def step() -> bool:
        piece = next(handler, None)
        pieces.append(piece or "")
        return piece is not None

    while in_threads(step)[0]:
        pass
    assert "".join(pieces) == expected


def test_a_block_in_a_generator_may_be_left_by_another_thread(model: PreTrainedModel) -> None:
    plain = logits(model)

    def handler() -> Iterator[Tensor]:
        with vector().apply(model, this_thread_only=True):
            while True:
                yield logits(model)

    steps = handler()
    (steered,) = in_threads(lambda: next(steps))
    assert not torch.equal(steered, plain)
    assert torch.equal(next(steps), plain)  # a step of this thread, not of the one that entered
    assert len(active_patches(model)) == 1
    steps.close()
    assert active_patches(model) == []


def test_the_handle_says_so(model: PreTrainedModel) -> None:
    with vector().patch(model, this_thread_only=True) as handle:
        assert repr(handle).endswith("tokens=all, this_thread_only=True)")


@pytest.mark.compiles
def test_compiled_code_serves_each_thread_as_plain_code_does() -> None:
    torch.compiler.reset()
    plain = tiny.shared("llama")
    with vector().apply(plain):
        expected = logits(plain)
    model = torch.compile(tiny.build("llama"), backend="eager")
    with vector().apply(model, this_thread_only=True):
        for _ in range(2):
            torch.testing.assert_close(logits(model), expected)
        (other,) = in_threads(lambda: logits(model))
    torch.testing.assert_close(other, logits(plain))
    torch.compiler.reset()
    in_one_graph = torch.compile(tiny.build("llama"), backend="eager", fullgraph=True)
    with (
        vector().apply(in_one_graph, this_thread_only=True),
        pytest.raises(Exception, match="compile the model without fullgraph=True"),
    ):
        logits(in_one_graph)
    torch.compiler.reset()


def test_a_later_thread_is_not_taken_for_an_earlier_one(model: PreTrainedModel) -> None:
    """The numbers of threads are used again."""
    plain = logits(model)

    def handler() -> Iterator[None]:
        with vector().apply(model, this_thread_only=True):
            yield

    steps = handler()
    in_threads(lambda: next(steps))
    for _ in range(20):
        (got,) = in_threads(lambda: logits(model))
        assert torch.equal(got, plain)
    with pytest.warns(RuntimeWarning, match="not in the thread that attached this steering"):
        next(steps, None)


def test_one_context_entered_by_two_threads_is_each_one_s_own(model: PreTrainedModel) -> None:
    context = vector(scale=3.0).apply(model, this_thread_only=True)
    with vector(scale=3.0).apply(model):
        expected = logits(model)
    inside, left = threading.Barrier(2, timeout=20), threading.Barrier(2, timeout=20)

    inside_first = threading.Barrier(2, timeout=20)

    def entered_first() -> Tensor:
        with context:
            inside_first.wait()
            inside.wait()
            left.wait()
            return logits(model)

    def entered_last() -> None:
        inside_first.wait()
        with context:
            inside.wait()
            logits(model)
        left.wait()

    _, got = in_threads(entered_last, entered_first)
    assert torch.equal(got, expected)


# Passes in whose midst another thread enters or leaves


class Held:
    """A pass in a thread of its own, held before one of its blocks until it is released."""

    def __init__(self, model: Any, block: int, **kwargs: Any) -> None:
        self.is_held, self._release = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._thread: int | None = None
        self._hook = tiny.blocks(model)[block].register_forward_pre_hook(self._hold)
        self._pass = self._pool.submit(self._run, model, kwargs)
        assert self.is_held.wait(20) or self._pass.result(0) is None

    def _run(self, model: Any, kwargs: dict[str, Any]) -> Tensor:
        self._thread = threading.get_ident()
        return logits(model, **kwargs)

    def _hold(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            self.is_held.set()
            assert self._release.wait(20)

    def result(self) -> Tensor:
        self._release.set()
        out: Tensor = self._pass.result(60)
        self._hook.remove()
        self._pool.shutdown()
        return out


WAYS: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "a selection": {"tokens": from_index(1)},
    "row multipliers": {"multiplier": [2.0, -1.0]},
    "row multipliers, a selection": {"multiplier": [2.0, -1.0], "tokens": generated(INPUTS)},
}


@pytest.mark.parametrize("block", range(tiny.LAYERS))
@pytest.mark.parametrize("this_thread_only", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*this_thread_only=True:RuntimeWarning")
class TestAPassInTheMidst:
    def test_stays_unsteered_where_another_thread_enters(
        self, model: PreTrainedModel, way: str, this_thread_only: bool, block: int
    ) -> None:
        plain = logits(model, **INPUTS_TO_PASS)
        context = vector(0, 1, 2, scale=3.0).apply(model, this_thread_only=this_thread_only, **WAYS[way])
        held = Held(model, block, **INPUTS_TO_PASS)
        with context:
            assert torch.equal(held.result(), plain)
            assert not torch.equal(logits(model, **INPUTS_TO_PASS), plain)
        assert torch.equal(logits(model, **INPUTS_TO_PASS), plain)

    def test_stays_steered_where_another_thread_leaves(
        self, model: PreTrainedModel, way: str, this_thread_only: bool, block: int
    ) -> None:
        plain = logits(model, **INPUTS_TO_PASS)
        context = vector(0, 1, 2, scale=3.0).apply(model, this_thread_only=this_thread_only, **WAYS[way])
        with context:
            expected = plain if this_thread_only else logits(model, **INPUTS_TO_PASS)
            held = Held(model, block, **INPUTS_TO_PASS)
        assert torch.equal(logits(model, **INPUTS_TO_PASS), plain)
        assert torch.equal(held.result(), expected)

    def test_of_one_thread_keeps_its_own_while_another_s_comes_and_goes(
        self, model: PreTrainedModel, way: str, this_thread_only: bool, block: int
    ) -> None:
        own = vector(0, 1, seed=5, scale=2.0)
        with own.apply(model):
            expected = logits(model, **INPUTS_TO_PASS)
        with own.apply(model):
            held = Held(model, block, **INPUTS_TO_PASS)
            in_threads(lambda: enter_and_leave(model, this_thread_only, WAYS[way]))
            assert torch.equal(held.result(), expected)


def enter_and_leave(model: Any, this_thread_only: bool, way: dict[str, Any]) -> None:
    with vector(0, 1, 2, seed=7).apply(model, this_thread_only=this_thread_only, **way):
        logits(model, **INPUTS_TO_PASS)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_one_context_entered_by_three_threads_that_leave_in_any_order(
    model: PreTrainedModel, order: tuple[int, ...]
) -> None:
    context = vector(scale=3.0).apply(model, this_thread_only=True)
    with vector(scale=3.0).apply(model):
        steered = logits(model)
    plain = logits(model)
    entered = threading.Barrier(3, timeout=20)
    turns = [threading.Event() for _ in order]

    def run(number: int) -> list[Tensor]:
        with context:
            entered.wait()
            place = order.index(number)
            if place > 0:
                assert turns[order[place - 1]].wait(20)
            inside = logits(model)
        after = logits(model)
        turns[number].set()
        return [inside, after]

    for inside, after in in_threads(*(lambda n=n: run(n) for n in range(3))):  # type: ignore[misc]
        assert torch.equal(inside, steered)
        assert torch.equal(after, plain)


def test_a_pass_that_begins_while_another_thread_is_entering_does_not_spoil_that_entry(model: PreTrainedModel) -> None:
    """After each hook that a thread attaches, another thread runs a pass."""
    with vector(0, 1, 2, scale=3.0).apply(model, tokens=from_index(1)):
        steered = logits(model)
    plain = logits(model)
    passes = []

    def attach_slowly(attachments: Any) -> None:
        for attachment in attachments:
            attachment.attach()
            passes.extend(in_threads(lambda: logits(model)))

    context = vector(0, 1, 2, scale=3.0).apply(model, tokens=from_index(1), this_thread_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "attach_all", attach_slowly)
        context.__enter__()
    assert len(passes) > 3
    assert all(torch.equal(one, plain) for one in passes)
    assert torch.equal(logits(model), steered)
    context.__exit__(None, None, None)


# Other work beside another thread's own steering

SAMPLES = [("good", "bad"), ("a longer text", "short")]


def beside_a_steering(model: Any, work: Callable[[], Any], **kwargs: Any) -> Any:
    """What the work gives while another thread is inside a steering of its own."""
    entered, done = threading.Event(), threading.Event()

    def steer() -> None:
        with vector(0, 1, scale=3.0).apply(model, this_thread_only=True, **kwargs):
            logits(model, **INPUTS_TO_PASS)
            entered.set()
            assert done.wait(60)

    def run() -> Any:
        assert entered.wait(20)
        try:
            return work()
        finally:
            done.set()

    return in_threads(steer, run)[1]


@pytest.mark.parametrize("way", WAYS)
def test_training_reading_and_ablation_are_not_touched_by_another_thread_s_own_steering(
    model: PreTrainedModel, way: str
) -> None:
    tokenizer = tiny.tokenizer()

    def ablated() -> Tensor:
        with ablate_everywhere(model, torch.ones(tiny.HIDDEN)):
            return logits(model)

    trained = train_steering_vector(model, tokenizer, SAMPLES)
    got = beside_a_steering(model, lambda: train_steering_vector(model, tokenizer, SAMPLES), **WAYS[way])
    assert got == trained
    assert got.metadata == trained.metadata
    rows = read_activations(model, tokenizer, ["some text", "more"])
    read = beside_a_steering(model, lambda: read_activations(model, tokenizer, ["some text", "more"]), **WAYS[way])
    assert all(torch.equal(read[layer], rows[layer]) for layer in rows)
    expected = ablated()
    assert torch.equal(beside_a_steering(model, ablated, **WAYS[way]), expected)


def test_a_trace_is_read_while_another_thread_runs(model: PreTrainedModel) -> None:
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with vector(0, 1, 2).apply(model, tokens=from_index(1), this_thread_only=True):
                logits(model)

    def read() -> None:
        try:
            for _ in range(100):
                trace.summary()
                str(trace)
                repr(active_patches(model))
        finally:
            stop.set()

    with short_switch_interval(), trace_steering(model) as trace:
        in_threads(run, read)
    assert set(trace.summary()) == {0, 1, 2}


@contextmanager
def short_switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_forked_while_another_thread_enters_and_leaves(model: PreTrainedModel) -> None:
    with vector(0, 1).apply(model, tokens=from_index(1)):
        steered = logits(model)
    stop = threading.Event()

    def enter_and_leave_in_a_loop() -> None:
        while not stop.is_set():
            with vector(2).apply(model, this_thread_only=True):
                pass

    def child() -> int:

        signal.alarm(20)  # waiting for a lock ends the child
        with vector(0, 1).apply(model, tokens=from_index(1), this_thread_only=True):
            return 0 if torch.equal(logits(model), steered) else 3

    def fork() -> list[int]:
        codes = []
        try:
            for _ in range(50):
                number = os.fork()
                if number == 0:
                    code = 2
                    try:
                        code = child()
                    finally:
                        os._exit(code)
                codes.append(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
        finally:
            stop.set()
        return codes

    with short_switch_interval():
        _, codes = in_threads(enter_and_leave_in_a_loop, fork)
    assert codes == [0] * 50
