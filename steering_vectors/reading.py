"""Read the activations of single prompts, for probes, and measure their norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steering_vectors._arguments import with_hints
from steering_vectors._extraction import (
    WINDOW,
    Prompt,
    PromptTokenizer,
    Reading,
    ReadPrompt,
    ReadTokenIndex,
    extractor_for,
)
from steering_vectors._models import anatomy_of
from steering_vectors._precision import wide
from steering_vectors._steering import TokenSelection
from steering_vectors.layer_matching import LayerType, ModelLayerConfig

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
    read_token_index: ReadTokenIndex = -1,
    tokens: TokenSelection | None = None,
    batch_size: int = 1,
    show_progress: bool = False,
    move_to_cpu: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[int, Tensor]:
    """Return the activations of prompts by layer: rows ``(n, hidden)`` in float32 or wider.

    Row i is prompt i's. Guarantees and errors are those of :func:`train_steering_vector`.

    Args:
        model: The model to read, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        prompts: Texts, lists of chat messages, or token ids.
        layers: The layers to read, as numbers from 0, or negative ones from the end. None reads
            all.
        layer_type: The kind of module that is read at each layer.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.
        read_token_index: The token to read of each prompt, as in :func:`train_steering_vector`. A
            callable gets an empty text for token ids.
        tokens: The tokens to read in place of a single one; the mean over them is read.
        batch_size: The size of a pass in pairs of prompts, as in :func:`train_steering_vector`.
        show_progress: True to show a progress bar.
        move_to_cpu: False to return the rows on the device where the layer runs instead of the CPU.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    >>> rows = read_activations(model, tokenizer, ["I love it", "I hate it", "Fine"], layers=[0, 1])
    >>> {layer: tuple(part.shape) for layer, part in rows.items()}
    {0: (3, 32), 1: (3, 32)}
    """
    tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
    anatomy = anatomy_of(model)
    extract = extractor_for(anatomy, layers, layer_type, layer_config, batch_size)
    reading = Reading(tokenize, read_token_index, tokens, anatomy=anatomy)
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        one = f": put it in a list, [{prompts!r}]" if isinstance(prompts, str) else ""
        raise TypeError(f"prompts must be texts, chats or lists of token ids, got {type(prompts).__name__}{one}")
    rows: dict[int, dict[int, Tensor]] = {layer: {} for layer in extract.layers}
    numbered = enumerate(prompts)
    first = 0
    total = len(prompts) if isinstance(prompts, Sequence) else None
    with (
        torch.inference_mode(False),  # inference tensors could not be used in training later
        tqdm(total=total, desc="Reading activations", unit="prompt", disable=not show_progress) as bar,
    ):
        while window := list(islice(numbered, 2 * WINDOW)):
            for part in extract([reading(prompt, name=f"prompt {number}") for number, prompt in window]):
                own = wide(part.rows.to("cpu" if move_to_cpu else part.rows.device))
                rows[part.layer].update((first + n, row) for n, row in zip(part.prompts, own, strict=True))
                bar.update(len(part.prompts) if part.layer == extract.layers[-1] else 0)
            first += len(window)
        if first == 0:
            raise ValueError("prompts is empty: give at least one")
        return {layer: torch.stack([by_prompt[n] for n in range(first)]) for layer, by_prompt in rows.items()}


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
