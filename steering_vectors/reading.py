"""Read the activations of single prompts, for probes, and measure their norms and projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from math import floor
from typing import Any, cast

import torch
from torch import Tensor, nn

from steering_vectors._arguments import finite_number, with_hints
from steering_vectors._extraction import (
    WINDOW,
    Extractor,
    Prompt,
    PromptTokenizer,
    Reading,
    ReadPrompt,
    ReadTokenIndex,
    extractor_for,
    in_windows,
)
from steering_vectors._models import Anatomy, anatomy_of
from steering_vectors._precision import wide
from steering_vectors._progress import progress_bar
from steering_vectors._steering import as_multiplier, config_for, steering_of
from steering_vectors._tokens import TokenSelection
from steering_vectors._vectors import projections
from steering_vectors.layer_matching import LayerType, ModelLayerConfig
from steering_vectors.steering_vector import SteeringVector
from steering_vectors.token_selection import from_index

# The number of texts within which their order in the model's passes is free.
_WINDOW = 256


@with_hints(missing="the arguments begin with model, tokenizer, prompts", layer="the argument is layers=")
def read_activations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[Prompt | Sequence[int]],
    layers: int | Iterable[int] | None = None,
    *,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    read_token_index: ReadTokenIndex | Sequence[int] = -1,
    tokens: TokenSelection | None = None,
    pool: bool = True,
    batch_size: int = 1,
    show_progress: bool = False,
    move_to_cpu: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[int, Any]:
    """Return the activations of prompts by layer: rows ``(n, hidden)`` in float32 or wider.

    Row i is prompt i's. All rows of a prompt come from one pass. Guarantees and errors are those of
    :func:`train_steering_vector`.

    Args:
        model: The model to read, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        prompts: Texts, lists of chat messages, also with images, or token ids.
        layers: The layers to read, as numbers from 0, or negative ones from the end. None reads
            all.
        layer_type: The kind of activation that is read, as in :func:`train_steering_vector`.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.
        read_token_index: The token to read of each prompt, as in :func:`train_steering_vector`. A
            callable gets an empty text for token ids. For a list of k indices, the activations are
            ``(n, k, hidden)``.
        tokens: The tokens to read in place of a single one; the mean over them is read.
        pool: False to read each of the ``tokens`` instead of their mean. Each layer then has a list
            with a tensor ``(tokens, hidden)`` for each prompt; weights only select.
        batch_size: The size of a pass in pairs of prompts, as in :func:`train_steering_vector`.
        show_progress: True to show a progress bar.
        move_to_cpu: False to return the rows on the device where the layer runs instead of the CPU.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    >>> rows = read_activations(model, tokenizer, ["I love it", "I hate it", "Fine"], layers=[0, 1])
    >>> {layer: tuple(part.shape) for layer, part in rows.items()}
    {0: (3, 32), 1: (3, 32)}
    >>> rows = read_activations(model, tokenizer, ["Fine"], layers=1, read_token_index=[-1, -2])
    >>> rows[1].shape
    torch.Size([1, 2, 32])
    """
    tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
    anatomy = anatomy_of(model)
    extract = extractor_for(anatomy, layers, layer_type, layer_config, batch_size)
    _check_prompts(prompts)
    reads = _reads(tokenize, anatomy, read_token_index, tokens, pool)
    device = "cpu" if move_to_cpu else None
    with torch.inference_mode(False):  # inference tensors could not be used in training later
        found = _rows_of_prompts(extract, prompts, reads, device, show_progress=show_progress)
        if not pool:
            return found
        join = torch.stack if _are_several(read_token_index) else torch.cat
        return {layer: join(parts) for layer, parts in found.items()}


def _rows_of_prompts(
    extract: Extractor,
    prompts: Iterable[Any],
    reads: Callable[[Any, str], list[ReadPrompt]],
    device: str | None,
    *,
    show_progress: bool,
) -> dict[int, list[Tensor]]:
    """Return a tensor ``(rows, hidden)`` for each prompt, by layer. Raises ValueError if there are no prompts."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in extract.layers}
    of_all = (reads(prompt, f"prompt {number}") for number, prompt in enumerate(prompts))
    total = len(prompts) if isinstance(prompts, Sequence) else None
    with progress_bar(total=total, desc="Reading activations", unit="prompt", disable=not show_progress) as bar:
        for window in in_windows(of_all, 2 * WINDOW):
            rows: dict[int, dict[int, Tensor]] = {layer: {} for layer in extract.layers}
            for part in extract([read for of_prompt in window for read in of_prompt if read]):
                own = wide(part.rows.to(device or part.rows.device))
                rows[part.layer].update(zip(part.prompts, own, strict=True))
            for layer, by_number in rows.items():
                in_order = torch.stack([by_number[number] for number in range(len(by_number))])
                found[layer].extend(torch.split(in_order, list(map(len, window))))
            bar.update(len(window))
    if not any(found.values()):
        raise ValueError("prompts is empty: give at least one")
    return found


