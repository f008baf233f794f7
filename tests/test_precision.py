"""Statistics and arithmetic are the same inside ``torch.autocast`` as outside it; only the model's passes follow it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    _statistics,
    ablate_everywhere,
    aggregate_activations,
    extract_activations,
    from_index,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    read_activations,
    record_activations,
    residual_norms,
    train_steering_vector,
)
from steering_vectors._precision import without_autocast
from steering_vectors._steering.stream_parts import written_parts
from tests import tiny
from tests.families import OPERATORS

ROWS = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
VECTOR, OTHER = SteeringVector({0: ROWS[0], 1: ROWS[1]}), SteeringVector({0: OTHERS[0], 1: OTHERS[1]})


def products(positive: Tensor, negative: Tensor) -> Tensor:
    """An aggregator of a user, with the products that autocast rounds."""
    return (positive - negative).T @ (positive @ negative[0])


class Products:
    """The same, of rows as they come."""

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        return products(positive, negative)

    def accumulator(self, hidden: int) -> "Products":
        self.total, self.last = torch.zeros(hidden), torch.eye(hidden)
        return self

    def add(self, rows: Tensor, side: str, samples: Any) -> None:
        self.total = self.total + rows.T @ (rows @ torch.ones(rows.shape[-1]))

    def merge(self, other: "Products") -> None:
        raise AssertionError("one process has nothing to merge")

    def direction(self) -> Tensor:
        return self.last @ self.total


COMPUTED: dict[str, Callable[[], Any]] = {
    "project": lambda: VECTOR.project({0: ROWS, 1: [ROWS, OTHERS[0]]}),
    "project from bfloat16": lambda: VECTOR.project({0: ROWS.bfloat16()}),
    "project on float64": lambda: VECTOR.to(torch.float64).project({0: ROWS}),
    "cosine_similarity": lambda: VECTOR.cosine_similarity(OTHER),
    "norms": VECTOR.norms,
    "orthogonal_to": lambda: VECTOR.orthogonal_to(OTHER).layer_activations,
    "normalized": lambda: VECTOR.normalized().layer_activations,
    "arithmetic": lambda: (2 * VECTOR - OTHER / 3).layer_activations,
    **{
        f"{aggregator!r}": lambda aggregator=aggregator: aggregator(ROWS, OTHERS)
        for aggregator in (mean_aggregator(), pca_aggregator(), logistic_aggregator())
    },
    **{
        f"aggregate_activations by {name}": lambda aggregator=aggregator: aggregate_activations(
            {0: [ROWS]}, {0: [OTHERS]}, aggregator
        )
        for name, aggregator in {"PCA": pca_aggregator(), "a user's": products}.items()
    },
    **{
        operator.shown: lambda operator=operator: operator.make()(ROWS[None], OTHERS[0])
        for operator in OPERATORS.values()
    },
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_what_needs_no_model_is_the_same_under_autocast(compute: Callable[[], Any], dtype: torch.dtype) -> None:
    expected = compute()
    with torch.autocast("cpu", dtype):
        found = compute()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "aggregator",
    [mean_aggregator(), pca_aggregator(), logistic_aggregator(), products, Products()],
    ids=["mean", "pca", "logistic", "a user's", "a user's of rows as they come"],
)
@pytest.mark.parametrize("tokens", [None, from_index(1)], ids=["last", "mean"])
def test_training_under_autocast_is_the_statistics_of_the_rows_that_the_model_has_there(
    aggregator: Any, tokens: Any
) -> None:
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    pairs = [("I love it all", "I hate it all"), ("so good", "so bad"), ("a warm day", "a cold day")]
    with torch.autocast("cpu", torch.bfloat16):
        found = train_steering_vector(model, tokenizer, pairs, aggregator=aggregator, tokens=tokens, layers=1)
        positive, negative = extract_activations(model, tokenizer, pairs, tokens=tokens, layers=1)
    if isinstance(aggregator, Products):
        made = aggregator.accumulator(tiny.HIDDEN)
        made.add(torch.cat(positive[1]), "positive", [])
        made.add(torch.cat(negative[1]), "negative", [])
        expected = made.direction()
    else:
        expected = aggregator(torch.cat(positive[1]), torch.cat(negative[1]))
    torch.testing.assert_close(found.layer_activations[1], expected, atol=1e-6, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = expected @ torch.eye(tiny.HIDDEN)
    assert not torch.allclose(rounded.float(), expected, atol=1e-6, rtol=1e-4)


def test_means_over_tokens_and_norms_under_autocast_are_those_of_the_rows_that_the_model_has_there() -> None:
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    text = "I love it all"
    inputs = tokenizer(text, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        with record_activations(model) as records, torch.no_grad():
            model(**inputs)
        means = read_activations(model, tokenizer, [text], tokens=from_index(1))
        norms = residual_norms(model, tokenizer, [text])
    for layer in range(tiny.LAYERS):
        rows = records[layer][0][0, 1:].double()
        torch.testing.assert_close(means[layer][0].double(), rows.mean(dim=0), atol=1e-6, rtol=1e-5)
        assert norms[layer] == pytest.approx(float(rows.norm(dim=-1).quantile(0.5)), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_modules_that_write_to_the_stream_are_found_under_autocast_too(architecture: str) -> None:
    model = tiny.shared(architecture)
    expected = written_parts(model, tiny.blocks(model))
    assert expected != [[block] for block in tiny.blocks(model)]
    with torch.autocast("cpu", torch.bfloat16):
        assert written_parts(model, tiny.blocks(model)) == expected
        with ablate_everywhere(model, ROWS[0]):
            pass


def test_the_statistics_of_a_device_without_float64_are_the_same_under_autocast(monkeypatch: Any) -> None:
    monkeypatch.setattr(_statistics, "_double", lambda rows: rows.float())
    positive, negative = ROWS[:, :16], OTHERS[:, :16]  # more rows than they are wide
    expected = pca_aggregator()(positive, negative)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pca_aggregator()(positive, negative), expected)


def test_the_caller_s_autocast_goes_on_afterwards_also_after_an_error() -> None:
    @without_autocast
    def product(rows: Tensor, fails: bool) -> torch.dtype:
        if fails:
            raise ValueError("broken")
        return (rows @ rows.T).dtype

    with torch.autocast("cpu", torch.bfloat16):
        assert product(ROWS, False) is torch.float32
        with pytest.raises(ValueError, match="broken"):
            product(ROWS, True)
        assert (ROWS @ ROWS.T).dtype is torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
