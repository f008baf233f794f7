"""Scores are those of each prompt and answer alone, without a cache, in a loop written out here."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import SteeringVector, from_index, generated
from steering_vectors.evaluation import scoring
from steering_vectors.evaluation.continuations import Continuation
from steering_vectors.evaluation.manner import Manner, Steering
from steering_vectors.evaluation.scoring import Row, Scorer
from tests import tiny

PROMPTS = [(11, 12, 13, 14, 15), (21, 22, 23, 24, 25, 26, 27, 28, 29), (31, 32)]
ANSWERS = [(41, 42), (51, 52, 53, 54), (61,)]
CONTINUATIONS = [Continuation(prompt, answer) for prompt, answer in itertools.product(PROMPTS, ANSWERS)]
LONGER = [Continuation(prompt, answer) for prompt in PROMPTS for answer in (ANSWERS[0], tuple(range(60, 69)))]
MULTIPLIERS = (-1.5, 0.0, 1.0)
ROWS = [Row(number, multiplier) for number in range(len(CONTINUATIONS)) for multiplier in MULTIPLIERS]
LAYER = 1

Selects = Callable[[int, int], bool]
TOKENS: dict[str, tuple[Any, Selects]] = {
    "generated": (generated, lambda place, length: place >= length - 1),
    "all": (None, lambda place, length: True),
    "from_index(1)": (from_index(1), lambda place, length: place >= 1),
    "a function": (lambda inputs: generated(inputs) & from_index(2), lambda place, length: place >= max(length - 1, 2)),
}


def vector() -> SteeringVector:
    return SteeringVector({LAYER: torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(0))})


def alone(model: Any, part: Continuation, multiplier: float, selects: Selects) -> Tensor:
    """The log-probabilities of an answer from one pass, steered by a hook that is written out here."""
    weights = torch.tensor([float(selects(n, len(part.prompt))) for n in range(len(part))])[:, None]
    delta = weights * multiplier * vector().layer_activations[LAYER]

    def add(_module: Any, _args: Any, output: Any) -> Any:
        return output + delta if isinstance(output, Tensor) else (output[0] + delta, *output[1:])

    handle = tiny.blocks(model)[LAYER].register_forward_hook(add)
    with torch.no_grad():
        logits = model(torch.tensor([part.prompt + part.answer]), use_cache=False).logits[0]
    handle.remove()
    log_probabilities = logits[len(part.prompt) - 1 : -1].log_softmax(dim=-1)
    return log_probabilities.gather(-1, torch.tensor(part.answer)[:, None])[:, 0]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_equal_a_pass_for_each_answer_alone(architecture: str, tokens: str) -> None:
    model = tiny.shared(architecture)
    given, selects = TOKENS[tokens]
    found = Scorer(model).batch(CONTINUATIONS).scores(ROWS, Steering(model, vector(), Manner(given)))
    for row, answer in zip(ROWS, found, strict=True):
        expected = alone(model, CONTINUATIONS[row.number], row.multiplier, selects)
        torch.testing.assert_close(answer.tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_a_prompts_cache_is_shared(architecture: str) -> None:
    model = tiny.shared(architecture)
    scorer = Scorer(model)
    batch = scorer.batch(CONTINUATIONS)
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for multiplier in (1.0, 2.0):
        rows = [Row(number, multiplier) for number in range(len(CONTINUATIONS))]
        batch.scores(rows, Steering(model, vector(), Manner(generated)))
    handle.remove()
    if architecture == "gpt2" and tiny.ON_TRANSFORMERS_4:
        pytest.skip("its cache is a tuple, which isn't shared")
    assert scorer._ways[0] is scoring._above_known_blocks
    answers = max(map(len, ANSWERS))
    # All prompts once but for their last tokens; the blocks below; the answers; a row alone to compare; the answers.
    assert lengths[:3] == [max(map(len, PROMPTS)) - 1, answers, answers]
    assert lengths[4:] == [answers]


@pytest.mark.parametrize("fault", ["cache", "padding"])
def test_a_way_that_scores_otherwise_is_left(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose cache, or whose padding, changes what it computes is scored another way."""
    model = tiny.build("llama")
    run = scoring.run

    def faulty(model: Any, inputs: Any, **kwargs: Any) -> Any:
        output = run(model, inputs, **kwargs)
        padded = not bool(inputs["attention_mask"].all())
        if kwargs.get("cache") is not None or (fault == "padding" and padded):
            output.logits = output.logits + torch.linspace(0, 0.1, output.logits.shape[-1])
        return output

    monkeypatch.setattr(scoring, "run", faulty)
    scorer = Scorer(model)
    found = scorer.batch(CONTINUATIONS).scores(ROWS, Steering(model, vector(), Manner(generated)))
    for row, answer in zip(ROWS, found, strict=True):
        expected = alone(model, CONTINUATIONS[row.number], row.multiplier, TOKENS["generated"][1])
        torch.testing.assert_close(answer.tokens, expected, atol=1e-5, rtol=1e-5)
    left = {"cache": scoring._in_padded_rows, "padding": scoring._in_equal_rows}
    assert scorer._ways[0] is left[fault]


