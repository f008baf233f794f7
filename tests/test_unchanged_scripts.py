"""What users of the public library 0.12.2 wrote runs as it did."""

import copy
import importlib
import inspect
import io
import pickle
import pickletools
import sys
import types
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import steering_vectors
from steering_vectors import (
    SteeringVector,
    SteeringVectorTrainingSample,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    aggregate_activations,
    extract_activations,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    record_activations,
    train_steering_vector,
)
from tests import tiny

SAMPLES = [("I love this", "I hate this"), ("So good", "So bad"), ("yes", "no")]
REQUIRED = inspect.Parameter.empty
SOME = object()  # a default that is made when the function is: only that there is one is compared

# What 0.12.2's signatures say: names in order, with their defaults.
_TRAINING: dict[str, Any] = {
    "model": REQUIRED,
    "tokenizer": REQUIRED,
    "training_samples": REQUIRED,
    "layers": None,
    "layer_type": "decoder_block",
    "layer_config": None,
    "move_to_cpu": False,
    "read_token_index": -1,
    "show_progress": False,
}
_APPLYING: dict[str, Any] = {
    "self": REQUIRED,
    "model": REQUIRED,
    "layer_config": None,
    "operator": None,
    "multiplier": 1.0,
    "min_token_index": None,  # there it was 0 for apply alone, which means the same
    "token_indices": None,
}
SIGNATURES: dict[str, dict[str, Any]] = {
    "train_steering_vector": {
        **_TRAINING,
        "aggregator": SOME,
        "batch_size": 1,
        "tqdm_desc": "Training steering vector",
    },
    "extract_activations": {**_TRAINING, "batch_size": 1, "tqdm_desc": "Extracting activations"},
    "aggregate_activations": {"pos_acts_by_layer": REQUIRED, "neg_acts_by_layer": REQUIRED, "aggregator": SOME},
    "SteeringVectorTrainingSample": {
        "positive_str": REQUIRED,
        "negative_str": REQUIRED,
        "read_positive_token_index": None,
        "read_negative_token_index": None,
    },
    "SteeringVector": {"layer_activations": REQUIRED, "layer_type": "decoder_block"},
    "SteeringVector.apply": _APPLYING,
    "SteeringVector.patch_activations": _APPLYING,
    "SteeringVector.to": {"self": REQUIRED, "args": REQUIRED, "kwargs": REQUIRED},
    "SteeringPatchHandle.remove": {"self": REQUIRED},
    "record_activations": {
        "model": REQUIRED,
        "layer_type": "decoder_block",
        "layer_config": None,
        "clone_activations": True,
        "layer_nums": None,
    },
    "mean_aggregator": {},
    "pca_aggregator": {},
    "logistic_aggregator": {"sklearn_kwargs": None},
    "addition_operator": {},
    "ablation_operator": {},
    "ablation_then_addition_operator": {},
    "get_num_matching_layers": {"model": REQUIRED, "layer_matcher": REQUIRED},
    "guess_and_enhance_layer_config": {"model": REQUIRED, "layer_config": None, "layer_type": None},
}
MODULES = {
    "aggregators": ["Aggregator", "logistic_aggregator", "mean_aggregator", "pca_aggregator"],
    "layer_matching": [
        *("LayerMatcher", "LayerType", "ModelLayerConfig", "collect_matching_layers"),
        *("get_num_matching_layers", "guess_and_enhance_layer_config"),
    ],
    "record_activations": ["record_activations"],
    "steering_operators": ["ablation_operator", "ablation_then_addition_operator", "addition_operator"],
    "steering_vector": ["PatchDeltaOperator", "SteeringPatchHandle", "SteeringVector"],
    "torch_utils": ["get_module"],
    "train_steering_vector": [
        *("LayerType", "SteeringVector", "SteeringVectorTrainingSample", "aggregate_activations"),
        *("extract_activations", "train_steering_vector"),
    ],
}


def public(dotted: str) -> Any:
    value: Any = steering_vectors
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def ids_of(text: str) -> list[int]:
    ids: list[int] = tiny.tokenizer()(text)["input_ids"]
    return ids


