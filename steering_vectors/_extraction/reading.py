"""Choose what is read: the layers of a model and the tokens of prompts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index as as_index
from typing import Any, TypeAlias

import torch

from steering_vectors._arguments import is_whole_number
from steering_vectors._extraction.conditions import Steered
from steering_vectors._extraction.extractor import Extractor, ReadPrompt
from steering_vectors._extraction.token_ids import OF_TEXT
from steering_vectors._extraction.tokenizing import Prompt, PromptTokenizer, TokenizedPrompt
from steering_vectors._models import Anatomy
from steering_vectors._steering import (
    check_not_steered_by_row,
    is_steered_by_token,
    may_be_steered_by_row,
    patches_of_this_thread,
)
from steering_vectors._tokens import TokenPositions, TokenSelection, as_selector, selected
from steering_vectors.layer_matching import LayerType, ModelLayerConfig, layers_of

# The number of pairs that are tokenized at a time, and within which their order in the model's passes is free.
WINDOW = 4096

ReadTokenIndex: TypeAlias = int | Callable[[str], int]


def extractor_for(
    anatomy: Anatomy,
    layers: int | Iterable[int] | None,
    layer_type: LayerType,
    layer_config: ModelLayerConfig | None,
    batch_size: int,
) -> Extractor:
    """Return an extractor that reads these layers. Raises TypeError or ValueError if they can't be read."""
    check_not_steered_by_row(anatomy.model)
    kind = type(anatomy.model).__name__
    if anatomy.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder model: only decoder-only models can be read or trained on")
    if not is_whole_number(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    found = layers_of(anatomy, layer_type, layer_config)
    sites = found.sites_of(found.numbers(layers))
    if anatomy.takes_tokens_again:
        raise ValueError(f"{kind} takes some of a row's tokens again and in another order, so it can't be read")

    def steered() -> Steered:
        check_not_steered_by_row(anatomy.model)
        return Steered(
            tuple(patches_of_this_thread(anatomy.model)),
            by_token=is_steered_by_token(anatomy.model),
            perhaps_by_row=may_be_steered_by_row(anatomy.model),
        )

    return Extractor(anatomy.model, sites, batch_size=batch_size, steered=steered)


class Reading:
    """Tokenizes prompts for the model with this anatomy, and chooses the tokens to read."""

    def __init__(
        self,
        tokenize: PromptTokenizer,
        read_token_index: ReadTokenIndex,
        tokens: TokenSelection | None,
        *,
        anatomy: Anatomy,
    ) -> None:
        if tokens is not None and not (isinstance(read_token_index, int) and read_token_index == -1):
            raise ValueError("read_token_index and tokens were given: choose one of them")
        self._tokenize = tokenize
        self._index = read_token_index
        self._anatomy = anatomy
        self._selector = None if tokens is None else as_selector(tokens)

    def __call__(self, prompt: Prompt, own_index: int | None = None, *, name: str) -> ReadPrompt:
        """Return a prompt with the tokens to read; ``own_index`` overrides the index for all prompts.

        Raises TypeError or ValueError, with the prompt's ``name``, if it can't be read or if a callable index or
        selector fails.
        """
        return self.several(prompt, [own_index], name=name)[0]

    def several(self, prompt: Prompt, indices: Sequence[int | None], *, name: str) -> list[ReadPrompt]:
        """Return the prompt, tokenized once, with each of the indices to read. Raises the same errors."""
        try:
            encoded = self._tokenize(prompt, find_completion=self._selector is not None)
            self._check_fits(encoded)
            return [self._read(prompt, encoded, index) for index in indices]
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name}: {error}") from error
        except Exception as error:
            raise ValueError(f"{name}: {type(error).__name__}: {error}") from error

    def _read(self, prompt: Prompt, encoded: TokenizedPrompt, own_index: int | None) -> ReadPrompt:
        if self._selector is not None:
            if own_index is not None:
                raise ValueError("the sample's read index and tokens were given: choose one of them")
            return self._mean_over_tokens(encoded)
        index: Any = self._index if own_index is None else own_index
        is_found = callable(index)
        if is_found:
            index = index(encoded.text)
        if not is_whole_number(index):
            raise TypeError(f"read_token_index must be a whole number or a callable that returns one, got {index!r}")
        position, length = as_index(index), len(encoded.input_ids)
        if is_found:
            position = encoded.place_of(position)
        elif isinstance(prompt, str) and position >= len(encoded.left_out) > 0:
            raise ValueError(
                f"read_token_index {position} may count the special tokens at the beginning of the text once or, as in "
                f"tokenizer(text), twice: leave them out of the text, since the tokenizer adds them, or count from the "
                f"end with a negative number"
            )
        if not -length <= position < length:
            raise ValueError(f"read_token_index {position} is outside the prompt, which has {length} tokens")
        return ReadPrompt(encoded.input_ids, [position % length], inputs=encoded.inputs)

    def _check_fits(self, prompt: TokenizedPrompt) -> None:
        """Raise ValueError for token ids that the model doesn't have, more tokens than it has positions, and images."""
        input_ids = prompt.input_ids
        kind, vocabulary, most = type(self._anatomy.model).__name__, self._anatomy.vocabulary, self._anatomy.most_tokens
        if prompt.inputs is not None:
            self._check_takes(prompt.inputs)
            input_ids = [n for n in input_ids if n not in self._anatomy.image_tokens]
        outside = [n for n in input_ids if not 0 <= n < (vocabulary or n + 1)]
        if outside:
            known = f"the model has only {vocabulary} tokens, from 0"
            raise ValueError(f"the prompt has the token id {outside[0]}, but {known}")
        if most is not None and len(prompt.input_ids) > most:
            raise ValueError(
                f"the prompt has {len(prompt.input_ids)} tokens, but {kind} has position embeddings for only {most}: "
                f"shorten it"
            )

    def _check_takes(self, inputs: Mapping[str, Any]) -> None:
        """Raise ValueError if the model takes nothing of what a processor returns for images."""
        of_images = sorted(inputs.keys() - OF_TEXT)
        if not self._anatomy.arguments.intersection(of_images):
            kind = type(self._anatomy.model).__name__
            raise ValueError(
                f"the prompt has images, but {kind} takes none: its forward method has no {' or '.join(of_images)}; "
                f"load the model with AutoModelForImageTextToText, and the processor that belongs to it"
            )

    def _mean_over_tokens(self, encoded: TokenizedPrompt) -> ReadPrompt:
        assert self._selector is not None
        length = len(encoded.input_ids)
        places = torch.arange(length, device="cpu")
        start = encoded.completion_start
        if start is None and getattr(self._selector, "needs_prompt_length", False):
            raise ValueError(
                f"tokens={self._selector!r} needs to know where the prompt ends and the completion begins, which only "
                f"a chat shows: give chat messages instead of a text, or select tokens by their index"
            )
        ids = torch.tensor(encoded.input_ids, device="cpu")[None]
        positions = TokenPositions(
            index=places[None],
            column=places,
            input_ids=ids,
            prompt_length=None if start is None else torch.tensor([start], device="cpu"),
            begins_sequence=True,
            row_ids=ids,
        )
        weights = selected(self._selector, positions)[0].detach().cpu().double()  # (length,)
        if not bool((weights >= 0).all()):
            raise ValueError(f"tokens={self._selector!r} returned negative weights: a mean needs weights of 0 or more")
        chosen = weights.nonzero().squeeze(1).tolist()
        if not chosen:
            raise ValueError(f"tokens={self._selector!r} selects none of the prompt's {length} tokens")
        return ReadPrompt(encoded.input_ids, chosen, (weights / weights.sum())[chosen].tolist(), encoded.inputs)
