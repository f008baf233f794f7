"""Tiny random-weight models, built from configs alone (no downloads).

Every class of transformers' causal-LM mapping and of its image-text-to-text mapping, on
transformers 5 and on 4.46.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

V5 = int(transformers.__version__.split(".")[0]) >= 5

VOCAB = 128
FIRST_SPECIAL = 96  # ids from here on may be image, audio, ... placeholders
HIDDEN = 32
FFN = 64
HEADS = 4
HEAD_DIM = 8
LAYERS = 3
MAX_LAYERS = 6
POSITIONS = 256

TOKEN_IDS = frozenset({"pad_token_id", "bos_token_id", "eos_token_id"})
LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "layers",
    "depth",
    "num_blocks",
)
PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "moe_layer_freq",
    "attention_layers",
    "attn_layers",
    "activation_sparsity_pattern",
)

# Encoders that are decoders too, where the config says so.
BERT_LIKE = frozenset(
    {
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "mega",
        "megatron-bert",
        "qdqbert",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)

OPTIONAL = ("q_lora", "o_lora", "sliding_window", "attention_chunk_size")

# Models with a vision tower from timm, which is seldom installed.
TIMM_TOWERS = frozenset({"fast_vlm", "gemma3n", "perception_lm"})

# Values of the attributes that most configs share, whatever the kind of the (sub)config.
GENERIC: dict[str, Any] = {
    # widths
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "embed_dim",
            "embedding_size",
            "emb_dim",
            "word_embed_proj_dim",
            "attention_hidden_size",
            "lru_width",
            "out_hidden_size",
            "text_hidden_size",
            "projection_dim",
            "encoder_hidden_size",
            "input_embedding_size",
            "projector_hidden_size",
            "image_text_hidden_size",
            "patch_embed_hidden_size",
            "hidden_size_global",
            "backbone_hidden_size",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "n_inner",
            "d_ff",
            "ffn_hidden_size",
            "feed_forward_size",
            "dim_ff",
            "dff",
            "d_inner",
            "mlp_dim",
            "intermediate_size_mlp",
            "dense_intermediate_size",
        ),
        FFN,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ),
        16,
    ),
    # heads
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
            "swa_num_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "dim_head",
            "d_kv",
            "d_head",
            "kv_channels",
            "attention_head_size",
            "swa_head_dim",
            "global_head_dim",
            "query_pre_attn_scalar",
            "resampler_head_dim",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "index_head_dim",
            "swa_v_head_dim",
            "rotary_dim",
        ),
        HEAD_DIM,
    ),
    "attention_head_dim": HEAD_DIM,
    "qk_head_dim": 2 * HEAD_DIM,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    # vocabulary and positions
    "vocab_size": VOCAB,
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "model_max_length",
            "max_target_positions",
            "max_source_positions",
            "max_sequence_length",
            "seq_length",
        ),
        POSITIONS,
    ),
    "type_vocab_size": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "decoder_start_token_id": 1,
    # windows
    "sliding_window": 16,
    "sliding_window_size": 16,
    "attention_window_size": 16,
    "attention_chunk_size": 16,
    "local_attention": 16,
    "window_size": 16,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        (
            "n_group",
            "topk_group",
            "num_expert_group",
            "n_shared_experts",
            "num_shared_experts",
            "moe_num_shared_experts",
            "first_k_dense_replace",
            "num_dense_layers",
        ),
        1,
    ),
    # recurrent parts
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_num_heads": HEADS,
    "linear_head_dim": HEAD_DIM,
    # images
    "image_size": 16,
    "patch_size": 8,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "output_channels": 16,
    "num_query_tokens": 4,
    "qformer_hidden_size": HIDDEN,
}

# What differs from the above, per model type of a (sub)config.
_ABSENT = object()  # an attribute to leave out

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 64,
        "patch_size": 4,
        "num_hidden_layers": LAYERS,  # its default cache asks for it
    },
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "num_key_value_heads": 2,
    },
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe"],
    },
    "dots3_note_text": {
        "per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2 * HEAD_DIM}},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": FFN,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
    },
    "gemma4": {"_parts": {"vision_config": "gemma4_vision"}},
    "gemma4_assistant": {
        "_default": {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            },
        },
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "global_head_dim": 2 * HEAD_DIM,
    },
    "gemma4_unified_text": {"global_head_dim": 2 * HEAD_DIM},
    "gpt_neo": {
        "num_layers": 4,
        "attention_types": [[["global", "local"], 2]],
        "attention_layers": _ABSENT,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "inkling_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rel_extent": 32,
        "swa_num_key_value_heads": 2,
        "unpadded_vocab_size": VOCAB,
    },
    "inkling2_text": {
        "rel_extent": 32,
        "swa_num_key_value_heads": 2,
        "unpadded_vocab_size": VOCAB,
        "n_layers_per_attn_res_block": 2,
    },
    "inkling2_loop_text": {
        "rel_extent": 32,
        "swa_num_key_value_heads": 2,
        "unpadded_vocab_size": VOCAB,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_gate_rank": 4,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "laguna": {"num_attention_heads_per_layer": [HEADS, 2 * HEADS, HEADS]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "mellum": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
    },
    "mllama_text_model": {"cross_attention_layers": [1]},
    "musicgen_decoder": {"num_codebooks": 1, "audio_channels": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1, "audio_channels": 1},
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB,
        "shape_vocab_size": VOCAB,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared"]},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "xlstm": {"hidden_size": 128, "qk_dim_factor": 0.5},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"],
    },
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(
        ("qwen4_exp_text",),
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
            "ngram_vocab_size_base": 64,
            "split_ngram_parts": 2,
            "ple_embed_dim": 16,
            "ple_layer_ids": [1],
            "make_ngram_vocab_size_divisible_by": 8,
        },
    ),
}

# Configs of models with images; a function is called with the number of layers of its part.
SPECIAL.update(
    {
        "apertus1p5": {
            "audio_config": {
                "codebook_dim": HIDDEN,
                "decoder_hidden_size": HIDDEN,
                "decoder_intermediate_size": FFN,
                "decoder_num_layers": 2,
                "num_filters": 4,
                "codebook_size": 8,
                "decoder_attention_num_groups": 4,
            },
            "vision_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "codebook_size": 8,
                "latent_channels": 8,
                "num_res_blocks": 1,
                "embed_dim": 8,
            },
            "image_token_offset": FIRST_SPECIAL + 8,
            "audio_token_offset": FIRST_SPECIAL + 16,
        },
        "chameleon": {
            "vocabulary_map": {"<image>": FIRST_SPECIAL, "IMGIMGAA": FIRST_SPECIAL + 1},
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_embeddings": 8,
                "latent_channels": 8,
                "num_res_blocks": 1,
                "embed_dim": 8,
            },
        },
        "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}},
        "dots3_note_vision_encoder": {
            "adapter_in_dim": HIDDEN,
            "adapter_out_dim": HIDDEN,
            "mlp_layer_types": lambda n: ["dense"] * n,
            "per_layer_config": {},
        },
        "dots3_note_audio_encoder": {
            "adapter_input_size": HIDDEN,
            "adapter_out_dim": HIDDEN,
            "downsample_hidden_size": 8,
        },
        "emu3": {
            "vocabulary_map": {
                "<image>": FIRST_SPECIAL,
                "<|extra_200|>": FIRST_SPECIAL + 1,
                "<|visual token 000000|>": FIRST_SPECIAL + 2,
            },
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "codebook_size": 8,
                "num_res_blocks": 1,
                "embed_dim": 4,
            },
        },
        "ernie4_5_vl_moe_text": {
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        "florence_vision": {
            "depths": lambda n: [1] * n,
            "embed_dim": lambda n: [HIDDEN] * n,
            "num_heads": lambda n: [HEADS] * n,
            "num_groups": lambda n: [HEADS] * n,
            "patch_size": lambda n: [3] * n,
            "patch_stride": lambda n: [2] * n,
            "patch_padding": lambda n: [1] * n,
            "patch_prenorm": lambda n: [True] * n,
        },
        "gemma4_vision": {"position_embedding_size": 16},
        "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0},
        "granite4_vision": {
            "vision_config": {"hidden_size": 64},  # its heads are of 64
            "deepstack_layer_map": [[-1, 0]],
            "downsample_rate": "1/2",
            "spatial_target_layers": [1],
        },
        "janus_vqgan": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_embeddings": 8,
            "latent_channels": 8,
            "num_res_blocks": 1,
            "embed_dim": 4,
        },
        "molmo2": {"image_patch_id": FIRST_SPECIAL},
        "molmo2_adapter": {"vision_feature_layer": [1, 0]},
        "molmo2_vision": {"image_size": [16, 16], "num_position_embeddings": 4},
        "molmo2_text": {"additional_vocab_size": 8, "rope_scaling_layers": None},
        "muse_spark_audio": {
            "depths": lambda n: [1] * n,
            "hidden_sizes": lambda n: [HIDDEN] * n,
            "patch_sizes": lambda n: [2] * n,
        },
        "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
        "step3p7": {"text_config": {"sliding_window": 16}},
        "vision-encoder-decoder": {
            "_parts": {"encoder": "vit", "decoder": "gpt2"},
            "decoder": {"add_cross_attention": True, "is_decoder": True},
        },
    }
)

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
SPECIAL.update(
    dict.fromkeys(
        (
            "glm46v_text",
            "glm4v_text",
            "glm4v_moe_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
            "hunyuan_vl_text",
        ),
        {"rope_parameters": MROPE},
    )
)

# What differs on transformers 4.
SPECIAL_V4: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {**dict.fromkeys(TOKEN_IDS, _ABSENT), "kv_n_heads": 2},
        "ffn_config": dict.fromkeys(TOKEN_IDS, _ABSENT),
    },
    "mega": {"bidirectional": False, "truncation": 64},
    "mllama_text_model": {
        "rope_scaling": {"rope_type": "default"},
        "cross_attention_layers": [1],
    },
    "qwen2_vl": {
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "image_token_id": FIRST_SPECIAL,
        "video_token_id": FIRST_SPECIAL + 1,
        "vision_start_token_id": FIRST_SPECIAL + 2,
    },
    "transfo-xl": {"cutoffs": [64], "mem_len": 16, "clamp_len": 64},
    "zamba": {
        "num_hidden_layers": 5,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
    },
}
if not V5:
    SPECIAL.update(SPECIAL_V4)

_part_classes: dict[str, type[PretrainedConfig]] = {}

UNBUILDABLE: dict[str, str] = (
    {}
    if V5
    else {
        "qdqbert": "needs the package pytorch-quantization, from NVIDIA's own index",
    }
)

# What builds, but does not run with `input_ids` alone.
CAUSAL_NEEDS_MORE: dict[str, str] = (
    {
        "gemma4_assistant": "inputs_embeds (batch, seq, 2 * backbone_hidden_size), shared_kv_states",
        "gemma4_unified_assistant": "inputs_embeds and shared_kv_states, as gemma4_assistant",
    }
    if V5
    else {
        "transfo-xl": "4.46.3 calls Tensor.type_as(dtype=...), which torch has not",
    }
)

VISION_LANGUAGE_NEEDS_MORE: dict[str, str] = {
    "blip": "pixel_values",
    "blip-2": "pixel_values",
    "idefics": "pixel_values (batch, images, 3, 16, 16), image_attention_mask, attention_mask",
    "instructblip": "pixel_values, qformer_input_ids",
    "instructblipvideo": "pixel_values (with frames), qformer_input_ids",
    "kosmos-2": "pixel_values or image_embeds with image_embeds_position_mask",
    "pix2struct": "flattened_patches and decoder_input_ids",
    "udop": "bbox and decoder_input_ids",
    "vision-encoder-decoder": "pixel_values and decoder_input_ids",
    **(
        {
            "llama4": "5.24.0 asks the text output for image_outputs, which it has not: never runs",
            "pi0": "state, actions; its text model is model.vlm.language_model",
            "pp_formulanet": "pixel_values or encoder_outputs, and decoder_input_ids",
        }
        if V5
        else {
            "llava": "images: 4.46.3 merges them whenever there are none; language_model runs",
            "llava_next": "images, as llava",
            "pixtral": "images, as llava",
            "vipllava": "images, as llava",
        }
    ),
}


def causal_model_types() -> list[str]:
    """Model types of the causal-LM mapping."""
    return list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def vision_language_model_types() -> list[str]:
    """Model types of the image-text-to-text mapping (and vision-to-sequence where it exists)."""
    return list(_vision_language_names())


def _vision_language_names() -> dict[str, str]:
    names = dict(getattr(modeling_auto, "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES", {}))
    names.update(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return names


def tiny_causal_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model of the causal-LM class of a model type."""
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return _build(model_type, name, vision_layers=2, overrides=overrides)


