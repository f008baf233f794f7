"""Vectors that other projects wrote: each direction at its layer."""

import json
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


def refusal_direction(path: Path) -> SteeringVector:
    return interop.load_refusal_direction(path, layer=3)


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
    assert vector.layers == [0, 1, 2]
    for layer in (0, 1):  # the last block's row stands behind the final norm
        assert torch.equal(vector.layer_activations[layer], activations[layer][0][0, -1])


def test_a_refusal_direction_is_of_the_layer_before_the_block_whose_input_was_read(tmp_path: Path) -> None:
    """Written as their code does, from the inputs of blocks; compared with the blocks' outputs."""
    model, inputs = tiny.shared("llama"), []
    hook = model.model.layers[2].register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with record_activations(model) as activations, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    hook.remove()
    torch.save(inputs[0][0, -1].double(), tmp_path / "direction.pt")
    (tmp_path / "direction_metadata.json").write_text('{"pos": -1, "layer": 2}')
    vector = interop.load_refusal_direction(tmp_path)
    assert vector == SteeringVector({1: activations[1][0][0, -1].double()})
    assert vector == interop.load_refusal_direction(tmp_path / "direction.pt", layer=2)
    assert interop.load_refusal_direction(tmp_path, layer=1).layers == [0]


@pytest.mark.parametrize(
    ("metadata", "layer", "error", "message"),
    [
        (None, None, FileNotFoundError, "there is no file .*direction_metadata.json: pass layer="),
        ("{", None, ValueError, "direction_metadata.json has no layer: expected JSON such as"),
        ("[1]", None, ValueError, "direction_metadata.json has no layer: expected JSON such as"),
        ('{"pos": -1}', None, ValueError, "direction_metadata.json has no layer"),
        ("[" * 100_000, None, ValueError, "direction_metadata.json has no layer"),
        ('{"layer": "14"}', None, ValueError, "layer must be a whole number from 1, .* got '14'"),
        ('{"layer": 0}', None, ValueError, "layer must be a whole number from 1, the block whose input was read, got 0"),
        ("{}", -1, ValueError, "layer must be a whole number from 1, .* got -1"),
        ("{}", True, ValueError, "layer must be a whole number from 1, .* got True"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_refusal_direction_without_its_layer(
    tmp_path: Path, metadata: str | None, layer: Any, error: Any, message: str
) -> None:
    torch.save(torch.ones(3), tmp_path / "direction.pt")
    if metadata is not None:
        (tmp_path / "direction_metadata.json").write_text(metadata)
    with pytest.raises(error, match=message):
        interop.load_refusal_direction(tmp_path, layer=layer)
    with pytest.raises(
        ValueError, match="doesn't say its layer: pass layer=, or the folder that has direction_metadata"
    ):
        interop.load_refusal_direction(tmp_path / "direction.pt")


class TestFilesForOthers:
    vector = SteeringVector({-2: torch.tensor([1.0, 2.0]).bfloat16()}, metadata={"layers_of_model": "4"})

    def test_caa_has_one_direction(self, tmp_path: Path) -> None:
        interop.to_caa(self.vector, tmp_path / "v.pt", multiplier=2)
        assert torch.load(tmp_path / "v.pt").tolist() == [2.0, 4.0]
        assert torch.load(tmp_path / "v.pt").dtype == torch.float32

    def test_persona_vectors_has_a_row_more_than_blocks(self, tmp_path: Path) -> None:
        interop.to_persona_vectors(self.vector, tmp_path / "v.pt", multiplier=2)
        rows = torch.load(tmp_path / "v.pt")
        assert rows.tolist() == [[0, 0], [0, 0], [0, 0], [2, 4], [0, 0]]
        assert interop.load_persona_vectors(tmp_path / "v.pt") == SteeringVector({2: [2.0, 4.0]})
        interop.to_persona_vectors(SteeringVector({0: [1.0]}), tmp_path / "v.pt", blocks=2)
        assert torch.load(tmp_path / "v.pt").tolist() == [[0], [1], [0]]

    @pytest.mark.parametrize("layers", [[0], [3], [0, 3], [1, 2], [0, 1, 2, 3]])
    def test_persona_vectors_come_back_as_they_were(self, tmp_path: Path, layers: list[int]) -> None:
        vector = SteeringVector({layer: torch.randn(8) for layer in layers})
        interop.to_persona_vectors(vector, tmp_path / "v.pt", blocks=4)
        assert interop.load_persona_vectors(tmp_path / "v.pt") == vector

    def test_persona_vectors_of_zeros_alone_are_refused(self, tmp_path: Path) -> None:
        torch.save(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), tmp_path / "v.pt")
        with pytest.raises(ValueError, match="v.pt has zeros in all rows after the first one"):
            interop.load_persona_vectors(tmp_path / "v.pt")

    def test_a_refusal_direction_has_the_next_block(self, tmp_path: Path) -> None:
        interop.to_refusal_direction(self.vector, tmp_path, multiplier=2, position=-3)
        assert torch.load(tmp_path / "direction.pt").tolist() == [2.0, 4.0]
        assert json.loads((tmp_path / "direction_metadata.json").read_text()) == {"pos": -3, "layer": 3}
        assert interop.load_refusal_direction(tmp_path) == SteeringVector({2: [2.0, 4.0]})

    @pytest.mark.parametrize(
        ("write", "error", "message"),
        [
            (lambda v, p: interop.to_caa(SteeringVector({3: [1.0], 5: [1.0]}), p), ValueError, r"layers \[3, 5\]: write vector\[3\]"),
            (lambda v, p: interop.to_caa(SteeringVector({1: [1.0]}, "mlp"), p), ValueError, "CAA's code steers the outputs of decoder blocks, but this vector is of mlp"),
            (lambda v, p: interop.to_caa(SteeringVector({}), p), ValueError, "has no directions: there is nothing to write"),
            (lambda v, p: interop.to_caa([1.0], p), TypeError, "expected a SteeringVector, got list"),
            (lambda v, p: interop.to_caa(v, p, multiplier=float("inf")), ValueError, "multiplier must be finite, got inf"),
            (lambda v, p: interop.to_refusal_direction(SteeringVector({3: [1.0], 5: [1.0]}), p), ValueError, "the refusal direction code reads one"),
            (lambda v, p: interop.to_refusal_direction(v, p.parent, position=0.5), TypeError, "position must be a whole number, such as -1, got 0.5"),
            (lambda v, p: interop.to_persona_vectors(SteeringVector({1: [1.0]}), p), ValueError, "how many blocks the model has: pass blocks="),
            (lambda v, p: interop.to_persona_vectors(v, p, blocks=2), ValueError, "blocks must be a whole number above the vector's layer 2, got 2"),
            (lambda v, p: interop.to_persona_vectors(v, p, blocks="9"), ValueError, "above the vector's layer 2, got '9'"),
            (lambda v, p: interop.to_persona_vectors(SteeringVector({-1: [1.0]}), p, blocks=4), ValueError, "layer -1 counts from the model's end"),
            (lambda v, p: interop.to_persona_vectors(v, p, blocks=2**33), ValueError, "must be 100000 at most, .* got 8589934592"),
            (lambda v, p: interop.to_persona_vectors(SteeringVector({2**33: [1.0]}), p, blocks=2**34), ValueError, "must be 100000 at most, .* got"),
            (lambda v, p: interop.to_lm_eval(v, tiny.shared("llama"), p), ValueError, "directions have 2 numbers"),
            (lambda v, p: interop.to_lm_eval(v, tiny.shared("llama"), p.with_suffix(".csv")), ValueError, "names end in .pt or .pth, got .*v.csv"),
            (lambda v, p: interop.to_caa(v, p, multiplier=1e300), ValueError, "layer 2, times 1e.300, has numbers too large for float32"),
            (lambda v, p: interop.to_persona_vectors(v, p, blocks=4, multiplier=1e300), ValueError, "too large for float32"),
            (lambda v, p: interop.to_refusal_direction(v, p.parent, multiplier=1e300), ValueError, "too large for float32"),
            (lambda v, p: interop.to_lm_eval(SteeringVector({1: torch.ones(tiny.HIDDEN)}), tiny.shared("llama"), p, multiplier=1e300), ValueError, "too large for float32"),
            (lambda v, p: interop.to_lm_eval([1.0], tiny.shared("llama"), p), TypeError, "expected a SteeringVector, got list"),
            (lambda v, p: interop.to_lm_eval(SteeringVector({9: torch.ones(tiny.HIDDEN)}), tiny.shared("llama"), p), ValueError, "9"),
            (lambda v, p: interop.to_lm_eval(SteeringVector({1: torch.ones(tiny.HIDDEN)}, "heads"), tiny.shared("llama"), p), ValueError, "but heads are a module's input: evaluate inside"),
        ],
    )  # fmt: skip
    def test_what_others_can_not_read_is_refused(
        self, tmp_path: Path, write: Callable[..., Any], error: Any, message: str
    ) -> None:
        with pytest.raises(error, match=message):
            write(self.vector, tmp_path / "v.pt")
        assert os.listdir(tmp_path) == []

    def test_a_refusal_direction_s_two_files_are_written_together_or_not_at_all(self, tmp_path: Path) -> None:
        interop.to_refusal_direction(self.vector, tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interop.pt_files.json, "dumps", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                interop.to_refusal_direction(2 * self.vector, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class TestLmEval:
    """The harness runs in tests/engines; here is what doesn't need it."""

    @pytest.mark.parametrize("layer_type", ["decoder_block", "mlp", "self_attn", "input_layernorm"])
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_hookpoints_are_modules_of_the_base_model(self, tmp_path: Path, architecture: str, layer_type: Any) -> None:
        model = tiny.shared(architecture)
        vector = SteeringVector({0: torch.ones(tiny.HIDDEN), -1: torch.ones(1, tiny.HIDDEN)}, layer_type)
        arguments = interop.to_lm_eval(vector, model, tmp_path / "v.pt", multiplier=3)
        entries = torch.load(tmp_path / "v.pt", weights_only=True)
        assert arguments == {"steer_path": str(tmp_path / "v.pt")}
        last = len(model.base_model.layers if architecture == "llama" else model.base_model.h) - 1
        blocks = "layers" if architecture == "llama" else "h"
        assert [".".join(name.split(".")[:2]) for name in entries] == [f"{blocks}.0", f"{blocks}.{last}"]
        for name, entry in entries.items():
            assert isinstance(model.base_model.get_submodule(name), nn.Module)
            assert entry["steering_vector"].tolist() == [3.0] * tiny.HIDDEN
            others = {key: value for key, value in entry.items() if key != "steering_vector"}
            assert others == {"action": "add", "steering_coefficient": 1.0, "bias": None, "head_index": None}

    def test_modules_outside_the_base_model_are_refused(self, tmp_path: Path) -> None:
        model = tiny.shared("llama")
        vector = SteeringVector({0: [1.0]}, metadata={"layer_config": '{"decoder_block": {"0": "lm_head"}}'})
        with pytest.raises(
            ValueError, match="base_model, a LlamaModel, which lacks those of layers .0.: evaluate inside"
        ):
            interop.to_lm_eval(vector, model, tmp_path / "v.pt")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("lm", "steering", "message"),
        [
            (None, lambda tokens: None, "lm must be lm-evaluation-harness's HFLM of a decoder-only model, got NoneType"),
            (SimpleNamespace(backend="seq2seq"), lambda tokens: None, "of a decoder-only model, got SimpleNamespace"),
            (SimpleNamespace(backend="causal"), None, "steering must be callable, such as lambda tokens: vector.apply"),
            (SimpleNamespace(backend="causal"), lambda: None, "steering must be callable with 1 argument"),
        ],
    )  # fmt: skip
    def test_other_models_of_the_harness_are_refused(self, lm: Any, steering: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message), interop.steer_lm_eval(lm, steering):
            pass


@pytest.mark.parametrize(
    "read", [lambda p: interop.load_caa(p, layer=1), interop.load_persona_vectors, refusal_direction]
)
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

    @pytest.mark.parametrize(
        "content",
        [
            *({"a": torch.ones(2)}, {"a": "b"}, {}, torch.ones(1, 2, 3), [1.0], torch.ones(()), None, "text", 3, True),
            *(torch.ones(0), torch.ones(3, 0), torch.ones(0, 3)),
            *(torch.ones(4).to_sparse(), torch.eye(4).to_sparse()),
            *(torch.ones(4, device="meta"), torch.ones(4, 4, device="meta")),
        ],
        ids=str,
    )
    def test_of_other_tensors_are_told_as_what_they_hold(
        self, read: Callable[[Path], Any], tmp_path: Path, content: Any
    ) -> None:
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt holds .*, expected"):
            read(tmp_path / "other.pt")

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
    def test_of_other_numbers_than_real_ones_are_refused(
        self, read: Callable[[Path], Any], tmp_path: Path, dtype: torch.dtype
    ) -> None:
        shape = (4, 4) if read is interop.load_persona_vectors else (4,)
        torch.save(torch.ones(shape).to(dtype), tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"other.pt holds numbers of {dtype}, expected real numbers of 16, 32 or"):
            read(tmp_path / "other.pt")
        torch.save(torch.full(shape, torch.inf), tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt has NaN or infinite numbers"):
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
