"""A table of the model families whose ablations vLLM serves as adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["engine_arguments"]

# The model types whose classes in vLLM 0.32 take an adapter on the embeddings. Others take it under the backend of
# transformers.
_TAKES_EMBEDDINGS = {
    *("apertus", "cohere", "cohere2", "ernie4_5", "exaone4", "granite", "granitemoe", "jamba", "lfm2", "llama"),
    *("minicpm", "mixtral", "nemotron", "phi3", "phimoe", "qwen3", "qwen3_moe", "solar"),
}
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def engine_arguments(model_type: str, names: Iterable[str], rank: int) -> dict[str, Any] | str:
    """Return vLLM's arguments to serve an ablation beside its base, or the reason for which vLLM can't.

    ``names`` are those of the adapted modules. One slot is kept free: with all slots in use, vLLM lets an adapter act
    on requests of the base, on a CPU. The backend of transformers can serve one adapter only: what the first token's
    adapter changes of the embeddings is looked up for all tokens of a batch.
    """
    lasts = {name.rpartition(".")[2] for name in names}
    if others := {name for name in lasts if name != "embed_tokens" and ("embed" in name or name in ("wte", "wpe"))}:
        return f"vLLM takes adapters on embeddings named embed_tokens alone, and not on {', '.join(sorted(others))}"
    if any("experts" in name for name in names):
        return "adapters on experts were not tried in vLLM"
    fitting = [size for size in _RANKS if size >= rank]
    if not fitting:
        return f"vLLM takes adapters up to rank {_RANKS[-1]}, and this one has rank {rank}"
    arguments: dict[str, Any] = {"enable_lora": True, "max_lora_rank": fitting[0], "max_loras": 2}
    return arguments if model_type in _TAKES_EMBEDDINGS else {**arguments, "model_impl": "transformers"}
