"""Read the activations of single prompts, for probes, and measure their norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steering_vectors._arguments import with_hints
from steering_vectors._extraction import (
    WINDOW,
    Extractor,
    Prompt,
    PromptTokenizer,
    Reading,
    ReadPrompt,
    ReadTokenIndex,
    extractor_for,
)
from steering_vectors._models import Anatomy, anatomy_of
from steering_vectors._precision import wide
from steering_vectors._steering import TokenSelection
from steering_vectors.layer_matching import LayerType, ModelLayerConfig

# The number of texts within which their order in the model's passes is free.
_WINDOW = 256


@overload
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
    pool: Literal[True] = True,
    batch_size: int = 1,
    show_progress: bool = False,
    move_to_cpu: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[int, Tensor]: ...
@overload
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
    pool: Literal[False],
    batch_size: int = 1,
    show_progress: bool = False,
    move_to_cpu: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[int, list[Tensor]]: ...
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
) -> dict[int, Tensor] | dict[int, list[Tensor]]:
    """Return the activations of prompts by layer: rows ``(n, hidden)`` in float32 or wider.

    Row i is prompt i's. All rows of a prompt come from one pass. Guarantees and errors are those of
    :func:`train_steering_vector`.

    Args:
        model: The model to read, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        prompts: Texts, lists of chat messages, or token ids.
        layers: The layers to read, as numbers from 0, or negative ones from the end. None reads
            all.
        layer_type: The kind of module that is read at each layer.
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
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        one = f": put it in a list, [{prompts!r}]" if isinstance(prompts, str) else ""
        raise TypeError(f"prompts must be texts, chats or lists of token ids, got {type(prompts).__name__}{one}")
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
    numbered = enumerate(prompts)
    total = len(prompts) if isinstance(prompts, Sequence) else None
    with tqdm(total=total, desc="Reading activations", unit="prompt", disable=not show_progress) as bar:
        while window := list(islice(numbered, 2 * WINDOW)):
            of_prompts = [reads(prompt, f"prompt {number}") for number, prompt in window]
            rows: dict[int, dict[int, Tensor]] = {layer: {} for layer in extract.layers}
            for part in extract([read for of_prompt in of_prompts for read in of_prompt]):
                own = wide(part.rows.to(device or part.rows.device))
                rows[part.layer].update(zip(part.prompts, own, strict=True))
            for layer, by_number in rows.items():
                in_order = torch.stack([by_number[number] for number in range(len(by_number))])
                found[layer].extend(torch.split(in_order, list(map(len, of_prompts))))
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
            return [one] if pool else [ReadPrompt(one.input_ids, [place]) for place in one.positions]

        return read
    indices = list(cast(Sequence[int], read_token_index))
    if not indices:
        raise ValueError("read_token_index is empty: give at least one index")
    if tokens is not None:
        raise ValueError("read_token_index and tokens were given: choose one of them")
    reading = Reading(tokenize, -1, None, anatomy=anatomy)
    return lambda prompt, name: [reading(prompt, index, name=name) for index in indices]


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
    read = (reading(text, name=f"text {number}") for number, text in enumerate(texts))
    norms: dict[int, list[Tensor]] = {layer: [] for layer in extract.layers}
    count = 0
    with tqdm(desc="Measuring activations", unit="text", disable=not show_progress) as bar:
        while window := list(islice(read, _WINDOW)):
            for part in extract(list(_single_tokens(window))):
                norms[part.layer].append(wide(part.rows).norm(dim=-1).cpu())
            bar.update(len(window))
            count += len(window)
    if not norms[extract.layers[0]]:
        alone = "all texts have only one token, which is left out: give longer ones"
        raise ValueError(alone if count else "texts is empty: give at least one")
    return {layer: _median(torch.cat(parts)) for layer, parts in norms.items()}


def _single_tokens(texts: Iterable[ReadPrompt]) -> Iterator[ReadPrompt]:
    """Yield a prompt for each token but the first of each text, so that each has a row."""
    return (ReadPrompt(text.input_ids, [n]) for text in texts for n in range(1, len(text.input_ids)))


def _median(values: Tensor) -> float:
    ordered = values.sort().values
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)
