"""Copies, pickles, replicas and exports of a steered model, and the model after the block: no trace is left in them."""

import copy
import functools
import importlib.util
import io
import multiprocessing
import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import AutoModelForCausalLM

from steering_vectors import (
    ablate_everywhere,
    active_patches,
    from_index,
    record_activations,
    trace_steering,
)
from tests import tiny
from tests.spawned import send_logits
from tests.test_steering import IDS, hooks_of, logits, vector

# name → (what is entered, True if it changes what the model gives)
STEERINGS: dict[str, tuple[Callable[[Any], AbstractContextManager[Any]], bool]] = {
    "all tokens": (lambda model: vector(0, 1).apply(model), True),
    "a selection": (lambda model: vector(0, 1).apply(model, tokens=from_index(1)), True),
    "a part, by row": (lambda model: vector(1, layer_type="mlp").patch(model, multiplier=[2.0]), True),
    "everywhere": (lambda model: ablate_everywhere(model, torch.ones(tiny.HIDDEN)), True),
    "a trace": (trace_steering, False),
    "a record": (record_activations, False),
}


def deep_copy(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    file = pickle.dumps(model)
    assert b"steering_vectors" not in file  # it can be loaded where the library is not installed
    return pickle.loads(file)


def pickled_by_the_oldest_protocol(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model, protocol=0))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_state_dict(model: Any) -> Any:
    made = tiny.build("llama")
    made.load_state_dict({name: 1 * tensor for name, tensor in model.state_dict().items()})
    return made


def copied_module_by_module(module: Any) -> Any:
    """As nn.DataParallel makes its replicas: each module is a shallow copy that holds weights of its own."""
    made = copy.copy(module)
    made._modules = {name: copied_module_by_module(child) for name, child in module._modules.items()}
    made._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach().clone())
        for name, parameter in module._parameters.items()
    }
    return made


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deep_copy,
    "pickle": pickled,
    "pickle, protocol 0": pickled_by_the_oldest_protocol,
    "torch.save": saved,
    "state_dict": from_state_dict,
    "shallow copies": copied_module_by_module,
}


def classes_of(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def attributes_of(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def assert_no_trace(model: Any) -> None:
    """No hook, class or attribute of the library is left in the model, nor any object that refers to it."""
    assert active_patches(model) == []
    assert hooks_of(model) == {}
    assert b"steering_vectors" not in pickle.dumps(model)
    for module in model.modules():
        assert not any("steering_vectors" in repr(kind.__dict__.keys()) for kind in type(module).__mro__)


def assert_like(copied: Any, original: Any, expected: Tensor) -> None:
    """A copy is an unsteered model of the original's classes, and can do all that an unsteered model can."""
    assert_no_trace(copied)
    assert classes_of(copied) == classes_of(original)
    assert attributes_of(copied) == attributes_of(original)
    assert torch.equal(logits(copied), expected)
    with vector(0, 1).apply(copied):
        assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(copied), expected)
    before = [parameter.detach().clone() for parameter in original.parameters()]
    copied.train()
    copied(torch.tensor([[5, 6, 7]])).logits.square().mean().backward()
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    copied.eval()
    assert not torch.equal(logits(copied), expected)
    assert all(torch.equal(old, new) for old, new in zip(before, original.parameters()))
    assert_no_trace(copied)


def enable_checkpointing(model: Any) -> None:
    name = "gradient" if tiny.ON_TRANSFORMERS_4 else "activation"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    if hasattr(model, "_require_grads_hooks") or hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()  # a hook of transformers that can't be pickled


def build(*, checkpointing: bool) -> Any:
    model: Any = tiny.build("llama")
    if checkpointing:
        enable_checkpointing(model)
    return model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("copying", COPIES)
@pytest.mark.parametrize("steering", STEERINGS)
def test_a_copy_made_inside_a_block_is_an_unsteered_model(steering: str, copying: str, checkpointing: bool) -> None:
    model = build(checkpointing=checkpointing)
    enter, changes = STEERINGS[steering]
    plain, before, classes = logits(model), attributes_of(model), classes_of(model)
    with enter(model):
        steered = logits(model)
        assert torch.equal(steered, plain) is not changes
        copied = COPIES[copying](model)
        assert torch.equal(logits(copied), plain)
        assert torch.equal(logits(model), steered)
    assert_no_trace(model)
    assert classes_of(model) == classes
    assert attributes_of(model) == before
    assert torch.equal(logits(model), plain)
    if copying == "state_dict" and checkpointing:
        enable_checkpointing(copied)
    assert_like(copied, model, plain)


@pytest.mark.parametrize("steering", STEERINGS)
def test_save_pretrained_inside_a_block_saves_the_unsteered_model(steering: str, tmp_path: Path) -> None:
    model = build(checkpointing=False)
    plain = logits(model)
    with STEERINGS[steering][0](model):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), plain)
    assert_no_trace(model)


