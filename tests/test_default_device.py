"""Under another default device than the CPU nothing changes: each tensor is made where it is needed.

The default device is ``meta``, whose tensors have no numbers, so that whatever is made there by mistake fails.
"""

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

from steering_vectors import (
    SteeringVector,
    ablate_everywhere,
    at,
    from_index,
    generated,
    interop,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    read_activations,
    record_activations,
    residual_norms,
    train_steering_vector,
)
from tests import tiny
from tests.families import OPERATORS
from tests.test_structure import FILES

PAIRS = [("I love it all", "I hate it all"), ("so good", "so bad"), ("a warm day", "a cold day")]
ROWS = torch.randn(40, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.ones_like(IDS)
CREATES = {function.__name__ for function in _device_constructors()}


@pytest.mark.parametrize("module", FILES)
def test_each_creation_of_a_tensor_names_its_device(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    unnamed = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in CREATES
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]
    assert unnamed == []


MADE: dict[str, Callable[[], Any]] = {
    "a vector of lists": lambda: SteeringVector({0: [3.0, 4.0]}).layer_activations,
    "a vector of arrays": lambda: SteeringVector({0: np.array([3.0, 4.0])}).layer_activations,
    "a vector of a tensor": lambda: SteeringVector({0: ROWS[0]}).layer_activations,
    "its norms": lambda: SteeringVector({0: ROWS[0]}).norms(),
    "arithmetic": lambda: (2 * SteeringVector({0: ROWS[0]}) - SteeringVector({1: ROWS[1]}) / 3).layer_activations,
    "cosines": lambda: SteeringVector({0: ROWS[0]}).cosine_similarity(SteeringVector({0: ROWS[1]})),
    "orthogonal": lambda: SteeringVector({0: ROWS[0]}).orthogonal_to(SteeringVector({0: ROWS[1]})).layer_activations,
    "normalized": lambda: SteeringVector({0: ROWS[0]}).normalized().layer_activations,
    "projections": lambda: SteeringVector({0: ROWS[0]}).project({0: ROWS}),
    "lists from elsewhere": lambda: interop.from_tensors([[1.0, 2.0], [3.0, 4.0]]).layer_activations,
    "arrays from elsewhere": lambda: interop.from_tensors(np.eye(3)).layer_activations,
    "a tensor from elsewhere": lambda: interop.from_tensors(ROWS[0], layer=1).layer_activations,
    **{
        f"{aggregator!r} of {count} rows": lambda aggregator=aggregator, count=count: aggregator(
            ROWS[:count], ROWS.flip(0)[:count]
        )
        for aggregator in (mean_aggregator(), pca_aggregator(), logistic_aggregator())
        for count in (4, 40)
    },
    **{
        operator.shown: lambda operator=operator: operator.make()(ROWS[None], ROWS[0])
        for operator in OPERATORS.values()
    },
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_needs_no_model_is_the_same(make: Callable[[], Any]) -> None:
    expected = make()
    with torch.device("meta"):
        found = make()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def model_and_tokenizer() -> tuple[Any, Any]:
    return tiny.shared("gpt2"), tiny.tokenizer()


def steered(**kwargs: Any) -> Callable[[], Any]:
    def run() -> Any:
        model, _ = model_and_tokenizer()
        with (
            SteeringVector({1: ROWS[0]}).apply(model, **kwargs),
            record_activations(model) as records,
            torch.no_grad(),
        ):
            model(input_ids=IDS, attention_mask=MASK, use_cache=False)
        return records[2]

    return run


def steered_by_lists() -> Any:
    return steered(tokens=generated({"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()}))()


def ablated() -> Any:
    model, _ = model_and_tokenizer()
    with ablate_everywhere(model, ROWS[0]), record_activations(model) as records, torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    return records[2]


RUN: dict[str, Callable[[], Any]] = {
    **{
        f"trained by {aggregator!r}": lambda aggregator=aggregator, tokens=tokens: (
            train_steering_vector(*model_and_tokenizer(), PAIRS, aggregator=aggregator, tokens=tokens).layer_activations
        )
        for aggregator in (mean_aggregator(), pca_aggregator(), logistic_aggregator())
        for tokens in (None, from_index(1))
    },
    "read": lambda: read_activations(*model_and_tokenizer(), [side for pair in PAIRS for side in pair]),
    "norms": lambda: residual_norms(*model_and_tokenizer(), [side for pair in PAIRS for side in pair]),
    "steered": steered(),
    "steered by a list": steered(tokens=[0, -1]),
    "steered by a slice": steered(tokens=slice(1, 3)),
    "steered by a mask": steered(tokens=torch.tensor([[True, False], [False, True]])),
    "steered by rows": steered(tokens=from_index([1, 2])),
    "steered at": steered(tokens=at([1, 3])),
    "steered by lengths": steered(tokens=generated([2, 3])),
    "steered by lists of ids": steered_by_lists,
    "with a number for each row": steered(multiplier=[0.0, 1.5]),
    "with a learned number": steered(multiplier=torch.tensor(0.0, requires_grad=True)),
    "with learned numbers in a list": steered(multiplier=[torch.tensor(0.0, requires_grad=True), 2.0]),
    "ablated everywhere": ablated,
}


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_what_runs_a_model_is_the_same(run: Callable[[], Any]) -> None:
    expected = run()
    with torch.device("meta"):
        found = run()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