class TestNames:
    @pytest.mark.parametrize("name", SIGNATURES)
    def test_have_the_same_parameters_in_the_same_order_with_the_same_defaults(self, name: str) -> None:
        parameters = inspect.signature(public(name)).parameters
        expected = SIGNATURES[name]
        assert list(parameters)[: len(expected)] == list(expected)
        for parameter, default in expected.items():
            if default is SOME:
                assert parameters[parameter].default not in (REQUIRED, None)
            else:
                assert parameters[parameter].default == default
            assert parameters[parameter].kind is not inspect.Parameter.KEYWORD_ONLY

    @pytest.mark.parametrize("name", SIGNATURES)
    def test_have_new_parameters_by_keyword_only(self, name: str) -> None:
        parameters = list(inspect.signature(public(name)).parameters.values())
        for parameter in parameters[len(SIGNATURES[name]) :]:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert parameter.default is not REQUIRED

    def test_cover_all_of_0_12_2(self) -> None:
        aliases = {"Aggregator", "LayerMatcher", "LayerType", "ModelLayerConfig", "PatchDeltaOperator"}
        classes = {"SteeringPatchHandle"}
        tested = {name for name in SIGNATURES if "." not in name} | aliases | classes
        assert tested <= set(steering_vectors.__all__)
        assert len(tested) == 20

    def test_of_layer_types_come_first(self) -> None:
        expected = ("decoder_block", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        assert get_args(steering_vectors.LayerType)[:5] == expected

    @pytest.mark.parametrize(("module", "names"), MODULES.items())
    def test_can_be_imported_from_their_modules(self, module: str, names: list[str]) -> None:
        found = importlib.import_module(f"steering_vectors.{module}")
        for name in names:
            assert getattr(found, name) is not None
            if name in steering_vectors.__all__:
                assert getattr(found, name) == getattr(steering_vectors, name)

    def test_of_modules_get_their_module_and_an_absent_one_a_lookup_error(self) -> None:
        from steering_vectors.torch_utils import get_module

        model = tiny.shared("gpt2")
        assert get_module(model, "transformer.h.1.mlp") is model.transformer.h[1].mlp
        with pytest.raises(LookupError, match=r"has no module 'transformer\.h\.9'"):
            get_module(model, "transformer.h.9")

    def test_of_layers_are_collected_up_to_the_first_that_is_missing(self) -> None:
        from steering_vectors.layer_matching import collect_matching_layers

        model = tiny.shared("gpt2")
        assert collect_matching_layers(model, "transformer.h.{num}.mlp") == [f"transformer.h.{n}.mlp" for n in range(3)]
        assert collect_matching_layers(model, lambda _model, num: f"transformer.h.{num}") == [
            f"transformer.h.{n}" for n in range(3)
        ]
        assert collect_matching_layers(model, "model.layers.{num}") == []


class TestTraining:
    def test_runs_with_everything_by_keyword(self) -> None:
        vector = train_steering_vector(
            model=tiny.shared("gpt2"),
            tokenizer=tiny.tokenizer(),
            training_samples=SAMPLES,
            layers=[0, 1],
            layer_type="decoder_block",
            layer_config={"decoder_block": "transformer.h.{num}"},
            move_to_cpu=True,
            read_token_index=-2,
            show_progress=False,
            aggregator=mean_aggregator(),
            batch_size=2,
            tqdm_desc="Training",
        )
        assert vector.layers == [0, 1]

    def test_runs_with_everything_by_place(self) -> None:
        by_place = train_steering_vector(
            *(
                tiny.shared("gpt2"),
                tiny.tokenizer(),
                SAMPLES,
                [1],
                "mlp",
                None,
                True,
                -2,
                False,
                pca_aggregator(),
                2,
                "x",
            )
        )
        by_name = train_steering_vector(
            tiny.shared("gpt2"),
            tiny.tokenizer(),
            SAMPLES,
            layers=[1],
            layer_type="mlp",
            read_token_index=-2,
            aggregator=pca_aggregator(),
        )
        assert by_place.layer_type == "mlp"
        torch.testing.assert_close(by_place.layer_activations[1], by_name.layer_activations[1], atol=1e-4, rtol=1e-4)

    def test_halves_are_the_whole(self) -> None:
        model, tokenizer = tiny.shared("gpt2"), tiny.tokenizer()
        positive, negative = extract_activations(model, tokenizer, SAMPLES, batch_size=2)
        assert all(isinstance(rows, list) for rows in positive.values())
        directions = aggregate_activations(positive, negative, mean_aggregator())
        vector = train_steering_vector(model, tokenizer, SAMPLES, batch_size=2)
        for layer, direction in directions.items():
            torch.testing.assert_close(direction, vector.layer_activations[layer])

    def test_pairs_of_one_text_twice_give_a_probes_rows(self) -> None:
        model, tokenizer = tiny.shared("gpt2"), tiny.tokenizer()
        texts = ["one", "two words", "a third text"]
        positive, negative = extract_activations(model, tokenizer, [(t, t) for t in texts], layers=[1], batch_size=2)
        for n, text in enumerate(texts):
            expected = tiny.hidden_states(model, ids_of(text))[1][-1]
            for side in (positive, negative):
                torch.testing.assert_close(torch.cat(side[1])[n], expected, atol=1e-5, rtol=1e-5)

    def test_a_probes_rows_inside_apply_are_steered(self) -> None:
        model, tokenizer = tiny.shared("gpt2"), tiny.tokenizer()
        samples = [(t, t) for t in ("one", "two words")]
        plain, _ = extract_activations(model, tokenizer, samples, layers=[1])
        with SteeringVector({1: torch.ones(tiny.HIDDEN)}).apply(model, multiplier=3):
            steered, _ = extract_activations(model, tokenizer, samples, layers=[1])
        torch.testing.assert_close(torch.cat(steered[1]), torch.cat(plain[1]) + 3)

    def test_samples_are_plain_mutable_values(self) -> None:
        sample = SteeringVectorTrainingSample("a", "b", 1, read_negative_token_index=0)
        sample.positive_str = "c"
        assert sample == SteeringVectorTrainingSample("c", "b", 1, 0)

    def test_a_custom_aggregator_gets_all_rows(self) -> None:
        shapes: list[tuple[torch.Size, torch.Size]] = []

        def first(pos_acts: Tensor, neg_acts: Tensor) -> Tensor:
            shapes.append((pos_acts.shape, neg_acts.shape))
            return pos_acts[0] - neg_acts[0]

        vector = train_steering_vector(tiny.shared("gpt2"), tiny.tokenizer(), SAMPLES, layers=[1], aggregator=first)
        rows = [tiny.hidden_states(tiny.shared("gpt2"), ids_of(text))[1][-1] for text in SAMPLES[0]]
        assert shapes == [(torch.Size([3, tiny.HIDDEN]), torch.Size([3, tiny.HIDDEN]))]
        torch.testing.assert_close(vector.layer_activations[1], rows[0] - rows[1], atol=1e-5, rtol=1e-5)

    def test_aggregators_take_recorded_rows_that_carry_gradients(self) -> None:
        """0.12.2's ran without gradients, so what a script recorded itself went in as it was."""
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(4, 8, generator=generator, requires_grad=True) for _ in range(2)]
        for aggregator in (mean_aggregator(), pca_aggregator(), logistic_aggregator()):
            assert aggregator(*rows).isfinite().all()


