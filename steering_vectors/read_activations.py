"""Read activations of single prompts, for probes."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steering_vectors._prompts import Prompt, PromptTokenizer
from steering_vectors._reading import WINDOW, Reading, ReadTokenIndex, extractor_for, vocabulary_of
from steering_vectors._token_indices import TokenSelection
from steering_vectors.layer_matching import LayerType, ModelLayerConfig


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
    """The activations of prompts, ``(n, hidden)`` in float32 or wider, by layer; row i is prompt i's.

    ``prompts`` are texts, lists of chat messages, or lists of token ids. What is read of each, and all other arguments,
    are as in :func:`train_steering_vector`, with the same guarantees; ``batch_size`` counts pairs of prompts there and
    here. A callable ``read_token_index`` gets an empty text for token ids. Rows are on the CPU, or with
    ``move_to_cpu=False`` on the device where the layer runs.

    Raises as :func:`train_steering_vector`.

    >>> rows = read_activations(model, tokenizer, ["I love it", "I hate it", "Fine"], layers=[0, 1])
    >>> {layer: tuple(part.shape) for layer, part in rows.items()}
    {0: (3, 32), 1: (3, 32)}
    """
    tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
    extract = extractor_for(model, layers, layer_type, layer_config, batch_size)
    reading = Reading(tokenize, read_token_index, tokens, vocabulary=vocabulary_of(model))
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be texts, chats or lists of token ids, got {type(prompts).__name__}")
    rows: dict[int, dict[int, Tensor]] = {layer: {} for layer in extract.layers}
    numbered = enumerate(prompts)
    first = 0
    total = len(prompts) if isinstance(prompts, Sequence) else None
    with (
        torch.inference_mode(False),  # from its tensors nothing could learn later
        tqdm(total=total, desc="Reading activations", unit="prompt", disable=not show_progress) as bar,
    ):
        while window := list(islice(numbered, 2 * WINDOW)):
            for part in extract([reading(prompt, name=f"prompt {number}") for number, prompt in window]):
                wide = part.rows.to("cpu" if move_to_cpu else part.rows.device)
                wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
                rows[part.layer].update((first + n, row) for n, row in zip(part.prompts, wide, strict=True))
                bar.update(len(part.prompts) if part.layer == extract.layers[-1] else 0)
            first += len(window)
        if first == 0:
            raise ValueError("prompts is empty: give at least one")
        return {layer: torch.stack([own[n] for n in range(first)]) for layer, own in rows.items()}
