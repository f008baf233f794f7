"""Diagnoses, against formulas written out here, numpy and scikit-learn."""

from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch

from steering_vectors import extract_activations, from_index, logistic_aggregator, train_steering_vector
from steering_vectors.evaluation import Diagnosis, LayerDiagnosis, diagnose
from tests import tiny

WORDS = [("love", "hate"), ("good", "bad"), ("great", "awful"), ("nice", "ugly"), ("fine", "poor"), ("warm", "cold")]
PAIRS = [(f"It is {positive} now", f"It is {negative} now") for positive, negative in WORDS]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.shared("llama")


def test_the_vector_is_that_of_training(model: Any) -> None:
    arguments = {"tokens": from_index(1), "layers": [0, 2], "batch_size": 2}
    vector, diagnosis = diagnose(model, tiny.tokenizer(), iter(PAIRS), **arguments)
    expected = train_steering_vector(model, tiny.tokenizer(), PAIRS, **arguments)
    assert vector.layers == expected.layers == [row.layer for row in diagnosis.rows]
    for layer in vector.layers:
        torch.testing.assert_close(vector.layer_activations[layer], expected.layer_activations[layer])
    assert vector.metadata == expected.metadata
    assert [row.norm_share for row in diagnosis.rows] == pytest.approx(list(expected.shares().values()))


def test_numbers_are_those_of_their_formulas(model: Any) -> None:
    vector, diagnosis = diagnose(model, tiny.tokenizer(), PAIRS)
    positive, negative = extract_activations(model, tiny.tokenizer(), PAIRS)
    for row in diagnosis.rows:
        plus, minus = (torch.cat(side[row.layer]).double().numpy() for side in (positive, negative))
        direction = vector.layer_activations[row.layer].double().numpy()
        unit = direction / np.linalg.norm(direction)
        differences = plus - minus
        cosines = differences @ unit / np.linalg.norm(differences, axis=1)
        assert row.pair_cosine == pytest.approx(cosines.mean(), abs=1e-5)
        p, m = plus @ unit, minus @ unit
        separation = (p.mean() - m.mean()) / np.sqrt((p.var(ddof=1) + m.var(ddof=1)) / 2)
        assert row.separation == pytest.approx(separation, rel=1e-3)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).numpy()
        found = 0.0
        for fold in np.array_split(order, 5):
            rest = np.setdiff1d(order, fold)
            trained = differences[rest].mean(axis=0)
            labels = [1] * len(fold) + [0] * len(fold)
            scores = np.concatenate([plus[fold] @ trained, minus[fold] @ trained])
            found += len(fold) * sklearn.metrics.roc_auc_score(labels, scores)
        assert row.auc == pytest.approx(found / 6)
        halves = [differences[half].mean(axis=0) for half in np.array_split(order, 2)]
        cosine = halves[0] @ halves[1] / np.linalg.norm(halves[0]) / np.linalg.norm(halves[1])
        assert row.split_half == pytest.approx(cosine, abs=1e-4)


def test_random_labels_separate_by_chance_on_pairs_left_out() -> None:
    """The AUC on the training pairs would be near 1 in so many dimensions."""
    from steering_vectors.evaluation.diagnosing import _Layer

    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 40, 500, generator=generator, dtype=torch.float64)
    direction = (positive - negative).mean(dim=0)
    layer = _Layer(positive, negative, lambda p, n: (p - n).mean(dim=0), direction, seed=0)
    assert 0.35 < layer.auc() < 0.65
    assert sklearn.metrics.roc_auc_score([1] * 40 + [0] * 40, torch.cat([positive, negative]) @ direction) > 0.95
    assert abs(layer.split_half()) < 0.2


def test_any_aggregator_is_diagnosed(model: Any) -> None:
    vector, diagnosis = diagnose(model, tiny.tokenizer(), PAIRS, aggregator=logistic_aggregator(), layers=[1])
    assert vector.metadata["method"] == repr(logistic_aggregator())
    assert 0 <= diagnosis.rows[0].auc <= 1


def test_equal_sides_have_no_separation(model: Any) -> None:
    _, diagnosis = diagnose(model, tiny.tokenizer(), [("Same", "Same")] * 4, layers=[1])
    (row,) = diagnosis.rows
    assert (row.pair_cosine, row.separation, row.auc, row.split_half) == (0, 0, 0.5, 0)


def test_the_table_names_the_best_layers_and_warns() -> None:
    rows = tuple(LayerDiagnosis(n, 0.1 * n, 1.0, min(1.0, 0.9 + 0.05 * n), 0.5, None) for n in range(4))
    diagnosis = Diagnosis(rows, pairs=9)
    assert diagnosis.best() == (3, 2, 1)
    text = str(diagnosis)
    assert max(map(len, text.splitlines())) <= 80
    assert "layers 3, 2, 1" in " ".join(text.split())
    assert "What separates is not what steers" in text
    assert "What separates is not what steers" in diagnosis._repr_html_()


@pytest.mark.parametrize(
    ("samples", "arguments", "error", "message"),
    [
        (PAIRS[:3], {}, ValueError, "a diagnosis needs at least 4 pairs, got 3"),
        ({"positive": ["a"], "negative": ["b"]}, {}, TypeError, "diagnose needs pairs"),
        (PAIRS, {"layer": 1}, TypeError, "layer"),
        (PAIRS, {"process_group": object()}, ValueError, "leave process_group out"),
        (PAIRS, {"seed": "x"}, TypeError, "seed must be a whole number"),
        (PAIRS, {"aggregator": "mean"}, TypeError, "aggregator must be callable"),
    ],
)
def test_bad_input_is_refused_in_words(
    model: Any, samples: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        diagnose(model, tiny.tokenizer(), samples, **arguments)
