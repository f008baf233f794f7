"""In bfloat16 and float16, vLLM with the plugin is as near to Hugging Face in float32 as Hugging Face in that dtype.

Rounding makes single log-probabilities differ by chance, steered or not: so root mean squares are compared, over many.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.vllm.plugin.comparison import SIZES, Request, Served, expected, ids, prepared, run
from tests.vllm.plugin.conftest import ShowCase

pytest.importorskip("vllm")

STEERINGS = [
    *("first:1", "middle:-1.5", "both:0.75", "first:0.5,both:1", "both:1@generated"),
    "middle:1,first:-1@generated",
]
MARGIN = 1.25


def mean_square(differences: list[float]) -> float:
    return float(torch.tensor(differences).square().mean().sqrt())


def distances(served: Served, requests: list[Request], answers: list[Any], dtype: torch.dtype) -> tuple[float, ...]:
    """The distances of vLLM, of Hugging Face in a dtype, and of Hugging Face without steering, from it in float32."""
    rounded = Served(copy.deepcopy(served.model).to(dtype), served.path, served.vectors)
    found: list[tuple[float, float, float]] = []
    for request, answer in zip(requests, answers, strict=True):
        rows = [
            expected(one, asked, answer["tokens"])
            for one, asked in [(served, request), (rounded, request), (served, (request[0], None, request[2]))]
        ]
        for step, exact, half, unsteered in zip(answer["steps"], *rows, strict=True):
            for token, logprob in step.items():
                wanted = float(exact[int(token)])
                found.append(
                    (logprob - wanted, float(half[int(token)]) - wanted, float(unsteered[int(token)]) - wanted)
                )
    return tuple(mean_square(list(column)) for column in zip(*found, strict=True))


def measured(
    show: ShowCase, case: str, served: Served, dtype: torch.dtype, prompts: int, fault: str | None = None
) -> tuple[float, float, float]:
    """The distances of steered vLLM, of steered Hugging Face in the dtype, and of unsteered vLLM from float32."""
    name = str(dtype).removeprefix("torch.")
    vocabulary = served.model.config.vocab_size
    texts = [ids(n, 5 + 3 * n, vocabulary) for n in range(prompts)]
    steered: list[Request] = [(text, steering, 6) for text in texts for steering in STEERINGS]
    unsteered: list[Request] = [(text, None, 6) for text in texts]
    answers = run(served, [[*steered, *unsteered]], dtype=name, fault=fault)["answers"]
    off, half, effect = distances(served, steered, answers[: len(steered)], dtype)
    noise, *_ = distances(served, unsteered, answers[len(steered) :], dtype)
    show(f"{case}, {name}, RMS (Hugging Face's: {half:.4f})", off, effect)
    return off, half, noise


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model in float32, with the weights that it has in a dtype."""
    return copy.deepcopy(model).to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steering_adds_no_noise(tmp_path: Path, show: ShowCase, family: str, dtype: torch.dtype) -> None:
    sizes = {"n_embd": 64, "n_head": 2} if family == "gpt2" else SIZES
    served = prepared(tmp_path, in_dtype(tiny.build(family, **sizes), dtype))
    off, half, noise = measured(show, family, served, dtype, prompts=8)
    assert off < MARGIN * half
    assert off < MARGIN * noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steering_adds_no_noise_to_a_real_model(
    smollm2: Any, tmp_path: Path, show: ShowCase, dtype: torch.dtype
) -> None:
    served = prepared(tmp_path, in_dtype(smollm2[0], dtype), Path(smollm2[0].name_or_path))
    off, half, noise = measured(show, "SmolLM2-135M", served, dtype, prompts=3)
    assert off < MARGIN * half
    assert off < MARGIN * noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_multiplier_that_is_slightly_wrong_is_noticed(tmp_path: Path, show: ShowCase, dtype: torch.dtype) -> None:
    served = prepared(tmp_path, in_dtype(tiny.build("llama", **SIZES), dtype))
    off, half, _ = measured(show, "with a fault", served, dtype, prompts=8, fault="multipliers 5 % off")
    assert off > 1.5 * MARGIN * half
