"""The value: directions by layer, how they are told, chosen, compared, moved and kept."""

import copy
import inspect
import io
import math
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import steering_vectors.steering_vector
from steering_vectors import SteeringVector
from tests import tiny


def make(*layers: int, layer_type: Any = "decoder_block", seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: torch.randn(4, generator=generator) for layer in layers}, layer_type)


def test_a_vector_is_a_collection_of_its_layers() -> None:
    vector = SteeringVector({3: [1.0], 1: [2.0]})
    assert (1 in vector, 2 in vector, list(vector), len(vector)) == (True, False, [1, 3], 2)


class TestMaking:
    @pytest.mark.parametrize("shape", [(4,), (1, 4)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_the_caller_s_tensors_are_kept(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        direction = torch.ones(shape, dtype=dtype, requires_grad=True)
        vector = SteeringVector({2: direction})
        assert vector.layer_activations[2] is direction
        assert vector.hidden_size == 4

    def test_parameters_are_kept(self) -> None:
        parameter = nn.Parameter(torch.zeros(4))
        assert SteeringVector({0: parameter}).layer_activations[0] is parameter

    @pytest.mark.parametrize(
        "value", [[1.0, 2.0], [1, 2], (1.0, 2.0), np.array([1.0, 2.0], np.float32), np.array([1, 2]), [[1.0, 2.0]]]
    )
    def test_arrays_and_lists_become_tensors(self, value: Any) -> None:
        direction = SteeringVector({0: value}).layer_activations[0]
        assert isinstance(direction, Tensor)
        assert direction.dtype is torch.float32
        assert direction.flatten().tolist() == [1.0, 2.0]

    def test_layer_numbers_of_numpy_become_plain_ones(self) -> None:
        vector = SteeringVector({np.int64(3): torch.ones(2)})  # type: ignore[dict-item]
        assert vector.layers == [3]
        assert type(next(iter(vector.layer_activations))) is int

    def test_any_mapping_will_do_and_a_plain_dictionary_comes_of_it(self) -> None:
        vector = SteeringVector(OrderedDict({1: torch.ones(2)}))
        assert type(vector.layer_activations) is dict
        assert vector.layer_type == "decoder_block"

    def test_a_vector_rebuilt_from_another_s_directions_is_equal(self) -> None:
        vector = make(1, 2, layer_type="mlp")
        rebuilt = SteeringVector(
            layer_activations={layer: direction for layer, direction in vector.layer_activations.items()},  # noqa: C416
            layer_type=vector.layer_type,
        )
        assert rebuilt == vector
        assert rebuilt.layer_activations[1] is vector.layer_activations[1]

    def test_directions_may_be_assigned(self) -> None:
        vector, direction = make(1), torch.ones(4)
        vector.layer_activations[2] = direction
        assert vector.layers == [1, 2]
        vector.layer_activations = {5: direction}
        assert vector.layers == [5]
        assert vector.layer_activations[5] is direction
        del vector.layer_activations[5]
        assert vector.layers == []

    @pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp", "input_layernorm"])
    def test_every_layer_type_is_known(self, layer_type: Any) -> None:
        assert make(0, layer_type=layer_type).layer_type == layer_type


class TestChoosingLayers:
    vector = make(0, 10, 11, 12, 14)

    @pytest.mark.parametrize(
        ("layers", "chosen"),
        [
            (12, [12]),
            ([10, 12], [10, 12]),
            ([12, 10, 12], [10, 12]),
            ((11,), [11]),
            (range(10, 13), [10, 11, 12]),
            (slice(10, 13), [10, 11, 12]),
            (slice(10, 15, 2), [10, 12, 14]),
            (slice(14, None), [14]),
            (slice(None, 1), [0]),
            (np.int64(12), [12]),
            ({10, 11}, [10, 11]),
        ],
        ids=str,
    )
    def test_a_vector_of_those_layers(self, layers: Any, chosen: list[int]) -> None:
        part = self.vector[layers]
        assert isinstance(part, SteeringVector)
        assert part.layers == chosen
        assert all(part.layer_activations[n] is self.vector.layer_activations[n] for n in chosen)
        assert all(type(n) is int for n in part.layer_activations)

    def test_the_layer_type_stays(self) -> None:
        assert make(1, 2, layer_type="mlp")[1].layer_type == "mlp"

    def test_a_choice_does_not_change_the_vector_and_is_not_changed_by_it(self) -> None:
        vector = make(1, 2)
        part = vector[[1]]
        part.layer_activations[7] = torch.ones(4)
        del vector.layer_activations[1]
        assert vector.layers == [2]
        assert part.layers == [1, 7]

    def test_negative_numbers_are_layers_like_others(self) -> None:
        vector = make(-1, 0)
        assert vector[-1].layers == [-1]
        assert vector[-1:1].layers == [-1, 0]

    @pytest.mark.parametrize(
        ("layers", "absent"),
        [(13, "[13]"), ([10, 13], "[13]"), (slice(10, 14), "[13]"), (-1, "[-1]"), (slice(12, None), "[13]")],
        ids=str,
    )
    def test_an_absent_layer_is_an_error_that_lists_those_there(self, layers: Any, absent: str) -> None:
        with pytest.raises(LookupError) as error:
            self.vector[layers]
        assert f"no direction for layers {absent}, only for [0, 10-12, 14]" in str(error.value)

    @pytest.mark.parametrize("layers", [[], slice(5, 5)])
    def test_no_layer_at_all_is_an_error(self, layers: Any) -> None:
        with pytest.raises(LookupError, match="no direction for layers"):
            self.vector[layers]


class TestWhatIsTold:
    def test_layers_are_ascending(self) -> None:
        assert make(7, 3, 5).layers == [3, 5, 7]

    @given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6), st.booleans())
    @settings(max_examples=40, deadline=None)
    def test_norms_are_euclidean(self, numbers: list[float], row: bool) -> None:
        direction = torch.tensor([numbers] if row else numbers, dtype=torch.float64)
        assert SteeringVector({3: direction}).norms()[3] == pytest.approx(math.hypot(*numbers))

    def test_norms_of_half_precision_do_not_overflow(self) -> None:
        direction = torch.full((100,), 6e4, dtype=torch.float16)
        assert SteeringVector({0: direction}).norms()[0] == pytest.approx(10 * float(direction[0]))

    def test_norms_are_plain_numbers_without_gradient(self) -> None:
        norms = SteeringVector({0: torch.tensor([3.0, 4.0], requires_grad=True)}).norms()
        assert norms == {0: 5.0}
        assert type(norms[0]) is float

    def test_the_repr_is_short_and_says_layers_width_type_and_norms(self) -> None:
        vector = SteeringVector({layer: [0.0, layer + 1.0] for layer in [*range(30), 40, 41]}, "mlp")  # type: ignore[misc]
        assert repr(vector) == ("SteeringVector(layers=[0-29, 40, 41], hidden_size=2, layer_type='mlp', norms=1 to 42)")
        assert repr(SteeringVector({})) == "SteeringVector(layers=[], layer_type='decoder_block')"
        equal = SteeringVector({0: [3.0, 4.0], 1: [4.0, 3.0]})  # type: ignore[dict-item]
        assert "norms=5)" in repr(equal)

    def test_a_vector_without_directions_has_no_width(self) -> None:
        with pytest.raises(ValueError, match="this steering vector has no directions"):
            _ = SteeringVector({}).hidden_size


class TestEquality:
    def test_equal_numbers_are_equal_and_anything_else_is_not(self) -> None:
        vector = make(1, 2)
        assert vector == make(1, 2)
        assert not vector != make(1, 2)  # noqa: SIM202
        assert vector != make(1, 3)
        assert vector != make(1)
        assert vector != make(1, 2, seed=1)
        assert vector != make(1, 2, layer_type="mlp")
        assert vector != vector.to(torch.float64)
        assert vector != "vector"
        assert vector != vector.layer_activations

    def test_the_order_of_layers_does_not_matter(self) -> None:
        a, b = torch.ones(2), torch.zeros(2)
        assert SteeringVector({1: a, 2: b}) == SteeringVector({2: b, 1: a})

    def test_gradients_do_not_matter(self) -> None:
        assert SteeringVector({1: torch.ones(2, requires_grad=True)}) == SteeringVector({1: torch.ones(2)})

    def test_a_mutable_value_has_no_hash(self) -> None:
        with pytest.raises(TypeError, match="unhashable"):
            hash(make(1))


class TestTo:
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((torch.float64,), {}),
            (("cpu",), {"dtype": torch.float64}),
            (("cpu", torch.float64), {}),
            ((), {"device": "cpu", "dtype": torch.float64, "copy": True}),
            ((torch.zeros(1, dtype=torch.float64),), {}),
        ],
        ids=str,
    )
    def test_arguments_are_those_of_tensor_to(self, args: Any, kwargs: Any) -> None:
        vector = make(1, 2, layer_type="mlp")
        moved = vector.to(*args, **kwargs)
        for layer, direction in vector.layer_activations.items():
            assert torch.equal(moved.layer_activations[layer], direction.double())
            assert direction.dtype is torch.float32
        assert moved.layer_type == "mlp"

    def test_gradients_flow_through_it(self) -> None:
        direction = torch.ones(4, requires_grad=True)
        SteeringVector({0: direction}).to(torch.float64).layer_activations[0].sum().backward()
        assert direction.grad is not None


