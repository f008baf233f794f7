"""A table of model families: the bias that can hold what is added to a block's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "FAMILIES_AS_LLAMA", "PROVEN_IN_VLLM", "Family", "family_of", "list_of_families"]


@dataclass(frozen=True)
class Family:
    """A family of models whose blocks have, or can have, a bias right before their output.

    ``bias`` is the parameter's path in a block; of experts, each has a row. ``settings`` are what the config must say
    for the bias to exist. The config's ``factor``, if named, multiplies what the bias is part of. A config that doesn't
    say what is ``needed`` puts a norm after the bias.
    """

    bias: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    factor: str = ""
    needed: Mapping[str, Any] = field(default_factory=dict)


_LIKE_LLAMA = Family("mlp.down_proj.bias", {"mlp_bias": True})
FAMILIES: dict[str, Family] = {
    "arcee": _LIKE_LLAMA,
    "biogpt": Family("fc2.bias"),
    "bloom": Family("mlp.dense_4h_to_h.bias"),
    "codegen": Family("mlp.fc_out.bias"),
    "cohere": Family("self_attn.o_proj.bias", {"attention_bias": True}),
    "cohere2": Family("self_attn.o_proj.bias", {"attention_bias": True}),
    "ernie4_5": Family("mlp.down_proj.bias", {"use_bias": True}),
    "falcon": Family("mlp.dense_4h_to_h.bias", {"bias": True}),
    "gpt2": Family("mlp.c_proj.bias"),
    "gpt_bigcode": Family("mlp.c_proj.bias"),
    "gpt_neo": Family("mlp.c_proj.bias"),
    "gpt_neox": Family("mlp.dense_4h_to_h.bias"),
    "gpt_oss": Family("mlp.experts.down_proj_bias"),  # the router's weights add up to 1
    "gptj": Family("mlp.fc_out.bias"),
    "granite": Family("mlp.down_proj.bias", {"mlp_bias": True}, "residual_multiplier"),
    "helium": _LIKE_LLAMA,
    "jais2": _LIKE_LLAMA,
    "llama": _LIKE_LLAMA,
    "nemotron": _LIKE_LLAMA,
    "opt": Family("fc2.bias", {"enable_bias": True}, needed={"do_layer_norm_before": True}),
    "persimmon": Family("mlp.dense_4h_to_h.bias"),
    "phi": Family("mlp.fc2.bias"),
    "seed_oss": _LIKE_LLAMA,
    "smollm3": _LIKE_LLAMA,
    "starcoder2": Family("mlp.c_proj.bias", {"use_bias": True}),
    "xglm": Family("fc2.bias"),
}
# Families without such a bias that are Llama under another name, with the condition.
FAMILIES_AS_LLAMA = {
    "mistral": "without a sliding window",
    "phi3": "without a sliding window, longrope or partial rotary embeddings",
    "qwen2": "without a sliding window",
}
# Families of merged models whose files vLLM 0.32 was seen to serve exactly. It drops the new bias of some others.
PROVEN_IN_VLLM = {
    *("arcee", "gpt2", "gpt_neox", "gpt_oss", "gptj", "granite", "llama", "nemotron", "opt", "phi", "seed_oss"),
    *("smollm3", "starcoder2"),
}


def list_of_families(engine: str | None) -> str:
    """Return the model types that can be merged, with their conditions, as a text."""
    types = {*FAMILIES} if engine is None else PROVEN_IN_VLLM
    named = [*types, *(f"{name} ({condition})" for name, condition in FAMILIES_AS_LLAMA.items())]
    return ", ".join(sorted(named))


def family_of(model_type: str, engine: str | None) -> Family:
    """Return the family of a model once merged, which may be Llama's.

    Raises ValueError for an unknown engine, for a family without a bias for this, and for one that isn't proven to be
    served by the engine.
    """
    if engine not in (None, "vllm"):
        raise ValueError(f"engine must be 'vllm', or None for transformers, got {engine!r}")
    merged_type = "llama" if model_type in FAMILIES_AS_LLAMA else model_type
    if merged_type not in FAMILIES:
        raise ValueError(
            f"a vector can't be merged into a model of type {model_type!r}: its blocks have no bias that its config "
            f"can switch on. Types that can be merged: {list_of_families(engine)}. For others, steer with "
            f"vector.apply, or write an adapter with to_adapter"
        )
    if engine == "vllm" and merged_type not in PROVEN_IN_VLLM:
        raise ValueError(
            f"vLLM is not known to add the bias of a merged model of type {model_type!r}, and would leave it out "
            f"without a word. Types that are known: {list_of_families(engine)}"
        )
    return FAMILIES[merged_type]
