"""Take samples in the forms in which they come: pairs as tuples, lists or rows of tables, and sets by side."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from steering_vectors._arguments import is_whole_number
from steering_vectors.aggregators import Side

SIDES: tuple[Side, Side] = ("positive", "negative")
# In the place of a prompt of the smaller set, once all of them were taken.
MISSING = object()


def are_pairs(samples: object) -> bool:
    """Return True for samples that are pairs, and False for two sets.

    Raises TypeError for samples that are neither, such as one text, a table, or one pair.
    """
    if _is_table(samples):
        raise TypeError('training_samples is a table: pass its rows, as in table.to_dict("records")')
    if isinstance(samples, Mapping):
        _check_sets(samples)
        return False
    if isinstance(samples, str) or not isinstance(samples, Iterable):
        raise TypeError(f"training_samples must be pairs (positive, negative), got {type(samples).__name__}")
    if isinstance(samples, (list, tuple)) and samples:
        _check_list(samples)
    return True


def _check_list(samples: Sequence[Any]) -> None:
    """Raise TypeError for what isn't a list of pairs: one pair, texts alone, all of one side and all of the other."""
    if (isinstance(samples, tuple) and _are_texts(samples)) or (len(samples) == 2 and all(map(_is_chat, samples))):
        raise TypeError("training_samples is a single pair: put it in a list, [(positive, negative)]")
    if _are_texts(samples):
        raise TypeError(
            "training_samples is a list of texts: expected pairs, as list(zip(positives, negatives)) makes them"
        )
    if len(samples) != 2 or not all(isinstance(side, list) for side in samples):
        return
    # A list of two lists of two texts is two pairs, as they come from JSON; a tuple of two lists isn't.
    are_sides = isinstance(samples, tuple) or any(len(side) != 2 for side in samples)
    if are_sides and (all(map(_are_texts, samples)) or all(map(_are_chats, samples))):
        raise TypeError(
            "training_samples looks like a list of positive prompts and a list of negative ones: make pairs of them, "
            'as in list(zip(positives, negatives)), or two sets, as in {"positive": positives, "negative": negatives}'
        )


def side_by_side(positive: Iterable[Any], negative: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Return the first prompt of both sets, then the second ones, and so on; MISSING after the smaller one's last."""
    return zip_longest(positive, negative, fillvalue=MISSING)


def check_sides(sides: Sequence[object], name: str) -> None:
    """Raise TypeError for a chat beside a text; ``name`` is what the error calls them."""
    if len({_is_chat(prompt) for prompt in sides if isinstance(prompt, str) or _is_chat(prompt)}) == 2:
        raise TypeError(
            f"{name} has a chat on one side and a text on the other, which differ in all their tokens: give both as "
            f"chats, or both as texts"
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
    check_sides(sample, f"sample {number}")
    if number == 0 and tuple(sample) == SIDES:
        raise TypeError("sample 0 is the header of a table: read it with csv.DictReader, or leave the first row out")
    return sample[0], sample[1]


def _check_sets(samples: Mapping[Any, Any]) -> None:
    """Raise TypeError unless the mapping has two sides, and each of them several prompts."""
    if set(samples) != set(SIDES):
        keys = sorted(map(str, samples))
        raise TypeError(f"training_samples is a mapping with the keys {keys}, expected the keys {' and '.join(SIDES)}")
    single = [side for side in SIDES if _is_one_prompt(samples[side])]
    if len(single) == 2:
        raise TypeError("training_samples is a single pair: put it in a list, [{…}]; sets have a list on each side")
    for side in SIDES:
        prompts = samples[side]
        if side in single:
            raise TypeError(f"the {side} side of training_samples is a single prompt: put it in a list, […]")
        if _is_table(prompts):
            raise TypeError(f"the {side} side of training_samples is a table: pass the column that has the prompts")
        if not isinstance(prompts, Iterable):
            raise TypeError(f"the {side} side of training_samples must be prompts, got {type(prompts).__name__}")


def _is_one_prompt(prompts: Any) -> bool:
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # tensors and arrays
    if isinstance(prompts, (list, tuple)) and prompts:
        return _is_chat(prompts) or all(map(is_whole_number, prompts))
    return isinstance(prompts, (str, Mapping))


def _is_table(samples: object) -> bool:
    return hasattr(samples, "columns") and hasattr(samples, "to_dict")


def _got(sample: object) -> str:
    if isinstance(sample, Mapping):
        keys = sorted(map(str, sample))
        found = f"got a mapping with the keys {keys}, expected the keys {' and '.join(SIDES)}"
        if any(key.startswith("\ufeff") for key in keys):
            return f'{found}: the file begins with a byte order mark, so open it with encoding="utf-8-sig"'
        if {"chosen", "rejected"} <= set(keys):
            return f'{found}: write [(row["chosen"], row["rejected"]) for row in rows]'
        return found
    got = f"got {type(sample).__name__}"
    if not isinstance(sample, (tuple, list)):
        return got
    if any(map(_is_message, sample)):
        return f"{got} of length {len(sample)} that holds chat messages: put each chat in a list of its own"
    return f"{got} of length {len(sample)}"


def _are_texts(side: Sequence[object]) -> bool:
    return all(isinstance(prompt, str) for prompt in side)


def _are_chats(side: Sequence[object]) -> bool:
    return bool(side) and all(map(_is_chat, side))


def _is_message(prompt: object) -> bool:
    return isinstance(prompt, Mapping) and "role" in prompt


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(map(_is_message, prompt))
