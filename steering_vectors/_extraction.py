"""Run a model over prompts and yield, layer by layer, the rows that were asked for."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._hooks import activation_of, after_forward, attach_all, remove_all
from steering_vectors._model_structure import call_once, input_device, virtual_tokens
from steering_vectors._positions import by_tokens

# How far two results for the same tokens may be apart, as a share of their norm, by the model's dtype.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt's token ids, and the tokens to read: one position, or several whose weighted mean is taken.

    ``weights``, one per position, sum to 1; None for a single position, whose row keeps the model's dtype.
    """

    input_ids: Sequence[int]
    positions: Sequence[int]
    weights: Sequence[float] | None = None


@dataclass(frozen=True, eq=False)
class LayerRows:
    """Some prompts' rows at one layer: ``rows (n, hidden)``, row i that of the prompt number ``prompts[i]``."""

    layer: int
    rows: Tensor
    prompts: Sequence[int]


def extract_rows(
    model: nn.Module, modules: Mapping[int, nn.Module], prompts: Sequence[ReadPrompt], *, rows_per_pass: int
) -> Iterator[LayerRows]:
    """Each prompt's row at each layer of ``modules``, in no promised order, layer after layer for each pass.

    Every row is what the prompt alone gives. The model is in evaluation mode while it runs, and afterwards, module by
    module, as it was.
    """
    # Prompts of about one length share a pass, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].input_ids))
    for start in range(0, len(order), rows_per_pass):
        numbers = order[start : start + rows_per_pass]
        rows = _run(model, modules, [prompts[n] for n in numbers])
        for layer in modules:
            yield LayerRows(layer, rows.pop(layer), numbers)


def check_causal(model: nn.Module, modules: Mapping[int, nn.Module], input_ids: Sequence[int]) -> None:
    """Raise ValueError if what follows a token changes its activation, as in encoders.

    ``input_ids`` are some prompt's; its first tokens are run alone and with those that follow.
    """
    input_ids = [*input_ids, input_ids[-1]][:16]  # a prompt of one token is followed by itself
    half = len(input_ids) // 2
    last = {max(modules): modules[max(modules)]}
    alone = ReadPrompt(input_ids[:half], range(half), [1 / half] * half)
    followed = ReadPrompt(input_ids[: 2 * half], range(half), [1 / half] * half)
    (rows,) = _run(model, last, [alone, followed]).values()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if (rows[0] - rows[1]).norm() > _ROUNDING.get(dtype, 5e-2) * rows[0].norm():
        raise ValueError(
            f"{type(model).__name__} is no decoder-only language model: an activation changes with the tokens that "
            f"follow it. For a BERT-like model, set is_decoder=True in its config."
        )


def _run(model: nn.Module, modules: Mapping[int, nn.Module], prompts: Sequence[ReadPrompt]) -> dict[int, Tensor]:
    """One pass over ``prompts``: each prompt's row, ``(n, hidden)``, by layer."""
    inputs = _right_padded([prompt.input_ids for prompt in prompts], input_device(model))
    batch, seq = inputs["input_ids"].shape
    before = virtual_tokens(model)
    rows: dict[int, Tensor] = {}

    def read(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        activation = by_tokens(activation_of(output), batch, before + seq)
        rows[layer] = _gather(activation[:, before:], prompts)

    handles = attach_all(partial(after_forward, module, partial(read, layer)) for layer, module in modules.items())
    try:
        with _evaluation(model), torch.no_grad(), _uncompiled():
            call_once(model, inputs)
    finally:
        remove_all(handles)
    if missing := sorted(modules.keys() - rows.keys()):
        raise RuntimeError(f"layers {missing} of {type(model).__name__} did not run in a pass of the model")
    return rows


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids and mask. On the right no padding is seen, so any id will do: a row's own last.

    Nor does it move the tokens, so that each model's own position ids are right, wherever they begin.
    """
    longest = max(map(len, rows))
    ids = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": (torch.arange(longest, device=device) < lengths[:, None]).long(),
    }


def _gather(activation: Tensor, prompts: Sequence[ReadPrompt]) -> Tensor:
    """The prompts' rows ``(n, hidden)`` out of an activation ``(batch, seq, hidden)``."""
    device = activation.device
    owners = torch.tensor([n for n, prompt in enumerate(prompts) for _ in prompt.positions], device=device)
    columns = torch.tensor([column for prompt in prompts for column in prompt.positions], device=device)
    tokens = activation[owners, columns]  # (tokens, hidden)
    if all(prompt.weights is None for prompt in prompts):
        return tokens
    weights = [weight for prompt in prompts for weight in prompt.weights or [1.0]]
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    weighted = wide * torch.tensor(weights, device=device, dtype=wide.dtype)[:, None]
    return wide.new_zeros(len(prompts), wide.shape[-1]).index_add_(0, owners, weighted)


@contextmanager
def _evaluation(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode for the length of the block; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _uncompiled() -> AbstractContextManager[None]:
    """The model's own code, also where it was compiled: passes of many lengths, and hooks, would compile it anew."""
    if not hasattr(torch.compiler, "set_stance"):  # before PyTorch 2.6
        return nullcontext()
    eager: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return eager
