"""Compare what two ways of scoring found: rounding is allowed, a fault isn't."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Differences in the log-probabilities of tokens that are rounding, as a share of the largest.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-4}
# In half precision a single token says little. There it is the mean over tokens of the KL over the vocabulary, in nats;
# of right ways it was 1e-4 and 0.006 at most, with a model of 30 blocks.
_ROUNDING_IN_HALF = {torch.float16: 1e-3, torch.bfloat16: 0.02}


def agree(expected: Tensor, found: Tensor, answer: Sequence[int], dtype: torch.dtype) -> bool:
    """Return True if two logits ``(answer, vocabulary)`` of a model of this dtype differ by rounding only."""
    expected, found = (logits.float().cpu().log_softmax(dim=-1) for logits in (expected, found))
    if dtype not in _ROUNDING:
        kl = (expected.exp() * (expected - found)).sum(dim=-1).mean()
        return bool(kl <= _ROUNDING_IN_HALF.get(dtype, _ROUNDING_IN_HALF[torch.bfloat16]))
    ids = torch.tensor(answer, device="cpu")[:, None]
    expected, found = (logits.gather(-1, ids) for logits in (expected, found))
    return bool(((expected - found).abs() <= _ROUNDING[dtype] * max(1.0, float(expected.abs().max()))).all())
