"""A table of the model families whose ablations vLLM serves as adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["PROVEN", "PROVEN_BY_TRANSFORMERS", "engine_arguments"]

# The model types whose ablations vLLM 0.32 was seen to serve exactly, by its own classes, and by the backend of
# transformers where its own take no adapter on the embeddings. That backend is wrong for others, such as Gemma.
PROVEN = {"cohere", "cohere2", "ernie4_5", "granite", "llama", "nemotron", "phi3", "qwen3"}
PROVEN_BY_TRANSFORMERS = {"arcee", "helium", "mistral", "qwen2", "seed_oss", "smollm3", "stablelm"}
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
    if model_type not in PROVEN | PROVEN_BY_TRANSFORMERS:
        known = ", ".join(sorted(PROVEN | PROVEN_BY_TRANSFORMERS))
        return f"vLLM is not known to serve ablations of a model of type {model_type!r} exactly, but of {known}"
    fitting = [size for size in _RANKS if size >= rank]
    if not fitting:
        return f"vLLM takes adapters up to rank {_RANKS[-1]}, and this one has rank {rank}"
    arguments: dict[str, Any] = {"enable_lora": True, "max_lora_rank": fitting[0], "max_loras": 2}
    return arguments if model_type in PROVEN else {**arguments, "model_impl": "transformers"}
