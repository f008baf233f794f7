"""Find a block's attention, its MLP, their output projections, and its norms, by the names in Hugging Face's models."""

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
# The part that ends in a projection to the stream, and the projection's paths inside it.
_PROJECTION_PATHS = {
    "heads": (
        "self_attn",
        """
        o_proj out_proj c_proj dense output.dense attention.out_proj Wo out_lin o o_net self_attention.attention_out
        """,
    ),
    "neurons": (
        "mlp",
        """
        down_proj dense_4h_to_h c_proj fc_out fc2 w2 wo Wo output.dense output output_linear proj_down layer_2 lin2
        value ffn.w_out CoreNet.3 2
        """,
    ),
}
# Paths of an MLP whose hidden layer stands beside it in the block: they are the projection.
_MLPS_THAT_PROJECT = {"fc2", "output.dense"}
_EXPERTS = re.compile("experts?", re.I)
# Names that hybrid models use for different kinds of parts in different blocks: the part's class decides.
_MIXED_PARTS = {"temporal_block", "mixer"}
_CLASS_OF_MIXED_PART = {"self_attn": re.compile("attention|attn", re.I), "mlp": re.compile("mlp|moe|experts", re.I)}


def part_path(block: nn.Module, layer_type: str) -> str | None:
    """Return the path of the block's part of this layer type; None if it has none."""
    if layer_type in _PROJECTION_PATHS:
        return _projection_path(block, layer_type)
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


def _projection_path(block: nn.Module, layer_type: str) -> str | None:
    part, paths = _PROJECTION_PATHS[layer_type]
    outer = part_path(block, part)
    if outer is None or outer in _MLPS_THAT_PROJECT:
        return outer
    for path in paths.split():
        try:
            projection = block.get_submodule(f"{outer}.{path}")
        except AttributeError:
            continue
        if not _EXPERTS.search(type(projection).__name__):
            return f"{outer}.{path}"
    return None
