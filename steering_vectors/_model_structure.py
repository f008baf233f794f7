"""How Hugging Face's models are built: where the text decoder, its blocks and their parts stand, and how to call it."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

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
    config = _text_config(_configured(model))
    width = getattr(config, "hidden_size", None)
    return [width, width * getattr(config, "hc_count", 1)] if isinstance(width, int) else []


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's config says so."""
    return bool(getattr(getattr(_configured(model), "config", None), "is_encoder_decoder", False))


def input_device(model: nn.Module) -> torch.device:
    """The device that the model's input belongs on."""
    get_embeddings = getattr(_configured(model), "get_input_embeddings", None)
    embeddings = get_embeddings() if callable(get_embeddings) else None
    modules = [module for module in (embeddings, model) if isinstance(module, nn.Module)]
    devices = (parameter.device for module in modules for parameter in module.parameters())
    # Weights that are offloaded stand on no device; the hooks that bring them move the input too.
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def call_once(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """One pass over ``input_ids`` and ``attention_mask``, without a cache and with few logits.

    Arguments that the model's forward method doesn't know are left out.
    """
    known: set[str] = set()
    for module in pass_modules(_configured(model)):
        parameters = inspect.signature(module.forward).parameters
        known |= parameters.keys()
        # A wrapper such as PEFT's hands on what it doesn't know itself.
        if inspect.Parameter.VAR_KEYWORD not in {parameter.kind for parameter in parameters.values()}:
            break
    options = {"use_cache": False, "logits_to_keep": 1, "num_logits_to_keep": 1}
    kwargs = {name: value for name, value in {**inputs, **options}.items() if name in known}
    if "input_ids" in kwargs:
        model(**kwargs)
    else:
        model(inputs["input_ids"], **kwargs)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path in ``model`` and the list of the text decoder's blocks. Raises ValueError where it is not sure."""
    decoder = _text_decoder(model)
    candidates = [(path, blocks) for path, blocks in _block_lists(model) if _contains(decoder, blocks)]
    counts = _layer_counts(_text_config(_configured(model)))
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
    decoder = _configured(model)
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


def _configured(model: nn.Module) -> nn.Module:
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
    configured = _configured(model)
    by_layer_type = _TEMPLATES.get(getattr(getattr(configured, "config", None), "model_type", ""), {})
    if layer_type not in by_layer_type:
        return []
    outer = next((name for name, module in model.named_modules() if module is configured), "")
    path = by_layer_type[layer_type]
    return [".".join(filter(None, (outer, inside))) for inside in (path, path.partition(".")[2])]


def learns_prompts(model: nn.Module) -> bool:
    """Whether a PEFT wrapper puts virtual tokens before each prompt, or before its keys and values."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def virtual_tokens(model: nn.Module) -> int:
    """How many columns a PEFT wrapper puts before the prompt, in prompt tuning."""
    config = getattr(model, "active_peft_config", None)
    if not learns_prompts(model) or "PREFIX" in str(getattr(config, "peft_type", "")):
        return 0
    return int(getattr(config, "num_virtual_tokens", 0))


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
