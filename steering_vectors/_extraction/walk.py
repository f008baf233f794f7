"""Walk over samples, window by window, and yield their prompts' rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import count
from typing import Any

from steering_vectors._extraction.extractor import Extractor, LayerRows
from steering_vectors._extraction.images import digest_of, size_of
from steering_vectors._extraction.read_model import ReadPrompt
from steering_vectors._extraction.reading import WINDOW
from steering_vectors._extraction.samples import SIDES, are_pairs, side_by_side
from steering_vectors._processes import Processes
from steering_vectors._progress import progress_bar
from steering_vectors._vectors import TrainingRecord
from steering_vectors.aggregators import Side

# The most that the images of a window may take, but for the last one's.
_MOST_BYTES = 2**28


def rows_of_samples(
    extract: Extractor,
    prompts_of: Callable[[int, Any], Sequence[ReadPrompt | None]],
    training_samples: Any,
    description: str | None,
    processes: Processes = Processes(),
    record: TrainingRecord | None = None,
) -> Iterator[LayerRows]:
    """Yield the rows of this process's share of the samples, in the order in which the model runs.

    Sample n is a pair, or prompt n of each of two sets. ``prompts_of`` gets its number too and returns its positive and
    its negative prompt, or None where a set has no more. Prompt 2n is the positive side of sample n, and prompt 2n + 1
    its negative side. Processes share pairs, or the single prompts of sets. The ``record`` gets the samples of all
    processes. A ``description`` turns the progress bar on.
    """
    paired = are_pairs(training_samples)
    parts = [training_samples] if paired else [training_samples[side] for side in SIDES]
    size, unit = (2, "pair") if paired else (1, "prompt")  # a unit is not split between processes
    samples = training_samples if paired else side_by_side(*parts)
    first, off = 0, description is None or processes.rank > 0
    with progress_bar(total=_total(parts), desc=description, unit=unit, disable=off) as bar:
        for window in in_windows(map(prompts_of, count(), samples), WINDOW):
            numbered = [
                (2 * number + n, prompt)
                for number, prompts in enumerate(window, start=first)
                for n, prompt in enumerate(prompts)
                if prompt is not None
            ]
            if first == 0:
                _check_both_sides([number for number, _ in numbered])
            processes.check_alike(f"the {unit}s from {first} on", _digest(numbered) if processes.count > 1 else "")
            if record is not None:
                for number, prompt in numbered:
                    record.add(SIDES[number % 2], prompt.input_ids, prompt.positions, digest_of(prompt.inputs))
            share = processes.share(len(numbered) // size)
            own = numbered[size * share.start : size * share.stop]
            done = 0
            for part in extract([prompt for _, prompt in own]):
                yield replace(part, prompts=[own[n][0] for n in part.prompts])
                if part.layer == extract.layers[-1]:
                    bar.update((done + len(part.prompts)) // size - done // size)
                    done += len(part.prompts)
            bar.update(len(numbered) // size - len(share))  # what the other processes run
            first += len(window)
    if first == 0:
        least = "one pair (positive, negative)" if paired else "one positive and one negative prompt"
        raise ValueError(f"training_samples is empty: give at least {least}")


def in_windows(
    samples: Iterable[Sequence[ReadPrompt | None]], most: int
) -> Iterator[list[Sequence[ReadPrompt | None]]]:
    """Yield the samples' prompts in windows of at most ``most`` samples, and of few where images fill the memory."""
    window: list[Sequence[ReadPrompt | None]] = []
    held = 0
    for prompts in samples:
        window.append(prompts)
        inputs = {id(prompt.inputs): prompt.inputs for prompt in prompts if prompt is not None}
        held += sum(map(size_of, inputs.values()))
        if len(window) == most or held >= _MOST_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


def by_side(part: LayerRows) -> Iterator[tuple[Side, list[int], list[int]]]:
    """Yield each side that has rows, with the rows' indices and their samples' numbers."""
    for n, side in enumerate(SIDES):
        indices = [row for row, prompt in enumerate(part.prompts) if prompt % 2 == n]
        if indices:
            yield side, indices, [part.prompts[row] // 2 for row in indices]


def _total(parts: Sequence[Iterable[Any]]) -> int | None:
    """Return the number of all things in the parts, if it is known before they are taken."""
    sized = [part for part in parts if isinstance(part, Sequence)]
    return sum(map(len, sized)) if len(sized) == len(parts) else None


def _check_both_sides(numbers: Sequence[int]) -> None:
    """Raise ValueError if the first prompts are all on one side."""
    empty = [side for n, side in enumerate(SIDES) if all(number % 2 != n for number in numbers)]
    if empty:
        raise ValueError(f"the {empty[0]} side of training_samples is empty: give at least one prompt")


def _digest(numbered: Sequence[tuple[int, ReadPrompt]]) -> str:
    """Return a hash of the prompts and of what is read of them, equal in processes that were given the same."""
    prompts = ((n, prompt.input_ids, list(prompt.positions), prompt.weights, prompt.inputs) for n, prompt in numbered)
    text = repr([(*prompt, digest_of(inputs)) for *prompt, inputs in prompts])
    return sha256(text.encode()).hexdigest()
