"""llama.cpp steers with the files of ``to_gguf`` as this library does: logits of SmolLM2 in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import SteeringVector
from steering_vectors.interop import from_gguf, to_gguf
from tests.engines.llama_engine import Engine, directions_of, write_llama

IDS = [504, 3575, 282, 4649, 314, 253, 1123, 1314, 28, 284]
AGREEMENT = 1e-3
ROWS: list[str] = []


def vector_at(*layers: int) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    metadata = {"model_type": "llama", "layers_of_model": "30"}
    return SteeringVector({layer: 2 * torch.randn(576, generator=generator) for layer in layers}, metadata=metadata)


@pytest.fixture(scope="module")
def model(smollm2: tuple[Any, Any]) -> Any:
    return smollm2[0]


@pytest.fixture(scope="module")
def engine(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("model") / "smollm2.gguf"
    write_llama(model, path)
    loaded = Engine(path)
    path.unlink()
    return loaded


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print the cases, once all have run."""
    ROWS[:] = [f"{'case':<44}{'agreement':>12}{'effect':>10}{'beside':>10}"]
    yield
    print("\n\n" + "\n".join(ROWS))


def ours(model: Any, vector: SteeringVector | None = None, multiplier: float = 1.0) -> Tensor:
    if vector is None:
        with torch.no_grad():
            return model(torch.tensor([IDS])).logits[0]
    with vector.apply(model, multiplier=multiplier), torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def apart(some: Tensor, other: Tensor) -> float:
    return float((some - other).abs().max())


def check(case: str, found: Tensor, expected: Tensor, unsteered: Tensor, beside: list[Tensor] | None = None) -> None:
    """Compare logits, and note the case: what agrees, the effect, and how far the layers beside are."""
    agreement, effect = apart(found, expected), apart(expected, unsteered)
    nearest = min((apart(found, other) for other in beside or []), default=float("nan"))
    ROWS.append(f"{case:<44}{agreement:>12.1e}{effect:>10.2f}{nearest if beside else '':>10.3}")
    assert agreement < AGREEMENT
    if beside:
        assert nearest > 100 * AGREEMENT


def test_unsteered(model: Any, engine: Engine) -> None:
    engine.steer(None)
    check("unsteered", engine.logits(IDS), ours(model), ours(model))


@pytest.mark.parametrize("layer", [1, 2, 10, 15, 28, 29])
def test_one_layer(model: Any, engine: Engine, tmp_path: Path, layer: int) -> None:
    vector = vector_at(layer)
    options = to_gguf(vector, tmp_path / "v.gguf")
    engine.steer(Path(options.path), options.strength, options.first_layer, options.last_layer)
    direction = vector.layer_activations[layer]
    beside = [ours(model, SteeringVector({n: direction})) for n in (layer - 1, layer + 1) if n < 30]
    check(f"direction.{layer}", engine.logits(IDS), ours(model, vector), ours(model), beside)


def test_a_multiplier_and_a_strength(model: Any, engine: Engine, tmp_path: Path) -> None:
    vector = vector_at(15)
    options = to_gguf(vector, tmp_path / "v.gguf", multiplier=-1.5)
    engine.steer(Path(options.path), options.strength)
    check("multiplier -1.5", engine.logits(IDS), ours(model, vector, -1.5), ours(model), [ours(model, vector, 1.5)])
    engine.steer(Path(options.path), 2.0)
    check("multiplier -1.5, FILE:2.0", engine.logits(IDS), ours(model, vector, -3.0), ours(model))


def test_layers_in_a_range(model: Any, engine: Engine, tmp_path: Path) -> None:
    vector = vector_at(10, 16)
    options = to_gguf(vector, tmp_path / "v.gguf")
    parts = [ours(model, vector[10]), ours(model, vector[16])]
    engine.steer(Path(options.path), options.strength, options.first_layer, options.last_layer)
    check("layers 10 and 16, range 10 16", engine.logits(IDS), ours(model, vector), ours(model), parts)
    engine.steer(Path(options.path), 1.0, 11, 16)
    check("layers 10 and 16, range 11 16", engine.logits(IDS), parts[1], ours(model), parts[:1])
    engine.steer(Path(options.path), 1.0, 10, 15)
    check("layers 10 and 16, range 10 15", engine.logits(IDS), parts[0], ours(model), parts[1:])


def test_a_vector_of_all_layers(model: Any, engine: Engine, tmp_path: Path) -> None:
    vector = 0.1 * vector_at(*range(1, 30))
    options = to_gguf(vector, tmp_path / "v.gguf")
    engine.steer(Path(options.path), options.strength, options.first_layer, options.last_layer)
    check("layers 1 to 29", engine.logits(IDS), ours(model, vector), ours(model))


def test_what_was_loaded_steers_alike(model: Any, engine: Engine, tmp_path: Path) -> None:
    vector = vector_at(10, 16)
    to_gguf(vector, tmp_path / "v.gguf")
    loaded = from_gguf(tmp_path / "v.gguf")
    assert loaded == vector
    engine.steer(tmp_path / "v.gguf")
    check("from_gguf(to_gguf(vector))", engine.logits(IDS), ours(model, loaded), ours(model))


def test_ggml_reads_the_file_as_we_do(tmp_path: Path) -> None:
    to_gguf(vector_at(1, 29), tmp_path / "v.gguf")
    read = directions_of(tmp_path / "v.gguf")
    loaded = from_gguf(tmp_path / "v.gguf").layer_activations
    assert {name: row.tolist() for name, row in read.items()} == {
        f"direction.{n}": d.tolist() for n, d in loaded.items()
    }
