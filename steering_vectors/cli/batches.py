"""Prompts as batches for ``generate``, in which each row has a multiplier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def batch(ids: Sequence[int], rows: int, model: Any) -> dict[str, Any]:
    """Return a prompt as a batch of equal rows, on the model's device."""
    import torch

    found = torch.tensor([list(ids)] * rows, device=model.device)
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def padding(tokenizer: Any) -> int:
    """Return the token that fills a row which ends before the others."""
    return next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
