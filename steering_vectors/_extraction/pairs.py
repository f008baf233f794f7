"""Walk over pairs of prompts, window by window, and yield their rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from typing import Any

from tqdm.auto import tqdm

from steering_vectors._extraction.extractor import Extractor, LayerRows
from steering_vectors._extraction.read_model import ReadPrompt
from steering_vectors._extraction.reading import WINDOW
from steering_vectors._extraction.samples import SIDES, check_samples
from steering_vectors._processes import Processes
from steering_vectors._vectors import TrainingRecord
from steering_vectors.aggregators import Side


def rows_of_pairs(
    extract: Extractor,
    prompts_of: Callable[[int, Any], Sequence[ReadPrompt]],
    training_samples: Iterable[Any],
    description: str | None,
    processes: Processes = Processes(),
    record: TrainingRecord | None = None,
) -> Iterator[LayerRows]:
    """Yield the rows of this process's share of the samples, in the order in which the model runs.

    ``prompts_of`` returns the positive and the negative prompt of a sample, whose number it gets too. Prompt 2n is the
    positive side of sample n, and prompt 2n + 1 its negative side. The ``record`` gets the samples of all processes. A
    ``description`` turns the progress bar on.
    """
    check_samples(training_samples)
    total = len(training_samples) if isinstance(training_samples, Sequence) else None
    samples = enumerate(training_samples)
    first = 0
    with tqdm(total=total, desc=description, unit="pair", disable=description is None or processes.rank > 0) as bar:
        while window := list(islice(samples, WINDOW)):
            prompts = [prompt for number, sample in window for prompt in prompts_of(number, sample)]
            processes.check_alike(f"the samples from {first} on", _digest(prompts) if processes.count > 1 else "")
            if record is not None:
                for prompt in prompts:
                    record.add(prompt.input_ids, prompt.positions)
            share = processes.share(len(window))
            done = 0
            for part in extract(prompts[2 * share.start : 2 * share.stop]):
                start = 2 * (first + share.start)
                yield replace(part, prompts=[start + prompt for prompt in part.prompts])
                if part.layer == extract.layers[-1]:
                    bar.update((done + len(part.prompts)) // 2 - done // 2)
                    done += len(part.prompts)
            bar.update(len(window) - len(share))  # the other processes' pairs
            first += len(window)
    if first == 0:
        raise ValueError("training_samples is empty: give at least one pair (positive, negative)")


def by_side(part: LayerRows) -> Iterator[tuple[Side, list[int], list[int]]]:
    """Yield each side that has rows, with the rows' indices and their samples' numbers."""
    for n, side in enumerate(SIDES):
        indices = [row for row, prompt in enumerate(part.prompts) if prompt % 2 == n]
        if indices:
            yield side, indices, [part.prompts[row] // 2 for row in indices]


def _digest(prompts: Sequence[ReadPrompt]) -> str:
    """Return a hash of the prompts and of what is read of them, equal in processes that were given the same."""
    text = repr([(prompt.input_ids, list(prompt.positions), prompt.weights) for prompt in prompts])
    return sha256(text.encode()).hexdigest()
