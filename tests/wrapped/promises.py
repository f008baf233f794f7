"""What a wrapped model must do, checked against plain hooks and plain loops that know nothing of the library."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from steering_vectors import SteeringVector, active_patches, generated, record_activations, train_steering_vector
from tests import tiny

LAYER = 1
STEPS = 4
SAMPLES = [("good", "bad"), ("a longer text", "short"), ("yes!", "no, not now")]
# The shorter row is padded on the left, so that all prompts end in one column.
INPUTS = {
    "input_ids": torch.tensor([[0, 0, 0, 11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27, 28]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]),
}
WIDTH = 8
# name → (what is given as tokens=, the first column of INPUTS that it selects)
SELECTIONS: dict[str, tuple[Any, int]] = {"all": (None, 0), "generated(inputs)": (generated(INPUTS), WIDTH - 1)}


def some_vector(hidden: int = tiny.HIDDEN) -> SteeringVector:
    """A vector that moves the tiny models' logits by more than any rounding."""
    return SteeringVector({LAYER: 2 * torch.randn(hidden, generator=torch.Generator().manual_seed(0))})


def check_trained(trained: nn.Module, run: Callable[..., Any], blocks: Sequence[nn.Module], **tolerance: float) -> None:
    """``trained`` gives the vector that a plain loop over ``run``, one prompt a pass, reads from ``blocks``."""
    expected = vector_by_hand(run, blocks)
    for batch_size in (1, 3):
        with unchanged(trained):
            vector = train_steering_vector(trained, tiny.tokenizer(), SAMPLES, batch_size=batch_size)
        assert_vectors_close(vector, expected, **tolerance)


def check_steered(
    entered: nn.Module,
    run: Callable[..., Any],
    generator: Any,
    blocks: Sequence[nn.Module],
    selection: str,
    *,
    hidden: int = tiny.HIDDEN,
    **tolerance: float,
) -> None:
    """Inside ``apply(entered)``, passes of ``run`` and what ``generator`` generates are as steered by hand.

    Generation is the same with a cache and without, and the recorded activations are moved by exactly the direction.
    """
    vector = some_vector(hidden)
    tokens, first_column = SELECTIONS[selection]
    plain = answer_by_hand(run)
    with steered_by_hand(blocks, vector, first_column):
        expected = answer_by_hand(run)
    assert (expected - plain).abs().amax(dim=-1).min() > 0.1
    before = recorded(entered, run)
    with unchanged(entered):
        with vector.apply(entered, tokens=tokens):
            after = recorded(entered, run)
            assert_close(answer_by_hand(run), expected, **tolerance)
            for use_cache in (True, False):
                assert_close(answer(generator, use_cache=use_cache), expected, **tolerance)
        assert_close(answer_by_hand(run), plain, **tolerance)
    assert_moved(before, after, vector, first_column)


def assert_moved(
    before: Mapping[int, Tensor], after: Mapping[int, Tensor], vector: SteeringVector, first_column: int
) -> None:
    """The activations ``(batch, seq, hidden)`` at the vector's layer are moved by exactly the direction."""
    assert torch.equal(after[LAYER - 1], before[LAYER - 1])
    assert torch.equal(after[LAYER][:, :first_column], before[LAYER][:, :first_column])
    direction = vector.layer_activations[LAYER].to(before[LAYER].dtype)
    assert after[LAYER].dtype is before[LAYER].dtype
    assert torch.equal(after[LAYER][:, first_column:], before[LAYER][:, first_column:] + direction)


def recorded(model: nn.Module, run: Callable[..., Any]) -> dict[int, Tensor]:
    """What the library records of one pass of ``run`` over INPUTS, by layer."""
    with record_activations(model) as records, torch.no_grad():
        run(**INPUTS)
    assert all(len(passes) == 1 for passes in records.values())
    return {layer: passes[0] for layer, passes in records.items()}


def answer(model: Any, **kwargs: Any) -> Tensor:
    """The logits of each step of ``generate``, ``(batch, steps, vocabulary)``."""
    out = model.generate(
        **INPUTS, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return torch.stack(out.logits, dim=1)


def answer_by_hand(run: Callable[..., Any]) -> Tensor:
    """The same by a greedy loop of passes over the whole rows, without a cache."""
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    steps = []
    for _ in range(STEPS):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            steps.append(run(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, steps[-1].argmax(dim=-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(steps, dim=1)


@contextmanager
def steered_by_hand(
    blocks: Sequence[nn.Module], vector: SteeringVector, first_column: int
) -> Generator[None, None, None]:
    """Plain hooks that add the directions to the columns from ``first_column`` on; for passes without a cache."""

    def steer(direction: Tensor, _module: nn.Module, _args: Any, output: Any) -> Any:
        moved = (output if isinstance(output, Tensor) else output[0]).clone()
        moved[:, first_column:] += direction.to(moved.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    handles = [
        blocks[layer].register_forward_hook(partial(steer, direction))
        for layer, direction in vector.layer_activations.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def vector_by_hand(run: Callable[..., Any], blocks: Sequence[nn.Module]) -> dict[int, Tensor]:
    """The mean difference of the prompts' last tokens, one prompt a pass, by plain hooks."""
    tokenizer = tiny.tokenizer()
    differences = []
    for positive, negative in SAMPLES:
        rows = []
        for text in (positive, negative):
            last: list[Tensor] = []

            def keep(_module: nn.Module, _args: Any, output: Any, last: list[Tensor] = last) -> None:
                last.append((output if isinstance(output, Tensor) else output[0])[0, -1].float())

            handles = [block.register_forward_hook(keep) for block in blocks]
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                run(input_ids=ids, attention_mask=torch.ones_like(ids))
            for handle in handles:
                handle.remove()
            rows.append(torch.stack(last))  # (layers, hidden)
        differences.append(rows[0] - rows[1])
    return dict(enumerate(torch.stack(differences).mean(dim=0)))


@contextmanager
def unchanged(model: nn.Module) -> Generator[None, None, None]:
    """Checks that after the block hooks, modules, modes and weights are those from before."""
    hooks, modules = hooks_of(model), list(model.named_modules())
    modes = [module.training for _, module in modules]
    forwards = [(type(module), vars(module).get("forward")) for _, module in modules]
    weights = weights_of(model)
    yield
    assert active_patches(model) == []
    assert hooks_of(model) == hooks
    assert list(model.named_modules()) == modules
    assert [module.training for _, module in modules] == modes
    assert [(type(module), vars(module).get("forward")) for _, module in modules] == forwards
    after = weights_of(model)
    assert after.keys() == weights.keys()
    for name, weight in weights.items():
        assert after[name].device == weight.device, name
        assert weight.device.type == "meta" or torch.equal(after[name], weight), name


def hooks_of(model: nn.Module) -> list[list[int]]:
    """Each module's hooks, by their ids, in their order."""
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return [[id(hook) for kind in kinds for hook in vars(module)[kind].values()] for module in model.modules()]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights and buffers; of sharded and quantized ones, of the tensors that they consist of."""
    tensors: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {path: part.clone() for name, tensor in tensors for path, part in parts_of(name, tensor.detach())}


def parts_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from parts_of(f"{name}.{part}", getattr(tensor, part))


def assert_vectors_close(vector: SteeringVector, expected: Mapping[int, Tensor], **tolerance: float) -> None:
    assert vector.layers == sorted(expected)
    for layer, direction in vector.layer_activations.items():
        assert direction.dtype is torch.float32
        assert_close(direction, expected[layer], **tolerance)


def assert_close(actual: Tensor, expected: Tensor, *, atol: float = 1e-4, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)