@pytest.mark.parametrize("steering", STEERINGS)
def test_a_shallow_copy_shares_the_layers_and_keeps_no_trace(steering: str) -> None:
    model = build(checkpointing=False)
    plain = logits(model)
    with STEERINGS[steering][0](model):
        copied, layer = copy.copy(model), copy.copy(tiny.blocks(model)[1])
    for module, original in ((copied, model), (layer, tiny.blocks(model)[1])):
        assert_no_trace(module)
        assert type(module) is type(original)
        assert sorted(vars(module)) == sorted(vars(original))
    assert torch.equal(logits(copied), plain)


@pytest.mark.parametrize("steering", STEERINGS)
def test_replicas_for_data_parallelism_are_refused_inside_the_block_alone(steering: str) -> None:
    model = build(checkpointing=False)
    with STEERINGS[steering][0](model), pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        [module._replicate_for_data_parallel() for module in model.modules()]
    replicas = [module._replicate_for_data_parallel() for module in model.modules()]
    assert [type(replica) for replica in replicas] == [type(module) for module in model.modules()]


@pytest.mark.parametrize("steering", STEERINGS)
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half().float(), lambda m: m.to("cpu")])
def test_a_model_that_is_cast_inside_a_block_stays_steered_and_is_whole_after_it(
    steering: str, cast: Callable[[Any], Any]
) -> None:
    enter, changes = STEERINGS[steering]
    model = build(checkpointing=False)
    expected = logits(cast(copy.deepcopy(model)))
    with enter(model):
        assert cast(model) is model
        assert torch.equal(logits(model), expected) is not changes
    assert torch.equal(logits(model), expected)
    assert_no_trace(model)


class Count:
    """A hook of a user."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("copying", [deep_copy, pickled, saved])
@pytest.mark.parametrize("steering", STEERINGS)
def test_hooks_of_users_stay_in_copies_as_pytorch_keeps_them(steering: str, copying: Callable[[Any], Any]) -> None:
    model = build(checkpointing=False)
    block = tiny.blocks(model)[1]
    after, before = Count(), Count()
    block.register_forward_hook(after, always_call=True)
    block.register_forward_pre_hook(before, with_kwargs=True)
    with STEERINGS[steering][0](model):
        after.calls = before.calls = 0  # entering may run the model
        copied = copying(model)
    counted = [copied.model.layers[1]._forward_hooks, copied.model.layers[1]._forward_pre_hooks]
    logits(copied)
    assert [[hook.calls for hook in hooks.values()] for hooks in counted] == [[1], [1]]
    expected = hooks_of(copying(model))
    assert {key: [number for number, _ in hooks] for key, hooks in hooks_of(copied).items()} == {
        key: [number for number, _ in hooks] for key, hooks in expected.items()
    }
    del block._forward_hooks[next(iter(block._forward_hooks))]
    assert len(counted[0]) == 1


def test_a_block_and_its_copy_have_hooks_apart() -> None:
    model = build(checkpointing=False)
    with vector(1).apply(model):
        copied = copy.deepcopy(model)
        with vector(1).apply(copied):
            both = logits(copied)
            assert torch.equal(logits(model), both)
        logits(copied)
    assert_no_trace(copied)
    assert_no_trace(model)


# Processes


def in_a_fork(function: Callable[[], None]) -> int:
    """The exit code of a forked process that runs the function: 0 if it raised nothing."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("steering", STEERINGS)
