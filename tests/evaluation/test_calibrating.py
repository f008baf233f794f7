"""Calibration meets its budget, and says where it can't."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_vectors import SteeringVector, ablation_operator, generated
from steering_vectors.evaluation import calibrate, evaluate
from steering_vectors.evaluation.calibrating import _search
from tests import tiny

TEXTS = ["It rains in the morning.", "The house is old."]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.shared("llama")


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    generator = torch.Generator().manual_seed(3)
    return SteeringVector({layer: torch.randn(tiny.HIDDEN, generator=generator) for layer in (0, 1)})


@pytest.mark.parametrize("budget", [1e-4, 0.03, 0.5])
def test_the_budget_is_met_as_evaluate_measures_it(model: Any, vector: SteeringVector, budget: float) -> None:
    result = calibrate(model, tiny.tokenizer(), vector, TEXTS, max_kl=budget, tokens=generated, batch_size=1)
    assert result.kl_p95 == pytest.approx(budget, rel=0.021)
    assert len(result.evaluations) <= 10
    row = evaluate(
        model,
        tiny.tokenizer(),
        vector,
        [("I say", " yes", " no")],
        multipliers=[0, result.multiplier],
        texts=TEXTS,
        controls=None,
    ).rows[0]
    assert row.kl_p95[1] == pytest.approx(result.kl_p95, rel=1e-2)


def test_chats_are_rendered_with_the_arguments_of_the_template(model: Any, vector: SteeringVector) -> None:
    tokenizer, chat = tiny.tokenizer(chat_template=tiny.QWEN_3), [{"role": "user", "content": "Hi"}]
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    found = calibrate(model, tokenizer, vector, [chat], max_kl=0.1, chat_template_kwargs={"enable_thinking": False})
    assert found == calibrate(model, tokenizer, vector, [written], max_kl=0.1)


@given(
    st.floats(-3, 3).map(lambda x: 10**x),
    st.floats(1, 4),
    st.floats(-3, 1).map(lambda x: 10**x),
    st.floats(0.1, 10),
)
@settings(deadline=None, max_examples=300)
def test_the_search_finds_any_power_that_levels_off(scale: float, power: float, budget: float, bend: float) -> None:
    """KL that grows with a power of the multiplier, and slower beyond some point."""

    def kl(multiplier: float) -> float:
        x = (scale * multiplier) ** power
        return float(x / (1 + x / (20 * bend)) ** 0.5)

    tried = _search(kl, budget)
    assert len(tried) <= 10
    assert min(abs(np.log(found / budget)) for _, found in tried) <= 0.02


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"operator": ablation_operator()}, ValueError, "An operator that ignores strength"),
        ({"vector": SteeringVector({1: torch.zeros(tiny.HIDDEN)})}, ValueError, "a vector of zeros"),
        ({"max_kl": 0}, ValueError, "max_kl must be more than 0"),
        ({"max_kl": "1"}, TypeError, "max_kl must be a number"),
        ({"max_kl": 1e9}, ValueError, "no multiplier was found"),
        ({"texts": []}, ValueError, "texts is empty"),
        ({"texts": ["a"]}, ValueError, "text 0 has 1 token"),
        ({"vector": None}, TypeError, "vector must be a SteeringVector"),
        ({"max_k": 1}, TypeError, "did you mean max_kl="),
    ],
)
def test_bad_input_is_refused_in_words(
    model: Any, vector: SteeringVector, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        calibrate(model, tiny.tokenizer(), **{"vector": vector, "texts": TEXTS, **change})
