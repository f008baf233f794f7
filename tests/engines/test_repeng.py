"""repeng's control vectors: trained and written by repeng, read here, and back, with the logits that repeng computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from repeng import ControlModel, ControlVector, DatasetEntry
from torch import Tensor

from steering_vectors import SteeringVector
from steering_vectors.interop import load_repeng, to_gguf
from tests import tiny
from tests.merging.fresh import lively, logits

pytestmark = pytest.mark.filterwarnings("ignore")  # repeng's
COEFFICIENT = 1.5
IDS = torch.tensor([[11, 12, 13, 14, 15, 16]])  # repeng takes one row
LAYERS = [[1], [0, 2], [0, 1, 2]]
PAIRS = [("I feel glad.", "I feel bad."), ("A good day!", "A long day!"), ("You say yes.", "You say no.")]


@pytest.fixture(params=["llama", "mistral", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return lively(request.param)


@pytest.fixture
def trained(model: Any) -> ControlVector:
    entries = [DatasetEntry(*pair) for pair in PAIRS]
    return ControlVector.train(model, tiny.tokenizer(), entries, hidden_layers=[0, 1, 2])


def by_repeng(model: Any, vector: ControlVector, layers: list[int]) -> Tensor:
    with controlled(model, layers) as control:
        control.set_control(vector, COEFFICIENT)
        return logits(control, IDS)


@contextmanager
def controlled(model: Any, layers: list[int]) -> Iterator[Any]:
    control = ControlModel(model, layers)
    try:
        yield control
    finally:
        control.unwrap()


def by_this_library(model: Any, vector: SteeringVector, layers: list[int]) -> Tensor:
    with SteeringVector({n: vector.layer_activations[n] for n in layers}).apply(model, multiplier=COEFFICIENT):
        return logits(model, IDS)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_its_file_steers_here_as_it_does_there(
    model: Any, trained: ControlVector, tmp_path: Path, layers: list[int]
) -> None:
    trained.export_gguf(tmp_path / "v.gguf")
    vector = load_repeng(tmp_path / "v.gguf")
    assert vector.layers == [0, 1, 2]
    assert vector.metadata == {"model_type": model.config.model_type}
    expected = by_repeng(model, trained, layers)
    off = float((by_this_library(model, vector, layers) - expected).abs().max())
    effect = float((logits(model, IDS) - expected).abs().max())
    print(f"\nrepeng's file on {model.config.model_type}, layers {layers}: off by {off:.0e}, effect {effect:.1f}")
    assert off < 1e-5
    assert effect > 0.1


def test_a_layer_beside_it_is_visibly_another(model: Any, trained: ControlVector, tmp_path: Path) -> None:
    trained.export_gguf(tmp_path / "v.gguf")
    directions = load_repeng(tmp_path / "v.gguf").layer_activations
    expected = by_repeng(model, trained, [1])
    for layer in (0, 2):
        moved = by_this_library(model, SteeringVector({layer: directions[1]}), [layer])
        assert (moved - expected).abs().max() > 0.05


def test_a_file_of_this_library_steers_there_as_it_does_here(model: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({layer: torch.randn(tiny.HIDDEN, generator=generator) for layer in (1, 2)})
    to_gguf(vector, tmp_path / "v.gguf", model_hint=model.config.model_type)
    read = ControlVector.import_gguf(tmp_path / "v.gguf")
    assert read.model_type == model.config.model_type
    for layers in ([1], [1, 2]):
        expected = by_this_library(model, vector, layers)
        torch.testing.assert_close(by_repeng(model, read, layers), expected, atol=1e-5, rtol=0)
        assert (expected - logits(model, IDS)).abs().max() > 0.1
