"""What one forward pass's arguments say about its tokens: padding, cached tokens, the pass's shape."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# The names under which models take the state of earlier passes.
CACHE_NAMES = (
    *("past_key_values", "cache", "cache_params", "past_key_value", "layer_past", "state"),
    "past_buckets_states",
)
# Arguments with which many prompts' tokens are run as one row, as generate_batch does.
_PACKING_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "block_table")
_TOKEN_NAMES = ("input_ids", "inputs_embeds", "attention_mask")
_NAMES = (
    *("position_ids", "cache_position", "use_cache", *CACHE_NAMES, *_PACKING_NAMES, *_TOKEN_NAMES),
    *(f"decoder_{name}" for name in _TOKEN_NAMES),
)


@dataclass(frozen=True, eq=False)
class PassArguments:
    """What a pass was given, noted before it changes its cache.

    ``mask``: ``(batch, past + seq)``, nonzero on tokens. ``query_mask``: ``(batch, heads, seq, keys)``, bool or
    additive.
    ``cached``: the columns in the cache, a number where the host knows it, a scalar tensor for a static cache, None for
    a cache that doesn't tell (recurrent models). ``columns``: the places ``(seq,)`` that the caller itself gave.
    ``makes_cache``: whether there is no cache yet, and the pass was asked to make one. ``packs_rows``: whether one row
    holds many prompts.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    mask: Tensor | None
    query_mask: Tensor | None
    position_ids: Tensor | None
    columns: Tensor | None
    cache: Any
    cached: int | Tensor | None
    makes_cache: bool
    packs_rows: bool

    @property
    def shape(self) -> tuple[int, int] | None:
        """``(batch, seq)`` of the pass, or None where these arguments don't say."""
        given = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        return None if given is None or given.ndim < 2 else (given.shape[0], given.shape[1])


def pass_arguments(arguments: Mapping[str, Any], parameters: Collection[str] = ()) -> PassArguments:
    """What the named arguments of a forward method with these ``parameters`` say."""
    # Encoder-decoder models give the plain names to the encoder.
    prefix = "decoder_" if "decoder_input_ids" in arguments or "decoder_input_ids" in parameters else ""
    cache = _first(arguments.get(name) for name in CACHE_NAMES)
    masks = arguments.get(f"{prefix}attention_mask")
    return PassArguments(
        input_ids=_tensor_or_none(arguments.get(f"{prefix}input_ids")),
        inputs_embeds=_tensor_or_none(arguments.get(f"{prefix}inputs_embeds")),
        mask=_mask_of(masks, ndim=2),
        query_mask=_mask_of(masks, ndim=4),
        position_ids=_tensor_or_none(arguments.get("position_ids")),
        columns=_tensor_or_none(arguments.get("cache_position")),
        cache=cache,
        cached=cached_columns(cache),
        makes_cache=cache is None and arguments.get("use_cache") is True,
        packs_rows=any(arguments.get(name) is not None for name in _PACKING_NAMES),
    )