def test_a_process_forked_inside_a_block_is_in_the_block_and_can_leave_it(steering: str) -> None:
    model = build(checkpointing=False)
    plain = logits(model)
    context = STEERINGS[steering][0](model)
    context.__enter__()
    steered = logits(model)

    def child() -> None:
        assert torch.equal(logits(model), steered)
        context.__exit__(None, None, None)
        assert_no_trace(model)
        assert torch.equal(logits(model), plain)
        with vector(2).apply(model, tokens=from_index(1)):
            assert not torch.equal(logits(model), plain)
        assert_no_trace(model)

    assert in_a_fork(child) == 0
    assert torch.equal(logits(model), steered)  # the parent is still in the block
    context.__exit__(None, None, None)
    assert_no_trace(model)


def test_a_spawned_process_gets_an_unsteered_model() -> None:
    model = build(checkpointing=False)
    plain = logits(model)
    with vector(1).apply(model):
        steered = logits(model)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    direction = vector(1).layer_activations[1].tolist()
    with vector(0, 1).apply(model), vector(2).apply(model, tokens=from_index(1)):
        process = context.Process(target=send_logits, args=(model, direction, there))
        process.start()
    got = [torch.tensor(values) for values in here.recv()] if here.poll(120) else []
    process.join(60)
    assert len(got) == 2
    torch.testing.assert_close(got[0], plain)
    torch.testing.assert_close(got[1], steered)


# Exports


@pytest.mark.compiles
@pytest.mark.parametrize("steering", ["all tokens", "a part, by row", "everywhere"])
def test_an_export_inside_the_block_is_steered_like_the_pass_that_it_keeps(steering: str) -> None:
    enter, _ = STEERINGS[steering]
    model = build(checkpointing=False)
    model.config.use_cache = False
    plain = logits(model)
    with enter(model):
        exported = torch.export.export(model, (IDS,), strict=False)
        steered = logits(model)  # the export comes first: nothing of it may be kept for later passes
        assert not torch.equal(steered, plain)
    with enter(model):
        assert torch.equal(logits(model), steered)
    torch.testing.assert_close(exported.module()(IDS).logits, steered)
    assert torch.equal(logits(model), plain)
    assert_no_trace(model)


@pytest.mark.parametrize("steering", ["a selection", "a trace"])
def test_an_export_is_refused_where_it_would_keep_the_tokens_of_one_pass(steering: str) -> None:
    model = build(checkpointing=False)
    plain = logits(model)
    with (
        STEERINGS[steering][0](model),
        pytest.raises(RuntimeError, match="torch.export keeps the operations of one pass, but a selection of tokens"),
    ):
        torch.export.export(model, (IDS,), strict=False)
    assert_no_trace(model)
    assert torch.equal(logits(model), plain)


# Modules that are not plain


@pytest.mark.parametrize("steering", STEERINGS)
def test_modules_with_a_forward_of_their_own(steering: str) -> None:
    """As accelerate gives them: a partial bound to the module, so that a copy must bind it to the copied module."""

    def wrapped(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return forward(*args, **kwargs)

    calls: list[nn.Module] = []
    model = build(checkpointing=False)
    plain = logits(model)
    for module in (model, model.model, *tiny.blocks(model)):
        module.forward = functools.partial(wrapped, module, module.forward)
    before = {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}
    enter, changes = STEERINGS[steering]
    with enter(model):
        assert torch.equal(logits(model), plain) is not changes
        copied = copy.deepcopy(model)
    assert hooks_of(model) == {}
    assert {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)} == before
    assert torch.equal(logits(model), plain)
    calls.clear()
    assert torch.equal(logits(copied), plain)
    assert {id(module) for module in calls} == {id(m) for m in (copied, copied.model, *copied.model.layers)}
    assert attributes_of(copied) == attributes_of(model)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
