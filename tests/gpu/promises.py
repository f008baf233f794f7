"""Oracles on a device: plain hooks and passes over whole rows, which know nothing of the library."""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny

DEVICE = os.environ.get("DEVICE", "cuda")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The largest difference of two logits over the logits' spread: rounding of a few layers.
LOGITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1}
# The largest distance of two directions over their length.
DIRECTIONS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
STEPS = 5
Moves = Mapping[int, Tensor]  # layer → what is added, (hidden,) or (batch, 1, hidden)


def on_device(architecture: str, dtype: str) -> Any:
    return tiny.build(architecture).to(DEVICE, DTYPES[dtype])


def padded(*prompts: list[int]) -> dict[str, Tensor]:
    """Prompts of one batch, padded on the left so that all end in one column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The rows with their answers, and the logits of each step ``(batch, steps, vocabulary)``."""
    out = model.generate(
        **inputs,
        **{"max_new_tokens": STEPS, "do_sample": False, **options},
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1).float()


def logits_by_hand(
    model: Any, blocks: Sequence[nn.Module], inputs: dict[str, Tensor], rows: Tensor, moves: Moves, first: int
) -> Tensor:
    """The logits that lead to the answers in ``rows``: one pass without a cache, moved from column ``first`` on.

    It takes the answers as they are: two tokens that are about as likely may change places by rounding.
    """
    width = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(rows[:, width:])], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with moved_by_hand(blocks, moves, first), torch.no_grad():
        out = model(input_ids=rows, attention_mask=mask, position_ids=positions, use_cache=False)
    logits: Tensor = out.logits[:, width - 1 : -1].float()
    return logits


@contextmanager
def moved_by_hand(blocks: Sequence[nn.Module], moves: Moves, first: int) -> Generator[None, None, None]:
    def move(added: Tensor, _module: nn.Module, _args: Any, output: Any) -> Any:
        moved = (output if isinstance(output, Tensor) else output[0]).clone()
        moved[:, first:] += added.to(moved)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    handles = [blocks[layer].register_forward_hook(partial(move, added)) for layer, added in moves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gap(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.std())


def distance(actual: Tensor, expected: Tensor) -> float:
    """The distance of two directions over the length of the second; of both on the CPU."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def last_tokens(model: Any, blocks: Sequence[nn.Module], prompts: Sequence[list[int]]) -> Tensor:
    """Each block's output at each prompt's last token, one prompt a pass: ``(prompts, layers, hidden)``."""
    rows: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        rows.append((output if isinstance(output, Tensor) else output[0])[0, -1].double().cpu())

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([prompt], device=DEVICE), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(rows).reshape(len(prompts), len(blocks), -1)