class TestRecording:
    def test_runs_as_before(self) -> None:
        model = tiny.shared("gpt2")
        with record_activations(model, "mlp", None, True, [0, -1]) as records, torch.no_grad():
            model(torch.tensor([ids_of("hello")]))
            model(torch.tensor([ids_of("hi")]))
        assert sorted(records) == [0, 2]
        assert [len(passes) for passes in records.values()] == [2, 2]

    def test_a_layer_that_never_ran_has_an_empty_list(self) -> None:
        with record_activations(tiny.shared("gpt2")) as records:
            assert records[1] == []


class TestVectors:
    def vector(self) -> SteeringVector:
        return train_steering_vector(tiny.shared("gpt2"), tiny.tokenizer(), SAMPLES, layers=[0, 1])

    def test_are_rebuilt_from_anothers_directions(self) -> None:
        vector = self.vector()
        rebuilt = SteeringVector(
            layer_activations={k: v * 2 for k, v in vector.layer_activations.items()}, layer_type=vector.layer_type
        )
        assert rebuilt.norms()[1] == pytest.approx(2 * vector.norms()[1])

    def test_directions_may_be_assigned(self) -> None:
        vector = self.vector()
        vector.layer_activations[1] = torch.ones(tiny.HIDDEN)
        assert type(vector.layer_activations) is dict
        vector.layer_activations = {2: torch.full((tiny.HIDDEN,), 2.0)}
        model, ids = tiny.shared("gpt2"), torch.tensor([ids_of("hello")])
        with record_activations(model, layer_nums=[2]) as plain, torch.no_grad():
            model(ids)
        with vector.apply(model), record_activations(model, layer_nums=[2]) as steered, torch.no_grad():
            model(ids)
        torch.testing.assert_close(steered[2][0], plain[2][0] + 2)

    def test_setting_is_the_plain_one(self) -> None:
        assert SteeringVector.__setattr__ is object.__setattr__

    @pytest.mark.parametrize("multiplier", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)])
    def test_multipliers_may_be_any_number(self, multiplier: Any) -> None:
        model, ids = tiny.shared("gpt2"), torch.tensor([ids_of("hello")])
        vector = SteeringVector({1: torch.ones(tiny.HIDDEN)})
        with record_activations(model, layer_nums=[1]) as plain, torch.no_grad():
            model(ids)
        with vector.apply(model, multiplier=multiplier), record_activations(model) as steered, torch.no_grad():
            model(ids)
        torch.testing.assert_close(steered[1][0], plain[1][0] + 2)

    @pytest.mark.parametrize("min_token_index", [None, 0])
    def test_both_old_defaults_of_min_token_index_steer_all_tokens(self, min_token_index: int | None) -> None:
        model, ids = tiny.shared("gpt2"), torch.tensor([ids_of("hello")])
        vector = SteeringVector({1: torch.ones(tiny.HIDDEN)})
        with record_activations(model, layer_nums=[1]) as plain, torch.no_grad():
            model(ids)
        handle = vector.patch_activations(model, min_token_index=min_token_index)
        with record_activations(model, layer_nums=[1]) as steered, torch.no_grad():
            model(ids)
        handle.remove()
        torch.testing.assert_close(steered[1][0], plain[1][0] + 1)

    @pytest.mark.parametrize(
        "operator",
        [
            addition_operator(),
            ablation_operator(),
            ablation_then_addition_operator(),
            lambda original, direction: direction,
            lambda original, direction: direction * original.norm(dim=-1, keepdim=True),
            lambda original, direction: -(original @ direction.squeeze()).unsqueeze(-1) * direction,
        ],
    )
    def test_old_operators_run(self, operator: Any) -> None:
        model, ids = tiny.shared("gpt2"), torch.tensor([ids_of("hello")])
        with self.vector().apply(model, operator=operator, multiplier=0.5), torch.no_grad():
            assert model(ids).logits.isfinite().all()

    def test_to_takes_what_tensors_take(self) -> None:
        vector = self.vector()
        for moved in (vector.to(torch.float16), vector.to("cpu", torch.float16), vector.to(torch.ones(1).half())):
            assert moved.layer_activations[1].dtype is torch.float16
        assert vector.to(device="cpu", dtype=torch.float64).layer_activations[0].dtype is torch.float64
        assert vector.layer_activations[0].dtype is torch.float32


