"""How Hugging Face's models are built: where the text decoder, its blocks and their parts stand."""

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

# Where a block keeps its parts, by the names that transformers' models use, the most telling ones first.
_PART_PATHS = {
    "self_attn": """
        self_attn attn attention self_attention self_att multi_head_attention rel_attn dec_attn norm_attn_norm.attn
        temporal_block mixer layer.0.SelfAttention
    """,
    "mlp": """
        mlp feed_forward ffn block_sparse_moe shared_mlp mlp_block ff pos_ff moe fc2 mixer output.dense
        layer.2.DenseReluDense layer.1.DenseReluDense
    """,
    "input_layernorm": """
        input_layernorm ln_1 self_attn_layer_norm norm1 norm_1 ln1 layernorm1 layer_norm1 ln_attn attn_norm
        attention_layernorm operator_norm temporal_pre_norm norm norm_attn_norm.norm_1 attention.ln attention.layer_norm
        self_att.layernorm_before_attention layer.0.layer_norm
    """,
    "post_attention_layernorm": """
        post_attention_layernorm ln_2 final_layer_norm norm2 norm_2 ln2 layernorm2 layer_norm2 ln_mlp mlp_norm
        pre_ff_layernorm pre_feedforward_layernorm pre_mlp_layernorm feedforward_layernorm ffn_norm channel_pre_norm
        feed_forward_layer_norm norm_ffn norm_attn_norm.norm_2 feed_forward.layer_norm ffn.layernorm_before_ffn
        layer.2.layer_norm layer.1.layer_norm
    """,
}
# Names under which hybrid models keep parts of different kinds in different blocks: the class tells which.
_MIXED_PARTS = {"temporal_block", "mixer"}
_CLASS_OF_MIXED_PART = {"self_attn": re.compile("attention|attn", re.I), "mlp": re.compile("mlp|moe|experts", re.I)}

# Models that have no list of blocks, but one for each part: a block's last part gives its output.
_TEMPLATES: dict[str, dict[str, str]] = {
    "xlm": {
        "decoder_block": "transformer.layer_norm2.{num}",
        "self_attn": "transformer.attentions.{num}",
        "mlp": "transformer.ffns.{num}",
        "post_attention_layernorm": "transformer.layer_norm1.{num}",
    }
}

_LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
# What decoders call their list of blocks, where it isn't the only list of its length.
_BLOCK_LIST_NAMES = {"layers", "layer", "blocks", "block", "h"}
_DECODER_NAMES = ("language_model", "text_model", "text_decoder", "decoder")


def pass_modules(model: nn.Module) -> list[nn.Module]:
    """The modules from ``model`` to its text decoder that take a whole pass's arguments, outermost first."""
    decoder = _text_decoder(model)
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]


def layer_widths(model: nn.Module) -> list[int]:
    """The widths that the config allows the text decoder's layers; none where it doesn't say.

    A few models stream several times their width from block to block.
    """
    config = _text_config(configured(model))
    width = getattr(config, "hidden_size", None)
    return [width, width * getattr(config, "hc_count", 1)] if isinstance(width, int) else []


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder; None where there is none."""
    return _text_config(configured(model))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's config says so."""
    return bool(getattr(getattr(configured(model), "config", None), "is_encoder_decoder", False))


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path in ``model`` and the list of the text decoder's blocks. Raises ValueError where it is not sure."""
    decoder = _text_decoder(model)
    candidates = [(path, blocks) for path, blocks in _block_lists(model) if _contains(decoder, blocks)]
    counts = _layer_counts(_text_config(configured(model)))
    fitting = next((found for n in counts if (found := [c for c in candidates if len(c[1]) == n])), candidates)
    named = [candidate for candidate in fitting if candidate[0].rpartition(".")[2] in _BLOCK_LIST_NAMES]
    fitting = named or fitting
    if len(fitting) != 1:
        raise ValueError(
            f"can't tell which modules are the decoder blocks of {type(model).__name__}; candidates: "
            f"{[f'{path}.{{num}}' for path, _ in fitting] or list_paths(model)}; "
            f"name them by layer_config={{'decoder_block': 'PATH.{{num}}'}}"
        )
    return fitting[0]


def _text_decoder(model: nn.Module) -> nn.Module:
    """The innermost module that holds the text decoder: no vision or audio tower, no encoder beside a decoder."""
    decoder = configured(model)
    while (inner := next(_inner_decoders(decoder), None)) is not None:
        decoder = inner
    return decoder


def _inner_decoders(module: nn.Module) -> Iterator[nn.Module]:
    """What a module itself calls its decoder, of its submodules that have blocks."""
    get_decoder = getattr(module, "get_decoder", None)
    found = [getattr(module, name, None) for name in _DECODER_NAMES]
    if callable(get_decoder):
        with suppress(AttributeError, NotImplementedError):
            found.append(get_decoder())
    found.append(getattr(module, "base_model", None))
    for inner in found:
        if (
            isinstance(inner, nn.Module)
            and inner is not module
            and _contains(module, inner)
            and any(_block_lists(inner))
        ):
            yield inner


def configured(model: nn.Module) -> nn.Module:
    """The outermost module with a config of its own, inside wrappers such as DistributedDataParallel; else the
    model.
    """
    return next((module for module in model.modules() if hasattr(module, "config")), model)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    if not callable(get_text_config):
        return config
    try:
        return get_text_config(decoder=True)
    except (TypeError, ValueError):
        return config


def _layer_counts(config: Any) -> list[int]:
    counts = (getattr(config, name, None) for name in _LAYER_COUNTS)
    return [count for count in counts if isinstance(count, int)]


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules with parts of their own that stand in no other list (as experts do)."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(outer) for outer in inside):
            inside.append(f"{path}.")
            if len(module) > 0 and all(any(True for _ in member.children()) for member in module):
                yield path, module


def known_templates(model: nn.Module, layer_type: str) -> list[str]:
    """Where the table says that the layers are, seen from a causal model and from its base model."""
    inner = configured(model)
    by_layer_type = _TEMPLATES.get(getattr(getattr(inner, "config", None), "model_type", ""), {})
    if layer_type not in by_layer_type:
        return []
    outer = next((name for name, module in model.named_modules() if module is inner), "")
    path = by_layer_type[layer_type]
    return [".".join(filter(None, (outer, inside))) for inside in (path, path.partition(".")[2])]


def takes_tokens_again(model: nn.Module) -> bool:
    """Whether a pass may compute some tokens of a row again, and in another order, as XLNet's."""
    return any("perm_mask" in inspect.signature(module.forward).parameters for module in pass_modules(model))


def puts_columns_first(model: nn.Module) -> bool:
    """Whether activations are ``(seq, batch, hidden)``."""
    return getattr(getattr(configured(model), "config", None), "model_type", None) in ("fsmt", "xlnet")


def learns_prompts(model: nn.Module) -> bool:
    """Whether a PEFT wrapper puts virtual tokens before each prompt, or before its keys and values."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def list_paths(model: nn.Module) -> list[str]:
    """Templates of all lists of modules."""
    return [f"{path}.{{num}}" for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(part is inner for inner in module.modules())


def part_path(block: nn.Module, layer_type: str) -> str | None:
    """Where the block keeps the part that plays the role; None if it has none."""
    for path in _PART_PATHS[layer_type].split():
        try:
            part = block.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(part, (nn.ModuleList, nn.Identity)):
            continue
        class_name = _CLASS_OF_MIXED_PART.get(layer_type) if path in _MIXED_PARTS else None
        if class_name is not None and not class_name.search(type(part).__name__):
            continue
        return path
    return None