@pytest.mark.parametrize("steering", STEERINGS)
def test_accelerate_s_hooks_put_on_and_taken_off_across_the_block(steering: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    enter, changes = STEERINGS[steering]
    model = build(checkpointing=False)
    block = tiny.blocks(model)[1]
    plain = logits(model)
    add_hook_to_module(block, ModelHook())
    with enter(model):
        assert torch.equal(logits(model), plain) is not changes
        remove_hook_from_module(block)
        add_hook_to_module(tiny.blocks(model)[0], ModelHook())
        assert torch.equal(logits(model), plain) is not changes
    remove_hook_from_module(tiny.blocks(model)[0])
    assert torch.equal(logits(model), plain)
    assert_no_trace(model)


class Slotted:
    """A mixin with a slot, whose value is in no ``__dict__``."""

    __slots__ = ("note",)


class BlockWithSlots(Slotted, nn.Module):
    """A block with state that no attribute holds, and methods that copy it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        object.__setattr__(self, "note", ["kept"])

    def __getstate__(self) -> Any:
        return vars(self).copy(), self.note

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        object.__setattr__(self, "note", state[1])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.note == ["kept"]
        return self.block(hidden_states, *args, **kwargs)


@pytest.mark.parametrize("copying", [deep_copy, pickled, saved])
@pytest.mark.parametrize("steering", STEERINGS)
def test_modules_with_slots(steering: str, copying: Callable[[Any], Any]) -> None:
    if steering == "a part, by row":
        pytest.skip("the parts are a step further inside")
    model = build(checkpointing=False)
    model.model.layers[1] = BlockWithSlots(model.model.layers[1])
    plain = logits(model)
    assert torch.equal(logits(copying(model)), plain)
    with STEERINGS[steering][0](model):
        copied = copying(model)
    assert copied.model.layers[1].note == ["kept"]
    assert torch.equal(logits(copied), plain)
    assert_no_trace(model)
    assert_no_trace(copied)


class Doubling(nn.Module):
    """A small module that can be scripted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * self.linear(hidden_states)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*only the blocks' outputs are ablated.*register_forward_hook is not supported")
@pytest.mark.parametrize("steering", STEERINGS)
def test_scripted_modules_inside_a_model(steering: str) -> None:
    if steering == "a part, by row":
        pytest.skip("PyTorch refuses hooks on scripted modules, in its own words")
    enter, changes = STEERINGS[steering]
    model = build(checkpointing=False)
    torch.manual_seed(0)
    for block in tiny.blocks(model):
        block.mlp = torch.jit.script(Doubling(tiny.HIDDEN))
    plain = logits(model)
    kinds = classes_of(model)
    with enter(model):
        steered = logits(model)
        assert torch.equal(steered, plain) is not changes
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied), plain)
        assert torch.equal(logits(model), steered)
    assert hooks_of(copied) == hooks_of(model) == {}
    assert classes_of(model) == classes_of(copied) == kinds
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(copied), plain)


def weights_that_are_parametrized(model: Any) -> list[nn.Linear]:
    """Linear modules inside steered layers, and ones that are steered themselves where a module's output is."""
    return [block.mlp.down_proj for block in tiny.blocks(model)]


@pytest.mark.parametrize("inside", [False, True], ids=["before the block", "inside the block"])
@pytest.mark.parametrize("removed", [None, "inside the block", "after the block"])
@pytest.mark.parametrize("steering", STEERINGS)
def test_parametrized_modules(steering: str, inside: bool, removed: str | None) -> None:
    enter, changes = STEERINGS[steering]
    model = build(checkpointing=False)
    plain, classes = logits(model), classes_of(model)
    linears = weights_that_are_parametrized(model)

    def wrap() -> None:
        for linear in linears:
            parametrizations.weight_norm(linear)

    def unwrap() -> None:
        for linear in linears:
            parametrize.remove_parametrizations(linear, "weight")

    if not inside:
        wrap()
    with enter(model):
        if inside:
            wrap()
        steered = logits(model)
        assert torch.allclose(steered, plain, atol=1e-5) is not changes
        copied = copy.deepcopy(model)
        torch.testing.assert_close(logits(copied), plain)
        if removed == "inside the block":
            unwrap()
            torch.testing.assert_close(logits(model), steered)
    torch.testing.assert_close(logits(model), plain)
    assert hooks_of(model) == hooks_of(copied) == {}
    if removed == "after the block":
        unwrap()
    assert (classes_of(model) == classes) is (removed is not None)
    for linear in linears:
        assert type(linear).__mro__.count(nn.Linear) == 1
        assert len(type(linear).__mro__) == len(nn.Linear.__mro__) + (removed is None)
    if removed is not None:
        assert classes_of(model) == classes
        assert active_patches(model) == []


