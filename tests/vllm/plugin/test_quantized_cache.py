"""With a quantized cache of keys and values, requests are steered as by weights into which the vector is merged.

Hugging Face quantizes caches otherwise, so that both run in vLLM here.
"""

from pathlib import Path
from typing import Any

import pytest

from steering_vectors import SteeringVector
from steering_vectors.merging import merge
from tests import tiny
from tests.vllm.plugin.comparison import SIZES, Request, Served, ids, prepared, run
from tests.vllm.plugin.conftest import ShowCase
from tests.vllm.plugin.test_exact import EXACT

pytest.importorskip("vllm")


def apart(answers: list[Any], others: list[Any]) -> list[float]:
    """The largest differences of log-probability, by answer, over what is in both top 20 while they say the same."""
    found = []
    for answer, other in zip(answers, others, strict=True):
        length = 1 + next((n for n, (a, b) in enumerate(zip(answer["tokens"], other["tokens"])) if a != b), 5)
        steps = zip(answer["steps"][:length], other["steps"][:length])
        found.append(max(abs(step[token] - wanted[token]) for step, wanted in steps for token in step.keys() & wanted))
    return found


@pytest.mark.parametrize(("cache", "fault"), [("fp8", None), ("fp8_e5m2", None), ("fp8", "multipliers 5 % off")])
def test_steering_is_that_of_merged_weights(tmp_path: Path, show: ShowCase, cache: str, fault: str | None) -> None:
    served = prepared(tmp_path, tiny.build("llama", **SIZES))
    vector = SteeringVector.load(served.vectors / "both.safetensors")
    merge(vector, served.model, multiplier=0.75, engine="vllm").save_pretrained(tmp_path / "merged")
    prompts = [ids(n, 5 + 3 * n) for n in range(6)]
    unsteered: list[Request] = [(prompt, None, 6) for prompt in prompts]
    steered: list[Request] = [(prompt, "both:0.75", 6) for prompt in prompts]
    answers = run(served, [[*unsteered, *steered]], kv_cache_dtype=cache, fault=fault)["answers"]
    merged = Served(None, tmp_path / "merged", served.vectors)
    idle: dict[str, str | None] = {"STEERING_VECTORS_DIR": ""}
    wanted = run(merged, [unsteered], kv_cache_dtype=cache, environment=idle)["answers"]
    exact = run(served, [unsteered], environment=idle)["answers"]
    off, effect = max(apart(answers[6:], wanted)), min(apart(answers[6:], answers[:6]))
    show(f"{'with a fault: ' if fault else ''}a cache in {cache}, from merged weights", off, effect)
    assert effect > 100 * EXACT
    assert min(apart(exact, answers[:6])) > 10 * EXACT  # the cache is quantized
    if fault:
        assert off > 10 * EXACT
    else:
        assert off < EXACT