def tiny_vision_language_model(model_type: str, *, vision_layers: int, **overrides: Any) -> PreTrainedModel:
    """A tiny model of the image-text-to-text class of a model type."""
    name = _vision_language_names()[model_type]
    return _build(model_type, name, vision_layers=vision_layers, overrides=overrides)


def _build(model_type: str, class_name: str, *, vision_layers: int, overrides: dict[str, Any]) -> PreTrainedModel:
    model_class = getattr(transformers, class_name)
    config = tiny_config(model_type, model_class, vision_layers=vision_layers, overrides=overrides)
    if model_type in TIMM_TOWERS:
        _replace_timm_tower(config, vision_layers)
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config).float()
    model.eval()
    return model


def tiny_config(
    model_type: str,
    model_class: type[PreTrainedModel],
    *,
    vision_layers: int = 2,
    overrides: dict[str, Any] | None = None,
) -> PretrainedConfig:
    """The config that the tiny model of a class is built from."""
    config_class = CONFIG_MAPPING[model_type]
    wanted = model_class.config_class
    if wanted is not None and not issubclass(config_class, wanted):
        config_class = wanted  # the class takes a part of the composite config
    kwargs = _tiny_kwargs(config_class, model_type, "text", vision_layers)
    for key, value in (overrides or {}).items():
        _override(kwargs, config_class, key, value)
    return config_class(**kwargs)


