"""Faults are told from rounding in each precision."""

import pytest
import torch

from steering_vectors.evaluation.agreement import agree

ANSWER = (3, 4)


@pytest.mark.parametrize(
    ("dtype", "rounding", "fault"),
    [(torch.float64, 1e-8, 1e-3), (torch.float32, 1e-5, 1e-2), (torch.float16, 0.01, 0.1), (torch.bfloat16, 0.1, 0.4)],
)
def test_faults_are_told_from_rounding(dtype: torch.dtype, rounding: float, fault: float) -> None:
    logits, noise = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert agree(logits, logits + rounding * noise, ANSWER, dtype)
    assert not agree(logits, logits + fault * noise, ANSWER, dtype)


def test_nan_agrees_with_nothing() -> None:
    logits = torch.full((2, 300), torch.nan)
    assert not agree(logits, logits, ANSWER, torch.float32)
    assert not agree(logits, logits, ANSWER, torch.bfloat16)
