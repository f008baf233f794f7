"""How large a model's activations are, layer by layer: the unit in which a steering's strength carries over."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steering_vectors._extraction import ReadPrompt
from steering_vectors._prompts import Prompt, PromptTokenizer
from steering_vectors._reading import Reading, extractor_for, vocabulary_of
from steering_vectors.layer_matching import ModelLayerConfig
from steering_vectors.token_selection import from_index

# How many texts are run in the order that suits the model at a time.
_WINDOW = 256


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
    """The median Euclidean norm of the activations of each decoder block, by layer.

    It is taken over all tokens of the ``texts`` but the first of each, whose norm is often a hundred times the
    others' (massive activations, arXiv 2402.17762). The texts should be like those that the model is to write, and may
    be chats; all arguments are as in :func:`train_steering_vector`.

    A vector times these norms has a multiplier that means a share of the stream, and so means the same in another
    model: ``vector.normalized().scaled(residual_norms(…))``.

    Raises as :func:`train_steering_vector`, and ValueError for a text of a single token.

    >>> sorted(residual_norms(model, tokenizer, ["I love it", "It rains"]))
    [0, 1]
    """
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be several texts or chats, got {type(texts).__name__}")
    extract = extractor_for(model, None, "decoder_block", layer_config, batch_size)
    tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
    reading = Reading(tokenize, -1, from_index(1), vocabulary=vocabulary_of(model))
    read = (reading(text, name=f"text {number}") for number, text in enumerate(texts))
    norms: dict[int, list[Tensor]] = {layer: [] for layer in extract.layers}
    with tqdm(desc="Measuring activations", unit="text", disable=not show_progress) as bar:
        while window := list(islice(read, _WINDOW)):
            for part in extract(list(_single_tokens(window))):
                wide = part.rows.to(torch.promote_types(part.rows.dtype, torch.float32))
                norms[part.layer].append(wide.norm(dim=-1).cpu())
            bar.update(len(window))
    if not norms[extract.layers[0]]:
        raise ValueError("texts is empty: give at least one")
    return {layer: _median(torch.cat(parts)) for layer, parts in norms.items()}


def _single_tokens(texts: Iterable[ReadPrompt]) -> Iterator[ReadPrompt]:
    """Each token that is read, as a prompt of its own: one row for each."""
    return (ReadPrompt(text.input_ids, [position]) for text in texts for position in text.positions)


def _median(values: Tensor) -> float:
    ordered = values.sort().values
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)