def test_a_steered_module_that_is_parametrized() -> None:
    """A module's own output is steered, and its class is derived from before the block or inside it."""
    layers: Any = {"mlp": "model.layers.{num}.mlp.down_proj"}
    for inside in (False, True):
        model = build(checkpointing=False)
        plain, classes = logits(model), classes_of(model)
        linear = model.model.layers[1].mlp.down_proj
        context = vector(1, layer_type="mlp").apply(model, layer_config=layers)
        if not inside:
            parametrizations.weight_norm(linear)
        with context:
            if inside:
                parametrizations.weight_norm(linear)
            steered = logits(model)
            assert not torch.allclose(steered, plain, atol=1e-3)
            if not inside:
                torch.testing.assert_close(logits(copy.deepcopy(model)), plain)
                assert_like_a_class_of_its_own(copy.deepcopy(model).model.layers[1].mlp.down_proj)
        torch.testing.assert_close(logits(model), plain)
        torch.testing.assert_close(logits(copy.deepcopy(model)), plain)
        assert_like_a_class_of_its_own(linear)
        parametrize.remove_parametrizations(linear, "weight")
        assert classes_of(model) == classes


def assert_like_a_class_of_its_own(linear: nn.Module) -> None:
    assert type(linear).__mro__[1:] == nn.Linear.__mro__
    assert not linear._forward_hooks
    assert not [name for name in vars(linear) if "steering" in name]


class Sharded:
    """What FSDP2 mixes into the classes of modules."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("sharded modules can't be copied")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # type: ignore[misc]


@pytest.mark.parametrize("steering", STEERINGS)
def test_classes_that_other_code_swaps_inside_a_block(steering: str) -> None:
    enter, _ = STEERINGS[steering]
    model = build(checkpointing=False)
    plain = logits(model)
    swapped: dict[type, type] = {}
    blocks = tiny.blocks(model)
    with enter(model):
        steered = logits(model)
        for block in blocks:
            kind = type(block)
            swapped.setdefault(kind, type(f"Sharded{kind.__name__}", (Sharded, kind), {}))
            block.__class__ = swapped[kind]
        assert torch.equal(logits(model), steered)
        with vector(0, 2).apply(model, tokens=from_index(1)):
            assert not torch.equal(logits(model), steered)
        assert torch.equal(logits(model), steered)
        with pytest.raises(AssertionError, match="sharded modules can't be copied"):
            copy.deepcopy(model)
    assert hooks_of(model) == {}
    assert torch.equal(logits(model), plain)
    original = type(tiny.build("llama").model.layers[0])
    for block in blocks:
        assert [kind for kind in type(block).__mro__ if kind is not Sharded][1:] == list(original.__mro__)
        assert isinstance(block, Sharded)


# Other libraries' wrappers


peft_only = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")
quiet_peft = pytest.mark.filterwarnings(
    "ignore:.*script_method.*:DeprecationWarning", "ignore::FutureWarning:transformers", "ignore::FutureWarning:peft"
)


@peft_only
@quiet_peft
@pytest.mark.parametrize("steering", STEERINGS)
def test_adapters_that_are_added_and_merged_inside_a_block(steering: str) -> None:
    import peft

    enter, changes = STEERINGS[steering]
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(model, config).eval()

    expected = logits(adapted(build(checkpointing=False)))
    model = build(checkpointing=False)
    with enter(model):
        wrapped = adapted(model)
        assert torch.allclose(logits(wrapped), expected, atol=1e-5) is not changes
        merged = wrapped.merge_and_unload()
        assert torch.allclose(logits(merged), expected, atol=1e-5) is not changes
    torch.testing.assert_close(logits(merged), expected)
    assert_no_trace(merged)
    assert_no_trace(wrapped)
    assert_no_trace(model)


@peft_only
@quiet_peft
@pytest.mark.parametrize("steering", STEERINGS)
def test_adapters_that_are_put_into_the_modules_inside_a_block(steering: str) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    expected = build(checkpointing=False)
    torch.manual_seed(3)
    peft.inject_adapter_in_model(config, expected)
    model = build(checkpointing=False)
    with STEERINGS[steering][0](model):
        torch.manual_seed(3)
        peft.inject_adapter_in_model(config, model)
        copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(model), logits(expected.eval()))
    torch.testing.assert_close(logits(copied), logits(expected))
    assert_no_trace(model)
    assert_no_trace(copied)
