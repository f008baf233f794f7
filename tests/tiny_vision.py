"""Tiny random vision-language models, each with its processor, built in code."""

from functools import cache
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AddedToken

from tests import tiny

# As in real templates, an image's placeholder stands where the image stands among the texts.
_TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for part in m['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_SPECIALS = ["<image>", "<boi>", "<eoi>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_SPECIALS += ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
_TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Deeper than the text model: layers are the text model's all the same.
_VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
_SIZE = {"height": 16, "width": 16}


def image(red: int, green: int = 40, blue: int = 40) -> Image.Image:
    """An image of 20 × 24 pixels, in one colour but for a corner."""
    made = Image.new("RGB", (20, 24), (red, green, blue))
    made.paste((blue, red, green), (0, 0, 9, 7))
    return made


def asked(picture: Any, text: str = "What is it?") -> list[dict[str, Any]]:
    """A chat of one question on an image."""
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def answered(picture: Any, answer: str, text: str = "What is it?") -> list[dict[str, Any]]:
    """The same, with its answer."""
    return [*asked(picture, text), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def _tokenizer(placeholder: str) -> Any:
    made = tiny.tokenizer(chat_template=_TEMPLATE.replace("IMAGE", placeholder))
    made.model_input_names = ["input_ids", "attention_mask"]
    made.add_special_tokens({"additional_special_tokens": [AddedToken(token, normalized=False) for token in _SPECIALS]})
    for name, token in {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}.items():
        if "vision" not in placeholder:
            setattr(made, name, token)
            setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def _of_images(name: str, **settings: Any) -> Any:
    """An image processor that needs no torchvision, which transformers 5 names otherwise."""
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return kind(**settings)


def _llava(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    processor = transformers.LlavaProcessor(
        _of_images("CLIPImageProcessor", size=_SIZE, crop_size=_SIZE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,  # CLIP's class token
    )
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **_VISION, "image_size": 16, "patch_size": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


class _Qwen2VLProcessor(transformers.Qwen2VLProcessor):  # type: ignore[misc]
    """One without a processor of videos, which needs torchvision."""

    tokenizer_class = "PreTrainedTokenizerFast"

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is not None:
            return super().check_argument_for_proper_class(argument_name, argument)
        return None


def _qwen2_vl(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    pixels = {"min_pixels": 16 * 16, "max_pixels": 32 * 32}
    images = _of_images("Qwen2VLImageProcessor", patch_size=4, merge_size=2, temporal_patch_size=2, **pixels)
    processor = _Qwen2VLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    vision = {"depth": 5, "embed_dim": 32, "num_heads": 4, "patch_size": 4, "hidden_size": tiny.HIDDEN, "mlp_ratio": 2}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 1, 1]}
    if tiny.ON_TRANSFORMERS_4:
        config = transformers.Qwen2VLConfig(vision_config=vision, rope_scaling=rope, **text, **ids)
    else:
        text = {**text, "rope_parameters": {**rope, "rope_theta": 1e4}}
        config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **ids)
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def _gemma3(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<boi>")
    processor = transformers.Gemma3Processor(
        _of_images("Gemma3ImageProcessor", size=_SIZE),
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=4,
    )
    config = transformers.Gemma3Config(
        text_config={**text, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
        vision_config={**_VISION, "image_size": 16, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<boi>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<eoi>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def _idefics3(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    size = {"longest_edge": 16}
    processor = transformers.Idefics3Processor(
        _of_images("Idefics3ImageProcessor", size=size, max_image_size=size, do_image_splitting=False),
        tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **text},
        # As deep as the text model.
        vision_config={**_VISION, "num_hidden_layers": tiny.LAYERS, "image_size": 16, "patch_size": 4},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


_FAMILIES = {"gemma3": _gemma3, "idefics3": _idefics3, "llava": _llava, "qwen2_vl": _qwen2_vl}
FAMILIES = [
    name for name in ("gemma3", "llava", "qwen2_vl") if name != "gemma3" or hasattr(transformers, "Gemma3Config")
]


def made(family: str, **text: Any) -> tuple[Any, Any]:
    """A model with weights large enough that tokens differ, and its processor; the text model's config may differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = _FAMILIES[family]({**_TEXT, **text})
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval(), processor


@cache
def shared(family: str) -> tuple[Any, Any]:
    """The same, made once for all tests, which must not change it."""
    return made(family)


def inputs_of(processor: Any, chat: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """What transformers itself makes of a chat with images, as its user would write it."""
    if not tiny.ON_TRANSFORMERS_4:
        options = {"add_generation_prompt": True, **options}
        found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **options)
        return dict(found)
    parts = [part for message in chat if not isinstance(message["content"], str) for part in message["content"]]
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    answer = chat[-1]["role"] == "assistant"
    text = processor.apply_chat_template(chat, add_generation_prompt=not answer)
    text = text.removesuffix("<|im_end|>\n") if answer else text
    return dict(processor(text=[text], images=pictures or None, return_tensors="pt"))