def test_a_way_that_was_seen_without_padding_is_looked_at_again_with_it() -> None:
    """The state of rwkv takes padding in. Short prompts suffer most, whose answers may be long."""
    model = tiny.shared("rwkv")
    scorer = Scorer(model)
    longer = tuple(range(71, 83))
    for prompts, answers in (
        ([longer, longer[::-1]], ANSWERS[:1]),
        ([longer, longer[:4]], ANSWERS[:1]),
        ([longer[:7], longer[:1]], ANSWERS),
    ):
        parts = [Continuation(prompt, answer) for prompt, answer in itertools.product(prompts, answers)]
        parts += [Continuation(prompts[1], longer)]
        rows = [Row(number, 1.0) for number in range(len(parts))]
        found = scorer.batch(parts).scores(rows, Steering(model, vector(), Manner(generated)))
        for part, answer in zip(parts, found, strict=True):
            expected = alone(model, part, 1.0, TOKENS["generated"][1])
            torch.testing.assert_close(answer.tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_longest_row_of_a_pass_changes_no_other(kind: str) -> None:
    """Their rotary embeddings go by the longest row: the first batch is short, and the next one has a longer row."""
    expected = [alone(tiny.scaled_rope(kind), part, 1.0, TOKENS["generated"][1]) for part in (*CONTINUATIONS, *LONGER)]
    scorer = Scorer(tiny.scaled_rope(kind))
    steering = Steering(scorer.model, vector(), Manner(generated))
    found = []
    for parts in (CONTINUATIONS, LONGER):
        found += scorer.batch(parts).scores([Row(number, 1.0) for number in range(len(parts))], steering)
    for right, answer in zip(expected, found, strict=True):
        torch.testing.assert_close(answer.tokens, right, atol=1e-5, rtol=1e-5)


def test_passes_are_split_where_logits_would_be_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.shared("llama")
    expected = Scorer(model).batch(CONTINUATIONS).scores(ROWS, Steering(model, vector(), Manner(generated)))
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 3 * 5 * tiny.VOCABULARY)
    found = Scorer(model).batch(CONTINUATIONS).scores(ROWS, Steering(model, vector(), Manner(generated)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)


def test_first_tokens_have_the_whole_distribution() -> None:
    model = tiny.shared("llama")
    (answer,) = Scorer(model).batch(CONTINUATIONS[:1]).scores([Row(0)])
    assert answer.first.exp().sum().item() == pytest.approx(1)
    assert answer.first[CONTINUATIONS[0].answer[0]].item() == pytest.approx(answer.tokens[0].item())


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.build("gpt2")
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    Scorer(model).batch(CONTINUATIONS).scores(ROWS, Steering(model, vector(), Manner(generated)))
    assert [module.training for module in model.modules()] == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_dropout_is_off() -> None:
    model = tiny.build("gpt2", resid_pdrop=0.5)
    expected = Scorer(model).batch(CONTINUATIONS).scores([Row(0)])[0].tokens
    model.train()
    assert torch.equal(Scorer(model).batch(CONTINUATIONS).scores([Row(0)])[0].tokens, expected)


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="evaluation needs a decoder-only one"):
        Scorer(model)
