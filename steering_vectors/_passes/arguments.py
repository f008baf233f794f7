"""Read a forward pass's arguments: its tokens, masks, cache and shape."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
    def tokens(self) -> Tensor | None:
        """The tokens as the pass got them: embeddings, or else ids."""
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds

    @property
    def shape(self) -> tuple[int, int] | None:
        """``(batch, seq)`` of the pass, or None where these arguments don't say."""
        given = self.tokens
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
