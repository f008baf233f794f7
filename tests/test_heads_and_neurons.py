"""Sites that are a module's input: where they are given by name, what is refused, and all that shows a vector."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    ablate_everywhere,
    at,
    clamp_operator,
    from_index,
    hub,
    projection_quantiles,
    read_activations,
    record_activations,
    steer,
    trace_steering,
    train_steering_vector,
    unembed,
)
from tests import tiny
from tests.test_layer_matching import jamba
from tests.test_steering import logits
from tests.test_training_through import enable_checkpointing

IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
PAIRS: Any = [([5, 6, 7], [5, 6, 9]), ([8, 11], [8, 12])]
NEURONS = 48


def random_vector(width: int, layer_type: Any, *layers: int, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({n: torch.randn(width, generator=generator) for n in layers or (1,)}, layer_type)


class TestANameInLayerConfig:
    def test_is_that_of_the_module_whose_input_is_meant(self) -> None:
        model = tiny.shared("llama")
        config: Any = {"heads": "model.layers.{num}.self_attn.o_proj"}
        vector = train_steering_vector(model, tiny.tokenizer(), PAIRS, layer_type="heads", layer_config=config)
        assert "layer_config" not in vector.metadata
        assert vector == train_steering_vector(model, tiny.tokenizer(), PAIRS, layer_type="heads")

    @pytest.mark.parametrize("takes", ["arguments by position", "arguments by name"])
    def test_may_be_of_any_module_and_is_kept_in_files(self, takes: str, tmp_path: Path) -> None:
        """The input of a norm comes by position, that of attention by name."""
        model: Any = tiny.shared("llama")
        name = "input_layernorm" if takes == "arguments by position" else "self_attn"
        config: Any = {"neurons": f"model.layers.{{num}}.{name}"}
        trained = train_steering_vector(
            model, tiny.tokenizer(), PAIRS, layers=[1], layer_type="neurons", layer_config=config
        )
        trained.save(tmp_path / "v")
        loaded = SteeringVector.load(tmp_path / "v")
        direction = loaded.layer_activations[1]

        def before(_module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] + direction, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + direction}

        handle = model.model.layers[1].get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
        expected = logits(model)
        handle.remove()
        with loaded.apply(model):
            assert torch.equal(logits(model), expected)
        assert not torch.equal(logits(model), expected)

    def test_says_where_the_down_projection_is_that_is_not_found(self) -> None:
        model: Any = tiny.build("mixtral")
        name = "block_sparse_moe.gate" if tiny.ON_TRANSFORMERS_4 else "mlp.gate"
        vector, config = random_vector(tiny.HIDDEN, "neurons"), {"neurons": f"model.layers.{{num}}.{name}"}
        plain = logits(model)
        with vector.apply(model, config):  # type: ignore[arg-type]
            assert not torch.equal(logits(model), plain)


class TestWhatIsRefused:
    def test_neurons_of_experts(self) -> None:
        message = (
            r"no neurons found in the blocks of MixtralForCausalLM, .*; a mixture of experts has no single down "
            r"projection; if a module in them .* pass layer_config=\{'neurons': 'model\.layers\.\{num\}\.NAME'\}"
        )
        with pytest.raises(ValueError, match=message):
            random_vector(NEURONS, "neurons").apply(tiny.shared("mixtral"))

    def test_heads_of_a_model_without_attention(self) -> None:
        with (
            pytest.raises(ValueError, match=r"no heads found in the blocks of MambaForCausalLM.*projects the heads"),
            record_activations(tiny.shared("mamba"), "heads"),
        ):
            pass

    def test_a_block_of_a_hybrid_model_that_has_none(self) -> None:
        with pytest.raises(
            ValueError, match=r"block 0 of JambaForCausalLM has no heads; blocks that have one: \[1, 3\]"
        ):
            random_vector(tiny.HIDDEN, "heads", 0).apply(jamba())
        assert list(read_activations(jamba(), tiny.tokenizer(), ["a"], layer_type="neurons")) == [0, 2]

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
    @pytest.mark.parametrize(("layer_type", "width"), [("heads", 24), ("neurons", tiny.HIDDEN)])
    def test_another_width_at_the_call(self, architecture: str, layer_type: Any, width: int) -> None:
        there = tiny.HIDDEN if layer_type == "heads" else 4 * tiny.HIDDEN if architecture == "gpt2" else NEURONS
        message = (
            f"directions have {width} numbers, but the {layer_type} of the model's layer 1 have {there}: use a vector "
            f"of the {layer_type} of this model"
        )
        with pytest.raises(ValueError, match=message):
            random_vector(width, layer_type).apply(tiny.shared(architecture))

    @pytest.mark.parametrize("layer_type", ["heads", "neurons"])
    def test_tokens_of_what_is_not_the_stream(self, layer_type: Any) -> None:
        with pytest.raises(ValueError, match=f"the vector is of {layer_type}, which a projection maps to the residual"):
            random_vector(tiny.HIDDEN, layer_type).top_tokens(tiny.shared("llama"), tiny.tokenizer())

    def test_a_sum_with_a_vector_of_the_stream(self) -> None:
        with pytest.raises(ValueError, match="different layer types: 'heads' and 'self_attn'"):
            random_vector(4, "heads") + random_vector(4, "self_attn")


def test_what_the_projection_makes_of_heads_can_be_unembedded() -> None:
    model: Any = tiny.shared("llama")
    direction = random_vector(tiny.HIDDEN, "heads").layer_activations[1]
    written = model.model.layers[1].self_attn.o_proj.weight.detach() @ direction
    assert unembed(model, written).shape == (tiny.VOCABULARY,)


def test_heads_wider_than_the_stream_are_steered() -> None:
    model: Any = tiny.build("llama", head_dim=16)
    vector = random_vector(64, "heads")
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _m, args: (args[0] + vector.layer_activations[1],)
    )
    expected = logits(model, IDS)
    handle.remove()
    with vector.apply(model):
        assert torch.equal(logits(model, IDS), expected)


class TestAblation:
    def test_of_one_head_is_its_columns_of_the_projection_set_to_zero(self) -> None:
        model: Any = tiny.build("llama")
        size = model.config.head_dim
        twin: Any = tiny.build("llama")
        with torch.no_grad():
            twin.model.layers[1].self_attn.o_proj.weight[:, 2 * size : 3 * size] = 0
        off = torch.zeros(4, size)
        off[2] = 1
        with steer(model, lambda h: -h * off.flatten(), layers=1, layer_type="heads"):
            torch.testing.assert_close(logits(model, IDS), logits(twin, IDS), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(logits(model, IDS), logits(twin, IDS), atol=1e-3)

    def test_of_a_neuron_is_its_column_set_to_zero(self) -> None:
        model: Any = tiny.build("gpt2")
        twin: Any = tiny.build("gpt2")
        with torch.no_grad():
            twin.transformer.h[1].mlp.c_proj.weight[7] = 0
        off = torch.eye(4 * tiny.HIDDEN)[7]
        with steer(model, lambda h: -h * off, layers=1, layer_type="neurons"):
            torch.testing.assert_close(logits(model, IDS), logits(twin, IDS), atol=1e-6, rtol=1e-5)

    def test_of_heads_goes_with_one_of_the_stream(self) -> None:
        """The stream's parts are found by passes of their own, in which the heads are steered too."""
        model, direction = tiny.shared("llama"), torch.ones(tiny.HIDDEN)
        with (
            random_vector(tiny.HIDDEN, "heads").apply(model),
            ablate_everywhere(model, direction),
            record_activations(model) as outputs,
        ):
            logits(model, IDS)
        for ((activation,),) in zip(outputs.values(), strict=True):
            assert float((activation @ direction).abs().max()) < 1e-4


