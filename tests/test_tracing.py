"""What a trace tells of steerings, against what was asked for."""

import gc
import io
import math
import sys
import threading
import weakref
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steering_vectors import (
    LayerSummary,
    SteeringVector,
    ablate_everywhere,
    ablation_operator,
    at,
    from_index,
    generated,
    record_activations,
    trace_steering,
)
from tests import tiny
from tests.test_steering import answer, hooks_of, logits, padded, vector
from tests.test_training_through import enable_checkpointing

IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
INPUTS = padded([11, 12, 13, 14, 15], [21, 22])


@pytest.mark.parametrize("operator", [None, ablation_operator()], ids=repr)
@pytest.mark.parametrize(
    ("tokens", "count"),
    [(None, 10), (from_index(2), 6), (at([0, 4]), 4), (lambda p: p.index / 4, 8)],
    ids=["all", "from 2", "two", "weights"],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "mamba"])
def test_tokens_and_shares_are_those_of_the_recorded_activations(
    architecture: str, tokens: Any, count: int, operator: Any
) -> None:
    model = tiny.shared(architecture)
    with record_activations(model, layers=1) as plain:
        logits(model, IDS)
    with (
        vector(1, scale=3.0).apply(model, tokens=tokens, operator=operator),
        trace_steering(model) as trace,
        record_activations(model, layers=1) as steered,
    ):
        logits(model, IDS)
    before, after = plain[1][0], steered[1][0]
    shares = ((after - before).norm(dim=-1) / before.norm(dim=-1)).flatten()
    summary = trace.summary()
    assert list(summary) == [1]
    assert (summary[1].runs, summary[1].steered_tokens) == (1, count)
    assert summary[1].change == pytest.approx(float(shares[shares > 0].mean()), rel=1e-4)


@pytest.mark.parametrize("inside", [True, False])
def test_steerings_may_be_entered_before_it_or_in_it(inside: bool) -> None:
    model = tiny.shared("llama")
    trace = trace_steering(model)
    contexts: list[Any] = [vector(0, 2).apply(model, tokens=generated(INPUTS)), trace]
    with contexts[inside], contexts[not inside]:
        answer(model, INPUTS)
    # The prompt's last token and three of the answer, of two rows each.
    assert {layer: found.steered_tokens for layer, found in trace.summary().items()} == {0: 8, 2: 8}
    assert {found.runs for found in trace.summary().values()} == {4}


