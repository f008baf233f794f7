"""Recording activations during the caller's own passes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_vectors import SteeringVector, record_activations
from tests import tiny
from tests.test_extraction import states_of

PROMPT = [11, 12, 13, 14, 15, 16, 17, 18]
BATCH = torch.tensor([PROMPT, PROMPT[::-1]])


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_recordings_are_the_hidden_states_of_hugging_face(architecture: str) -> None:
    model = tiny.shared(architecture)
    with record_activations(model) as records, torch.no_grad():
        model(BATCH)
    assert sorted(records) == list(range(len(tiny.blocks(model))))
    for number, row in enumerate(BATCH.tolist()):
        for layer, expected in enumerate(states_of(model, row)):
            torch.testing.assert_close(records[layer][0][number], expected, atol=1e-5, rtol=1e-5)
        by_hand = tiny.hidden_states(model, row)[-1]
        torch.testing.assert_close(records[max(records)][0][number], by_hand, atol=1e-5, rtol=1e-5)


def test_each_pass_is_one_entry() -> None:
    model = tiny.shared("llama")
    with record_activations(model, layers=1) as records, torch.no_grad():
        for length in (3, 5, 8):
            model(BATCH[:, :length])
    assert [activation.shape for activation in records[1]] == [(2, n, tiny.HIDDEN) for n in (3, 5, 8)]


def test_nothing_is_recorded_outside_the_block() -> None:
    model = tiny.shared("llama")
    with record_activations(model) as records:
        assert dict(records) == {}
    with torch.no_grad():
        model(BATCH)
    assert dict(records) == {}


@pytest.mark.parametrize("name", ["layers", "layer_nums"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        (-1, [2]),
        ([0, -1], [0, 2]),
        ([2, -1, 2, 0], [0, 2]),
        (range(1, 3), [1, 2]),
        (torch.tensor(1), [1]),
    ],
)
def test_layers_are_numbers_in_any_form(name: str, asked: Any, expected: list[int]) -> None:
    model = tiny.shared("llama")
    with record_activations(model, **{name: asked}) as records, torch.no_grad():
        model(BATCH)
    assert sorted(records) == expected


def test_layers_may_come_from_a_generator() -> None:
    with record_activations(tiny.shared("llama"), layers=(n for n in (0, 2))) as records, torch.no_grad():
        tiny.shared("llama")(BATCH)
    assert sorted(records) == [0, 2]


@pytest.mark.parametrize("layer_type", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"])
def test_other_layer_types_give_those_modules_outputs(layer_type: Any) -> None:
    model = tiny.shared("llama")
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handles = [model.get_submodule(f"model.layers.{n}.{layer_type}").register_forward_hook(keep) for n in range(3)]
    with record_activations(model, layer_type) as records, torch.no_grad():
        model(BATCH)
    for handle in handles:
        handle.remove()
    for layer in range(3):
        assert torch.equal(records[layer][0], seen[layer])


def test_experts_routing_is_left_out_of_their_activation() -> None:
    with record_activations(tiny.shared("mixtral"), "mlp") as records, torch.no_grad():
        tiny.shared("mixtral")(BATCH)
    assert {layer: passes[0].shape for layer, passes in records.items()} == dict.fromkeys(range(3), (2, 8, tiny.HIDDEN))


def test_a_layer_config_says_what_is_recorded() -> None:
    model = tiny.shared("llama")
    config: Any = {"decoder_block": "model.layers.{num}.mlp"}
    with (
        record_activations(model, layer_config=config) as given,
        record_activations(model, "mlp") as expected,
        torch.no_grad(),
    ):
        model(BATCH)
    assert torch.equal(given[1][0], expected[1][0])


def test_clones_are_detached_and_nobody_elses() -> None:
    model = tiny.shared("llama")
    with record_activations(model, layers=1) as records:
        before = model(BATCH).logits
        records[1][0].zero_()
        after = model(BATCH).logits
    assert not records[1][0].requires_grad
    assert torch.equal(before, after)


def test_without_clones_the_layers_own_output_is_kept_with_its_gradients() -> None:
    model = tiny.build("llama")
    kept: list[Tensor] = []
    handle = tiny.blocks(model)[1].register_forward_hook(
        lambda _m, _a, output: kept.append(output if isinstance(output, Tensor) else output[0])
    )
    with record_activations(model, clone_activations=False, layers=1) as records:
        model(BATCH)
    handle.remove()
    assert records[1][0] is kept[0]
    records[1][0].sum().backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_activations_keep_the_models_dtype() -> None:
    model = tiny.build("llama").to(torch.bfloat16)
    with record_activations(model) as records, torch.no_grad():
        model(BATCH)
    assert {activation.dtype for passes in records.values() for activation in passes} == {torch.bfloat16}


def test_a_recording_inside_and_one_outside_of_a_steering_see_what_was_steered() -> None:
    model = tiny.shared("llama")
    vector = SteeringVector({1: torch.ones(tiny.HIDDEN)})
    with record_activations(model, layers=1) as plain, torch.no_grad():
        model(BATCH)
    with (
        record_activations(model, layers=1) as outside,
        vector.apply(model),
        record_activations(model, layers=1) as inside,
        torch.no_grad(),
    ):
        model(BATCH)
    torch.testing.assert_close(inside[1][0], plain[1][0] + 1)
    assert torch.equal(outside[1][0], inside[1][0])


def test_training_mode_is_the_callers() -> None:
    model = tiny.build("llama").train()
    with record_activations(model):
        assert all(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    model = tiny.build("llama")
    mine = tiny.blocks(model)[1].register_forward_hook(lambda _m, _a, _o: None)
    before = hooks(model)
    if fails:
        with pytest.raises(KeyError), record_activations(model):
            raise KeyError
    else:
        with record_activations(model):
            assert hooks(model) == before + 3
    assert hooks(model) == before
    assert mine.id in tiny.blocks(model)[1]._forward_hooks


def test_both_names_for_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="two names of one parameter"):
        record_activations(tiny.shared("llama"), layers=1, layer_nums=1).__enter__()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 3}, "layer 3 does not exist: the model has 3 layers, 0 to 2, or -3 to -1 from the end"),
        ({"layers": [0, -4]}, "layer -4 does not exist: the model has 3 layers, 0 to 2"),
        ({"layer_nums": 7}, "layer 7 does not exist: the model has 3 layers, 0 to 2"),
        ({"layers": []}, "layers is empty"),
        ({"layer_type": "attention"}, "unknown layer type 'attention'; expected one of decoder_block"),
    ],
)
def test_what_the_model_has_not_is_refused_and_nothing_attached(arguments: dict[str, Any], message: str) -> None:
    model = tiny.build("llama")
    with pytest.raises(ValueError, match=message):
        record_activations(model, **arguments).__enter__()
    assert hooks(model) == 0


def test_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module.*got str"):
        record_activations("gpt2").__enter__()  # type: ignore[arg-type]
