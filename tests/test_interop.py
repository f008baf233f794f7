"""Vectors that other projects wrote: each direction at its layer."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from steering_vectors import SteeringVector, interop, record_activations
from tests import tiny


def test_a_caa_file_is_of_the_layer_in_its_name(tmp_path: Path) -> None:
    direction = torch.randn(8)
    torch.save(direction, tmp_path / "vec_layer_13_Llama-2-7b-chat-hf.pt")
    assert interop.load_caa(tmp_path / "vec_layer_13_Llama-2-7b-chat-hf.pt", layer=13) == SteeringVector(
        {13: direction}
    )


def test_row_i_of_persona_vectors_is_of_layer_i_minus_1(tmp_path: Path) -> None:
    """Written as their code does, from hidden_states; compared with the blocks' outputs."""
    model = tiny.shared("llama")
    with record_activations(model) as activations, torch.no_grad():
        states = model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    torch.save(torch.stack([state[0, -1] for state in states]), tmp_path / "evil_response_avg_diff.pt")
    vector = interop.load_persona_vectors(tmp_path / "evil_response_avg_diff.pt")
    assert vector.layers == [0, 1]  # the last block's row stands behind the final norm
    for layer in vector.layers:
        assert torch.equal(vector.layer_activations[layer], activations[layer][0][0, -1])


@pytest.mark.parametrize("read", [lambda p: interop.load_caa(p, layer=1), interop.load_persona_vectors])
class TestFiles:
    def test_that_are_not_there(self, read: Callable[[Path], Any], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read(tmp_path / "none.pt")

    def test_of_anything_else_are_refused_and_run_nothing(self, read: Callable[[Path], Any], tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (os.mkdir, (str(tmp_path / "was run"),))

        path = tmp_path / "evil.pt"
        for content in (Evil(), {"v": Evil()}):
            torch.save(content, path)
            with pytest.raises(ValueError, match="can't be loaded safely, as a file of tensors only"):
                read(path)
        path.write_bytes(pickle.dumps(Evil(), 2))
        with pytest.raises(ValueError, match="can't be loaded safely, as a file of tensors only"):
            read(path)
        path.write_bytes(b"nothing")
        with pytest.raises(ValueError, match="can't be loaded safely, as a file of tensors only"):
            read(path)
        assert not (tmp_path / "was run").exists()

    @pytest.mark.parametrize("content", [{"a": torch.ones(2)}, torch.ones(1, 2, 3), [1.0], torch.ones(())], ids=str)
    def test_of_other_tensors_are_told_as_what_they_hold(
        self, read: Callable[[Path], Any], tmp_path: Path, content: Any
    ) -> None:
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt holds .*, expected"):
            read(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (torch.eye(2), {0: [1.0, 0.0], 1: [0.0, 1.0]}),
        (np.eye(2, dtype=np.float32), {0: [1.0, 0.0], 1: [0.0, 1.0]}),
        ([torch.tensor([1.0, 0.0]), [0.0, 1.0]], {0: [1.0, 0.0], 1: [0.0, 1.0]}),
        ({12: torch.tensor([1.0, 0.0])}, {12: [1.0, 0.0]}),
        ({"12": torch.tensor([1.0, 0.0]), "model.layers.13": [0.0, 1.0]}, {12: [1.0, 0.0], 13: [0.0, 1.0]}),
        ({"layer_7": torch.tensor([1.0, 0.0]), "-1": [0.0, 1.0]}, {7: [1.0, 0.0], -1: [0.0, 1.0]}),
        ({np.int64(3): torch.tensor([1.0, 0.0])}, {3: [1.0, 0.0]}),
    ],
    ids=str,
)
def test_tensors_at_hand_are_of_their_keys_or_places(tensors: Any, expected: dict[int, list[float]]) -> None:
    assert interop.from_tensors(tensors) == SteeringVector(expected)  # type: ignore[arg-type]


def test_one_direction_has_its_layer() -> None:
    direction = torch.ones(3)
    vector = interop.from_tensors(direction, layer=4, layer_type="mlp")
    assert vector.layer_activations[4] is direction
    assert vector.layer_type == "mlp"
    assert interop.from_tensors([1.0, 1.0, 1.0], layer=4) == interop.from_tensors(np.float32([1, 1, 1]), layer=4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: interop.from_tensors(torch.ones(3)), ValueError, r"needs its layer: write from_tensors\(dir"),
        (lambda: interop.from_tensors(torch.ones(2, 3), layer=1), ValueError, "layer is only for one direction"),
        (lambda: interop.from_tensors({1: torch.ones(3)}, layer=1), ValueError, "layer is only for one direction"),
        (lambda: interop.from_tensors({"a": torch.ones(3)}), ValueError, "exactly one number, .*, got 'a'"),
        (lambda: interop.from_tensors({"1.2": torch.ones(3)}), ValueError, "exactly one number, .*, got '1.2'"),
        (
            lambda: interop.from_tensors({"1": torch.ones(3), 1: torch.ones(3)}),
            ValueError,
            "each layer may have one direction, but some of these keys",
        ),
        (lambda: interop.from_tensors(3), (TypeError, ValueError), "one or more directions, got a single number"),
        (lambda: interop.from_tensors([]), ValueError, "tensors is empty: give at least one direction"),
        (lambda: interop.from_tensors(None), TypeError, "tensors must be"),
        (lambda: interop.from_tensors(torch.ones(1, 2, 3)), ValueError, "must have the shape"),
        (
            lambda: interop.from_sae(torch.eye(4), 4, layer=1),
            ValueError,
            "feature must be a whole number from 0 to 3, got 4",
        ),
        (lambda: interop.from_sae(torch.eye(4), -1, layer=1), ValueError, "from 0 to 3, got -1"),
        (lambda: interop.from_sae(object(), 1, layer=1), TypeError, "sae must be an autoencoder with W_dec"),
        (lambda: interop.from_sae(torch.ones(4), 1, layer=1), TypeError, r"got a tensor \(4,\)"),
    ],
)
def test_what_tells_no_vector_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_feature_is_its_row_of_the_decoder_whatever_the_autoencoder() -> None:
    rows = torch.randn(10, 4)
    linear = nn.Linear(10, 4)
    with torch.no_grad():
        linear.weight.copy_(rows.T)
    for sae in (SimpleNamespace(W_dec=nn.Parameter(rows)), SimpleNamespace(decoder=linear), rows):
        vector = interop.from_sae(sae, 7, layer=12)
        assert vector == SteeringVector({12: rows[7]})
        assert not vector.layer_activations[12].requires_grad