def _reads(
    tokenize: PromptTokenizer,
    anatomy: Anatomy,
    read_token_index: ReadTokenIndex | Sequence[int],
    tokens: TokenSelection | None,
    pool: bool,
) -> Callable[[Any, str], list[ReadPrompt]]:
    """Return a function of a prompt and its name, whose result has an entry for each row to read of the prompt."""
    if not pool and tokens is None:
        raise ValueError("pool=False reads each of several tokens: select them with tokens=")
    if not _are_several(read_token_index):
        reading = Reading(tokenize, cast(ReadTokenIndex, read_token_index), tokens, anatomy=anatomy)

        def read(prompt: Any, name: str) -> list[ReadPrompt]:
            one = reading(prompt, name=name)
            return [one] if pool else [one.at(place) for place in one.positions]

        return read
    indices = list(cast(Sequence[int], read_token_index))
    if not indices:
        raise ValueError("read_token_index is empty: give at least one index")
    if tokens is not None:
        raise ValueError("read_token_index and tokens were given: choose one of them")
    reading = Reading(tokenize, -1, None, anatomy=anatomy)
    return lambda prompt, name: reading.several(prompt, indices, name=name)


def _are_several(read_token_index: object) -> bool:
    return isinstance(read_token_index, Sequence) and not isinstance(read_token_index, str)


@with_hints(missing="the arguments begin with model, tokenizer, texts", layer="the argument is layers=")
def residual_norms(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Prompt],
    *,
    layer_config: ModelLayerConfig | None = None,
    batch_size: int = 1,
    show_progress: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[int, float]:
    """Return the median Euclidean norm of the activations of each decoder block, by layer.

    The median is over all tokens of the texts except the first of each. Its norm is often a hundred
    times that of the others (massive activations, arXiv 2402.17762).

    Scale a unit vector by these norms: ``vector.normalized().scaled(residual_norms(…))``. Its
    multiplier is then a fraction of the activations' size, comparable across models.

    Args:
        model: The model to measure, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        texts: Texts or chats, which should resemble what the model is to write.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.
        batch_size: The size of a pass in pairs of texts, as in :func:`train_steering_vector`.
        show_progress: True to show a progress bar.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Raises:
        TypeError: As in :func:`train_steering_vector`.
        ValueError: As there, and if no text has more than one token.

    >>> sorted(residual_norms(model, tokenizer, ["I love it", "It rains"]))
    [0, 1]
    """
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a list or another iterable of texts or chats, got {type(texts).__name__}")
    anatomy = anatomy_of(model)
    extract = extractor_for(anatomy, None, "decoder_block", layer_config, batch_size)
    tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
    reading = Reading(tokenize, -1, None, anatomy=anatomy)
    numbers = count()
    read = (reading(text, name=f"text {next(numbers)}") for text in texts)
    without_first = (replace(text, positions=range(1, len(text.input_ids))) for text in read)
    with progress_bar(desc="Measuring activations", unit="text", disable=not show_progress) as bar:
        norms = _by_token(extract, without_first, lambda _, rows: wide(rows).norm(dim=-1), bar)
        if not norms:
            alone = "all texts have only one token, which is left out: give longer ones"
            raise ValueError(alone if next(numbers) else "texts is empty: give at least one")
    return {layer: _quantile(values.sort().values, 0.5) for layer, values in norms.items()}


