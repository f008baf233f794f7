"""Train a steering vector from contrasting prompts, in one call or in its two halves."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steering_vectors._arguments import check_takes
from steering_vectors._extraction import (
    WINDOW,
    Extractor,
    LayerRows,
    Prompt,
    PromptTokenizer,
    Reading,
    ReadPrompt,
    ReadTokenIndex,
    chat_template_of,
    extractor_for,
)
from steering_vectors._models import anatomy_of, check_unsharded
from steering_vectors._processes import Processes
from steering_vectors._steering import TokenSelection, active_patches
from steering_vectors._vectors import TrainingRecord, of_libraries, of_model, of_template, without_addresses
from steering_vectors.aggregators import (
    Accumulator,
    Aggregator,
    Side,
    accumulator_for,
    aggregate,
    as_direction,
    mean_aggregator,
)
from steering_vectors.layer_matching import LayerType, ModelLayerConfig
from steering_vectors.steering_vector import SteeringVector

__all__ = [
    "LayerType",
    "SteeringVector",
    "SteeringVectorTrainingSample",
    "aggregate_activations",
    "extract_activations",
    "train_steering_vector",
]

_SIDES: tuple[Side, Side] = ("positive", "negative")


@dataclass
class SteeringVectorTrainingSample:
    """A positive and a negative prompt, each as in :func:`train_steering_vector`, with read positions of their own.

    ``read_positive_token_index`` and ``read_negative_token_index`` take the place of ``read_token_index`` for this
    sample.

    >>> SteeringVectorTrainingSample("I love it", "I hate it", read_positive_token_index=-1).negative_str
    'I hate it'
    """

    positive_str: Prompt
    negative_str: Prompt
    read_positive_token_index: int | None = None
    read_negative_token_index: int | None = None


TrainingSample: TypeAlias = SteeringVectorTrainingSample | tuple[Prompt, Prompt] | list[Prompt]


def train_steering_vector(
    model: nn.Module,
    tokenizer: Any,
    training_samples: Iterable[TrainingSample],
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
    """The steering vector that contrasting prompts give: a direction ``(hidden,)`` in float32 for each layer.

    ``training_samples`` are pairs ``(positive, negative)`` or :class:`SteeringVectorTrainingSample`, from any
    sequence or iterator. A prompt is a text, or a list of token ids, or of chat messages, which the tokenizer's chat
    template renders: as far as the text of the last message where that is the assistant's, and else as far as the
    header of the answer to come.
    ``chat_template_kwargs`` go to the template, as ``{"enable_thinking": False}``.

    ``tokenizer`` is the model's tokenizer, or a processor that has one. It is not changed and needs no padding token.
    ``layers`` are numbers from 0, or negative ones from the end; None trains all. ``layer_type`` and
    ``layer_config`` are those of :meth:`SteeringVector.apply`.

    What is read of each prompt: the token at ``read_token_index``, counted in the prompt's own tokens, negative from
    its end, or what a callable gives for the prompt's text; or else the mean over the tokens that the selector
    ``tokens`` selects: ``from_index(1)`` all but the first, whose norm is often a hundred times that of others, and
    ``completion()`` the last assistant message's.

    ``aggregator`` makes a direction of the rows of a layer. Each row is the same as if its prompt were run alone, up to
    rounding. What prompts begin with together is computed once where the model allows it, in packs of 512 tokens, no
    layer after the last one asked for runs, and ``batch_size`` bounds a pass: to the tokens of so many pairs, or one
    pack; where the memory is full, a pass is halved. Statistics are in float32 or wider, on the device where the layer
    runs, or on the CPU with ``move_to_cpu``. The model runs in evaluation mode, without gradients, and is afterwards as
    it was. An iterator is consumed in windows of 4,096 pairs.

    With ``process_group``, such as ``torch.distributed.group.WORLD``, each process of the group makes the same call,
    runs its share of the pairs, and returns the same vector; without it each works alone.

    The vector's ``metadata`` say how to make it again: the model, its revision and dtype, the method, what was read,
    the number of samples, and hashes of their token ids and of the chat template.

    Raises TypeError for arguments of a wrong kind. Raises ValueError for layers that the model hasn't, for models that
    aren't decoder-only, and for samples that can't be read: none at all, no pair, an empty prompt, a position outside
    the prompt, a selection of no token, chat messages without a chat template or with other content than text; and
    with ``process_group`` for a model that the processes hold together. Raises RuntimeError if another process of the
    group failed or was given other samples.

    Source: contrastive activation addition, arXiv 2312.06681, for the default aggregator.

    >>> train_steering_vector(model, tokenizer, [("I love it", "I hate it"), ("Great!", "Awful!")], layers=[0, 1])
    SteeringVector(layers=[0, 1], hidden_size=32, layer_type='decoder_block', norms=...)
    """
    processes, record = Processes(process_group), TrainingRecord()
    with torch.inference_mode(False):  # from its tensors nothing could learn later
        with processes.together("the rows") as accumulators:
            check_takes(aggregator, 2, "aggregator", "mean_aggregator()")
            tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
            anatomy = anatomy_of(model)
            extract = extractor_for(anatomy, layers, layer_type, layer_config, batch_size)
            reading = Reading(tokenize, read_token_index, tokens, vocabulary=anatomy.vocabulary)
            if process_group is not None:
                check_unsharded(model)
            processes.check_alike("the arguments", without_addresses(f"{extract.layers} {layer_type} {aggregator!r}"))
            accumulators.own = _Accumulators(aggregator, on_cpu=move_to_cpu or process_group is not None)
            bar = tqdm_desc if show_progress else None
            for rows in _rows(extract, reading, training_samples, bar, processes, record):
                accumulators.own.add(rows)
        with processes.together("the directions") as directions:
            directions.own = _merged(aggregator, accumulators.by_rank).directions()
    read = f"{read_token_index=}" if tokens is None else f"{tokens=}"
    made = _of_call(model, repr(aggregator), read, layer_config)
    template = of_template(chat_template_of(tokenizer), chat_template_kwargs)
    metadata = {**of_model(anatomy), **template, **made, **record.entries(), **of_libraries()}
    return SteeringVector(directions.own, layer_type, metadata=metadata)


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
    """The rows that training reads, those of the positive prompts and those of the negative ones, by layer.

    Each layer has a list of tensors ``(batch_size, hidden)``, the last one perhaps shorter, in the samples' order: in
    the model's dtype for single tokens, in float32 or wider for means over tokens; on the device where the layer
    runs, or on the CPU with ``move_to_cpu``. Inside ``apply`` they are what was steered.

    Arguments and errors are those of :func:`train_steering_vector`.

    >>> positive, negative = extract_activations(model, tokenizer, [("I love it", "I hate it")], layers=1)
    >>> positive[1][0].shape
    torch.Size([1, 32])
    """
    found: dict[Side, dict[int, dict[int, Tensor]]] = {side: {} for side in _SIDES}
    tokenize = PromptTokenizer(tokenizer, chat_template_kwargs)
    anatomy = anatomy_of(model)
    extract = extractor_for(anatomy, layers, layer_type, layer_config, batch_size)
    reading = Reading(tokenize, read_token_index, tokens, vocabulary=anatomy.vocabulary)
    with torch.inference_mode(False):
        for part in _rows(extract, reading, training_samples, tqdm_desc if show_progress else None):
            rows = part.rows.to("cpu") if move_to_cpu else part.rows
            for side, own, samples in _by_side(part):
                found[side].setdefault(part.layer, {}).update(zip(samples, rows[own], strict=True))
        positive, negative = (
            {layer: _in_batches(rows, batch_size) for layer, rows in sorted(found[side].items())} for side in _SIDES
        )
    return positive, negative


def aggregate_activations(
    pos_acts_by_layer: Mapping[int, Sequence[Tensor]],
    neg_acts_by_layer: Mapping[int, Sequence[Tensor]],
    aggregator: Aggregator = mean_aggregator(),
) -> dict[int, Tensor]:
    """A direction ``(hidden,)`` in float32 for each layer, of what :func:`extract_activations` gives.

    Raises TypeError for sides that are no mappings, and ValueError if they don't have the same layers and numbers of
    rows ``(n, hidden)``.

    >>> aggregate_activations({0: [torch.ones(1, 2)]}, {0: [torch.zeros(1, 2)]})
    {0: tensor([1., 1.])}
    """
    for side in (pos_acts_by_layer, neg_acts_by_layer):
        if not isinstance(side, Mapping):
            raise TypeError(f"each side must map layers to lists of rows (n, hidden), got {type(side).__name__}")
    if pos_acts_by_layer.keys() != neg_acts_by_layer.keys():
        raise ValueError(
            f"the sides have different layers: {sorted(pos_acts_by_layer)} and {sorted(neg_acts_by_layer)}"
        )
    check_takes(aggregator, 2, "aggregator", "mean_aggregator()")
    directions = {}
    for layer, positive_rows in pos_acts_by_layer.items():
        if not len(positive_rows) or not len(neg_acts_by_layer[layer]):
            raise ValueError(f"layer {layer} has no rows: give at least one for each side")
        parts = [*positive_rows, *neg_acts_by_layer[layer]]
        if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
            raise ValueError(f"layer {layer}: each side must have a list of tensors (n, hidden)")
        positive, negative = torch.cat(list(positive_rows)), torch.cat(list(neg_acts_by_layer[layer]))
        if positive.shape != negative.shape:
            raise ValueError(
                f"layer {layer}: the sides have rows of shapes {tuple(positive.shape)} and {tuple(negative.shape)}"
            )
        directions[layer] = aggregate(aggregator, positive, negative)
    return directions


def _of_call(model: nn.Module, method: str, read: str, layer_config: ModelLayerConfig | None) -> dict[str, str]:
    """What the metadata tell of a training's arguments, and of what the model was steered by meanwhile."""
    steered_by = ", ".join(map(repr, active_patches(model)))
    told = {
        "method": method,
        "read": read,
        "layer_config": repr(layer_config) if layer_config else "",
        "steered_by": steered_by,
    }
    return {name: without_addresses(text) for name, text in told.items() if text}


