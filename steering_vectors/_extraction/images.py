"""Take chats with images through the model's processor, and find the tokens of the text in the result."""

import inspect
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from steering_vectors._extraction.packs import shared_prefix

# Where a part of a message may have its image, as transformers' processors look for it.
SOURCES = ("image", "url", "path", "base64")


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if some message's content has an image."""
    return bool(_image_parts(messages))


def check_takes_images(processor: Any, tokenizer: Any) -> None:
    """Raise ValueError for a processor that takes no images, and for a tokenizer in its place."""
    if getattr(processor, "image_processor", None) is not None:
        return
    kind = "a tokenizer" if processor is tokenizer else f"{type(processor).__name__}, a processor,"
    raise ValueError(
        f"the chat has an image, but {kind} takes none: pass the model's own processor as the tokenizer, as "
        f"AutoProcessor.from_pretrained(…) returns it"
    )


def inputs_with_images(
    processor: Any, messages: Sequence[Mapping[str, Any]], text: str, *, bos: str | None
) -> dict[str, Any]:
    """Return the model's inputs for a rendered chat with images, as the processor's ``apply_chat_template`` does.

    ``text`` is the chat as rendered. Special tokens are added unless it begins with ``bos``. Raises ValueError if the
    processor fails.
    """
    try:
        if "return_dict" in inspect.signature(processor.apply_chat_template).parameters:
            found = processor.apply_chat_template(
                list(messages),
                chat_template="{{ rendered_text }}",
                rendered_text=text,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:  # those of earlier versions render alone
            specials = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
            found = processor(text=[text], images=_loaded(messages), return_tensors="pt", **specials)
    except Exception as error:  # images may be missing, of a wrong kind, or more than the template writes
        kind = type(processor).__name__
        raise ValueError(f"{kind} failed on the chat's images: {type(error).__name__}: {error}") from error
    return dict(found)


def place_among_images(index: int, written: Sequence[int], expanded: Sequence[int]) -> int:
    """Return the place in ``expanded``, where images have taken their tokens, of a token of the ``written`` text.

    Raises ValueError for a token of an image, or between two.
    """
    index = index % len(written) if index < 0 else index
    after = shared_prefix(written[::-1], expanded[::-1])
    if index >= len(written) - after:
        return index + len(expanded) - len(written)
    if index < shared_prefix(written, expanded):
        return index
    raise ValueError(
        f"token {index} of tokenizer(text) is an image's or stands between images, so its place among the prompt's "
        f"tokens isn't known: choose one before the first image or after the last, or give its place in the prompt"
    )


def digest_of(inputs: Mapping[str, Any] | None) -> str:
    """Return a hash of a prompt's inputs, images included; empty for a prompt without any."""
    if inputs is None:
        return ""
    found = sha256()
    for name in sorted(inputs):
        for tensor in _tensors(inputs[name]):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def size_of(inputs: Mapping[str, Any] | None) -> int:
    """Return the number of bytes that a prompt's inputs take."""
    return sum(
        tensor.numel() * tensor.element_size() for value in (inputs or {}).values() for tensor in _tensors(value)
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _image_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, (list, tuple)) for part in content)
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") == "image"]


def _loaded(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    from transformers.image_utils import load_image

    sources = [next(part[name] for name in SOURCES if part.get(name) is not None) for part in _image_parts(messages)]
    return [load_image(source) if isinstance(source, str) else source for source in sources]