def pickle_of_0_12_2(protocol: int) -> bytes:
    """A pickle as 0.12.2 wrote it: a dataclass of that class path and those two fields, made by a stand-in."""
    stand_in = types.ModuleType("steering_vectors.steering_vector")
    made = type("SteeringVector", (), {"__module__": stand_in.__name__, "__qualname__": "SteeringVector"})
    stand_in.SteeringVector = made  # type: ignore[attr-defined]
    old = made()
    old.__dict__.update(layer_activations={3: torch.arange(4.0), 5: torch.ones(4)}, layer_type="mlp")
    real = sys.modules[stand_in.__name__]
    try:
        sys.modules[stand_in.__name__] = stand_in
        return pickle.dumps(old, protocol)
    finally:
        sys.modules[stand_in.__name__] = real


class TestPickles:
    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_of_0_12_2_load(self, protocol: int) -> None:
        data = pickle_of_0_12_2(protocol)
        listing = io.StringIO()
        pickletools.dis(data, listing)
        assert "steering_vectors.steering_vector" in listing.getvalue()
        vector = pickle.loads(data)
        assert type(vector) is SteeringVector
        assert vector == SteeringVector({3: torch.arange(4.0), 5: torch.ones(4)}, "mlp")
        assert "layers=[3, 5]" in repr(vector)

    def test_of_ours_keep_to_the_two_old_fields_under_the_old_path(self) -> None:
        vector = SteeringVector({1: torch.ones(4)}, metadata={"method": "by hand"})
        assert vector.__getstate__() == {**vars(vector), "metadata": {"method": "by hand"}}
        assert type(vector.__getstate__()["metadata"]) is dict  # of no class that 0.12.2 lacks
        assert SteeringVector({1: torch.ones(4)}).__getstate__().keys() == {"layer_activations", "layer_type"}
        assert (
            f"{SteeringVector.__module__}.{SteeringVector.__qualname__}"
            == "steering_vectors.steering_vector.SteeringVector"
        )

    @pytest.mark.parametrize("copied", ["pickle", "torch.save", "copy", "deepcopy"])
    def test_and_copies_of_ours_are_equal(self, copied: str) -> None:
        vector = SteeringVector({1: torch.randn(4), -1: torch.randn(4).half().float()}, "mlp")
        if copied == "torch.save":
            buffer = io.BytesIO()
            torch.save(vector, buffer)
            buffer.seek(0)
            again = torch.load(buffer, weights_only=False)
        elif copied == "pickle":
            again = pickle.loads(pickle.dumps(vector))
        else:
            again = getattr(copy, copied)(vector)
        assert again == vector
        assert again is not vector
        if copied != "copy":
            again.layer_activations[1].zero_()
            assert again != vector