def _override(kwargs: dict[str, Any], config_class: type[PretrainedConfig], key: str, value: Any) -> None:
    """Set an attribute in the config, and in its text part where that has it."""
    name = config_class.attribute_map.get(key, key)
    done = key == "num_hidden_layers" and _set_layers(kwargs, value)
    part = next(
        (v for k, v in kwargs.items() if isinstance(v, dict) and "model_type" in v and _role(k) == "text"),
        None,
    )
    part_class = _part_classes[part["model_type"]] if part else None
    if part is not None and part_class is not None:
        known = key in _fields(part_class) | set(part_class.attribute_map)
        if known or (key == "num_hidden_layers" and not done):
            _override(part, part_class, key, value)
            done = done or name not in _fields(config_class)
    if not done:
        kwargs[name] = value


def _set_layers(kwargs: dict[str, Any], layers: int) -> bool:
    """Set the number of layers; lists with an entry per layer are cut or go round again."""
    counts = [key for key in LAYER_COUNTS if key in kwargs and "encoder_" not in key]
    lists = [key for key in PER_LAYER_LISTS if isinstance(kwargs.get(key), list)]
    for key in lists:
        value = kwargs[key]
        kwargs[key] = [value[i % len(value)] for i in range(layers)]
    if isinstance(kwargs.get("per_layer_config"), dict):
        value, count = kwargs["per_layer_config"], max(kwargs.get(key, LAYERS) for key in counts)
        kwargs["per_layer_config"] = {i: value[i % count] for i in range(layers) if i % count in value}
    if "attention_types" in kwargs:  # GPT-Neo
        pattern = [("global", "local")[i % 2] for i in range(layers)]
        kwargs["attention_types"] = [[pattern, 1]]
    kwargs.update(dict.fromkeys(counts, layers))
    return bool(counts or lists)


