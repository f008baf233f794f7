"""Median norms of activations, and vectors brought to them."""

import statistics
from typing import Any

import pytest
import torch

import steering_vectors.reading
from steering_vectors import SteeringVector, residual_norms
from tests import tiny

TEXTS = ["I love it", "It rains again", "So it does, on and on", "ab"]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_norms_are_the_medians_over_all_tokens_but_the_first(architecture: str, batch_size: int) -> None:
    model, tokenizer = tiny.shared(architecture), tiny.tokenizer()
    norms = residual_norms(model, tokenizer, iter(TEXTS), batch_size=batch_size)
    states = [tiny.hidden_states(model, tokenizer(text)["input_ids"]) for text in TEXTS]
    assert list(norms) == list(range(len(states[0])))
    for layer, norm in norms.items():
        expected = statistics.median(float(row.norm()) for state in states for row in state[layer][1:])
        assert norm == pytest.approx(expected, rel=1e-4)


def test_texts_may_come_in_several_windows_and_be_chats_or_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer(chat_template=tiny.CHATML)
    expected = residual_norms(model, tokenizer, TEXTS)
    monkeypatch.setattr(steering_vectors.reading, "_WINDOW", 2)
    assert residual_norms(model, tokenizer, [tokenizer(text)["input_ids"] for text in TEXTS]) == pytest.approx(expected)
    chat = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert residual_norms(model, tokenizer, [chat]) == pytest.approx(residual_norms(model, tokenizer, [rendered]))


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("a text", TypeError, "texts must be a list or another iterable of texts or chats, got str"),
        (None, TypeError, "texts must be a list or another iterable of texts or chats, got NoneType"),
        ([], ValueError, "texts is empty: give at least one"),
        (["fine", ""], ValueError, "^text 1: the prompt is empty"),
        (["y", "x"], ValueError, "all texts have only one token, which is left out: give longer ones"),
        ([3], TypeError, "^text 0: expected a text"),
    ],
    ids=str,
)
def test_texts_that_can_not_be_read(texts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        residual_norms(tiny.shared("llama"), tiny.tokenizer(), texts)


def test_a_text_of_one_token_adds_nothing() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    assert residual_norms(model, tokenizer, ["x", *TEXTS]) == residual_norms(model, tokenizer, TEXTS)


def test_a_vector_times_the_norms_moves_the_stream_by_shares_of_it() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    norms = residual_norms(model, tokenizer, TEXTS)
    vector = SteeringVector({layer: torch.randn(tiny.HIDDEN) for layer in (0, 2)})
    assert vector.normalized().scaled(norms).norms() == pytest.approx({layer: norms[layer] for layer in (0, 2)})


class TestScaling:
    def test_each_direction_is_brought_to_norm_1_and_none_changed(self) -> None:
        directions = {0: torch.tensor([3.0, 4.0]), 5: torch.tensor([0.0, -1e-20])}
        vector = SteeringVector(directions, "mlp")
        made = vector.normalized()
        assert made.norms() == pytest.approx({0: 1.0, 5: 1.0})
        assert made.layer_type == "mlp"
        assert torch.equal(directions[0], torch.tensor([3.0, 4.0]))
        assert vector.layer_activations[0] is directions[0]

    def test_a_direction_of_zeros_can_not_be(self) -> None:
        with pytest.raises(ValueError, match=r"the directions of layers \[1\] are all zeros"):
            SteeringVector({0: [1.0], 1: [0.0]}).normalized()

    @pytest.mark.parametrize("factor", [2, 2.0, torch.tensor(2.0), {0: 2, 1: 2.0, 7: 5}])
    def test_directions_are_times_the_factor(self, factor: Any) -> None:
        vector = SteeringVector({0: torch.tensor([1.0, 2.0]), 1: torch.tensor([3.0, 4.0])})
        expected = SteeringVector({0: torch.tensor([2.0, 4.0]), 1: torch.tensor([6.0, 8.0])})
        assert vector.scaled(factor) == expected

    def test_gradients_flow_and_dtypes_stay(self) -> None:
        direction = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
        scaled = SteeringVector({0: direction}).scaled({0: 3.0}).layer_activations[0]
        assert scaled.dtype is torch.bfloat16
        scaled.sum().backward()
        assert torch.equal(direction.grad, torch.full((2,), 3.0, dtype=torch.bfloat16))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("factor", "error", "message"),
        [
            ({0: 1.0}, ValueError, r"factor must have a number for each layer: it lacks \[1\], and has \[0\]"),
            ("2", TypeError, "a factor must be a number, got '2'"),
            ({0: 1.0, 1: None}, TypeError, "a factor must be a number, got NoneType"),
            (float("nan"), ValueError, "a factor must be finite, got nan"),
            ([1.0, 2.0], TypeError, "a factor must be a number, got list"),
        ],
        ids=str,
    )
    def test_other_factors_are_refused(self, factor: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            SteeringVector({0: [1.0], 1: [2.0]}).scaled(factor)