@with_hints(missing="the arguments begin with model, tokenizer, prompts, vector, quantiles")
def projection_quantiles(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[Prompt | Sequence[int]],
    vector: SteeringVector,
    quantiles: Sequence[float],
    *,
    layer_config: ModelLayerConfig | None = None,
    tokens: TokenSelection | None = None,
    batch_size: int = 1,
    show_progress: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[int, float]]:
    """Return quantiles of the projections ``h·u`` of prompts' tokens, for each layer of ``vector``.

    ``u`` is the direction at norm 1, and each selected token of each prompt counts once. The
    quantile ``q`` of ``n`` projections in ascending order stands at place ``q * (n - 1)``, counted
    from 0; between two places it is interpolated linearly, as by ``numpy.quantile``.

    They are the bounds for :func:`~steering_vectors.clamp_operator`, which caps activations at what
    is usual for the prompts (arXiv 2601.10387).

    Projections are in float32 or wider. One number for each token and layer is kept, and no
    activation. Guarantees and errors are those of :func:`train_steering_vector`.

    Args:
        model: The model to read, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        prompts: Texts, lists of chat messages, or token ids.
        vector: The directions. Their lengths don't matter.
        quantiles: The quantiles, from 0 to 1, such as ``[0.25]``.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.
        tokens: The tokens to project, as in :meth:`SteeringVector.apply`; by default all.
        batch_size: The size of a pass in pairs of prompts, as in :func:`train_steering_vector`.
        show_progress: True to show a progress bar.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Returns:
        A mapping from layer numbers to projections, for each quantile.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: As in :func:`train_steering_vector`, if a quantile isn't between 0 and 1, if a
            direction is all zeros, or if ``tokens`` weights tokens differently.

    >>> texts = ["I love it", "It rains"]
    >>> [low] = projection_quantiles(model, tokenizer, texts, vector, [0.25])
    >>> with vector.apply(model, operator=clamp_operator(min=low)):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    """
    shares = _checked_quantiles(quantiles)
    _check_prompts(prompts)
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"vector must be a SteeringVector, got {type(vector).__name__}")
    anatomy = anatomy_of(model)
    directions = steering_of(vector, model, layer_config, None, as_multiplier(1), None, False).directions
    assert directions is not None
    projections(directions, directions)  # raises for a direction of zeros
    config = config_for(anatomy, vector, layer_config)
    extract = extractor_for(anatomy, list(directions), vector.layer_type, config, batch_size)
    tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
    reading = Reading(tokenize, -1, from_index(0) if tokens is None else tokens, anatomy=anatomy)
    named = ((prompt, f"prompt {number}") for number, prompt in enumerate(prompts))
    read = (_evenly_read(reading(prompt, name=name), name) for prompt, name in named)

    def project(layer: int, rows: Tensor) -> Tensor:
        projected: Tensor = projections(directions, {layer: rows})[layer].detach()
        return projected

    with progress_bar(desc="Projecting activations", unit="prompt", disable=not show_progress) as bar:
        found = _by_token(extract, read, project, bar)
    if not found:
        raise ValueError("prompts is empty: give at least one")
    ordered = {layer: values.sort().values for layer, values in sorted(found.items())}
    return [{layer: _quantile(values, share) for layer, values in ordered.items()} for share in shares]


def _check_prompts(prompts: object) -> None:
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        one = f": put it in a list, [{prompts!r}]" if isinstance(prompts, str) else ""
        raise TypeError(f"prompts must be texts, chats or lists of token ids, got {type(prompts).__name__}{one}")


def _checked_quantiles(quantiles: object) -> list[float]:
    if not isinstance(quantiles, Iterable) or isinstance(quantiles, (str, bytes, Mapping)):
        raise TypeError(f"quantiles must be a list of numbers from 0 to 1, such as [0.25], got {quantiles!r}")
    numbers = [finite_number(number, "a quantile") for number in quantiles]
    if not numbers:
        raise ValueError("quantiles is empty: give at least one, such as [0.25]")
    outside = [number for number in numbers if not 0 <= number <= 1]
    if outside:
        percent = f": for {outside[0]:g} % write {outside[0] / 100:g}" if 1 < outside[0] <= 100 else ""
        raise ValueError(f"quantiles must be from 0 to 1, got {outside[0]:g}{percent}")
    return numbers


def _evenly_read(prompt: ReadPrompt, name: str) -> ReadPrompt:
    """Return the prompt. Raises ValueError if its tokens have different weights."""
    weights = prompt.weights or [1.0]
    if max(weights) - min(weights) > 1e-6 * max(weights):
        raise ValueError(f"{name}: tokens weights the tokens differently, but each counts once: select them by a mask")
    return prompt


def _by_token(
    extract: Extractor, prompts: Iterator[ReadPrompt], measure: Callable[[int, Tensor], Tensor], bar: Any
) -> dict[int, Tensor]:
    """Return a number for each of the tokens to read of each prompt, by layer, in no promised order.

    ``measure`` gets a layer's number and rows ``(n, hidden)``. Layers are left out if there are no tokens.
    """
    found: dict[int, list[Tensor]] = {}
    for window in in_windows(([prompt] for prompt in prompts), _WINDOW):
        for part in extract([prompt.at(n) for one in window for prompt in one if prompt for n in prompt.positions]):
            found.setdefault(part.layer, []).append(measure(part.layer, part.rows).cpu())
        bar.update(len(window))
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _quantile(ordered: Tensor, share: float) -> float:
    """Return a quantile of ascending values, interpolated linearly."""
    place = share * (len(ordered) - 1)
    below = floor(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (place - below) * (high - low)