class TestWhatShowsThem:
    @pytest.mark.parametrize(("layer_type", "width"), [("heads", tiny.HIDDEN), ("neurons", NEURONS)])
    def test_a_trace_counts_their_tokens(self, layer_type: Any, width: int) -> None:
        model, vector = tiny.shared("llama"), random_vector(width, layer_type)
        with record_activations(model, layer_type, layers=1) as plain:
            logits(model, IDS)
        with vector.apply(model, tokens=at([0, 3])), trace_steering(model) as trace:
            logits(model, IDS)
        (summary,) = trace.summary().values()
        assert (summary.runs, summary.steered_tokens) == (1, 4)
        sizes = plain[1][0][:, [0, 3]].norm(dim=-1)
        assert summary.change == pytest.approx(float((vector.norms()[1] / sizes).mean()), rel=1e-4)

    def test_the_input_and_the_output_of_one_module_are_traced_apart(self) -> None:
        model, name = tiny.shared("llama"), "model.layers.{num}.mlp.down_proj"
        with (
            random_vector(NEURONS, "neurons").apply(model, tokens=at([0])),
            random_vector(tiny.HIDDEN, "mlp").apply(model, {"mlp": name}, tokens=at([1])),
            trace_steering(model) as trace,
        ):
            logits(model, IDS)
        assert (trace.summary()[1].runs, trace.summary()[1].steered_tokens) == (1, 4)

    def test_a_vector_says_width_in_place_of_hidden_size(self) -> None:
        vector = random_vector(NEURONS, "neurons")
        assert repr(vector).startswith("SteeringVector(layers=[1], width=48, layer_type='neurons', norms=")
        assert "width" in vector._repr_html_()
        assert "hidden size" not in vector._repr_html_()

    @pytest.mark.parametrize(
        ("layer_type", "words"),
        [
            ("heads", "the attention heads in layer 1 (`heads`,"),
            ("neurons", "the MLP's neurons in layer 1 (`neurons`,"),
        ],
    )
    def test_a_model_card_says_what_the_directions_change(self, layer_type: Any, words: str) -> None:
        assert words in hub.model_card(random_vector(NEURONS, layer_type), "me/v")

    def test_a_file_says_which_convention_its_layers_follow(self, tmp_path: Path) -> None:
        for layer_type in ("heads", "mlp"):
            random_vector(4, layer_type).save(tmp_path / layer_type)
        said = [SteeringVector.load(tmp_path / name).metadata["layer_convention"] for name in ("heads", "mlp")]
        assert said[0].startswith("the input of the projection back to the residual stream")
        assert said[1].startswith("the output of the layer")


