"""Read a config's attention: the kinds of its layers, and the lengths at which it attends otherwise."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from steering_vectors._locks import computed_once

# The kinds of masks that a model takes by their names in transformers 5; None names one mask for all layers.
MaskKinds: TypeAlias = Mapping[str | None, str]

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_ROPE_OF_LENGTH = {"dynamic", "longrope", "su"}


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a text decoder, as its config describes it."""

    config: Any

    @computed_once
    def window(self) -> int | None:
        """The number of tokens that a sliding layer attends to; None without such layers."""
        window = getattr(self.config, "sliding_window", None)
        return window if isinstance(window, int) and getattr(self.config, "use_sliding_window", True) else None

    @property
    def chunk(self) -> int:
        """The number of tokens that a chunk of chunked attention has."""
        return int(self.config.attention_chunk_size)

    @property
    def mask_kinds(self) -> list[MaskKinds]:
        """The kinds of masks that the model may take, likeliest first; none if it takes no ``(batch, 1, n, n)``."""
        if getattr(self.config, "_attn_implementation", None) not in ("sdpa", "eager"):
            return []
        by_layer = getattr(self.config, "layer_types", None)
        if by_layer is None:
            return [{None: "full_attention" if self.window is None else "sliding_attention"}]
        kinds = set(by_layer)
        if not kinds <= _KINDS:
            return []
        by_kind: MaskKinds = {kind: kind for kind in kinds}
        return [by_kind, {None: next(iter(kinds))}] if len(kinds) == 1 else [by_kind]

    @property
    def critical_lengths(self) -> list[int]:
        """The lengths beyond which the model may attend otherwise: windows, chunks, original lengths, ascending."""
        names = ("attention_chunk_size", "window_size", "sliding_window", "original_max_position_embeddings")
        values = {getattr(self.config, name, None) for name in names}
        values |= {rope.get("original_max_position_embeddings") for rope in self._ropes()}
        return sorted(value for value in values if isinstance(value, int))

    @computed_once
    def depends_on_length(self) -> bool:
        """True if a pass's longest row changes the activations of shorter ones."""
        return any(rope.get("rope_type", rope.get("type")) in _ROPE_OF_LENGTH for rope in self._ropes())

    @property
    def sparse_beyond(self) -> int | None:
        """The length beyond which the model picks the tokens that it attends to, where rounding may decide."""
        picked = getattr(self.config, "index_topk", None)
        return picked if isinstance(picked, int) else None

    def _ropes(self) -> Iterator[Mapping[str, Any]]:
        """Yield the settings of rotary position embeddings, of each kind of layer where they differ."""
        for name in ("rope_parameters", "rope_scaling"):
            settings = getattr(self.config, name, None)
            if isinstance(settings, Mapping):
                yield settings
                yield from (inner for inner in settings.values() if isinstance(inner, Mapping))
