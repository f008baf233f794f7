"""Tiny random models of many architectures, and a tokenizer for them, built in code."""

import inspect
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320
HIDDEN = 32
LAYERS = 3
WINDOW = 6
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# There a cached Gemma-2 gives other logits than an uncached one beyond its window, whoever steers it.
ON_TRANSFORMERS_4 = VERSION < (5, 0)
# There the chunks of a prompt are compiled, as one graph, also on CPUs.
CHUNKS_ARE_ONE_GRAPH = VERSION == (4, 51)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}

# model type → (configuration class, what its configuration needs beyond the sizes)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {**_SIZES, "n_layer": LAYERS, "n_head": 4}),
    "falcon": ("FalconConfig", {**_SIZES, "alibi": False, "new_decoder_architecture": False}),
    "gemma2": ("Gemma2Config", {**_SIZES, **_HEADS, "sliding_window": 32 if ON_TRANSFORMERS_4 else WINDOW}),
    "gemma3": ("Gemma3TextConfig", {**_SIZES, **_HEADS, "sliding_window": WINDOW}),
    "gpt2": ("GPT2Config", _GPT_SIZES),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{name: value for name, value in _SIZES.items() if name != "num_hidden_layers"},
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "gptj": ("GPTJConfig", {**_GPT_SIZES, "rotary_dim": 4}),
    "llama": ("LlamaConfig", {**_SIZES, **_HEADS}),
    "mamba": ("MambaConfig", {**_SIZES, "state_size": 8}),
    "mistral": ("MistralConfig", {**_SIZES, **_HEADS, "sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {**_SIZES, **_HEADS, "num_local_experts": 4}),
    "mpt": ("MptConfig", {**_SIZES, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 128}),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "phi": ("PhiConfig", _SIZES),
    "qwen2": ("Qwen2Config", {**_SIZES, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {**_SIZES, **_HEADS}),
    "rwkv": ("RwkvConfig", {**_SIZES, "attention_hidden_size": HIDDEN}),
    "stablelm": ("StableLmConfig", {**_SIZES, "num_key_value_heads": 2}),
}

# Built by some tests only.
_MORE_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("ArceeConfig", {**_SIZES, **_HEADS}),
    "biogpt": ("BioGptConfig", _SIZES),
    "codegen": ("CodeGenConfig", {**_GPT_SIZES, "rotary_dim": 4}),
    "cohere": ("CohereConfig", {**_SIZES, "num_key_value_heads": 2}),
    "cohere2": ("Cohere2Config", {**_SIZES, "num_key_value_heads": 2}),
    "ernie4_5": ("Ernie4_5Config", {**_SIZES, **_HEADS}),
    "gemma": ("GemmaConfig", {**_SIZES, **_HEADS}),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT_SIZES),
    "gpt_oss": ("GptOssConfig", {**_SIZES, **_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", {**_SIZES, "num_key_value_heads": 2, "residual_multiplier": 0.3}),
    "helium": ("HeliumConfig", {**_SIZES, **_HEADS}),
    "jais2": ("Jais2Config", {**_SIZES, "num_key_value_heads": 2}),
    "nemotron": ("NemotronConfig", {**_SIZES, **_HEADS}),
    "olmo2": ("Olmo2Config", {**_SIZES, "num_key_value_heads": 2}),
    "persimmon": ("PersimmonConfig", _SIZES),
    "phi3": ("Phi3Config", {**_SIZES, "num_key_value_heads": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_SIZES, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_SIZES, **_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "seed_oss": ("SeedOssConfig", {**_SIZES, **_HEADS}),
    "smollm3": ("SmolLM3Config", {**_SIZES, "num_key_value_heads": 2}),
    "starcoder2": ("Starcoder2Config", {**_SIZES, "num_key_value_heads": 2}),
    "xglm": (
        "XGLMConfig",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "num_layers": LAYERS, "attention_heads": 4, "ffn_dim": 48},
    ),
}


def is_there(name: str) -> bool:
    """True if this version of transformers has the architecture."""
    return hasattr(transformers, {**_CONFIGS, **_MORE_CONFIGS}[name][0])


ARCHITECTURES = [name for name, (config, _) in _CONFIGS.items() if hasattr(transformers, config)]
# Cached, they give other logits than uncached, whoever steers them.
UNLIKE_UNCACHED = {"gemma2"} if (4, 46) < VERSION < (5, 0) else set()
# Their states take padding in, whoever steers them.
IGNORE_PADDING = {"rwkv"}
# The states of this one can't be reordered, so that generate refuses beams.
WITH_BEAMS = [name for name in ARCHITECTURES if name != "rwkv"]
_STATIC = ["gemma3", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen2", "qwen3"]
_STATIC_ON_TRANSFORMERS_4 = ["gpt_neox", "llama", "phi", "qwen2", "stablelm"]
WITH_STATIC_CACHE = _STATIC_ON_TRANSFORMERS_4 if ON_TRANSFORMERS_4 else _STATIC


def build(architecture: str, **overrides: Any) -> PreTrainedModel:
    """A new model of the architecture, in evaluation mode, with weights large enough that tokens differ."""
    class_name, settings = {**_CONFIGS, **_MORE_CONFIGS}[architecture]
    config = getattr(transformers, class_name)(**{**settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def scaled_rope(kind: str) -> PreTrainedModel:
    """A new model whose rotary frequencies change beyond 16 tokens."""
    settings: dict[str, Any] = {"rope_type": kind}
    if kind == "longrope":
        settings |= {"type": kind, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        overrides: dict[str, Any] = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    else:
        settings |= {"factor": 4.0}
        overrides = {"max_position_embeddings": 16}
    if ON_TRANSFORMERS_4:
        settings.pop("rope_type" if kind == "longrope" else "type", None)
        rope = {"rope_scaling": settings}
    else:
        settings |= {"rope_theta": 10000.0}
        settings |= {"original_max_position_embeddings": 16} if kind == "longrope" else {}
        rope = {"rope_parameters": settings}
    return build("phi3" if kind == "longrope" else "llama", **rope, **overrides)


@cache
def shared(architecture: str) -> PreTrainedModel:
    """One model of the architecture for the whole run; tests must leave it as it was."""
    return build(architecture)


@cache
def llava(depth: int = 5) -> PreTrainedModel:
    """A vision tower of so many blocks beside a text model of three."""
    text = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 3}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": depth, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text, "num_attention_heads": 4, "num_key_value_heads": 2},
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 16, "patch_size": 8},
        image_token_index=VOCABULARY - 1,
    )
    model: PreTrainedModel = transformers.LlavaForConditionalGeneration(config).eval()
    return model


def blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder blocks, told by hand, independently of the library."""
    paths = ("model.layers", "transformer.h", "transformer.blocks", "gpt_neox.layers", "model.decoder.layers")
    for path in (*paths, "backbone.layers", "rwkv.blocks"):
        try:
            return list(model.get_submodule(path))
        except AttributeError:
            continue
    raise AssertionError(type(model))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A message's content as text, also where it comes in parts.
TEXT_OF_CONTENT = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
# It leaves the thinking out of all answers but the last.
QWEN_3 = TEXT_OF_CONTENT + (
    "{%- set ns = namespace(last_query=-1) -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{%- set ns.last_query = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for m in messages -%}{%- set content = text(m['content']) -%}"
    "{%- if m['role'] != 'assistant' -%}{{ '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' }}"
    "{%- else -%}{%- set thought = '' -%}"
    "{%- if '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last_query and (loop.last or thought) -%}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else -%}{{ content }}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
    "{%- endif -%}"
)


def tokenizer(
    *, padding_side: str = "right", bos: bool = False, pad: bool = True, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with ids below VOCABULARY; with ``bos`` it begins each text with <s>."""
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        padding_side=padding_side,
    )
    made.chat_template = chat_template
    return made


def position_ids(model: PreTrainedModel, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The position ids that generate gives, for the models that take them."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0)}


def hidden_states(model: PreTrainedModel, input_ids: list[int]) -> list[torch.Tensor]:
    """What each block gives for one prompt alone, ``(seq, hidden)``, by plain hooks written out here."""
    outputs: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, torch.Tensor) else output[0])[0].detach())

    handles = [block.register_forward_hook(keep) for block in blocks(model)]
    with torch.no_grad():
        model(torch.tensor([input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs
