"""Train a steering vector from contrasting prompts, in one call or in two steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from steering_vectors._accumulators import Accumulators, merged_accumulators, rows_of_both
from steering_vectors._arguments import check_takes, with_hints
from steering_vectors._extraction import (
    MISSING,
    SIDES,
    Prompt,
    PromptTokenizer,
    Reading,
    ReadPrompt,
    ReadTokenIndex,
    are_pairs,
    by_side,
    chat_template_of,
    check_sides,
    extractor_for,
    rows_of_samples,
    sides_of,
)
from steering_vectors._models import anatomy_of, check_unsharded
from steering_vectors._processes import Processes
from steering_vectors._steering import patches_of_this_thread
from steering_vectors._tokens import TokenSelection
from steering_vectors._vectors import TrainingRecord, of_libraries, of_model, of_template, without_addresses
from steering_vectors.aggregators import (
    Aggregator,
    Side,
    aggregate,
    mean_aggregator,
)
from steering_vectors.layer_matching import LayerType, ModelLayerConfig, written_config
from steering_vectors.steering_vector import SteeringVector

__all__ = [
    "LayerType",
    "SteeringVector",
    "SteeringVectorTrainingSample",
    "aggregate_activations",
    "extract_activations",
    "train_steering_vector",
]


@dataclass
class SteeringVectorTrainingSample:
    """A positive and a negative prompt, and where to read them.

    Args:
        positive_str: The positive prompt, as in :func:`train_steering_vector`.
        negative_str: The negative prompt.
        read_positive_token_index: The token to read of the positive prompt, in place of
            ``read_token_index``.
        read_negative_token_index: The same for the negative prompt.

    >>> pair = SteeringVectorTrainingSample("I love it", "I hate it", read_positive_token_index=-1)
    >>> pair.negative_str
    'I hate it'
    """

    positive_str: Prompt
    negative_str: Prompt
    read_positive_token_index: int | None = None
    read_negative_token_index: int | None = None


TrainingSample: TypeAlias = (
    SteeringVectorTrainingSample
    | tuple[Prompt, Prompt]
    | list[Prompt]
    | Mapping[Literal["positive", "negative"], Prompt]
)
PromptSets: TypeAlias = Mapping[Literal["positive", "negative"], Iterable[Prompt]]


# What to write instead of arguments that are missing or that don't exist.
_HINTS = {
    "missing": "the arguments begin with model, tokenizer, training_samples",
    "layer": "the argument is layers=",
    "pairs": "the argument is training_samples=",
    "positive": 'both sides are one argument, training_samples={"positive": prompts, "negative": prompts}',
}


@with_hints(**_HINTS)
def train_steering_vector(
    model: nn.Module,
    tokenizer: Any,
    training_samples: Iterable[TrainingSample] | PromptSets,
    layers: int | Iterable[int] | None = None,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    move_to_cpu: bool = False,
    read_token_index: ReadTokenIndex = -1,
    show_progress: bool = False,
    aggregator: Aggregator = mean_aggregator(),
    batch_size: int = 1,
    tqdm_desc: str = "Training steering vector",
    *,
    tokens: TokenSelection | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    process_group: Any = None,
) -> SteeringVector:
    """Train a steering vector from contrasting prompts: one direction for each layer.

    Directions are ``(hidden,)``, in float32. The model runs in evaluation mode, without gradients,
    and only up to the last layer asked for. Afterwards it is as it was before.

    The prompts are read in packs where the model allows it. A pack usually holds up to 512 tokens,
    and the common beginnings of its prompts are computed only once. Each row is the same as if its
    prompt were run alone, up to rounding. In mixtures of experts in half precision, rounding
    decides which experts run, so there each prompt is run alone.

    A text gets the special tokens that the tokenizer adds, once, also if it begins with them. A
    chat gets those of its template alone, so that its tokens are the ones that
    ``apply_chat_template`` returns for ``generate``. It is rendered up to the end of the last
    message's text if that message is the assistant's, and otherwise up to the header of the answer
    to come. Token ids are taken as they are, without the padding that an ``attention_mask`` shows.

    A chat with images goes through the model's processor and through the whole model, one chat at a
    time. Its tokens are those that the processor returns, where an image takes many.

    The vector's ``metadata`` record what is needed to make it again: the model, its revision and
    dtype, the method, which tokens were read, the number of samples, and hashes of their token ids
    and of the chat template.

    Source: contrastive activation addition, arXiv 2312.06681, for the default aggregator.

    Args:
        model: The model to read, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one, as images need it. It is not
            changed and needs no padding token.
        training_samples: Pairs ``(positive, negative)``, rows with the keys ``positive`` and
            ``negative``, or :class:`SteeringVectorTrainingSample`, in any sequence or iterator. Or
            two sets of any sizes, ``{"positive": prompts, "negative": prompts}``, if no prompt
            belongs to one of the other side. A prompt is a text, a list of chat messages, or token
            ids: a list or a tensor, or what a tokenizer returns for one prompt. Messages may hold
            images, as in ``{"type": "image", "path": "owl.png"}``. Iterators are consumed in
            windows of 4,096 pairs, or of 4,096 prompts of each set, and of fewer with images.
        layers: The layers to train, as numbers from 0, or negative ones from the end. None trains
            all.
        layer_type: The kind of activation that is read at each layer: the output of the decoder
            block, or of a part of it such as ``"mlp"``; or the attention ``"heads"``, or the MLP's
            ``"neurons"``.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.
        move_to_cpu: True to compute on the CPU instead of the device where the layer runs.
            Statistics are in float32 or wider on both.
        read_token_index: The token to read of each prompt, without padding; negative numbers count
            from its end. It may be a callable that gets the prompt's text, as rendered by the
            template, and returns the index of a token of ``tokenizer(text)``, such as
            ``tokenizer(text).char_to_token(text.index("owl"))``.
        show_progress: True to show a progress bar.
        aggregator: The callable that computes a direction from the rows of a layer, one row for
            each prompt. By default, it is the mean of the differences. Sets need one with the
            method ``of_sets``: of the library's, all but :func:`pca_aggregator`.
        batch_size: The number of pairs to whose tokens a pass is limited; 512 tokens are always
            allowed. If memory runs out, a pass is halved.
        tqdm_desc: The label of the progress bar.
        tokens: The tokens to read in place of a single one, as in :meth:`SteeringVector.apply`: the
            mean over them is read. ``from_index(1)`` selects all tokens but the first, whose norm
            is often a hundred times that of the others. ``completion()`` selects the last assistant
            message's tokens.
        chat_template_kwargs: Arguments for the tokenizer's chat template, such as
            ``{"enable_thinking": False}``.
        process_group: The processes that share the work, such as ``torch.distributed.group.WORLD``.
            Each process of the group makes the same call, runs its share of the samples, and
            returns the same vector. Without a group, each process works alone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model doesn't have one of the layers or isn't decoder-only, if there
            are no samples, if they are sets and the aggregator needs pairs, or if a sample
            can't be read. Causes are a sample that is not a pair, an empty prompt, more tokens
            than the model has position embeddings for, a position outside the prompt, a
            selection of no token, and chat messages without a chat template, with content other
            than text and images, with images that the tokenizer or the model doesn't take, or
            with a last text that the template leaves out. With ``process_group``,
            also if the model is sharded over the processes.
        RuntimeError: If another process of the group failed or was given other samples.

    Warns:
        UserWarning: If all directions are zeros, since both sides of the pairs read the same, and
            if prompts are read at their first token.

    >>> pairs = [("I love it", "I hate it"), ("Great!", "Awful!")]
    >>> train_steering_vector(model, tokenizer, pairs, layers=[0, 1])
    SteeringVector(layers=[0, 1], hidden_size=32, layer_type='decoder_block', norms=...)
    """
    processes, on_cpu = Processes(process_group), move_to_cpu or process_group is not None
    with torch.inference_mode(False):  # inference tensors could not be used in training later
        with processes.together("the rows") as accumulators:
            record = TrainingRecord(paired=are_pairs(training_samples))
            accumulators.own = Accumulators(aggregator, paired=record.paired, on_cpu=on_cpu)
            tokenize, anatomy = PromptTokenizer(tokenizer, chat_template_kwargs), anatomy_of(model)
            extract = extractor_for(anatomy, layers, layer_type, layer_config, batch_size)
            prompts = _PromptsOf(Reading(tokenize, read_token_index, tokens, anatomy=anatomy), paired=record.paired)
            if process_group is not None:
                check_unsharded(model)
            processes.check_alike("the arguments", without_addresses(f"{extract.layers} {layer_type} {aggregator!r}"))
            bar = tqdm_desc if show_progress else None
            accumulators.own.add(rows_of_samples(extract, prompts, training_samples, bar, processes, record))
        with processes.together("the directions") as directions:
            merged = merged_accumulators(Accumulators(aggregator, paired=record.paired), accumulators.by_rank)
            directions.own = merged.directions()
    _warn_of_what_was_read(directions.own, prompts, tokenizer)
    site = written_config(anatomy, layer_type, layer_config, directions.own)
    entries = of_model(anatomy) | _of_call(model, aggregator, read_token_index, tokens, site)
    entries |= merged.norms_of_stream(layer_type, site) if prompts.show_the_stream else {}
    entries |= of_template(chat_template_of(tokenizer), chat_template_kwargs) | record.entries() | of_libraries()
    return SteeringVector(directions.own, layer_type, metadata=entries)


@with_hints(**_HINTS)
def extract_activations(
    model: nn.Module,
    tokenizer: Any,
    training_samples: Iterable[TrainingSample],
    layers: int | Iterable[int] | None = None,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    move_to_cpu: bool = False,
    read_token_index: ReadTokenIndex = -1,
    show_progress: bool = False,
    batch_size: int = 1,
    tqdm_desc: str = "Extracting activations",
    *,
    tokens: TokenSelection | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]:
    """Return the rows that training reads, by layer: the positive prompts', and the negative ones'.

    Inside ``apply``, they are the steered activations. Errors are those of
    :func:`train_steering_vector`, and a TypeError for sets, whose rows :func:`read_activations`
    returns.

    Args:
        model: The model to read, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        training_samples: Pairs, as in :func:`train_steering_vector`.
        layers: The layers to read, as numbers from 0, or negative ones from the end. None reads
            all.
        layer_type: The kind of activation that is read, as in :func:`train_steering_vector`.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.
        move_to_cpu: True to return tensors on the CPU instead of the device where the layer runs.
        read_token_index: The token to read of each prompt, as in :func:`train_steering_vector`.
        show_progress: True to show a progress bar.
        batch_size: The number of pairs in a pass, and of rows in a tensor.
        tqdm_desc: The label of the progress bar.
        tokens: The tokens to read in place of a single one; the mean over them is read.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Returns:
        Two mappings from layers to lists of tensors ``(batch_size, hidden)`` in the samples' order;
        the last tensor may be shorter. Single tokens are in the model's dtype, and means over
        tokens in float32 or wider.

    >>> pairs = [("I love it", "I hate it")]
    >>> positive, negative = extract_activations(model, tokenizer, pairs, layers=1)
    >>> positive[1][0].shape
    torch.Size([1, 32])
    """
    if not are_pairs(training_samples):
        raise TypeError(
            "extract_activations takes pairs: call read_activations for the prompts of each set, and "
            "aggregate_activations with the two results"
        )
    found: dict[Side, dict[int, dict[int, Tensor]]] = {side: {} for side in SIDES}
    tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
    anatomy = anatomy_of(model)
    extract = extractor_for(anatomy, layers, layer_type, layer_config, batch_size)
    reading = Reading(tokenize, read_token_index, tokens, anatomy=anatomy)
    bar = tqdm_desc if show_progress else None
    with torch.inference_mode(False):
        for part in rows_of_samples(extract, _PromptsOf(reading), training_samples, bar):
            rows = part.rows.to("cpu") if move_to_cpu else part.rows
            for side, indices, samples in by_side(part):
                found[side].setdefault(part.layer, {}).update(zip(samples, rows[indices], strict=True))
        positive, negative = (
            {layer: _in_batches(rows, batch_size) for layer, rows in sorted(found[side].items())} for side in SIDES
        )
    return positive, negative


def aggregate_activations(
    pos_acts_by_layer: Mapping[int, Sequence[Tensor] | Tensor],
    neg_acts_by_layer: Mapping[int, Sequence[Tensor] | Tensor],
    aggregator: Aggregator = mean_aggregator(),
) -> dict[int, Tensor]:
    """Compute a direction for each layer from rows that were read before.

    Lists of tensors, as :func:`extract_activations` returns them, are pairs: row i of one side
    belongs to row i of the other. A single tensor for each layer, as :func:`read_activations`
    returns it, is a set: its rows belong to none of the other side, and the sides may have any
    numbers of rows. If the rows of such tensors are pairs, give each in a list.

    Directions are ``(hidden,)``, in float32.

    Args:
        pos_acts_by_layer: The positive rows for each layer: a list of tensors ``(n, hidden)``, or
            one such tensor.
        neg_acts_by_layer: The negative rows, in the same form.
        aggregator: The callable that computes a direction from the rows of a layer.

    Raises:
        TypeError: If the activations are not mappings.
        ValueError: If the sides don't have the same layers, and rows ``(n, hidden)`` of one width;
            for lists, if they don't have the same numbers of rows; for single tensors, if the
            aggregator needs pairs.

    >>> aggregate_activations({0: [torch.ones(1, 2)]}, {0: [torch.zeros(1, 2)]})
    {0: tensor([1., 1.])}
    >>> aggregate_activations({0: torch.ones(3, 2)}, {0: torch.zeros(5, 2)})
    {0: tensor([1., 1.])}
    """
    for side in (pos_acts_by_layer, neg_acts_by_layer):
        if not isinstance(side, Mapping):
            raise TypeError(f"activations must map layers to lists of tensors (n, hidden), got {type(side).__name__}")
    if pos_acts_by_layer.keys() != neg_acts_by_layer.keys():
        raise ValueError(
            f"both sides must have the same layers, got {sorted(pos_acts_by_layer)} and {sorted(neg_acts_by_layer)}"
        )
    check_takes(aggregator, 2, "aggregator", "mean_aggregator()")
    directions = {}
    for layer, positive_rows in pos_acts_by_layer.items():
        positive, negative, paired = rows_of_both(layer, positive_rows, neg_acts_by_layer[layer])
        directions[layer] = aggregate(aggregator, positive, negative, paired=paired)
    return directions


def _of_call(
    model: nn.Module,
    aggregator: Aggregator,
    read_token_index: ReadTokenIndex,
    tokens: TokenSelection | None,
    site: str,
) -> dict[str, str]:
    """Return the metadata on a training's arguments, and on what steered the model meanwhile."""
    entries = {
        "method": repr(aggregator),
        "read": f"{read_token_index=}" if tokens is None else f"{tokens=}",
        "layer_config": site,
        "steered_by": ", ".join(map(repr, patches_of_this_thread(model))),
    }
    return {name: without_addresses(text) for name, text in entries.items() if text}


class _PromptsOf:
    """The prompts of a sample, as ``reading`` reads them. Errors name the sample's number.

    A sample of sets has a prompt of each, or MISSING where one has no more.
    """

    def __init__(self, reading: Reading, *, paired: bool = True) -> None:
        self.reading = reading
        self.paired = paired
        self.first: Sequence[ReadPrompt | None] = ()
        self.count = 0
        self.read_at_first: list[ReadPrompt] = []  # those of which the first token alone is read

    def __call__(self, number: int, sample: Any) -> Sequence[ReadPrompt | None]:
        prompts = self._of_pair(number, sample) if self.paired else self._of_sets(number, sample)
        self.first = self.first or prompts
        known = [prompt for prompt in prompts if prompt]
        self.count += len(known)
        self.read_at_first += [prompt for prompt in known if list(prompt.positions) == [0]]
        return prompts

    @property
    def show_the_stream(self) -> bool:
        """True if the median of what is read is a token's that follows others; first tokens' norms tell nothing."""
        return 2 * len(self.read_at_first) < self.count

    def _of_sets(self, number: int, sides: Sequence[Any]) -> Sequence[ReadPrompt | None]:
        if number == 0:  # sets may mix chats and texts, but one of chats and one of texts is a mistake
            check_sides(sides, "training_samples")
        return [
            None if prompt is MISSING else self.reading(prompt, name=f"{side} prompt {number}")
            for side, prompt in zip(SIDES, sides, strict=True)
        ]

    def _of_pair(self, number: int, sample: Any) -> Sequence[ReadPrompt]:
        pair = _as_sample(number, sample)
        texts = (pair.positive_str, pair.negative_str)
        indices = (pair.read_positive_token_index, pair.read_negative_token_index)
        return [
            self.reading(text, index, name=f"sample {number}, {side} side")
            for side, text, index in zip(SIDES, texts, indices, strict=True)
        ]