def say_the_same(some: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the arguments of two modules around one pass say the same of its tokens."""
    return all(some.get(name) is other.get(name) for name in _NAMES)


def merge_arguments(calls: Sequence[PassArguments]) -> PassArguments | None:
    """The best of what the modules around one pass were given, outermost first; None if none was told its shape.

    A vision-language model gives its text decoder embeddings in place of ids, and masks and position ids of more
    dimensions than it got; prompt tuning gives the decoder a longer prompt than it got. So the innermost module says
    what the shape is, and of what fits that shape, two-dimensional arguments come first.
    """
    if len(calls) == 1 and _fits_itself(calls[0]):
        return calls[0]
    shape = _first(call.shape for call in reversed(calls))
    if shape is None:
        return None
    fitting = [call for call in reversed(calls) if call.shape in (None, shape)]
    cached = [call for call in fitting if call.cache is not None]
    return PassArguments(
        input_ids=_first(call.input_ids for call in fitting),
        inputs_embeds=_first(call.inputs_embeds for call in fitting),
        mask=_first(call.mask for call in fitting),
        query_mask=_first(call.query_mask for call in fitting),
        position_ids=_first(ids for call in fitting if (ids := call.position_ids) is not None and ids.ndim == 2),
        columns=_first(
            call.columns for call in fitting if call.columns is not None and call.columns.shape == shape[1:]
        ),
        cache=cached[0].cache if cached else None,
        cached=cached[0].cached if cached else 0,
        makes_cache=not cached and any(call.makes_cache for call in fitting),
        packs_rows=any(call.packs_rows for call in fitting),
    )


def _fits_itself(call: PassArguments) -> bool:
    """Whether there is nothing in it to leave out."""
    shape, ids, columns = call.shape, call.position_ids, call.columns
    return shape is not None and (ids is None or ids.ndim == 2) and (columns is None or columns.shape == shape[1:])


@dataclass(frozen=True, eq=False)
class Fed:
    """What earlier passes fed into a cache.

    ``columns``, and own ``tokens (batch,)``, for caches that don't tell their length; ``prompt_length (batch,)``, the
    own tokens of the first pass; ``first_position``, a scalar, the position id of each row's first token.
    """

    columns: int = 0
    tokens: Tensor | None = None
    prompt_length: Tensor | None = None
    first_position: Tensor | None = None


def token_index(call: PassArguments, fed: Fed) -> tuple[Tensor, Tensor]:
    """``index (batch, seq)`` and ``column (seq,)`` of :class:`TokenPositions` for a pass.

    Raises ValueError for a pass that doesn't take a row's tokens in their order.
    """
    if call.packs_rows:
        raise ValueError(
            "can't tell where the tokens stand in a pass that has many prompts in one row, as in generate_batch; "
            "steer all tokens"
        )
    assert call.shape is not None
    batch, seq = call.shape
    given = call.input_ids if call.inputs_embeds is None else call.inputs_embeds
    assert given is not None
    past = fed.columns if call.cached is None else call.cached
    if call.columns is not None:
        # A static cache of transformers 4 counts wrongly over padding; there generate gives the columns.
        column = call.columns.to(given.device)
    elif isinstance(past, int):
        column = torch.arange(past, past + seq, device=given.device)
    else:
        column = torch.arange(seq, device=given.device) + past
    if call.mask is not None and (seen := _index_from_mask(call.mask, past, column, batch)) is not None:
        return seen.to(given.device), column
    tokens = _is_token(call, column, batch)
    before = past if fed.tokens is None else fed.tokens[:, None].to(given.device)
    no_padding_before = isinstance(past, int) and (past == 0 or (call.mask is None and call.query_mask is None))
    if call.position_ids is not None and not no_padding_before:
        first = 0 if fed.first_position is None else fed.first_position.to(given.device)
        index = call.position_ids.to(given.device).long().expand(batch, seq) - first
    elif call.query_mask is not None and call.cached is not None and not no_padding_before:
        index = _index_from_query_mask(call.query_mask, column).expand(batch, seq)
    else:
        index = before + tokens.cumsum(dim=1) - 1
    return torch.where(tokens, index, -1), column


def first_position(call: PassArguments, index: Tensor) -> Tensor | None:
    """The position id at which rows begin, a scalar: 0 in most models, 1 in PaliGemma. None where there are no ids."""
    if call.position_ids is None:
        return None
    offset = call.position_ids.to(index.device).expand_as(index) - index
    return torch.where(index >= 0, offset, 0).amax()


def along_tokens(values: Tensor, activation: Tensor, *, columns_first: bool = False) -> Tensor:
    """``values (batch, seq, n)`` with the activation's axes, so that they broadcast to it.

    Activations are ``(batch, seq, hidden)`` in most models; ``(batch * seq, hidden)`` in some feed-forward parts,
    ``(seq, batch, hidden)``, for sure with ``columns_first``, or with one more axis for parallel streams in a few.
    Raises ValueError where it can't be told which axes are batch and seq.
    """
    batch, seq, n = values.shape
    axes = tuple(activation.shape[:-1])
    if columns_first and axes == (seq, batch):
        return values.transpose(0, 1)
    if axes == (batch, seq):
        return values
    if axes == (batch * seq,):
        return values.reshape(-1, n)
    if axes == (seq, batch):
        return values.transpose(0, 1)
    pairs = [(i, j) for i, j in itertools.combinations(range(len(axes)), 2) if (axes[i], axes[j]) == (batch, seq)]
    if len(pairs) != 1:
        raise ValueError(
            f"can't tell the tokens of a pass of {batch} rows and {seq} columns in an activation of shape "
            f"{tuple(activation.shape)}; steer all tokens of this layer, and all rows alike"
        )
    sizes = [1] * len(axes)
    for axis in pairs[0]:
        sizes[axis] = axes[axis]
    return values.reshape(*sizes, n)


def by_tokens(activation: Tensor, batch: int, seq: int) -> Tensor:
    """``activation`` as a view ``(batch, seq, hidden)``. Raises ValueError where it has no such view."""
    axes = tuple(activation.shape[:-1])
    if axes == (batch, seq):
        return activation
    if axes == (batch * seq,):
        return activation.reshape(batch, seq, -1)
    if axes == (seq, batch):
        return activation.transpose(0, 1)
    raise ValueError(
        f"can't tell the tokens of a pass of {batch} rows and {seq} columns in an activation of shape "
        f"{tuple(activation.shape)}"
    )


def _index_from_mask(mask: Tensor, past: int | Tensor, column: Tensor, batch: int) -> Tensor | None:
    """The own index of the pass's columns from a mask that reaches back to the first one; None if it doesn't."""
    columns, seq = mask.shape[1], column.shape[0]
    if isinstance(past, int) and columns < past + seq:
        return None
    tokens = mask != 0
    if isinstance(past, int):
        now = slice(past, past + seq)
        return torch.where(tokens[:, now], tokens.cumsum(dim=1)[:, now] - 1, -1).expand(batch, seq)
    index = torch.where(tokens, tokens.cumsum(dim=1) - 1, -1)
    # The mask may be as long as a static cache.
    return index[:, column.to(index.device).clamp(max=columns - 1)].expand(batch, seq)


def _is_token(call: PassArguments, column: Tensor, batch: int) -> Tensor:
    """Which columns of the pass are no padding, from a mask of the pass alone or from what the queries see."""
    seq = column.shape[0]
    if call.mask is not None and call.mask.shape[1] == seq:
        return (call.mask != 0).to(column.device).expand(batch, seq)
    if call.query_mask is None:
        return torch.ones(batch, seq, dtype=torch.bool, device=column.device)
    visible = _visible(call.query_mask).to(column.device)  # (batch or 1, seq, keys)
    keys = visible.shape[-1]
    sees_itself = visible.gather(-1, column.clamp(max=keys - 1).expand(len(visible), 1, seq).mT).squeeze(-1)
    # A query on padding sees nothing, or everything: kernels that can't have nothing are given everything. So does a
    # prefix's token in a prefix language model, but that one is seen by the last token.
    sees_all = visible.all(dim=-1)
    seen_by_last = visible[:, -1, :].gather(-1, column.clamp(max=keys - 1).expand(len(visible), seq))
    # A key beyond the mask stands in a sliding window's cache, where the pass is past its prompt.
    return ((sees_itself & (seen_by_last | ~sees_all)) | (column >= keys)).expand(batch, seq)


def _index_from_query_mask(query_mask: Tensor, column: Tensor) -> Tensor:
    """How many tokens each query sees up to itself, less one: ``(batch or 1, seq)``."""
    visible = _visible(query_mask).to(column.device)
    keys = torch.arange(visible.shape[-1], device=column.device)
    return (visible & (keys <= column[:, None])).sum(dim=-1) - 1


def _visible(query_mask: Tensor) -> Tensor:
    """Which keys each query sees, by the first head: ``(batch or 1, seq, keys)``."""
    mask = query_mask[:, 0]
    return mask if mask.dtype is torch.bool else mask > -1e4  # additive masks hold the dtype's minimum


def cached_columns(cache: Any) -> int | Tensor | None:
    """How many columns a cache holds, as in :class:`PassArguments`; 0 for no cache."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):
        return _columns_of_tuples(cache)
    try:
        length = cache.get_seq_length()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    if isinstance(length, Tensor):
        return length.clone()  # a static cache counts in a tensor that the pass changes
    return length if isinstance(length, int) else None


def _columns_of_tuples(cache: Sequence[Any]) -> int | None:
    """The length of transformers 4's tuples of keys and values ``(…, seq, head)``; None for a list of states."""
    layer = cache[0] if cache else None
    if isinstance(layer, (tuple, list)) and len(layer) >= 2 and isinstance(layer[1], Tensor):
        return int(layer[1].shape[-2])
    return None


def _mask_of(masks: Any, ndim: int) -> Tensor | None:
    """The mask of so many dimensions, out of one mask or of transformers 5's masks by kind of layer."""
    if isinstance(masks, Mapping):
        # Windows hide what stands before them: full attention says most.
        ordered = sorted(masks.items(), key=lambda item: item[0] != "full_attention")
        return _first(_mask_of(mask, ndim) for _kind, mask in ordered)
    return masks if isinstance(masks, Tensor) and masks.ndim == ndim else None


def _tensor_or_none(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _first(values: Iterable[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)