def torch_saved(vector: SteeringVector) -> Any:
    buffer = io.BytesIO()
    torch.save(vector, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestKeeping:
    @pytest.mark.parametrize(
        "keep",
        [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v)), torch_saved],
        ids=["deepcopy", "pickle", "save"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_comes_back_is_equal_and_shares_nothing(self, keep: Any, dtype: torch.dtype) -> None:
        vector = make(1, -2, layer_type="self_attn").to(dtype)
        vector.layer_activations[1].requires_grad_()
        back = keep(vector)
        assert type(back) is SteeringVector
        assert back == vector
        assert back.layer_activations[1].requires_grad
        with torch.no_grad():
            back.layer_activations[1].add_(1)
        assert back != vector

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_a_pickle_of_0_12_2_loads(self, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
        directions = {1: torch.tensor([1.0, 2.0]), 2: torch.tensor([3.0, 4.0])}
        # Its class stood at this path, a plain dataclass of two fields, so its state is their dictionary.
        old_class = type("SteeringVector", (), {"__module__": "steering_vectors.steering_vector"})
        old = old_class()
        old.__dict__.update(layer_activations=directions, layer_type="mlp")
        with monkeypatch.context() as patch:
            patch.setattr(steering_vectors.steering_vector, "SteeringVector", old_class)
            pickled = pickle.dumps(old, protocol)
        loaded = pickle.loads(pickled)
        assert type(loaded) is SteeringVector
        assert loaded == SteeringVector(directions, "mlp")

    def test_no_method_changes_the_vector(self) -> None:
        vector = SteeringVector({1: torch.ones(tiny.HIDDEN), -1: torch.ones(tiny.HIDDEN)})
        before = copy.deepcopy(vector)
        vector.to(torch.float64)
        _ = (vector[1], vector.norms(), repr(vector), vector.layers, vector == before)
        with vector.apply(tiny.shared("llama")), vector.patch(tiny.shared("llama")):
            pass
        assert vector == before
        assert vars(vector).keys() == {"layer_activations", "layer_type", "metadata"}


class TestUnchangedScripts:
    """What users of 0.12.2 write."""

    @pytest.mark.parametrize("name", ["apply", "patch", "patch_activations"])
    def test_parameters_stand_in_their_old_order_with_their_old_defaults(self, name: str) -> None:
        parameters = inspect.signature(getattr(SteeringVector, name)).parameters.values()
        old = [
            ("model", inspect.Parameter.empty),
            ("layer_config", None),
            ("operator", None),
            ("multiplier", 1.0),
            ("min_token_index", None),
            ("token_indices", None),
        ]
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
        assert [(p.name, p.default) for p in positional] == old
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == ["tokens", "this_thread_only"]

    def test_patch_activations_is_patch(self) -> None:
        assert SteeringVector.patch_activations is SteeringVector.patch

    def test_fields_stand_in_their_old_order(self) -> None:
        vector = SteeringVector({0: torch.ones(2)}, "mlp")
        assert vector == SteeringVector(layer_activations={0: torch.ones(2)}, layer_type="mlp")

    def test_names_stay_importable_from_their_modules(self) -> None:
        from steering_vectors.layer_matching import (
            LayerType,
            ModelLayerConfig,
            collect_matching_layers,
            guess_and_enhance_layer_config,
        )
        from steering_vectors.steering_vector import PatchDeltaOperator, SteeringPatchHandle
        from steering_vectors.torch_utils import get_module
        from steering_vectors.train_steering_vector import LayerType as Same
        from steering_vectors.train_steering_vector import SteeringVector as SameVector

        assert SameVector is SteeringVector
        assert Same is LayerType
        assert all((ModelLayerConfig, PatchDeltaOperator, SteeringPatchHandle, guess_and_enhance_layer_config))
        model = tiny.shared("llama")
        names = collect_matching_layers(model, "model.layers.{num}.mlp")
        assert [get_module(model, name) for name in names] == [block.mlp for block in tiny.blocks(model)]


@pytest.mark.parametrize("layers", ["12", [1.7], 1.0])
def test_what_is_no_layer_number_is_no_index(layers: Any) -> None:
    with pytest.raises(TypeError):
        SteeringVector({1: torch.ones(2), 2: torch.ones(2)})[layers]
