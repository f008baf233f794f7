"""Find a block's attention, its MLP and its norms by the names that Hugging Face's models use."""

import re

from torch import nn

# The paths of a block's parts in transformers' models, the least ambiguous first.
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
# Names that hybrid models use for different kinds of parts in different blocks: the part's class decides.
_MIXED_PARTS = {"temporal_block", "mixer"}
_CLASS_OF_MIXED_PART = {"self_attn": re.compile("attention|attn", re.I), "mlp": re.compile("mlp|moe|experts", re.I)}


def part_path(block: nn.Module, layer_type: str) -> str | None:
    """Return the path of the block's part of this layer type; None if it has none."""
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
