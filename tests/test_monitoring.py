"""A monitor reads what ``record_activations`` records and ``project`` projects, and leaves nothing behind."""

import gc
import io
import re
import sys
import threading
import weakref
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import SteeringVector, generated, monitor, record_activations
from tests import tiny
from tests.test_steering import answer, hooks_of, logits, padded, unchanged, vector
from tests.test_training_through import enable_checkpointing

IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
INPUTS = padded([11, 12, 13, 14, 15], [21, 22])
KINDS = ["decoder_block", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected.float(), atol=tolerance, rtol=tolerance, equal_nan=True)


def by_hand(activation: Tensor, direction: Tensor) -> Tensor:
    return activation.double() @ (direction / direction.norm()).double()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_projections_are_those_of_the_recorded_activations(architecture: str) -> None:
    model, steering = tiny.shared(architecture), vector(0, 2)
    with record_activations(model, layers=[0, 2]) as activations, monitor(model, steering) as watched:
        logits(model, IDS)
        logits(model, IDS[:1, :3])
    expected, found = steering.project(activations), watched.projections()
    assert list(found) == [0, 2]
    for layer, (first, second) in found.items():
        assert first.shape == (2, 5)
        assert second.shape == (1, 3)
        close(first, by_hand(activations[layer][0], steering.layer_activations[layer]))
        close(first, expected[layer][0])
        close(second, expected[layer][1])


@pytest.mark.parametrize("kind", KINDS)
def test_projections_at_every_layer_type(kind: Any) -> None:
    model, steering = tiny.shared("llama"), vector(1, layer_type=kind)
    with record_activations(model, kind, layers=1) as activations, monitor(model, steering) as watched:
        logits(model, IDS)
    (found,) = watched.projections()[1]
    close(found, by_hand(activations[1][0], steering.layer_activations[1]))


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mistral"])
def test_projections_of_heads_and_neurons(architecture: str, kind: Any) -> None:
    model = tiny.shared(architecture)
    with record_activations(model, kind, layers=1) as activations:
        logits(model, IDS)
    width = activations[1][0].shape[-1]
    direction = torch.randn(width, generator=torch.Generator().manual_seed(1))
    with monitor(model, SteeringVector({1: direction}, kind)) as watched:
        logits(model, IDS)
    (found,) = watched.projections()[1]
    assert found.shape == (2, 5)
    close(found, by_hand(activations[1][0], direction))


@pytest.mark.parametrize("length", [0.01, 1000.0])
def test_the_lengths_of_directions_do_not_matter(length: float) -> None:
    model = tiny.shared("llama")
    found = []
    for scale in (1.0, length):
        with monitor(model, vector(scale=scale)) as watched:
            logits(model, IDS)
        found.append(watched.projections()[1][0])
    close(found[0], found[1])


