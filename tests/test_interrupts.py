"""An interrupt at each line while a steering, a trace or a record is entered or left: nothing stays behind."""

import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import steering_vectors
from steering_vectors import ablate_everywhere, from_index, read_activations, record_activations, trace_steering
from tests import tiny
from tests.test_no_trace import assert_no_trace, attributes_of, classes_of, enable_checkpointing
from tests.test_steering import hooks_of, logits, vector

PACKAGE = str(Path(steering_vectors.__file__).parent)
# The modules that attach and remove. The others only compute, before or after.
FILES = {
    f"{PACKAGE}/{name}.py"
    for name in (
        *("_models/hooks", "_models/running", "_passes/tracker", "_passes/forward_pass", "_passes/checkpointing"),
        *("_steering/attaching", "_steering/handle", "_steering/stream_parts", "tracing", "record_activations"),
        *("steering_vector", "ablation"),
    )
}


class Interrupt(BaseException):
    """What Ctrl-C or a timeout raises."""


class Lines:
    """A block in which the lines of FILES that run are listed; with ``stop``, that line raises an Interrupt instead.

    ``stop`` is a line and how many times it has run before.
    """

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.ran: list[str] = []
        self._stop = stop

    def __enter__(self) -> "Lines":
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in FILES else None

    def _line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            line = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
            if self._stop is not None and self._stop[0] == line and self.ran.count(line) == self._stop[1]:
                sys.settrace(None)
                raise Interrupt(line)
            self.ran.append(line)
        return self._line


def stops(function: Callable[[Any], None], model: Any) -> list[tuple[str, int]]:
    """Each line that the function runs, at its first time and, unless it runs many, at its last."""
    with Lines() as lines:
        function(model)
    counts = {line: lines.ran.count(line) for line in dict.fromkeys(lines.ran)}
    return [(line, time) for line, count in counts.items() for time in {0, count - 1 if len(counts) < 200 else 0}]


def apply(model: Any) -> None:
    with vector(0).apply(model):
        pass


def select(model: Any) -> None:
    with vector(0).apply(model, tokens=from_index(1)):
        pass


def nest(model: Any) -> None:
    with vector(0).apply(model), vector(0).apply(model, this_thread_only=True):
        pass


def patch(model: Any) -> None:
    handle = vector(0).patch(model)
    if sys.gettrace() is None:
        handle.remove()
        return
    try:
        handle.remove()
    except Interrupt:
        handle.remove()  # the user's second try
        raise


def trace(model: Any) -> None:
    with trace_steering(model):
        pass


def record(model: Any) -> None:
    with record_activations(model):
        pass


def read(model: Any) -> None:
    read_activations(model, tiny.tokenizer(), ["ab"])


def ablate(model: Any) -> None:
    with ablate_everywhere(model, torch.ones(tiny.HIDDEN)):
        pass


DONE: dict[str, Callable[[Any], None]] = {
    function.__name__: function for function in (apply, select, nest, patch, trace, record, read, ablate)
}


def build(checkpointing: bool) -> Any:
    model: Any = tiny.build("llama", num_hidden_layers=1)
    model.model.norm.train()  # reading puts it in evaluation mode meanwhile
    if checkpointing:
        enable_checkpointing(model)
    return model


@pytest.fixture
def _frozen() -> Iterator[None]:
    """Makes collecting garbage fast: what is there already is not looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def modes_of(model: Any) -> list[bool]:
    return [module.training for module in model.modules()]


class Before:
    """The state of a model, to be checked after each try."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.classes, self.attributes, self.plain = classes_of(model), attributes_of(model), logits(model)
        self.modes = modes_of(model)
        with vector(0).apply(model):
            self.steered = logits(model)

    def check(self, *, thoroughly: bool = False) -> None:
        gc.collect()
        assert classes_of(self.model) == self.classes
        assert attributes_of(self.model) == self.attributes
        assert hooks_of(self.model) == {}
        assert modes_of(self.model) == self.modes
        assert torch.is_grad_enabled()
        other = threading.Thread(target=record, args=(self.model,), daemon=True)
        other.start()
        other.join(timeout=20)
        assert not other.is_alive(), "another thread waits for a lock"
        if not thoroughly:
            return
        assert_no_trace(self.model)
        assert torch.equal(logits(self.model), self.plain)
        with vector(0).apply(self.model):
            assert torch.equal(logits(self.model), self.steered)


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in DONE), ("select", True), ("trace", True)]
)
@pytest.mark.usefixtures("_frozen")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt of a finalizer
def test_an_interrupt_at_any_line_leaves_nothing_behind(name: str, checkpointing: bool) -> None:
    model = build(checkpointing)
    before = Before(model)
    left_behind = []
    places = stops(DONE[name], model)
    for place in places:
        try:
            with Lines(place):
                DONE[name](model)
        except Interrupt:
            pass
        try:
            before.check()
        except AssertionError as error:
            left_behind.append((place, str(error)[:100]))
            model = build(checkpointing)
            before = Before(model)
    before.check(thoroughly=True)
    assert not left_behind, "\n".join(map(str, left_behind))
    assert len(places) > 5


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_frozen")
def test_signals_at_random_moments_leave_nothing_behind() -> None:
    """As Ctrl-C, a notebook's stop button and timeouts do: between any two instructions, also outside of FILES."""
    model = build(checkpointing=False)
    before = Before(model)

    def interrupt(*_: Any) -> None:
        raise Interrupt

    def enter_and_leave() -> None:
        for tokens in (None, from_index(1)):
            with vector(0).apply(model, tokens=tokens):
                pass
        with record_activations(model), trace_steering(model):
            pass

    took = []
    for _ in range(9):
        start = time.perf_counter()
        enter_and_leave()
        took.append(time.perf_counter() - start)
    longest = sorted(took)[4]
    generator = random.Random(0)
    interrupted = 0
    earlier = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, generator.random() * longest))
                enter_and_leave()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interrupted += 1
            before.check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    before.check(thoroughly=True)
    assert interrupted > 20  # most of them, unless the machine has much else to do
