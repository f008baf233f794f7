"""Take pairs of prompts in the forms in which they come: tuples, lists, rows of tables."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steering_vectors.aggregators import Side

SIDES: tuple[Side, Side] = ("positive", "negative")


def check_samples(samples: object) -> None:
    """Raise TypeError for samples that can't be pairs: one text, a table, or all positives beside all negatives."""
    if hasattr(samples, "columns") and hasattr(samples, "to_dict"):
        raise TypeError('training_samples is a table: pass its rows, as in table.to_dict("records")')
    if isinstance(samples, (str, Mapping)) or not isinstance(samples, Iterable):
        raise TypeError(f"training_samples must be pairs (positive, negative), got {type(samples).__name__}")
    if not isinstance(samples, (list, tuple)) or len(samples) != 2 or not all(isinstance(s, list) for s in samples):
        return
    # A list of two lists of two texts is two pairs, as they come from JSON; a tuple of two lists isn't.
    if all(map(_are_texts, samples)) and (isinstance(samples, tuple) or any(len(side) != 2 for side in samples)):
        raise TypeError(
            "training_samples looks like a list of positive prompts and a list of negative ones: make pairs of them, "
            "as in list(zip(positives, negatives))"
        )


def sides_of(sample: Any, number: int) -> tuple[Any, Any]:
    """Return the positive and the negative prompt of a sample.

    A sample is a tuple, list or array of two, or a mapping with the keys ``positive`` and ``negative``. Raises
    TypeError for anything else, and for a chat beside a text.
    """
    given = sample
    if isinstance(sample, Mapping) and set(SIDES) <= sample.keys():
        sample = [sample[side] for side in SIDES]
    elif hasattr(sample, "tolist"):
        sample = sample.tolist()
    if not isinstance(sample, (tuple, list)) or len(sample) != 2 or any(map(_is_message, sample)):
        raise TypeError(
            f"sample {number} must be a pair (positive, negative) or a SteeringVectorTrainingSample, {_got(given)}"
        )
    missing = [
        side for side, prompt in zip(SIDES, sample, strict=True) if isinstance(prompt, float) and math.isnan(prompt)
    ]
    if missing:
        raise TypeError(f"sample {number}, {missing[0]} side: expected a prompt, got {sample!r}: leave empty rows out")
    if len({_is_chat(prompt) for prompt in sample if isinstance(prompt, str) or _is_chat(prompt)}) == 2:
        raise TypeError(
            f"sample {number} has a chat on one side and a text on the other, which differ in all their tokens: give "
            f"both as chats, or both as texts"
        )
    return sample[0], sample[1]


def _got(sample: object) -> str:
    if isinstance(sample, Mapping):
        return f"got a mapping with the keys {sorted(map(str, sample))}, expected the keys {' and '.join(SIDES)}"
    got = f"got {type(sample).__name__}"
    if not isinstance(sample, (tuple, list)):
        return got
    if any(map(_is_message, sample)):
        return f"{got} of length {len(sample)} that holds chat messages: put each chat in a list of its own"
    return f"{got} of length {len(sample)}"


def _are_texts(side: Sequence[object]) -> bool:
    return all(isinstance(prompt, str) for prompt in side)


def _is_message(prompt: object) -> bool:
    return isinstance(prompt, Mapping) and "role" in prompt


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(map(_is_message, prompt))