def test_padding_is_nan() -> None:
    model = tiny.shared("llama")
    with monitor(model, vector()) as watched:
        logits(model, INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"])
    (found,) = watched.projections()[1]
    assert torch.equal(found.isnan(), INPUTS["attention_mask"] == 0)


@pytest.mark.parametrize(
    "architecture", [name for name in tiny.ARCHITECTURES if name not in tiny.IGNORE_PADDING | tiny.UNLIKE_UNCACHED]
)
def test_sequences_under_generate_are_those_of_uncached_passes_over_each_whole_row(architecture: str) -> None:
    model, steering = tiny.shared(architecture), vector(0, 2)
    with monitor(model, steering) as watched:
        answers = model.generate(**INPUTS, max_new_tokens=5, min_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert len(watched.projections()[0]) == 5
    found = watched.by_sequence()
    for row, prompt in enumerate(([11, 12, 13, 14, 15], [21, 22])):
        whole = prompt + answers[row, 5:-1].tolist()  # the last token never goes through the model
        assert watched.token_ids()[row] == whole
        with record_activations(model, layers=[0, 2]) as activations:
            logits(model, torch.tensor([whole]), use_cache=False)
        for layer in (0, 2):
            close(found[layer][row], by_hand(activations[layer][0][0], steering.layer_activations[layer]), 1e-3)


def test_calls_one_after_the_other_are_sequences_of_their_own() -> None:
    model = tiny.shared("llama")
    with monitor(model, vector()) as watched:
        logits(model, IDS)
        logits(model, IDS[:1, :3])
    assert watched.token_ids() == [*IDS.tolist(), IDS[0, :3].tolist()]
    assert [len(along) for along in watched.by_sequence()[1]] == [5, 5, 3]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_inside_apply_the_steered_state_is_read(architecture: str, inside: bool) -> None:
    model, steering = tiny.shared(architecture), vector(scale=2.0)
    with monitor(model, steering) as plain:
        logits(model, IDS)
    watched = monitor(model, steering)
    contexts: list[Any] = [steering.apply(model, multiplier=1.5, min_token_index=2), watched]
    with contexts[inside], contexts[not inside]:
        logits(model, IDS)
    more = 1.5 * steering.norms()[1] * (torch.arange(5) >= 2).expand(2, 5)
    close(watched.projections()[1][0], plain.projections()[1][0] + more, 1e-3)


def test_inside_apply_generated_tokens_are_read_as_steered() -> None:
    model, steering = tiny.shared("llama"), vector(scale=2.0)
    with steering.apply(model, tokens=generated(INPUTS)), monitor(model, steering) as watched:
        answers = model.generate(**INPUTS, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
    whole = [21, 22, *answers[1, 5:-1].tolist()]
    with monitor(model, steering) as plain:
        logits(model, torch.tensor([whole]), use_cache=False)
    more = steering.norms()[1] * (torch.arange(len(whole)) >= 1)
    close(watched.by_sequence()[1][1], plain.projections()[1][0][0] + more, 1e-3)


def test_nothing_is_changed_and_nothing_left_behind() -> None:
    model: Any = tiny.build("llama")
    before = logits(model, IDS)
    with unchanged(model), monitor(model, vector()):
        assert torch.equal(logits(model, IDS), before)
    assert torch.equal(logits(model, IDS), before)


def test_gradients_flow_past_it_and_no_graph_is_kept() -> None:
    model: Any = tiny.build("llama")
    direction = torch.ones(tiny.HIDDEN, requires_grad=True)
    steering = SteeringVector({1: direction})
    with steering.apply(model), monitor(model, steering) as watched:
        model(IDS).logits.square().mean().backward()
    assert direction.grad is not None
    assert not watched.projections()[1][0].requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_runs_again_is_noted_once(reentrant: bool) -> None:
    model: Any = tiny.build("llama").train()
    enable_checkpointing(model, reentrant=reentrant)
    with monitor(model, vector(layer_type="mlp")) as watched:
        model(IDS, use_cache=False).logits.square().mean().backward()
    assert len(watched.projections()[1]) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_passes_and_leaves_nothing(error: type[BaseException]) -> None:
    model: Any = tiny.build("llama")
    watched = monitor(model, vector())

    def fail() -> None:
        with watched:
            logits(model, IDS)
            raise error

    with pytest.raises(error):
        fail()
    assert hooks_of(model) == {}
    assert len(watched.projections()[1]) == 1  # what was seen stays


def test_an_error_in_a_pass_leaves_nothing_and_the_next_pass_is_right() -> None:
    model: Any = tiny.build("llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("in a block")

    with monitor(model, vector(0)) as watched:
        handle = tiny.blocks(model)[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in a block"):
            logits(model, IDS)
        handle.remove()
        logits(model, IDS[:1])
    assert hooks_of(model) == {}
    with monitor(model, vector(0)) as alone:
        logits(model, IDS[:1])
    close(watched.projections()[0][-1], alone.projections()[0][0])


def test_a_layer_that_a_pass_did_not_reach_has_no_projections_of_it() -> None:
    model: Any = tiny.build("llama")
    handle = tiny.blocks(model)[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError))
    with monitor(model, vector(0, 2)) as watched, pytest.raises(RuntimeError):
        logits(model, IDS)
    handle.remove()
    assert (len(watched.projections()[0]), watched.projections()[2]) == (1, [])
    assert watched.by_sequence()[2][0].isnan().all()


def test_a_monitor_that_is_dropped_inside_its_block_keeps_nothing() -> None:
    model: Any = tiny.build("llama")
    watched = monitor(model, vector())
    watched.__enter__()
    logits(model, IDS)
    noted = weakref.ref(watched)
    del watched
    gc.collect()
    assert noted() is None
    assert hooks_of(model) == {}


def test_threads_at_once_have_their_own_sequences() -> None:
    model = tiny.shared("llama")
    barrier, prompts = threading.Barrier(2), {"first": [11, 12, 13], "second": [21, 22, 23]}
    answers: dict[str, Tensor] = {}

    def run(name: str) -> None:
        barrier.wait()
        answers[name] = answer(model, padded(prompts[name]), min_new_tokens=4)

    with monitor(model, vector()) as watched:
        threads = [threading.Thread(target=run, args=(name,)) for name in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = [prompts[name] + answers[name][0, :-1].tolist() for name in prompts]
    assert sorted(watched.token_ids()) == sorted(expected)  # type: ignore[type-var]
    for ids, along in zip(watched.token_ids(), watched.by_sequence()[1], strict=True):
        with monitor(model, vector()) as alone:
            logits(model, torch.tensor([ids]))
        close(along, alone.projections()[1][0][0], 1e-3)


def test_a_block_may_be_entered_again_and_begins_anew_where_it_was() -> None:
    model, watched = tiny.shared("llama"), monitor(tiny.shared("llama"), vector())
    for _ in range(2):
        with watched:
            logits(model, IDS)
    assert repr(watched) == "SteeringMonitor(layers=[1], passes=2)"


def test_it_can_be_read_inside_the_block() -> None:
    model = tiny.shared("llama")
    with monitor(model, vector()) as watched:
        assert watched.projections() == {1: []}
        assert watched.by_sequence() == {1: []}
        logits(model, IDS)
        assert len(watched.projections()[1]) == 1


def test_projections_are_in_float32_whatever_the_models_dtype() -> None:
    model: Any = tiny.build("llama").to(torch.bfloat16)
    with record_activations(model, layers=1) as activations, monitor(model, vector()) as watched:
        logits(model, IDS)
    (found,) = watched.projections()[1]
    assert found.dtype == torch.float32
    close(found, by_hand(activations[1][0], vector().layer_activations[1]))


class TestShow:
    @pytest.fixture
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        model = tiny.shared("llama")
        with monitor(model, vector(0, 1)) as found:
            logits(model, torch.tensor([[72, 105, 33]]))
        along = {0: [torch.tensor([900.0, 2.0, -4.0])], 1: [torch.tensor([-900.0, 1.0, 0.0])]}
        monkeypatch.setattr(
            found,
            "_sequences",
            lambda: [([72, 105, 33], [[float(along[n][0][t]) for n in (0, 1)] for t in range(3)])],
        )
        return found

    def pieces(self) -> list[str]:
        return [tiny.tokenizer().decode([token]) for token in (72, 105, 33)]

    def test_writes_signed_numbers_where_there_are_no_colours(self, watched: Any) -> None:
        printed = io.StringIO()
        with redirect_stdout(printed):
            watched.show(tiny.tokenizer(), layer=0)
            watched.show(tiny.tokenizer())
        first, second, third = self.pieces()
        assert printed.getvalue().splitlines() == [
            f"{first}(+900.0){second}(+2.0){third}(-4.0)",
            f"{first}(-900.0){second}(+1.0){third}(+0.0)",
        ]

    def test_colours_a_terminal_red_towards_and_blue_away_by_size(self, watched: Any) -> None:
        printed = io.StringIO()
        printed.isatty = lambda: True  # type: ignore[method-assign]
        with redirect_stdout(printed):
            watched.show(tiny.tokenizer(), layer=0)
        found = re.findall(r"\x1b\[30;48;5;(\d+)m(.+?)\x1b\[0m", printed.getvalue())
        # The first token is no measure of the others: the largest of them has the strongest colour.
        assert found == list(zip(("203", "217", "75"), self.pieces(), strict=True))

    def test_colours_html_in_a_notebook(self, watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        shown: list[Any] = []
        display = SimpleNamespace(HTML=lambda text: text, display=shown.append)
        ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()), display=display)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        watched.show(tiny.tokenizer(), layer=0)
        (text,) = shown
        found = re.findall(r'title="([^"]+)" style="background: rgba\((\d+), \d+, \d+, ([\d.]+)\)"', text)
        assert found == [("+900", "214", "1.00"), ("+2", "214", "0.50"), ("-4", "49", "1.00")]

    def test_escapes_html(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown: list[Any] = []
        display = SimpleNamespace(HTML=lambda text: text, display=shown.append)
        ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()), display=display)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        tokenizer = tiny.tokenizer()
        with monitor(tiny.shared("llama"), vector()) as watched:
            logits(tiny.shared("llama"), torch.tensor([tokenizer("<b>&")["input_ids"]]))
        watched.show(tokenizer)
        assert re.sub("<[^>]*>", "", shown[0]) == "&lt;b&gt;&amp;"

    def test_refuses_a_layer_that_is_not_watched(self, watched: Any) -> None:
        with pytest.raises(LookupError, match=r"layer 7 is not watched; those that are: \[0, 1\]"):
            watched.show(tiny.tokenizer(), layer=7)

    def test_refuses_embeddings(self) -> None:
        model = tiny.shared("llama")
        with monitor(model, vector()) as watched, torch.no_grad():
            model(inputs_embeds=torch.randn(1, 3, tiny.HIDDEN))  # type: ignore[operator]
        assert watched.token_ids() == [[None] * 3]
        assert watched.by_sequence()[1][0].shape == (3,)
        with pytest.raises(ValueError, match="embeddings, not token ids, so there is no text"):
            watched.show(tiny.tokenizer())
        with pytest.raises(ValueError, match="embeddings, not token ids, so there is no text"):
            watched.token_texts(tiny.tokenizer())

    def test_token_texts_are_the_text_of_each_sequence_without_padding(self) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
        rows = [tokenizer(text)["input_ids"] for text in ("Grüße & Küsse", "ja")]
        with monitor(model, vector()) as watched:
            model.generate(**padded(*rows), max_new_tokens=3, do_sample=False, pad_token_id=0)
        texts, ids = watched.token_texts(tokenizer), watched.token_ids()
        assert [list(map(len, (texts, ids)))] == [[2, 2]]
        assert ["".join(row) for row in texts] == [tokenizer.decode(row) for row in ids]
        assert list(map(len, texts)) == list(map(len, watched.by_sequence()[1]))


class TestBadInput:
    def test_no_vector(self) -> None:
        with pytest.raises(TypeError, match="vector must be a SteeringVector, got Tensor"):
            monitor(tiny.shared("llama"), torch.ones(tiny.HIDDEN))  # type: ignore[arg-type]

    def test_no_model(self) -> None:
        with pytest.raises(TypeError, match="model"):
            monitor("gpt2", vector())  # type: ignore[arg-type]

    def test_arguments_the_wrong_way_round(self) -> None:
        with pytest.raises(TypeError, match="model"):
            monitor(vector(), tiny.shared("llama"))  # type: ignore[arg-type]

    def test_a_missing_argument(self) -> None:
        with pytest.raises(TypeError, match="the arguments are model, vector"):
            monitor(tiny.shared("llama"))  # type: ignore[call-arg]

    def test_another_width(self) -> None:
        with pytest.raises(ValueError, match="directions have 5 numbers"):
            monitor(tiny.shared("llama"), SteeringVector({1: torch.ones(5)}))

    def test_a_layer_that_the_model_lacks(self) -> None:
        with pytest.raises(ValueError, match="layer 9 .*3 layers"):
            monitor(tiny.shared("llama"), vector(9))

    def test_a_direction_of_zeros(self) -> None:
        with pytest.raises(ValueError, match="zero"):
            monitor(tiny.shared("llama"), SteeringVector({1: torch.zeros(tiny.HIDDEN)}))

    def test_a_model_that_is_gone(self) -> None:
        watched = monitor(tiny.build("llama"), vector())
        gc.collect()
        with pytest.raises(RuntimeError, match="no longer exists: make a new monitor"):
            watched.__enter__()

    def test_several_texts_in_a_row_have_projections_but_no_sequences(self) -> None:
        model = tiny.shared("llama")
        with monitor(model, vector()) as watched:
            logits(model, torch.tensor([[11, 12, 13, 21, 22]]), position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
        assert watched.projections()[1][0].shape == (1, 5)
        with pytest.raises(ValueError, match="several texts in one row"):
            watched.by_sequence()
