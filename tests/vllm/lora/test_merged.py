"""vLLM serves merged models of each family that ``merge(…, engine="vllm")`` takes, as Hugging Face computes them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from steering_vectors import SteeringVector
from steering_vectors.merging import merge
from steering_vectors.merging.families import FAMILIES_AS_LLAMA, PROVEN_IN_VLLM
from tests.merging.fresh import lively
from tests.vllm.lora.sizes import GROUPED, SIZES, WIDTH, WITH_HEAD_SIZES
from tests.vllm.lora.test_lora import PROMPTS, apart, expected_steps, served

pytest.importorskip("vllm")

MULTIPLIER = 1.5
VECTOR = SteeringVector({layer: torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer)) for layer in (0, 2)})
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("arcee", "granite", "llama", "nemotron", "seed_oss"), WITH_HEAD_SIZES),
    **dict.fromkeys(("phi3", "qwen2", "smollm3", "starcoder2"), GROUPED),
    **dict.fromkeys(("gpt_neox", "phi"), SIZES),
    "gpt2": {"n_embd": WIDTH, "n_head": 2},
    "gpt_oss": {**WITH_HEAD_SIZES, "intermediate_size": 64},  # vLLM's experts need multiples of 32
    "gptj": {"n_embd": WIDTH, "n_head": 2, "rotary_dim": 16},
    "mistral": {**WITH_HEAD_SIZES, "sliding_window": None},
    "opt": {**SIZES, "word_embed_proj_dim": WIDTH},
}


def test_every_family_is_among_the_cases() -> None:
    assert {*SETTINGS} == {*PROVEN_IN_VLLM, *FAMILIES_AS_LLAMA}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_merged_model_is_exact(tmp_path: Path, name: str) -> None:
    model: Any = lively(name, **SETTINGS[name])
    merge(VECTOR, model, multiplier=MULTIPLIER, engine="vllm").save_pretrained(tmp_path / "merged")
    off, effects = 0.0, []
    for answer, ids in zip(served(tmp_path, tmp_path / "merged", {}, {}), PROMPTS, strict=True):
        with VECTOR.apply(model, multiplier=MULTIPLIER):
            expected = expected_steps(model, None, ids, answer["tokens"])
        off = max(off, apart(answer["steps"], expected))
        effects.append(apart(answer["steps"], expected_steps(model, None, ids, answer["tokens"])))
    print(f"\n{name}, merged: off by {off:.0e}; effects from {min(effects):.1f} to {max(effects):.1f}")
    assert off < 5e-4
    assert min(effects) > 0.1
