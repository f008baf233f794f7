"""Continuations: prompts and answers as tokens, and as the rows of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors.evaluation.running import padded
from steering_vectors.token_selection import TokenPositions


@dataclass(frozen=True)
class Continuation:
    """The token ids of a prompt and of an answer to it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def begins_at_the_last_token(selection: Any, continuations: Sequence[Continuation], model: nn.Module) -> bool:
    """Return True if a selector is seen to leave out all that stands before the last tokens of the prompts."""
    if not callable(selection):
        return False
    whole = whole_rows(continuations, model)
    index = whole["attention_mask"].cumsum(dim=1).where(whole["attention_mask"].bool(), 0) - 1
    ids = whole["input_ids"].where(whole["attention_mask"].bool(), -1)
    columns = torch.arange(index.shape[1], device=index.device)
    positions = TokenPositions(index, columns, input_ids=whole["input_ids"], row_ids=ids, begins_sequence=True)
    last = torch.tensor([len(part.prompt) - 1 for part in continuations], device=index.device)
    try:
        selected = selection(positions)
        return bool((selected[(index >= 0) & (index < last[:, None])] == 0).all())
    except Exception:  # the pass itself raises it, in words
        return False


def whole_rows(continuations: Sequence[Continuation], model: nn.Module) -> dict[str, Tensor]:
    """Return ids and mask of whole rows: all answers begin in the same column."""
    prompts = padded([part.prompt for part in continuations], model)
    answers = padded([part.answer for part in continuations], model, left=False)
    return {name: torch.cat([prompts[name], answers[name]], dim=1) for name in prompts}