def _replace_timm_tower(config: PretrainedConfig, vision_layers: int) -> None:
    """Put a CLIP tower where the config wants one of timm's."""
    timm_config = config.vision_config
    kwargs = _tiny_kwargs(CONFIG_MAPPING["clip_vision_model"], "", "vision", vision_layers)
    tower = CONFIG_MAPPING["clip_vision_model"](**kwargs)
    for key, value in vars(timm_config).items():  # what the other parts ask the tower's config for
        if not key.startswith("_") and not hasattr(tower, key):
            setattr(tower, key, value)
    tower.model_args = {"embed_dim": HIDDEN}
    vars(config)["vision_config"] = tower  # past the check of its type


def _role(name: str) -> str:
    if name == "encoder" or any(part in name for part in ("vision", "vit", "image", "visual")):
        return "vision"
    text = ("text", "decoder", "llm", "language", "thinker", "vlm", "dit_")
    if any(part in name for part in text):
        return "text"
    return "other"


def _fields(config_class: type[PretrainedConfig]) -> set[str]:
    names = set(TOKEN_IDS)
    for parent in config_class.__mro__:
        if parent is PretrainedConfig or not issubclass(parent, PretrainedConfig):
            continue
        names |= set(inspect.signature(parent.__init__).parameters)
        names |= set(parent.__dict__.get("__annotations__", {}))
    return names - {"self", "args", "kwargs"}


def _default_config(config_class: type[PretrainedConfig], kwargs: dict[str, Any]) -> PretrainedConfig | None:
    try:
        return config_class(**kwargs)
    except Exception:  # some composite configs have no default
        return None


def _get(config: PretrainedConfig | None, key: str) -> Any:
    """An attribute, or None where the config has none (or one per layer)."""
    try:
        return getattr(config, key, None)
    except Exception:
        return None


