"""Folders of vectors: each file fits the model, or the start fails with the file's name and the layer."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from steering_vectors import SteeringVector
from steering_vectors.serving.store import read_folder, read_vector

JOY = SteeringVector({0: torch.tensor([1.0, -2.5]), 3: torch.tensor([0.5, 0.25])})


def read(folder: Path) -> object:
    return read_folder(folder, depth=4, width=2)


def test_vectors_are_read_by_the_names_of_their_files(tmp_path: Path) -> None:
    JOY.save(tmp_path / "joy.safetensors")
    (2 * JOY).to(torch.bfloat16).save(tmp_path / "more.joy-2_.safetensors")
    (tmp_path / ".hidden").touch()
    found = read_folder(tmp_path, depth=4, width=2)
    assert list(found) == ["joy", "more.joy-2_"]
    assert [list(vector.directions) for vector in found.values()] == [[0, 3], [0, 3]]
    assert torch.equal(found["more.joy-2_"].directions[0], torch.tensor([2.0, -5.0]))
    assert [vector.largest for vector in found.values()] == [2.5, 5.0]


def test_a_folder_may_be_empty(tmp_path: Path) -> None:
    assert read(tmp_path) == {}


def test_the_hash_is_of_layers_and_numbers_alone(tmp_path: Path) -> None:
    other_layer = SteeringVector({1: JOY.layer_activations[0], 3: JOY.layer_activations[3]})
    described = SteeringVector(JOY.layer_activations, metadata={"method": "by hand"})
    for name, vector in {"a": JOY, "b": described, "c": 2 * JOY, "d": other_layer}.items():
        vector.save(tmp_path / f"{name}.safetensors")
    a, b, c, d = (vector.hash for vector in read_folder(tmp_path, depth=4, width=2).values())
    assert a == b
    assert len({a, c, d}) == 3


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (SteeringVector({4: [1.0, 2.0]}), "has layer 4, and the model has 4 layers (0 to 3)"),
        (SteeringVector({-1: [1.0, 2.0]}), "has layer -1: write it as 3, counted from the first layer"),
        (SteeringVector({2: [1.0, 2.0, 3.0]}), "the direction of layer 2 has 3 numbers, the model's layers have 2"),
        (SteeringVector({2: [1.0, 2.0]}, "mlp"), "steers 'mlp': only vectors at outputs of decoder blocks are served"),
        (
            SteeringVector({2: torch.tensor([1e300, 2.0], dtype=torch.float64)}),
            "the direction of layer 2 is too large for float32",
        ),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_by_file_and_layer(
    tmp_path: Path, vector: SteeringVector, reason: str
) -> None:
    vector.save(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read(tmp_path)
    assert "bad.safetensors" in str(caught.value)


def test_a_vector_of_modules_by_name_is_refused(tmp_path: Path) -> None:
    metadata = {"layer_config": '{"decoder_block": "transformer.h.{num}.attn"}'}
    SteeringVector({2: [1.0, 2.0]}, metadata=metadata).save(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad.safetensors steers .*transformer.h.*: only vectors at outputs"):
        read(tmp_path)


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    JOY.save(tmp_path / "joy.safetensors")
    content = (tmp_path / "joy.safetensors").read_bytes()
    (tmp_path / "joy.safetensors").write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"joy.safetensors is not a complete safetensors file"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "joy", "joy.safetensors.bak", "a b.safetensors", "é.safetensors"])
def test_other_files_and_other_names_are_refused(tmp_path: Path, name: str) -> None:
    JOY.save(tmp_path / "joy.safetensors")
    shutil.copy(tmp_path / "joy.safetensors", tmp_path / name) if name != "joy" else (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        read(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="there is no folder '.*nowhere' of steering vectors"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../joy", "a/b", "", "joy\n"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    JOY.save(tmp_path / "joy.safetensors")
    with pytest.raises(ValueError, match="can't be the name of a vector"):
        read_vector(tmp_path / "in", name, depth=4, width=2)


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^the folder of steering vectors has no file sad.safetensors$"):
        read_vector(tmp_path, "sad", depth=4, width=2)
