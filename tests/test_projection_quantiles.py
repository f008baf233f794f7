"""Quantiles of projections, and clamps with bounds by layer."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import steering_vectors.reading
from steering_vectors import (
    SteeringVector,
    clamp_operator,
    from_index,
    norm_preserving_operator,
    projection_quantiles,
    record_activations,
)
from tests import tiny
from tests.test_steering import logits, vector

TEXTS = ["I love it", "It rains again", "So it does, on and on", "ab"]
SHARES = [0.0, 0.25, 0.5, 0.9, 1.0]


def by_hand(model: Any, tokenizer: Any, direction: torch.Tensor, layer: int, first: int = 0) -> list[float]:
    states = [tiny.hidden_states(model, tokenizer(text)["input_ids"])[layer][first:] for text in TEXTS]
    projected = torch.cat(states).double().numpy() @ (direction / direction.norm()).double().numpy()
    return [float(number) for number in np.quantile(projected, SHARES)]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_quantiles_are_those_of_numpy_over_the_selected_tokens(architecture: str, batch_size: int) -> None:
    model, tokenizer, directions = tiny.shared(architecture), tiny.tokenizer(), vector(0, -1, scale=5.0)
    last = len(tiny.blocks(model)) - 1
    for tokens, first in ((None, 0), (from_index(1), 1)):
        found = projection_quantiles(
            model, tokenizer, iter(TEXTS[:3] + TEXTS[3:]), directions, SHARES, tokens=tokens, batch_size=batch_size
        )
        assert [list(of_layer) for of_layer in found] == [[0, last]] * len(SHARES)
        for layer, key in ((0, 0), (last, -1)):
            expected = by_hand(model, tokenizer, directions.layer_activations[key], layer, first)
            assert [of_layer[layer] for of_layer in found] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_prompts_may_come_in_several_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    expected = projection_quantiles(model, tokenizer, TEXTS, vector(), [0.3])
    monkeypatch.setattr(steering_vectors.reading, "_WINDOW", 2)
    assert projection_quantiles(model, tokenizer, TEXTS, vector(), [0.3])[0] == pytest.approx(expected[0])


def test_activations_are_capped_in_two_lines() -> None:
    model, tokenizer, directions = tiny.shared("llama"), tiny.tokenizer(), vector(0, 1, scale=3.0)
    low, high = projection_quantiles(model, tokenizer, TEXTS, directions, [0.4, 0.6])
    ids = torch.tensor([tokenizer(TEXTS[2])["input_ids"]])
    with record_activations(model) as plain:
        logits(model, ids)
    with directions.apply(model, operator=clamp_operator(low, high)), record_activations(model) as steered:
        logits(model, ids)
    for layer in (0, 1):
        before, after = (directions.project({layer: one[layer][0]})[layer] for one in (plain, steered))
        outside = (before < low[layer] - 1e-4) | (before > high[layer] + 1e-4)
        assert bool(outside.any())
        assert bool(((after > low[layer] - 1e-4) & (after < high[layer] + 1e-4)).all())


@pytest.mark.parametrize("wrap", [lambda operator: operator, norm_preserving_operator], ids=["", "norm_preserving"])
def test_each_layer_is_clamped_at_its_bounds(wrap: Any) -> None:
    model, one, other = tiny.shared("llama"), vector(0), vector(2)
    with one.apply(model, operator=wrap(clamp_operator(0.5, 1))), other.apply(model, operator=wrap(clamp_operator(-3))):
        expected = logits(model)
    of_one, of_other = clamp_operator({0: 0.5, 1: -5}, 1.0), clamp_operator({2: -3, 0: 7})
    with one.apply(model, operator=wrap(of_one)), other.apply(model, operator=wrap(of_other)):
        assert torch.equal(logits(model), expected)
    both = SteeringVector({**one.layer_activations, **other.layer_activations})
    with both.apply(model, operator=wrap(clamp_operator({0: 0.5, 2: -3}, {0: 1, 2: 1e6, 1: 3}))):
        torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("wrap", [lambda operator: operator, norm_preserving_operator], ids=["", "norm_preserving"])
def test_a_layer_without_bounds_is_refused_in_the_call(wrap: Any) -> None:
    operator = wrap(clamp_operator({0: 1.0, 2: 1.0}, {0: 2.0, 1: 2.0}))
    message = r"the operator .*clamp_operator\(.*\) is for layers \[0\] only, but the steering has layers \[1, 2\] too"
    with pytest.raises(ValueError, match=message):
        vector(0, 1, -1).apply(tiny.shared("llama"), operator=operator)


def test_a_call_by_hand_needs_the_layer() -> None:
    h, d = torch.ones(1, 1, 2), torch.tensor([1.0, 0.0])
    assert clamp_operator(max={3: 0.5})(h, d, layer=3).tolist() == [[[-0.5, 0.0]]]  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"clamp_operator has bounds for layers \[3\], got layer=None"):
        clamp_operator(max={3: 0.5})(h, d)


def test_a_clamp_by_layer_is_a_value() -> None:
    operator = clamp_operator({1: 0.5}, 2.0)
    assert repr(operator) == "clamp_operator(min={1: 0.5}, max=2.0)"
    assert operator == clamp_operator({1: 0.5}, 2.0) == copy.deepcopy(operator) == pickle.loads(pickle.dumps(operator))
    assert operator != clamp_operator({1: 0.6}, 2.0)
    assert len({operator, clamp_operator({1: 0.5}, 2.0)}) == 1
    assert repr(clamp_operator(max=dict.fromkeys(range(9), 1.0))) == "clamp_operator(max=9 bounds by layer)"


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        (({1: "a"},), TypeError, "min of clamp_operator at layer 1 must be a number, got 'a'"),
        (({1: math.nan},), ValueError, "min of clamp_operator at layer 1 must be finite"),
        (({"1": 2},), TypeError, "min of clamp_operator must map layers to numbers, got the layer '1'"),
        (({-1: 2},), ValueError, "must count layers from 0, got layer -1"),
        (({},), ValueError, "needs a layer that has all bounds"),
        (({1: 2}, {2: 3}), ValueError, "needs a layer that has all bounds"),
        (({1: 2, 2: 4}, 3), ValueError, "min to be at most max, got min=4 and max=3 at layer 2"),
    ],
)
def test_bounds_that_are_none_are_refused(bounds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clamp_operator(*bounds)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"prompts": "a text"}, TypeError, "prompts must be texts, chats or lists of token ids, got str: put it in"),
        ({"prompts": []}, ValueError, "prompts is empty: give at least one"),
        ({"prompts": ["fine", ""]}, ValueError, "^prompt 1: the prompt is empty"),
        ({"vector": {1: 2}}, TypeError, "vector must be a SteeringVector, got dict"),
        ({"vector": vector(7)}, ValueError, "layer 7 does not exist: the model has 3 layers"),
        ({"vector": SteeringVector({1: torch.ones(5)})}, ValueError, "directions have 5 numbers"),
        ({"vector": SteeringVector({1: torch.zeros(32)})}, ValueError, "the direction of layer 1 is all zeros"),
        ({"quantiles": 0.5}, TypeError, r"a list of numbers from 0 to 1, such as \[0.25\], got 0.5"),
        ({"quantiles": []}, ValueError, "quantiles is empty"),
        ({"quantiles": [25]}, ValueError, "quantiles must be from 0 to 1, got 25: for 25 % write 0.25"),
        ({"quantiles": [-0.5]}, ValueError, "quantiles must be from 0 to 1, got -0.5$"),
        ({"tokens": lambda p: p.index / 2}, ValueError, "^prompt 0: tokens weights the tokens differently"),
    ],
)
def test_what_can_not_be_read_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"prompts": TEXTS, "vector": vector(), "quantiles": [0.5], **changed}
    with pytest.raises(error, match=message):
        projection_quantiles(tiny.shared("llama"), tiny.tokenizer(), **arguments)
