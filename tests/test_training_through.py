"""Training through a steered model: gradient checkpointing, optimizers, several passes before a backward one."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steering_vectors import SteeringVector, from_index, generated
from tests import tiny
from tests.test_steering import first, padded, shown, vector

PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23]]
SELECTIONS: list[Any] = [None, from_index(2), generated([7, 3]), lambda p: (p.index % 2).float() / 2]


def enable_checkpointing(model: Any, *, reentrant: bool) -> None:
    name = "gradient" if tiny.ON_TRANSFORMERS_4 else "activation"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    model.enable_input_require_grads()


def loss_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**inputs, use_cache=False).logits.square().mean()
    return loss


def gradients_of(model: nn.Module, direction: Tensor) -> list[Tensor]:
    gradients = [p.grad for p in (*model.parameters(), direction)]
    assert gradients[-1] is not None
    return [torch.zeros(()) if g is None else g.clone() for g in gradients]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp", "input_layernorm"])
@pytest.mark.parametrize("tokens", SELECTIONS, ids=shown)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradients(
    architecture: str, tokens: Any, layer_type: Any, reentrant: bool
) -> None:
    model: Any = tiny.build(architecture).train()
    for module in model.modules():  # what is random would differ anyway
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    runs: list[int] = []
    next(part for part in tiny.blocks(model)[1].children()).register_forward_hook(lambda *_: runs.append(1))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, reentrant=reentrant)
        model.zero_grad()
        direction = vector(scale=3.0).layer_activations[1].clone().requires_grad_()
        steered = SteeringVector({1: direction}, layer_type)
        with steered.apply(model, tokens=tokens):
            # Two passes before a backward one, of other shapes and so with other tokens.
            total = loss_of(model, padded(*PROMPTS)) + loss_of(model, padded([*PROMPTS[0], 18, 19], PROMPTS[1]))
            total.backward()
        found.append(gradients_of(model, direction))
    assert len(runs) == 6  # with checkpoints each pass ran twice
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-3)


def test_backward_passes_in_another_order_and_after_leaving() -> None:
    model: Any = tiny.build("llama").train()
    batches = [padded(*PROMPTS), padded(PROMPTS[1]), padded(*PROMPTS[::-1])]
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, reentrant=False)
        model.zero_grad()
        with vector(scale=3.0, layer_type="mlp").apply(model, tokens=lambda p: p.index % 2 == 1):
            losses = [loss_of(model, inputs) for inputs in batches]
            for number in (2, 0):
                losses[number].backward()
            losses[1].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-3)


def test_two_steerings_removed_in_any_order_leave_the_model_s_own_function() -> None:
    model: Any = tiny.build("llama").train()
    enable_checkpointing(model, reentrant=False)
    owners = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    before = [module._gradient_checkpointing_func for module in owners]
    assert before
    some = vector().patch(model, tokens=from_index(1))
    other = vector().patch(model, tokens=from_index(2))
    loss_of(model, padded(*PROMPTS)).backward()
    some.remove()
    loss_of(model, padded(*PROMPTS)).backward()
    other.remove()
    assert all(module._gradient_checkpointing_func is function for module, function in zip(owners, before, strict=True))


def test_a_function_that_was_set_within_the_block_stays() -> None:
    model: Any = tiny.build("llama").train()
    enable_checkpointing(model, reentrant=False)
    owner = next(module for module in model.modules() if "_gradient_checkpointing_func" in vars(module))
    with vector().apply(model, tokens=from_index(1)):
        owner._gradient_checkpointing_func = checkpoint
    assert owner._gradient_checkpointing_func is checkpoint


def test_checkpoints_that_the_library_does_not_know_of_are_refused_in_words() -> None:
    model: Any = tiny.build("llama").train()
    mlp = tiny.blocks(model)[1].mlp
    own = mlp.forward
    mlp.forward = lambda hidden: checkpoint(own, hidden, use_reentrant=False)
    config: Any = {"mlp": "model.layers.{num}.mlp.up_proj"}
    with SteeringVector({1: torch.ones(48)}, "mlp").apply(model, config, tokens=from_index(1)):
        loss = loss_of(model, padded(*PROMPTS))
        with pytest.raises(RuntimeError, match="enable gradient checkpointing with the model's own method"):
            loss.backward()


@pytest.mark.parametrize("tokens", [None, generated([7, 3])], ids=shown)
def test_several_optimizer_steps_in_one_block_are_those_of_a_loop_by_hand(tokens: Any) -> None:
    inputs = padded(*PROMPTS)
    losses: list[list[float]] = []
    for by_hand in (False, True):
        model: Any = tiny.build("llama").train()
        direction = nn.Parameter(vector(scale=2.0).layer_activations[1].clone())
        optimizer = torch.optim.SGD([*model.parameters(), direction], lr=0.02)
        mask = torch.ones(2, 7) if tokens is None else torch.tensor([[0.0] * 6 + [1.0]] * 2)

        def add(_m: nn.Module, _a: Any, output: Any, direction: Tensor = direction, mask: Tensor = mask) -> Any:
            steered = first(output) + mask[..., None] * direction
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        context: Any = tiny.blocks(model)[1].register_forward_hook(add)
        if not by_hand:
            context.remove()
            context = SteeringVector({1: direction}).apply(model, tokens=tokens)
        with context:
            seen = []
            for _ in range(4):
                optimizer.zero_grad()
                loss = loss_of(model, inputs)
                loss.backward()
                optimizer.step()
                seen.append(float(loss.detach()))
        losses.append(seen)
    assert losses[0][0] > losses[0][-1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_are_those_of_a_hook_by_hand(dtype: torch.dtype) -> None:
    inputs, found = padded(*PROMPTS), []
    for by_hand in (False, True):
        model: Any = tiny.build("llama")
        direction = vector().layer_activations[1].clone().requires_grad_()

        def add(_m: nn.Module, _a: Any, output: Any, direction: Tensor = direction) -> Any:
            steered = first(output) + direction.to(first(output).dtype)
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        context: Any = tiny.blocks(model)[1].register_forward_hook(add)
        if not by_hand:
            context.remove()
            context = SteeringVector({1: direction}).apply(model)
        with torch.autocast("cpu", dtype=dtype), context:
            loss_of(model, inputs).float().backward()
        found.append(gradients_of(model, direction))
    assert found[0][-1].dtype is torch.float32
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_was_kept_for_running_again_is_let_go_with_the_graph() -> None:
    model: Any = tiny.build("llama").train()
    enable_checkpointing(model, reentrant=False)
    with vector(layer_type="mlp").apply(model, tokens=from_index(1)):
        inputs = padded(*PROMPTS)
        kept = weakref.ref(inputs["attention_mask"])
        loss = loss_of(model, inputs)
        loss.backward()
        del inputs, loss
        gc.collect()
        assert kept() is None


def by_hand(model: Any, gate: Tensor, direction: Tensor) -> Any:
    """A hook that adds each token's gate, a ``(batch, seq)`` tensor, times the direction."""

    def add(_m: nn.Module, _a: Any, output: Any) -> Any:
        steered = first(output) + (gate.float()[..., None] * direction.float()).to(first(output).dtype)
        return steered if isinstance(output, Tensor) else (steered, *output[1:])

    return tiny.blocks(model)[1].register_forward_hook(add)