def _merged(aggregator: Aggregator, parts: Sequence["_Accumulators"]) -> "_Accumulators":
    """Return the accumulators of all processes' rows."""
    if len(parts) == 1:
        return parts[0]
    merged = _Accumulators(aggregator)
    for part in parts:  # in the same order in each process
        merged.merge(part)
    return merged


class _Accumulators:
    """An accumulator for each layer, with the width of its rows."""

    def __init__(self, aggregator: Aggregator, *, on_cpu: bool = False) -> None:
        self._aggregator = aggregator
        self._on_cpu = on_cpu
        self._by_layer: dict[int, tuple[int, Accumulator]] = {}

    def add(self, part: LayerRows) -> None:
        rows = part.rows.to("cpu" if self._on_cpu else part.rows.device)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        accumulator = self._at(part.layer, rows.shape[-1])
        for side, own, samples in _by_side(part):
            accumulator.add(rows[own], side, samples)

    def merge(self, other: "_Accumulators") -> None:
        for layer, (hidden, accumulator) in other._by_layer.items():
            self._at(layer, hidden).merge(accumulator)

    def directions(self) -> dict[int, Tensor]:
        return {
            layer: as_direction(self._aggregator, accumulator.direction(), hidden)
            for layer, (hidden, accumulator) in sorted(self._by_layer.items())
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_aggregator": None}  # another process has its own, which may not be sent

    def _at(self, layer: int, hidden: int) -> Accumulator:
        if layer not in self._by_layer:
            self._by_layer[layer] = (hidden, accumulator_for(self._aggregator, hidden))
        return self._by_layer[layer][1]


def _rows(
    extract: Extractor,
    reading: Reading,
    training_samples: Iterable[TrainingSample],
    description: str | None,
    processes: Processes = Processes(),
    record: TrainingRecord | None = None,
) -> Iterator[LayerRows]:
    """The rows of the samples that are this process's, in the order in which the model runs.

    A description brings a bar. Prompt 2n is the positive side of the sample n, prompt 2n + 1 the negative one. All
    processes' samples are noted in the ``record``.
    """
    if isinstance(training_samples, (str, Mapping)) or not isinstance(training_samples, Iterable):
        raise TypeError(f"training_samples must be pairs (positive, negative), got {type(training_samples).__name__}")
    total = len(training_samples) if isinstance(training_samples, Sequence) else None
    samples = enumerate(training_samples)
    first = 0
    with tqdm(total=total, desc=description, unit="pair", disable=description is None or processes.rank > 0) as bar:
        while window := list(islice(samples, WINDOW)):
            prompts = [prompt for number, sample in window for prompt in _prompts_of(reading, number, sample)]
            processes.check_alike(f"the samples from {first} on", _digest(prompts) if processes.count > 1 else "")
            if record is not None:
                for prompt in prompts:
                    record.add(prompt.input_ids, prompt.positions)
            own = processes.share(len(window))
            done = 0
            for part in extract(prompts[2 * own.start : 2 * own.stop]):
                start = 2 * (first + own.start)
                yield replace(part, prompts=[start + prompt for prompt in part.prompts])
                if part.layer == extract.layers[-1]:
                    bar.update((done + len(part.prompts)) // 2 - done // 2)
                    done += len(part.prompts)
            bar.update(len(window) - len(own))  # the other processes' pairs
            first += len(window)
    if first == 0:
        raise ValueError("training_samples is empty: give at least one pair (positive, negative)")


def _by_side(part: LayerRows) -> Iterator[tuple[Side, list[int], list[int]]]:
    """For each side that has some, which rows are its own, and their samples' numbers."""
    for n, side in enumerate(_SIDES):
        own = [row for row, prompt in enumerate(part.prompts) if prompt % 2 == n]
        if own:
            yield side, own, [part.prompts[row] // 2 for row in own]


def _digest(prompts: Sequence[ReadPrompt]) -> str:
    """A hash of what is run and read, the same in every process that was given the same."""
    said = repr([(prompt.input_ids, list(prompt.positions), prompt.weights) for prompt in prompts])
    return sha256(said.encode()).hexdigest()


def _prompts_of(reading: Reading, number: int, sample: Any) -> list[ReadPrompt]:
    """The positive and the negative prompt of the sample with this number. Errors name it."""
    pair = _as_sample(number, sample)
    texts = (pair.positive_str, pair.negative_str)
    indices = (pair.read_positive_token_index, pair.read_negative_token_index)
    return [
        reading(text, index, name=f"sample {number}, {side} side")
        for side, text, index in zip(_SIDES, texts, indices, strict=True)
    ]


def _as_sample(number: int, sample: Any) -> SteeringVectorTrainingSample:
    if isinstance(sample, SteeringVectorTrainingSample):
        return sample
    if isinstance(sample, (tuple, list)) and len(sample) == 2 and not any(isinstance(s, Mapping) for s in sample):
        return SteeringVectorTrainingSample(sample[0], sample[1])
    got = type(sample).__name__
    if isinstance(sample, (tuple, list)):
        got += f" of length {len(sample)}" + " of chat messages" * any(isinstance(side, Mapping) for side in sample)
    raise TypeError(f"sample {number} must be a pair (positive, negative) or a SteeringVectorTrainingSample, got {got}")


def _in_batches(rows: Mapping[int, Tensor], batch_size: int) -> list[Tensor]:
    return list(torch.split(torch.stack([rows[sample] for sample in sorted(rows)]), batch_size))
