"""Take prompts that are given as token ids: lists, tensors, and what a tokenizer returns."""

from collections.abc import Mapping
from operator import index as as_index
from typing import Any

from steering_vectors._arguments import is_whole_number

# What tokenizers return of a text. Other inputs, such as pixel_values, change what the model computes.
OF_TEXT = {
    *("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"),
    *("special_tokens_mask", "assistant_masks", "offset_mapping", "length"),
}


def given_token_ids(prompt: object) -> list[int] | None:
    """Return the ids of a prompt that is given as ids, exactly as they are, or None for any other prompt.

    Ids are a list, a tensor or an array ``(seq,)`` or ``(1, seq)``, or a mapping that holds them as ``input_ids``. What
    its ``attention_mask`` masks is padding, and left out.

    Raises ValueError for several rows, and for inputs of images or sound.
    """
    if not isinstance(prompt, Mapping):
        return _row(prompt)
    if "input_ids" not in prompt:
        return None
    others = sorted(set(prompt) - OF_TEXT)
    if others:
        raise ValueError(
            f"token ids with {', '.join(others)} beside them can't be read: give the chat itself, with its images, and "
            f"the model's processor as the tokenizer"
        )
    ids, mask = _row(prompt["input_ids"]), prompt.get("attention_mask")
    if ids is None or mask is None:
        return ids
    own = _row(mask)
    if own is None or len(own) != len(ids):
        raise ValueError("a prompt's attention_mask must have one number for each of its input_ids")
    return [token for token, seen in zip(ids, own, strict=True) if seen]


def _row(values: Any) -> list[int] | None:
    """Return the only row of whole numbers, or None if ``values`` holds something else."""
    values = values.tolist() if hasattr(values, "tolist") else values  # tensors and arrays
    if not isinstance(values, (list, tuple)):
        return None
    if all(map(is_whole_number, values)):
        return [as_index(value) for value in values]
    rows = [_row(value) for value in values]
    if any(row is None for row in rows):
        return None
    if len(rows) > 1:
        raise ValueError(f"a prompt must be one row of token ids, got {len(rows)}: give each as a prompt of its own")
    return rows[0]
