"""The models into which tests merge, and what is merged."""

from typing import Any

import torch

from steering_vectors import SteeringVector
from steering_vectors.merging.families import FAMILIES, FAMILIES_AS_LLAMA
from tests import tiny

VECTOR = SteeringVector(
    {layer: torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(layer)) for layer in (0, 2)}
)
MULTIPLIER = 1.5
DIRECTION = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(4))
SEVERAL = torch.randn(3, tiny.HIDDEN, generator=torch.Generator().manual_seed(5))

# By a case's name, the architecture, and what its config says besides.
ADDED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in sorted({*FAMILIES, *FAMILIES_AS_LLAMA} - {"mistral"})},
    "mistral": ("mistral", {"sliding_window": None}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "llama, rope scaled": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "mistral, rope theta": ("mistral", {"sliding_window": None, "rope_theta": 500.0}),
    "phi3, one head each": ("phi3", {"num_key_value_heads": 4}),
    "falcon with biases": ("falcon", {"bias": True}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False}),
}
ABLATED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in (
            *(
                "cohere",
                "falcon",
                "gemma",
                "gpt2",
                "gpt_neox",
                "gpt_oss",
                "gptj",
                "granite",
                "llama",
                "mamba",
                "mistral",
            ),
            *(
                "mixtral",
                "mpt",
                "nemotron",
                "opt",
                "phi",
                "phi3",
                "qwen2",
                "qwen2_moe",
                "qwen3",
                "qwen3_moe",
                "stablelm",
            ),
        )
    },
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "mixtral of 16 experts": ("mixtral", {"num_local_experts": 16, "num_experts_per_tok": 1}),
}


def there(cases: dict[str, tuple[str, dict[str, Any]]]) -> list[str]:
    """The names of the cases whose architecture this version of transformers has."""
    return [name for name, (architecture, _) in cases.items() if tiny.is_there(architecture)]
