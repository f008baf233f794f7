"""Models of other families, expressed as Llama models that compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steering_vectors.merging.families import FAMILIES_AS_LLAMA

__all__ = ["as_llama", "check_is_like_llama"]

_CLASSES = {"mistral": "MistralForCausalLM", "phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# The settings that mean the same in both families.
_SHARED = """
    attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range intermediate_size
    max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads pad_token_id rms_norm_eps
    rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
"""


def check_is_like_llama(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model computes the same as a Llama model with its weights."""
    config = model.config
    kind = config.model_type
    reasons = []
    if type(model).__name__ != _CLASSES[kind]:
        reasons.append(f"it is a {type(model).__name__}, not a {_CLASSES[kind]}")
    has_window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) is not None
    if has_window or "sliding_attention" in (getattr(config, "layer_types", None) or []):
        reasons.append("it has a sliding window")
    rope = {**(getattr(config, "rope_scaling", None) or {}), **(getattr(config, "rope_parameters", None) or {})}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        reasons.append("it has longrope")
    if {rope.get("partial_rotary_factor", 1.0), getattr(config, "partial_rotary_factor", 1.0)} != {1.0}:
        reasons.append("it has partial rotary embeddings")
    if len({weight.dtype for weight in model.parameters()}) > 1:
        reasons.append("its weights have several dtypes")
    if reasons:
        raise ValueError(
            f"a vector can be merged into a model of type {kind!r} only {FAMILIES_AS_LLAMA[kind]}, as it is written as "
            f"a Llama model, but {' and '.join(reasons)}"
        )


def as_llama(model: PreTrainedModel) -> PreTrainedModel:
    """Return a Llama model with biases in its MLPs that computes the same, made from the weights of ``model``.

    New biases are zeros. The weights are not copied.
    """
    old = model.config
    settings = {name: getattr(old, name) for name in _SHARED.split() if getattr(old, name, None) is not None}
    biased = old.model_type == "qwen2"
    head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    config = LlamaConfig(**settings, head_dim=head_dim, attention_bias=biased, mlp_bias=True)
    config._attn_implementation = getattr(old, "_attn_implementation", None)
    config._name_or_path = old._name_or_path
    with torch.device("meta"):
        made: Any = LlamaForCausalLM(config)
    for name, part in list(made.named_modules()):  # buffers, which no weights replace
        if "Rotary" in type(part).__name__:
            owner, _, last = name.rpartition(".")
            setattr(made.get_submodule(owner), last, type(part)(config=config).to(model.device))
    frequencies = {name.rpartition(".")[2]: buffer for name, buffer in model.named_buffers()}  # they may be rounded
    for name, buffer in made.named_buffers():
        buffer.data = frequencies.get(name.rpartition(".")[2], buffer).data
    weights = dict(_renamed(model))
    for name, wanted in made.named_parameters(remove_duplicate=False):
        if name not in weights and name.endswith("bias"):
            weights[name] = nn.Parameter(torch.zeros(wanted.shape, dtype=model.dtype, device=model.device))
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made.eval()  # type: ignore[no-any-return]


def _renamed(model: PreTrainedModel) -> Any:
    """Yield the model's weights under the names that Llama's have; Phi-3 has several in one."""
    config = model.config
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name.endswith("qkv_proj.weight"):
            width = weight.shape[0] // (config.num_attention_heads + 2 * config.num_key_value_heads)
            sizes = [width * config.num_attention_heads, *[width * config.num_key_value_heads] * 2]
            parts = zip(("q_proj", "k_proj", "v_proj"), torch.split(weight.detach(), sizes), strict=True)
            yield from ((name.replace("qkv_proj", part), _own(rows)) for part, rows in parts)
        elif name.endswith("gate_up_proj.weight"):
            parts = zip(("gate_proj", "up_proj"), weight.detach().chunk(2), strict=True)
            yield from ((name.replace("gate_up_proj", part), _own(rows)) for part, rows in parts)
        else:
            yield name, weight


def _own(rows: Tensor) -> nn.Parameter:
    return nn.Parameter(rows.clone())