def _tiny_kwargs(
    config_class: type[PretrainedConfig], model_type: str, role: str, vision_layers: int
) -> dict[str, Any]:
    """Keyword arguments that make a config of a class tiny."""
    layers = {"text": LAYERS, "vision": vision_layers, "other": 2}[role]
    special = {**SPECIAL.get(config_class.model_type, {}), **SPECIAL.get(model_type, {})}
    parts = special.pop("_parts", {})
    default = _default_config(config_class, special.pop("_default", {}))
    fields = _fields(config_class)
    kwargs: dict[str, Any] = {k: v for k, v in GENERIC.items() if k in fields}
    for key in list(kwargs):  # an attribute that the default leaves out stays out
        if key.startswith(OPTIONAL) and default is not None and _get(default, key) is None:
            del kwargs[key]
    for key in LAYER_COUNTS:
        if key in fields:
            kwargs[key] = layers
    if model_type in BERT_LIKE and role == "text":
        kwargs["is_decoder"] = True
    if "num_key_value_heads" in fields:
        grouped = _get(default, "num_key_value_heads")
        heads = _get(default, "num_attention_heads")
        kwargs["num_key_value_heads"] = HEADS if grouped in (None, heads) else 2
    if default is not None:
        _add_layer_lists(kwargs, default, fields, layers)
        _add_special_tokens(kwargs, default, fields)
        _add_rope(kwargs, default, fields)
        for key, part in vars(default).items():
            if isinstance(part, PretrainedConfig):
                kwargs[key] = _sub_kwargs(key, part, role, vision_layers)
    for key, part_type in parts.items():
        kwargs[key] = _sub_kwargs(key, CONFIG_MAPPING[part_type](), role, vision_layers)
    for key, value in special.items():
        if callable(value):
            value = value(layers)
        if isinstance(value, dict) and "model_type" in (kwargs.get(key) or {}):
            kwargs[key] = _present({**kwargs[key], **value})
        else:
            kwargs[key] = value
    return _present(kwargs)


def _present(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if v is not _ABSENT}


def _sub_kwargs(key: str, part: PretrainedConfig, role: str, vision_layers: int) -> dict[str, Any]:
    _part_classes[part.model_type] = type(part)
    role = _role(key) if role == "text" else role  # parts of a vision tower belong to it
    kwargs = _tiny_kwargs(type(part), part.model_type, role, vision_layers)
    kwargs["model_type"] = part.model_type
    return kwargs


def _add_layer_lists(kwargs: dict[str, Any], default: PretrainedConfig, fields: set[str], layers: int) -> None:
    """Per-layer lists that hold each kind of layer of the default config once or more."""
    count = _get(default, "num_hidden_layers")
    lists = {
        key: list(value)
        for key in PER_LAYER_LISTS
        if key in fields and isinstance(value := _get(default, key), (list, tuple)) and len(value) == count
    }
    if not lists:
        return
    kinds: list[tuple[Any, ...]] = []
    for kind in zip(*lists.values()):
        if kind not in kinds:
            kinds.append(kind)
    kinds = kinds[:MAX_LAYERS]
    first = len(kinds)
    while len(kinds) < layers:
        kinds.append(kinds[len(kinds) - first])
    for key, values in zip(lists, zip(*kinds)):
        kwargs[key] = list(values)
    for key in LAYER_COUNTS:
        if key in kwargs:
            kwargs[key] = len(kinds)


def _add_special_tokens(kwargs: dict[str, Any], default: PretrainedConfig, fields: set[str]) -> None:
    """Placeholder tokens (image, audio, ...) get ids inside the vocabulary, all different."""
    next_id = FIRST_SPECIAL
    for key in sorted(fields):
        if not key.endswith(("_token_id", "_token_index")) or key in kwargs:
            continue
        if isinstance(_get(default, key), int):
            kwargs[key] = next_id
            next_id += 1


def _add_rope(kwargs: dict[str, Any], default: PretrainedConfig, fields: set[str]) -> None:
    """Sections of multimodal rotary embeddings must sum to half the head size."""
    for field in ("rope_parameters", "rope_scaling"):
        rope = _get(default, field)
        if field in fields and isinstance(rope, dict):
            kwargs[field] = _tiny_rope(rope)


def _tiny_rope(rope: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _tiny_rope(value)
        if isinstance(value, dict)
        else [2, 1, 1]
        if key == "mrope_section" and value is not None
        else value
        for key, value in rope.items()
    }