def test_padding_is_not_counted() -> None:
    model = tiny.shared("llama")
    with vector().apply(model), trace_steering(model) as trace:
        logits(model, INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"])
    assert trace.summary()[1].steered_tokens == 7


def test_several_steerings_of_a_layer_are_one_change() -> None:
    model = tiny.shared("llama")
    with vector().apply(model, multiplier=2), vector().apply(model, multiplier=-1), trace_steering(model) as trace:
        logits(model, IDS)
    with vector().apply(model), trace_steering(model) as once:
        logits(model, IDS)
    assert trace.summary()[1].change == pytest.approx(once.summary()[1].change, rel=1e-4)


def test_what_is_ablated_everywhere_is_told_by_layer() -> None:
    model = tiny.shared("llama")
    with ablate_everywhere(model, torch.ones(tiny.HIDDEN)), trace_steering(model) as trace:
        logits(model, IDS)
    assert {layer: (found.runs, found.steered_tokens) for layer, found in trace.summary().items()} == dict.fromkeys(
        range(3), (1, 10)
    )


def test_tokens_steered_at_several_parts_of_a_layer_count_once_each() -> None:
    model = tiny.shared("llama")
    with (
        vector().apply(model, tokens=at([0, 1])),
        vector(layer_type="mlp").apply(model, tokens=at([1, 2])),
        trace_steering(model) as trace,
    ):
        logits(model, IDS)
    assert trace.summary()[1].steered_tokens == 6


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_runs_again_is_not_counted(reentrant: bool) -> None:
    model: Any = tiny.build("llama").train()
    enable_checkpointing(model, reentrant=reentrant)
    with vector(layer_type="mlp").apply(model), trace_steering(model) as trace:
        model(IDS, use_cache=False).logits.square().mean().backward()
    assert (trace.summary()[1].runs, trace.summary()[1].steered_tokens) == (1, 10)


def test_an_activation_of_zeros_has_no_share() -> None:
    model: Any = tiny.build("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] * 0, *args[1:]))
    direction = SteeringVector({1: torch.ones(tiny.HIDDEN)})
    with direction.apply(model), trace_steering(model) as trace:
        logits(model, IDS)
    assert trace.summary()[1].steered_tokens == 10
    assert math.isfinite(trace.summary()[1].change) or math.isnan(trace.summary()[1].change)


@pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="its Llama takes no prompts in one row")
def test_a_pass_of_many_prompts_in_one_row_is_traced_as_a_whole() -> None:
    model: Any = tiny.shared("llama")
    with vector().apply(model), trace_steering(model) as trace, torch.no_grad():
        model(IDS[:1], cu_seq_lens_q=torch.tensor([0, 2, 5]))
    assert trace.summary()[1].steered_tokens == 5


def test_it_does_not_keep_the_model() -> None:
    model: Any = tiny.build("llama")
    with vector().apply(model), trace_steering(model) as trace:
        logits(model, IDS)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None
    assert trace.summary()[1].runs == 1


def test_texts_are_cut_where_their_letters_are() -> None:
    class Words:
        """Spaces belong to the token behind them, but for the first."""

        def decode(self, ids: list[int]) -> str:
            return "".join(f" {'abc'[n]}" for n in ids)[1:]

    model = tiny.shared("llama")
    with vector().apply(model, tokens=at(1)), trace_steering(model) as trace:
        logits(model, torch.tensor([[0, 1, 2]]))
    output = io.StringIO()
    with redirect_stdout(output):
        trace.show(Words())
    assert output.getvalue() == "a[[ b]] c\n"


def test_threads_have_rows_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    prompts = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in ("Hello", "Bye")]
    with trace_steering(model) as trace:
        threads = [
            threading.Thread(
                target=vector().apply(model, tokens=generated(p), this_thread_only=True)(model.generate),
                kwargs={**p, "max_new_tokens": 6, "do_sample": False},
            )
            for p in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace.show(tokenizer)
    shown = capsys.readouterr().out
    assert "Hell[[o" in shown
    assert "By[[e" in shown


def test_token_ids_that_are_written_over_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    ids = tokenizer("one", return_tensors="pt")["input_ids"]
    with vector().apply(model, tokens=from_index(1)), trace_steering(model) as trace:
        logits(model, ids)
        ids.copy_(tokenizer("two", return_tensors="pt")["input_ids"])
        logits(model, ids)
    trace.show(tokenizer)
    assert capsys.readouterr().out == "o[[ne]]\nt[[wo]]\n"


def test_a_multiplier_of_0_changes_nothing() -> None:
    model = tiny.shared("llama")
    with vector().apply(model, multiplier=0), trace_steering(model) as trace:
        logits(model, IDS)
    assert repr(trace.summary()) == "{1: LayerSummary(runs=1, steered_tokens=0, change=nan)}"


def test_nothing_is_told_of_passes_outside_of_unsteered_ones_and_of_other_models() -> None:
    model, other = tiny.shared("llama"), tiny.shared("gpt2")
    with vector().apply(model), vector().apply(other):
        before = hooks_of(model), hooks_of(other)
        with trace_steering(model) as trace:
            logits(other, IDS)
        logits(model, IDS)
        assert (hooks_of(model), hooks_of(other)) == before
    with trace:
        logits(model, IDS)
    assert trace.summary() == {}


def test_two_traces_at_once() -> None:
    model = tiny.shared("llama")
    with vector().apply(model), trace_steering(model) as outer:
        logits(model, IDS)
        with trace_steering(model) as inner:
            logits(model, IDS)
        logits(model, IDS)
    assert (outer.summary()[1].runs, inner.summary()[1].runs) == (3, 1)


def test_as_a_text_it_is_a_table() -> None:
    model = tiny.shared("llama")
    with vector(0, 2, scale=1e-3).apply(model, tokens=from_index(4)), trace_steering(model) as trace:
        logits(model, IDS)
    lines = str(trace).splitlines()
    assert lines[0].split() == ["layer", "runs", "steered", "tokens", "change"]
    assert [line.split()[:3] for line in lines[1:]] == [["0", "1", "2"], ["2", "1", "2"]]
    assert all(line.endswith("%") for line in lines[1:])
    assert len({len(line) for line in lines}) == 1


def steered_chat(**options: Any) -> tuple[Any, Any]:
    """A trace of an answer to two prompts, and the tokenizer."""
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer(padding_side="left")
    inputs = tokenizer(["Hello", "Hi <you>"], return_tensors="pt", padding=True, return_token_type_ids=False)
    with vector().apply(model, tokens=generated(inputs)), trace_steering(model) as trace:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
    return trace, tokenizer


@pytest.mark.parametrize("use_cache", [True, False])
def test_shown_elsewhere_steered_tokens_stand_in_brackets(capsys: pytest.CaptureFixture[str], use_cache: bool) -> None:
    trace, tokenizer = steered_chat(use_cache=use_cache)
    trace.show(tokenizer)
    lines = capsys.readouterr().out.split("Hi")
    # The last token of each prompt, and two of the three of its answer: the third was never run.
    assert lines[0].startswith("Hell[[o")
    assert lines[1].startswith(" <you[[>")
    assert all(line.rstrip().endswith("]]") for line in lines)
    assert all(line.count("[[") == 1 for line in lines)


def test_shown_in_a_terminal_they_are_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    trace, tokenizer = steered_chat()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    trace.show(tokenizer)
    assert terminal.getvalue().startswith("Hell\x1b[7mo")
    assert terminal.getvalue().count("\x1b[0m") == 2


def test_shown_in_a_notebook_they_are_marked_and_the_text_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    ipython = SimpleNamespace(
        get_ipython=lambda: SimpleNamespace(kernel=object()),
        display=SimpleNamespace(display=shown.append, HTML=str),
    )
    trace, tokenizer = steered_chat()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    trace.show(tokenizer)
    assert "Hell<mark>o" in shown[0]
    assert "Hi &lt;you<mark>&gt;" in shown[0]
    assert shown[0].count("<pre") == 2


def test_one_prompt_after_another_is_shown_apart(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    with vector().apply(model, tokens=from_index(1)), trace_steering(model) as trace:
        for text in ("one", "two"):
            logits(model, tokenizer(text, return_tensors="pt")["input_ids"])
    trace.show(tokenizer)
    assert capsys.readouterr().out == "o[[ne]]\nt[[wo]]\n"


def test_without_token_ids_there_is_no_text() -> None:
    model: Any = tiny.shared("llama")
    with vector().apply(model), trace_steering(model) as trace, torch.no_grad():
        model(inputs_embeds=torch.ones(1, 3, tiny.HIDDEN))
    assert trace.summary()[1].steered_tokens == 3
    with pytest.raises(ValueError, match="the model got embeddings, not token ids"):
        trace.show(tiny.tokenizer())


@pytest.mark.compiles
def test_a_compiled_model_is_traced_and_runs_as_before_afterwards() -> None:
    torch.compiler.reset()
    model: Any = torch.compile(tiny.build("llama"), backend="eager")
    with vector().apply(model):
        expected = logits(model, IDS)
        with trace_steering(model) as trace:
            torch.testing.assert_close(logits(model, IDS), expected)
        torch.testing.assert_close(logits(model, IDS), expected)
    assert trace.summary()[1].steered_tokens == 10
    torch.compiler.reset()


def test_the_trace_of_a_model_that_is_gone_says_so() -> None:
    trace = trace_steering(tiny.build("llama"))
    gc.collect()
    with pytest.raises(RuntimeError, match="the model of this trace no longer exists: make a new trace"), trace:
        pass


def test_summaries_are_values() -> None:
    assert LayerSummary(1, 2, 0.5) == LayerSummary(1, 2, 0.5)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        trace_steering("gpt2")  # type: ignore[arg-type]
