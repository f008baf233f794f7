"""Read a forward pass's arguments: its tokens, masks, cache and shape."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from steering_vectors._passes.contents import Contents, cached_columns, contents_of

T = TypeVar("T")

# Names of the arguments that hold the state of earlier passes.
CACHE_NAMES = (
    *("past_key_values", "cache", "cache_params", "past_key_value", "layer_past", "state"),
    "past_buckets_states",
)
# Names of the arguments that pack many prompts' tokens into one row, as generate_batch does.
_PACKING_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "block_table")
_TOKEN_NAMES = ("input_ids", "inputs_embeds", "attention_mask")
# Names of the argument that says of how many of the last tokens the logits are wanted.
_LOGITS_NAMES = ("logits_to_keep", "num_logits_to_keep")
_NAMES = (
    *("position_ids", "cache_position", "use_cache", *CACHE_NAMES, *_PACKING_NAMES, *_TOKEN_NAMES),
    *(f"decoder_{name}" for name in _TOKEN_NAMES),
)


@dataclass(frozen=True, eq=False)
class PassArguments:
    """The arguments of a pass, recorded before it changes its cache.

    ``mask``: ``(batch, past + seq)``, nonzero on tokens. ``query_mask``: ``(batch, heads, seq, keys)``, bool or
    additive. ``columns``: the columns ``(seq,)`` that the caller passed.
    ``cached``: the number of columns in the cache. It is an int if the host knows it, a scalar tensor for a static
    cache, and None for a cache without a length that may hold tokens, as in recurrent models.
    ``contents``: a part of the cache, to notice changes of it. ``is_given_cache``: True if the caller passed the cache.
    ``use_cache``: the caller's argument, None if that is left to the model's config. ``packs_rows``: True if one row
    holds many prompts. ``may_hold_drafts``: True if logits of several last tokens are wanted, as of a draft in assisted
    decoding. ``beside_encoder``: True if the tokens are a decoder's, beside an encoder's.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    mask: Tensor | None
    query_mask: Tensor | None
    position_ids: Tensor | None
    columns: Tensor | None
    cache: Any
    cached: int | Tensor | None
    contents: Contents | None
    is_given_cache: bool
    use_cache: bool | None
    packs_rows: bool
    may_hold_drafts: bool
    beside_encoder: bool

    @property
    def tokens(self) -> Tensor | None:
        """The pass's tokens: embeddings if it received any, else ids."""
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds

    @property
    def keeps_cache(self) -> bool:
        """True if the caller wants the pass's tokens in a cache."""
        return self.is_given_cache or self.use_cache is True

    @property
    def shape(self) -> tuple[int, int] | None:
        """The pass's ``(batch, seq)``; None if these arguments don't show it."""
        given = self.tokens
        return None if given is None or given.ndim < 2 else (given.shape[0], given.shape[1])


def pass_arguments(arguments: Mapping[str, Any], parameters: Collection[str] = ()) -> PassArguments:
    """Return a pass's arguments, out of the named arguments of a forward method with these ``parameters``."""
    # In encoder-decoder models the plain names are those of the encoder's arguments.
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
        contents=contents_of(cache),
        is_given_cache=cache is not None,
        use_cache=arguments.get("use_cache"),
        packs_rows=any(arguments.get(name) is not None for name in _PACKING_NAMES),
        may_hold_drafts=any(_wants_several(arguments.get(name)) for name in _LOGITS_NAMES),
        beside_encoder=bool(prefix),
    )


def describe_same_tokens(some: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True if two modules around one pass received the same arguments about its tokens."""
    return all(some.get(name) is other.get(name) for name in _NAMES)


def merge_arguments(calls: Sequence[PassArguments]) -> PassArguments | None:
    """Merge the arguments of the modules around one pass, outermost first; return None if none shows the shape.

    A vision-language model passes its text decoder embeddings instead of ids, and masks and position ids with more
    dimensions than it received. Prompt tuning passes the decoder a longer prompt than it received. So the innermost
    module decides the shape. Of the arguments that fit that shape, two-dimensional ones come first.
    """
    if len(calls) == 1 and _fits_itself(calls[0]):
        return calls[0]
    shape = _first(call.shape for call in reversed(calls))
    if shape is None:
        return None
    fitting = [call for call in reversed(calls) if call.shape in (None, shape)]
    cached = [call for call in fitting if call.cache is not None]
    caller = next(call for call in calls if call.shape is not None)
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
        contents=cached[0].contents if cached else None,
        # A module may resolve what the caller left open before it calls the next one.
        is_given_cache=caller.is_given_cache,
        use_cache=caller.use_cache,
        packs_rows=any(call.packs_rows for call in fitting),
        may_hold_drafts=any(call.may_hold_drafts for call in calls),
        beside_encoder=any(call.beside_encoder for call in calls),
    )


def _fits_itself(call: PassArguments) -> bool:
    """Return True if merging the call alone would leave nothing out."""
    shape, ids, columns = call.shape, call.position_ids, call.columns
    return shape is not None and (ids is None or ids.ndim == 2) and (columns is None or columns.shape == shape[1:])


def _mask_of(masks: Any, ndim: int) -> Tensor | None:
    """Return the mask with ``ndim`` dimensions, out of one mask or of transformers 5's masks by kind of layer."""
    if isinstance(masks, Mapping):
        # A sliding window hides the tokens before it, so the mask of full attention shows most.
        ordered = sorted(masks.items(), key=lambda item: item[0] != "full_attention")
        return _first(_mask_of(mask, ndim) for _kind, mask in ordered)
    return masks if isinstance(masks, Tensor) and masks.ndim == ndim else None


def _wants_several(logits: Any) -> bool:
    """Return True for a number of logits above 1, or a tensor of several columns; 0 means all columns."""
    return logits.numel() > 1 if isinstance(logits, Tensor) else isinstance(logits, int) and logits > 1


def _tensor_or_none(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _first(values: Iterable[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)