def _warn_of_what_was_read(directions: Mapping[int, Tensor], prompts: _PromptsOf, tokenizer: Any) -> None:
    """Warn if all directions are zeros, or if prompts were read at their first token, with the tokens."""

    def texts(read: Iterable[ReadPrompt | None]) -> list[str]:
        decode = getattr(tokenizer, "decode", repr)
        return [repr(decode([one.input_ids[place] for place in one.positions])) for one in read if one]

    if not any(bool(direction.any()) for direction in directions.values()):
        message = (
            f"all directions are zeros: both sides read the same. Of the first positive and the first negative prompt, "
            f"{' and '.join(texts(prompts.first))} were read. Does the chat template leave out what differs, or do the "
            f"prompts differ only after the token that is read?"
        )
    elif prompts.read_at_first:
        message = (
            f"{len(prompts.read_at_first)} of {prompts.count} prompts were read at their first token, such as "
            f"{texts(prompts.read_at_first[:1])[0]}. In many models its activation is a hundred times as long as the "
            f"others' and says little of the text: put words into sentences, such as 'I love it.', or use chats"
        )
    else:
        return
    warnings.warn(message, UserWarning, stacklevel=4)  # where train_steering_vector was called, which is decorated


def _as_sample(number: int, sample: Any) -> SteeringVectorTrainingSample:
    if isinstance(sample, SteeringVectorTrainingSample):
        return sample
    return SteeringVectorTrainingSample(*sides_of(sample, number))


def _in_batches(rows: Mapping[int, Tensor], batch_size: int) -> list[Tensor]:
    return list(torch.split(torch.stack([rows[sample] for sample in sorted(rows)]), batch_size))