GATES = {"zeros": torch.zeros(2, 7), "some zeros": torch.tensor([[0.0, 0.5, 0, -1, 2, 0, 0], [0.0] * 5 + [1, 0.25]])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", GATES.values(), ids=GATES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_gate_learned_from_zero_gets_the_gradients_of_a_hook_by_hand(
    architecture: str, numbers: Tensor, dtype: torch.dtype
) -> None:
    model: Any = tiny.build(architecture).to(dtype)
    inputs, found = padded(*PROMPTS), []
    for is_by_hand in (True, False):
        model.zero_grad()
        gate = numbers.clone().requires_grad_()
        direction = vector(scale=3.0).layer_activations[1].clone().requires_grad_()
        if is_by_hand:
            hook = by_hand(model, gate, direction)
            loss = loss_of(model, inputs).float()
            hook.remove()
        else:
            with SteeringVector({1: direction}).apply(model, tokens=lambda p, gate=gate: gate.clone()):
                loss = loss_of(model, inputs).float()
        loss.backward()
        assert gate.grad is not None
        assert bool((gate.grad[inputs["attention_mask"] == 1] != 0).all())
        found.append([loss.detach(), gate.grad, *gradients_of(model, direction)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_a_learned_gate_the_same_gradients(reentrant: bool) -> None:
    model: Any = tiny.build("llama").train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, reentrant=reentrant)
        model.zero_grad()
        gate = torch.zeros(2, 1, requires_grad=True)
        steering = vector(scale=3.0)
        steering.layer_activations[2] = steering.layer_activations[1].flip(0)
        direction = steering.layer_activations[1].requires_grad_()
        with steering.apply(model, tokens=lambda p, gate=gate: (gate * (p.index % 3)).exp() - 1):
            (loss_of(model, padded(*PROMPTS)) + loss_of(model, padded(*PROMPTS[::-1]))).backward()
        assert gate.grad is not None
        assert bool((gate.grad != 0).all())
        found.append([gate.grad, *gradients_of(model, direction)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-3)
