"""Evaluations, against a loop that is written out here, and the verdicts on them."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering_vectors import SteeringVector, ablate_everywhere, ablation_operator, from_index, train_steering_vector
from steering_vectors.evaluation import (
    ConditionRow,
    Controls,
    Evaluation,
    EvaluationItem,
    Propensity,
    choice_propensity,
    evaluate,
    sweep,
    text_propensity,
    verdict,
)
from steering_vectors.evaluation.controls import permuted_labels, random_vector
from tests import tiny

ITEMS = [("I say", " yes", " no!"), ("Then we", " are glad", " weep"), ("It", " works", " fails now")]
TEXTS = ["It rains in the morning.", "The house is old."]
MULTIPLIERS = (-1.0, 0.0, 2.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.shared("llama")


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    return SteeringVector({1: torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(3))})


def by_hand(model: Any, prompt: str, answer: str, delta: torch.Tensor, start: int | None = None) -> torch.Tensor:
    """The log-probabilities (answer, vocabulary) of one pass, steered from a token on by a hook of its own."""
    tokenizer = tiny.tokenizer()
    first, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    begin = len(first) - 1 if start is None else start
    weights = torch.tensor([float(n >= begin) for n in range(len(whole))])[:, None]

    def add(_module: Any, _args: Any, output: Any) -> Any:
        steered = (output if isinstance(output, torch.Tensor) else output[0]) + weights * delta
        return steered if isinstance(output, torch.Tensor) else (steered, *output[1:])

    handle = tiny.blocks(model)[1].register_forward_hook(add)
    with torch.no_grad():
        logits = model(torch.tensor([whole]), use_cache=False).logits[0]
    handle.remove()
    return logits[len(first) - 1 : -1].log_softmax(dim=-1).double()


def scores_by_hand(log_probabilities: torch.Tensor, answer: str) -> torch.Tensor:
    ids = torch.tensor(tiny.tokenizer()(answer)["input_ids"])
    return log_probabilities.gather(-1, ids[:, None])[:, 0]


def propensities_by_hand(
    model: Any, vector: SteeringVector, items: Sequence[tuple[str, str, str]]
) -> np.ndarray[Any, Any]:
    found = []
    for prompt, matching, other in items:
        for m in MULTIPLIERS:
            delta = m * vector.layer_activations[1]
            sides = [scores_by_hand(by_hand(model, prompt, a, delta), a).mean().item() for a in (matching, other)]
            found.append(sides[0] - sides[1])
    return np.array(found).reshape(len(items), len(MULTIPLIERS))


def test_propensities_and_slopes_are_those_of_a_loop(model: Any, vector: SteeringVector) -> None:
    result = evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=MULTIPLIERS, texts=[], batch_size=2)
    expected = propensities_by_hand(model, vector, ITEMS)
    slopes = np.polyfit(MULTIPLIERS, expected.T, 1)[0]
    np.testing.assert_allclose([item.propensities for item in result.items], expected, atol=1e-5)
    np.testing.assert_allclose([item.slope for item in result.items], slopes, atol=1e-5)
    row = result.rows[0]
    assert row.condition == "vector"
    assert row.slope == pytest.approx(slopes.mean(), abs=1e-5)
    assert row.anti_steerable == pytest.approx((slopes < 0).mean())
    assert row.propensities == pytest.approx(expected.mean(axis=0), abs=1e-5)
    for place, values in enumerate(expected.T):
        drawn = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
        ends = (row.propensities_low[place], row.propensities_high[place])
        assert ends == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.1 * np.ptp(values))
    unsteered = next(row for row in result.rows if row.condition == "unsteered")
    assert unsteered.propensities_low == pytest.approx((row.propensities_low[1],))
    assert unsteered.propensities_high == pytest.approx((row.propensities_high[1],))
    assert unsteered.propensities == pytest.approx((expected[:, 1].mean(),), abs=1e-5)


def test_costs_are_those_of_a_loop(model: Any, vector: SteeringVector) -> None:
    result = evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=MULTIPLIERS, texts=TEXTS, controls=None)
    kl: list[float] = []
    change: list[float] = []
    for text in TEXTS:
        prompt, rest = text[:2], text[2:]  # a token is a character
        before = by_hand(model, prompt, rest, torch.zeros(tiny.HIDDEN))
        after = by_hand(model, prompt, rest, 2.0 * vector.layer_activations[1])
        kl += (before.exp() * (before - after)).sum(dim=-1).tolist()
        change += (scores_by_hand(before, rest) - scores_by_hand(after, rest)).tolist()
    row = result.rows[0]
    assert row.kl_mean[2] == pytest.approx(np.mean(kl), rel=1e-4)
    assert row.kl_p95[2] == pytest.approx(np.quantile(kl, 0.95), rel=1e-4)
    assert row.nll_change[2] == pytest.approx(np.mean(change), rel=1e-4, abs=1e-6)
    assert (row.kl_mean[1], row.kl_p95[1], row.nll_change[1]) == (0, 0, 0)


def test_the_cost_of_first_tokens_leaves_decided_ones_out(vector: SteeringVector) -> None:
    model = tiny.build("llama")
    first = evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=MULTIPLIERS, texts=[], controls=None).rows[0]
    before = [by_hand(model, prompt, a, torch.zeros(tiny.HIDDEN))[0] for prompt, a, _ in ITEMS]
    after = [by_hand(model, prompt, a, 2.0 * vector.layer_activations[1])[0] for prompt, a, _ in ITEMS]
    expected = np.mean([(b.exp() * (b - a)).sum().item() for b, a in zip(before, after)])
    assert first.first_kl[2] == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        model.lm_head.weight *= 1000  # all is decided now
    assert evaluate(model, tiny.tokenizer(), vector, ITEMS, texts=[], controls=None).rows[0].first_kl == ()


def test_the_same_seed_gives_the_same_numbers(model: Any, vector: SteeringVector) -> None:
    first, again, other = (
        evaluate(model, tiny.tokenizer(), vector, ITEMS, texts=TEXTS, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_batches_do_not_matter(model: Any, vector: SteeringVector) -> None:
    one, three = (evaluate(model, tiny.tokenizer(), vector, ITEMS, texts=TEXTS, batch_size=n) for n in (1, 3))
    for a, b in zip(one.rows, three.rows):
        assert a.propensities == pytest.approx(b.propensities, abs=1e-5)
        assert a.kl_mean == pytest.approx(b.kl_mean, rel=1e-3, abs=1e-6)


def test_choices_are_asked_in_both_orders(model: Any, vector: SteeringVector) -> None:
    item = ("Do you like it?", "Yes, I do", "No")
    result = evaluate(
        model, tiny.tokenizer(), vector, [item], multipliers=[0, 1], texts=[], propensity=choice_propensity()
    )
    found = []
    for first, second, letters in ((item[1], item[2], "AB"), (item[2], item[1], "BA")):
        prompt = f"{item[0]}\n\nChoices:\n (A) {first}\n (B) {second}\n\nAnswer: ("
        after = by_hand(model, prompt, "A", vector.layer_activations[1])
        matching, other = (scores_by_hand(after, letter)[0].item() for letter in letters)
        found.append(matching - other)
    assert result.items[0].propensities[1] == pytest.approx(np.mean(found), abs=1e-5)


def test_choices_of_a_chat_are_asked_in_the_users_turn() -> None:
    item = EvaluationItem([{"role": "user", "content": "Well?"}], "Yes", "No")
    first, second = choice_propensity().asked(item)
    assert first.prompt[0]["content"] == "Well?\n\nChoices:\n (A) Yes\n (B) No"
    assert first.prompt[1] == {"role": "assistant", "content": "Answer: ("}
    assert second.prompt[0]["content"] == "Well?\n\nChoices:\n (A) No\n (B) Yes"
    assert (first.matching, second.matching) == ("A", "B")


def test_a_propensity_is_any_callable(model: Any, vector: SteeringVector) -> None:
    def total(matching: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return matching.sum() - other.sum()

    result = evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=[0, 1], texts=[], propensity=total)
    delta = vector.layer_activations[1]
    sides = [scores_by_hand(by_hand(model, "I say", a, delta), a).sum().item() for a in (" yes", " no!")]
    assert result.items[0].propensities[1] == pytest.approx(sides[0] - sides[1], abs=1e-5)


def test_chats_are_rendered_as_training_renders_them(model: Any, vector: SteeringVector) -> None:
    tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
    chat = [{"role": "user", "content": "Hi"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    as_chat = evaluate(model, tokenizer, vector, [(chat, "Good", "Bad")], texts=[])
    as_text = evaluate(model, tokenizer, vector, [(text, "Good", "Bad")], texts=[])
    assert as_chat.items[0].propensities == pytest.approx(as_text.items[0].propensities, abs=1e-6)


def test_tokens_and_operators_are_passed_on(model: Any, vector: SteeringVector) -> None:
    result = evaluate(model, tiny.tokenizer(), vector, ITEMS[:1], tokens=from_index(1), multipliers=[0, 1], texts=[])
    sides = [
        scores_by_hand(by_hand(model, "I say", a, vector.layer_activations[1], start=1), a).mean().item()
        for a in (" yes", " no!")
    ]
    assert result.items[0].propensities[1] == pytest.approx(sides[0] - sides[1], abs=1e-5)
    ablated = evaluate(
        model, tiny.tokenizer(), vector, ITEMS, operator=ablation_operator(), multipliers=[0, 1, 2], texts=[]
    )
    assert ablated.items[0].propensities[1] == pytest.approx(ablated.items[0].propensities[2], abs=1e-5)


def test_an_ablation_everywhere_is_measured_by_rows(model: Any, vector: SteeringVector) -> None:
    def ablated(given: SteeringVector, on: list[float], _tokens: Any) -> Any:
        return ablate_everywhere(model, given, rows=[multiplier > 0 for multiplier in on])

    result = evaluate(
        model, tiny.tokenizer(), vector, ITEMS, apply=ablated, tokens=None, multipliers=[0, 1], texts=TEXTS
    )
    plain = evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=[0, 1], texts=[], controls=None)
    with ablate_everywhere(model, vector):
        alone = evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=[0, 1], texts=[], controls=None)
    for item, off, on in zip(result.items, plain.items, alone.items):
        assert item.propensities == pytest.approx((off.propensities[0], on.propensities[0]), abs=1e-5)
    assert [row.condition for row in result.rows] == ["vector", "random 1", "random 2", "random 3", "unsteered"]
    assert len({row.propensities[1] for row in result.rows[:4]}) == 4


def test_an_apply_may_steer_what_it_likes(model: Any, vector: SteeringVector) -> None:
    """Though the selection that it is given would leave the prompt alone, and unsteered passes were checked before."""
    items = [("I say it now and then", " yes", " no!"), ("We say", " good", " bad")]
    result = evaluate(
        model,
        tiny.tokenizer(),
        vector,
        items,
        apply=lambda given, multipliers, _tokens: given.apply(model, multiplier=multipliers),
        multipliers=[0, 1],
        texts=[],
        controls=None,
    )
    expected = evaluate(
        model, tiny.tokenizer(), vector, items, tokens=None, multipliers=[0, 1], texts=[], controls=None
    )
    for one, other in zip(result.items, expected.items):
        assert one.propensities == pytest.approx(other.propensities, abs=1e-5)


def test_sets_of_iterators_are_permuted_several_times(model: Any, vector: SteeringVector) -> None:
    sets = {"positive": iter(["I love it", "Good"]), "negative": iter(["I hate it", "Bad"])}
    result = evaluate(
        model, tiny.tokenizer(), vector, ITEMS, texts=[], controls=Controls(random=0, permuted=2), training_samples=sets
    )
    assert [row.condition for row in result.rows] == ["vector", "permuted 1", "permuted 2", "unsteered"]


def test_costs_are_shown_where_the_model_is_steered(model: Any, vector: SteeringVector) -> None:
    result = evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=[-4, 0, 4], texts=TEXTS, controls=None)
    assert "KL +4" in str(result)


def test_a_system_prompt_and_variants_have_rows(model: Any, vector: SteeringVector) -> None:
    shouted = [(prompt.upper(), matching, other) for prompt, matching, other in ITEMS]
    result = evaluate(
        model,
        tiny.tokenizer(),
        vector,
        ITEMS,
        texts=[],
        controls=None,
        system_prompt="Be kind.",
        variants={"shouted": shouted, "a role": "You are a grump."},
    )
    conditions = [row.condition for row in result.rows]
    assert conditions == ["vector", "variant: shouted", "variant: a role", "system prompt"]
    alone = evaluate(model, tiny.tokenizer(), vector, shouted, texts=[], controls=None)
    assert result.rows[1].propensities == pytest.approx(alone.rows[0].propensities, abs=1e-6)
    kind = [(f"Be kind.\n\n{prompt}", matching, other) for prompt, matching, other in ITEMS]
    asked = evaluate(model, tiny.tokenizer(), vector, kind, texts=[], controls=None).rows[0]
    assert result.rows[3].propensities == pytest.approx((asked.propensities[2],), abs=1e-6)
    assert result.rows[3].slope is None
    assert "Worst variant: " in str(result)


def test_answers_are_generated_and_scored(model: Any, vector: SteeringVector) -> None:
    result = evaluate(
        model,
        tiny.tokenizer(),
        vector,
        ITEMS,
        multipliers=[0, 3],
        texts=[],
        controls=None,
        score=lambda prompt, answer: float(len(answer)),
        max_new_tokens=6,
    )
    assert [row.multiplier for row in result.answers] == [0, 3]
    plain = model.generate(
        torch.tensor([tiny.tokenizer()("I say")["input_ids"]]), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    expected = tiny.tokenizer().decode(plain[0, 5:], skip_special_tokens=True)
    assert result.answers[0].answers[0] == expected
    assert result.answers[0].scores == tuple(float(len(answer)) for answer in result.answers[0].answers)
    assert result.answers[1].answers != result.answers[0].answers
    assert "log-likelihood" in str(result)


def test_equal_multipliers_have_one_row_of_answers(model: Any, vector: SteeringVector) -> None:
    arguments = {"texts": [], "controls": None, "score": lambda prompt, answer: float(len(answer)), "max_new_tokens": 3}
    twice, once = (
        evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=multipliers, **arguments)
        for multipliers in ([0, 3, 3], [0, 3])
    )
    assert twice.answers == once.answers


def test_a_chats_template_gets_its_arguments_wherever_it_is_rendered(model: Any, vector: SteeringVector) -> None:
    tokenizer, chat = tiny.tokenizer(chat_template=tiny.QWEN_3), [{"role": "user", "content": "Hi"}]
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    shown: list[Any] = []

    def measured(prompt: Any, **arguments: Any) -> Evaluation:
        return evaluate(
            model,
            tokenizer,
            vector,
            [(prompt, "Good", "Bad")],
            multipliers=[0, 1],
            texts=[prompt],
            score=lambda asked, answer: float(shown.append(asked) or len(answer)),
            max_new_tokens=8,
            **arguments,
        )

    as_chat, as_text = measured(chat, chat_template_kwargs={"enable_thinking": False}), measured(written)
    assert as_chat.rows == as_text.rows
    for one, other in zip(as_chat.answers, as_text.answers):
        assert replace(one, prompts=()) == replace(other, prompts=())
    assert shown == [chat, chat, written, written]


class TestControls:
    def test_need_numbers_that_are_not_negative(self) -> None:
        with pytest.raises(ValueError, match="random must be a whole number of controls, 0 or more, got -1"):
            Controls(random=-1)

    @pytest.mark.parametrize("measure", [evaluate, sweep])
    def test_are_no_number(self, measure: Any) -> None:
        """The error comes before anything is measured."""
        model = tiny.build("llama")
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        vector, items = SteeringVector({0: torch.ones(tiny.HIDDEN)}), 2 * [("I say", " yes", " no")]
        with pytest.raises(TypeError, match=r"controls must be Controls\(...\), or None for none, got 3"):
            measure(model, tiny.tokenizer(), vector, items, controls=3)

    def test_random_directions_are_as_long_as_the_vectors(self) -> None:
        vector = SteeringVector({0: torch.ones(8), 2: 3 * torch.ones(8)})
        found = random_vector(vector, seed=0)
        assert found.norms() == pytest.approx(vector.norms())
        assert abs(float(found.cosine_similarity(vector)[0])) < 0.95
        assert found == random_vector(vector, seed=0) != random_vector(vector, seed=1)

    @pytest.mark.parametrize("count", [4, 7])
    def test_exactly_half_of_the_labels_are_swapped(self, count: int) -> None:
        samples = [(f"+{n}", f"-{n}") for n in range(count)]
        found = permuted_labels(samples, seed=0)
        assert len(found) == count // 2 * 2
        assert sum(pair in samples for pair in found) == count // 2
        assert sum((negative, positive) in samples for positive, negative in found) == count // 2

    def test_of_two_sets_half_of_each_change_sides(self) -> None:
        sets = {"positive": ["+1", "+2", "+3", "+4"], "negative": ["-1", "-2"]}
        found = permuted_labels(sets, seed=0)
        for side in found.values():
            assert sorted(text[0] for text in side) == ["+", "+", "-"]

    def test_what_all_pairs_share_cancels_out(self, model: Any) -> None:
        tokenizer = tiny.tokenizer()
        pairs = [("I love it", "I hate it")] * 6
        vector = train_steering_vector(model, tokenizer, pairs, layers=[1])
        permuted = train_steering_vector(model, tokenizer, permuted_labels(pairs, 0), layers=[1])
        assert permuted.norms()[1] < 1e-5 * vector.norms()[1]

    def test_have_rows_and_can_be_switched_off(self, model: Any, vector: SteeringVector) -> None:
        pairs = [("I love it", "I hate it"), ("Good", "Bad")]
        given = {"texts": [], "training_samples": pairs}
        result = evaluate(model, tiny.tokenizer(), vector, ITEMS, controls=Controls(random=2), **given)
        assert [row.condition for row in result.rows] == ["vector", "random 1", "random 2", "permuted 1", "unsteered"]
        assert len(evaluate(model, tiny.tokenizer(), vector, ITEMS, controls=None, **given).rows) == 1


def row(condition: str, slope: float, half: float = 0.05) -> ConditionRow:
    return ConditionRow(condition, (-1.0, 1.0), (-slope, slope), slope, slope - half, slope + half, items=9)


class TestVerdict:
    @pytest.mark.parametrize(
        ("rows", "begins"),
        [
            ([row("vector", 0.8), row("random 1", 0.1)], "steers: its slope is +0.80 [+0.75, +0.85]"),
            ([row("vector", 0.8), row("random 1", -0.78)], "does not steer: its slope is +0.80"),
            ([row("vector", 0.8), row("random 1", 0.72)], "does not steer: its slope is +0.80"),
            ([row("vector", 0.04)], "does not steer: its slope is +0.04 [-0.01, +0.09], which reaches zero"),
            ([row("vector", -0.8), row("random 1", 0.1)], "does not steer: it steers the other way"),
            ([row("vector", 0.0, half=0.0)], "does not steer"),
            ([row("vector", math.nan)], "does not steer"),
            ([row("vector", 0.8), row("random 1", math.nan)], "does not steer"),
            (
                [replace(row("vector", 0.8, half=0.0), items=1)],
                "does not steer: one item is too few to tell, its slope is",
            ),
            ([row("vector", 0.8), row("variant: x", 0.9)], "steers: its slope is +0.80 [+0.75, +0.85]; no control"),
            ([row("vector", 0.8), ConditionRow("unsteered", (0.0,), (3.0,))], "steers"),
        ],
    )
    def test_follows_from_the_numbers(self, rows: list[ConditionRow], begins: str) -> None:
        assert verdict(rows).startswith(begins)
        assert Evaluation(tuple(rows), (), "", texts=0, seed=0).verdict == verdict(rows)

    def test_needs_the_vectors_row(self) -> None:
        with pytest.raises(ValueError, match="must be the first"):
            verdict([row("random 1", 0.1)])

    @pytest.mark.parametrize("kind", ["random", "zero"])
    def test_is_no_for_vectors_without_effect(self, model: Any, kind: str) -> None:
        generator = torch.Generator().manual_seed(5)
        direction = torch.zeros(tiny.HIDDEN) if kind == "zero" else torch.randn(tiny.HIDDEN, generator=generator)
        items = [(f"I {verb} it", " yes", " no!") for verb in ("see", "know", "take", "want", "like", "hear")]
        result = evaluate(model, tiny.tokenizer(), SteeringVector({1: direction}), items, texts=[])
        assert result.verdict.startswith("does not steer: ")


class TestResult:
    def test_is_a_table_of_80_columns(self, model: Any, vector: SteeringVector) -> None:
        result = evaluate(model, tiny.tokenizer(), vector, ITEMS, texts=TEXTS, variants={"of a very long name": "Be."})
        text = str(result)
        assert max(map(len, text.splitlines())) <= 80
        assert text.splitlines()[0].split() == [
            *("condition", "at", "-2", "at", "0", "at", "+2", "slope", "[95", "%", "interval]", "reversed"),
            *("KL", "+1", "p95"),
        ]
        assert " ".join(text.split()).endswith(result.verdict)
        assert result.verdict in result._repr_html_()

    def test_round_trips_through_json(self, model: Any, vector: SteeringVector, tmp_path: Path) -> None:
        chat = [{"role": "user", "content": "Hi"}]
        tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
        result = evaluate(
            model, tokenizer, vector, [(chat, "a", "b"), *ITEMS], texts=TEXTS, score=lambda p, a: 1.0, max_new_tokens=2
        )
        assert Evaluation.from_json(result.to_json()) == result
        path = tmp_path / "result.json"
        path.write_text("old")
        result.to_json(path)
        assert Evaluation.from_json(path) == result
        assert [file.name for file in tmp_path.iterdir()] == ["result.json"]

    @pytest.mark.parametrize("text", ["{}", '{"rows": [{}]}', "{", '{"rows": 3}'])
    def test_other_json_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="not (the )?JSON of an evaluation"):
            Evaluation.from_json(text)

    def test_is_a_data_frame_if_pandas_is_there(self, model: Any, vector: SteeringVector) -> None:
        pandas = pytest.importorskip("pandas")
        frame = evaluate(model, tiny.tokenizer(), vector, ITEMS, texts=[], controls=None).to_pandas()
        assert isinstance(frame, pandas.DataFrame)
        assert list(frame["multiplier"]) == [-2, -1, 0, 1, 2]
        assert (frame["propensity_low"] <= frame["propensity"]).all()
        assert (frame["propensity"] <= frame["propensity_high"]).all()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no items": ({"items": []}, ValueError, "items is empty"),
    "pairs": ({"items": [("I love it", "I hate it")]}, ValueError, "item 0 has two parts, as training pairs have"),
    "four parts": ({"items": [("a", "b", "c", "d")]}, ValueError, "item 0 has 4 parts"),
    "a text": ({"items": "abc"}, TypeError, "items must be a list"),
    "texts": ({"items": ["abc"]}, TypeError, "item 0 is a str"),
    "other keys": ({"items": [{"prompt": "a"}]}, ValueError, r"item 0 has the keys \['prompt'\]"),
    "equal answers": ({"items": [("a", " b", " b")]}, ValueError, "item 0: both answers are ' b'"),
    "an empty answer": ({"items": [("a", "", " b")]}, ValueError, "item 0: matching is empty"),
    "an answer that is no text": ({"items": [("a", 1, " b")]}, TypeError, "item 0: matching must be a text"),
    "an empty prompt": ({"items": [("", " a", " b")]}, ValueError, "item 0: the prompt is empty"),
    "one multiplier": ({"multipliers": [1, 1]}, ValueError, "at least two different multipliers"),
    "multipliers that are a number": ({"multipliers": 2}, TypeError, "multipliers must be a list"),
    "a NaN multiplier": ({"multipliers": [0, float("nan")]}, ValueError, "a multiplier must be finite"),
    "a text of one token": ({"texts": ["a"]}, ValueError, "text 0 has 1 token"),
    "one text": ({"texts": "It rains."}, TypeError, "texts must be a list"),
    "another width": ({"vector": SteeringVector({1: torch.ones(5)})}, ValueError, "5 numbers"),
    "no vector": ({"vector": torch.ones(5)}, TypeError, "vector must be a SteeringVector"),
    "a batch of none": ({"batch_size": 0}, ValueError, "batch_size must be"),
    "a propensity that is a name": ({"propensity": "text"}, TypeError, "propensity must be callable"),
    "an apply that takes one argument": ({"apply": len}, TypeError, "apply must be callable with 3"),
    "an apply and an operator": (
        {"apply": lambda v, m, t: v.apply(None), "operator": ablation_operator()},
        ValueError,
        "operator and apply were given",
    ),
    "a score that takes one argument": ({"score": len}, TypeError, "score must be callable with 2"),
    "a variant of other items": ({"variants": {"x": ITEMS[:1]}}, ValueError, "variant 'x' has 1 items"),
    "a bad variant": ({"variants": {"x": [("a", "b")]}}, ValueError, "variant 'x': item 0 has two parts"),
    "variants without names": ({"variants": ["Be."]}, TypeError, "variants must be a mapping from names"),
    "a system prompt that is no text": ({"system_prompt": 3}, TypeError, "system_prompt must be a text, got int"),
    "samples of three": (
        {"training_samples": [("a", "b", "c")] * 2},
        TypeError,
        r"sample 0 must be a pair \(positive, negative\)",
    ),
    "one sample to permute": ({"training_samples": [("a", "b")]}, ValueError, "at least two training samples"),
    "a typo": ({"multiplier": [1]}, TypeError, "did you mean multipliers="),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case: str, model: Any, vector: SteeringVector) -> None:
    arguments, error, message = BAD[case]
    given = {"vector": vector, "items": ITEMS, "texts": [], **arguments}
    with pytest.raises(error, match=message):
        evaluate(model, tiny.tokenizer(), **given)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_answer_without_tokens_is_refused(model: Any, vector: SteeringVector) -> None:
    template = tiny.CHATML.replace("m['content']", "m['content'].strip()")
    tokenizer = tiny.tokenizer(chat_template=template)
    with pytest.raises(ValueError, match="item 0: "):
        evaluate(model, tokenizer, vector, [([{"role": "user", "content": "Hi"}], " ", "b")], texts=[])


def test_nan_names_the_item(vector: SteeringVector) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny.tokenizer()("~")["input_ids"]] = torch.nan
    with pytest.raises(ValueError, match="item 1: the log-probabilities of an answer are NaN"):
        evaluate(model, tiny.tokenizer(), vector, [("I say", " yes", " no"), ("It ~", " is", " not")], texts=[])


@pytest.mark.parametrize(
    ("propensity", "error", "message"),
    [
        (lambda matching, other: None, TypeError, "item 0: its propensity at multiplier 0 must be a number, but"),
        (lambda matching, other: matching, TypeError, "must be a number, but propensity returned tensor"),
        (
            lambda matching, other: float("nan"),
            ValueError,
            "item 0: its propensity at multiplier 0 must be finite, but",
        ),
        (
            lambda matching, other: -math.inf,
            ValueError,
            "is -inf: the least log-probability of its answers' tokens is -",
        ),
    ],
)
def test_a_propensity_that_is_no_number_is_refused(
    model: Any, vector: SteeringVector, propensity: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(model, tiny.tokenizer(), vector, ITEMS, multipliers=[0, 1], texts=[], propensity=propensity)


@pytest.mark.parametrize(
    ("scored", "error", "message"),
    [
        (None, TypeError, "score must return a number, but returned None for the answer '"),
        ("good", TypeError, "score must return a number, but returned 'good'"),
        (float("nan"), ValueError, "score must return a finite number, but returned nan"),
    ],
)
def test_a_score_that_is_no_number_is_refused(
    model: Any, vector: SteeringVector, scored: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(
            model, tiny.tokenizer(), vector, ITEMS, texts=[], controls=None, score=lambda p, a: scored, max_new_tokens=2
        )


def test_protocols_are_met() -> None:
    functions: list[Propensity] = [text_propensity(), choice_propensity()]
    assert json.dumps(list(map(repr, functions))) == '["text_propensity()", "choice_propensity()"]'