def test_bounds_from_quantiles_hold_in_heads() -> None:
    model, vector = tiny.shared("llama"), random_vector(tiny.HIDDEN, "heads", 0, 1)
    texts = ["some text", "more text than that"]
    (low,) = projection_quantiles(model, tiny.tokenizer(), texts, vector, [0.5])
    with (
        vector.apply(model, operator=clamp_operator(min=low)),
        record_activations(model, "heads", layers=[0, 1]) as made,
    ):
        logits(model, IDS)
    for layer, projections in vector.project(made).items():
        assert float(projections[0].min()) >= low[layer] - 1e-5


def test_threads_at_once_have_their_own_multipliers() -> None:
    model, vector = tiny.shared("llama"), random_vector(NEURONS, "neurons", 0, 2)
    multipliers = (2.0, -2.0, 0.0)
    expected = []
    for multiplier in multipliers:
        with vector.apply(model, multiplier=multiplier, tokens=from_index(1)):
            expected.append(logits(model, IDS))
    meeting, found = threading.Barrier(len(multipliers), timeout=20), dict[float, Tensor]()

    def run(multiplier: float) -> None:
        with vector.apply(model, multiplier=multiplier, tokens=from_index(1), this_thread_only=True):
            meeting.wait()  # all steerings are attached
            found[multiplier] = logits(model, IDS)
            meeting.wait()

    threads = [threading.Thread(target=run, args=(multiplier,)) for multiplier in multipliers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for multiplier, one in zip(multipliers, expected, strict=True):
        assert torch.equal(found[multiplier], one)


def test_layers_that_checkpointing_runs_again_are_steered_again() -> None:
    model = tiny.build("llama").train()
    plain, checkpointed = (random_vector(NEURONS, "neurons", seed=1).layer_activations[1] for _ in range(2))
    for direction, is_on in ((plain, False), (checkpointed, True)):
        direction.requires_grad_()
        if is_on:
            enable_checkpointing(model, reentrant=False)
        with SteeringVector({1: direction}, "neurons").apply(model, tokens=from_index(2)):
            model(IDS, use_cache=False).logits.square().mean().backward()
    assert plain.grad is not None
    assert bool(plain.grad.any())
    torch.testing.assert_close(checkpointed.grad, plain.grad)
