"""What a model's config says of its attention: the masks that packs need, and the lengths at which it changes."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

# None: one mask for all layers; else transformers 5's names of the kinds of layers.
MaskKinds: TypeAlias = Mapping[str | None, str]

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_ROPE_OF_LENGTH = {"dynamic", "longrope", "su"}


def mask_kinds(config: Any) -> list[MaskKinds]:
    """The kinds of masks that the model may take, likeliest first; none where it takes no mask ``(batch, 1, n, n)``."""
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return []
    by_layer = getattr(config, "layer_types", None)
    if by_layer is None:
        return [{None: "full_attention" if _window(config) is None else "sliding_attention"}]
    kinds = set(by_layer)
    if not kinds <= _KINDS:
        return []
    by_kind: MaskKinds = {kind: kind for kind in kinds}
    return [by_kind, {None: next(iter(kinds))}] if len(kinds) == 1 else [by_kind]


def attention_masks(kinds: MaskKinds, config: Any, visible: Tensor, depths: Tensor, dtype: torch.dtype) -> Any:
    """Additive masks ``(packs, 1, n, n)``, one or by kind of layer.

    ``visible (packs, n, n)`` says which tokens are a token's ancestors or itself, ``depths (packs, n)`` where they
    stand in their prompts.
    """
    masks: dict[str | None, Tensor] = {}
    for name, kind in kinds.items():
        seen = visible
        if kind == "sliding_attention" and (window := _window(config)) is not None:
            seen = visible & (depths[:, :, None] - depths[:, None, :] < window)
        elif kind == "chunked_attention":
            chunk = depths // config.attention_chunk_size
            seen = visible & (chunk[:, :, None] == chunk[:, None, :])
        masks[name] = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        masks[name] = masks[name].masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    return masks.get(None, masks)


def critical_lengths(config: Any) -> list[int]:
    """The lengths beyond which the model may attend otherwise, ascending: windows, chunks, original lengths."""
    values = {getattr(config, name, None) for name in ("attention_chunk_size", "window_size", "sliding_window")}
    values |= {getattr(config, "original_max_position_embeddings", None)}
    values |= {rope.get("original_max_position_embeddings") for rope in _ropes(config)}
    return sorted(value for value in values if isinstance(value, int))


def depends_on_length(config: Any) -> bool:
    """Whether a pass's longest row changes what the model gives for shorter ones."""
    return any(rope.get("rope_type", rope.get("type")) in _ROPE_OF_LENGTH for rope in _ropes(config))


def sparse_beyond(config: Any) -> int | None:
    """The length beyond which the model picks the tokens that it attends to, where rounding may decide; None: never."""
    picked = getattr(config, "index_topk", None)
    return picked if isinstance(picked, int) else None


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and getattr(config, "use_sliding_window", True) else None


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary position embeddings, of each kind of layer where they differ."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if isinstance(settings, Mapping):
            yield settings
            yield from (inner for inner in settings.values() if isinstance(inner, Mapping))
