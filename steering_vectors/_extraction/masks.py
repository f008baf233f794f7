"""Build the attention masks of packs, in which each token sees its ancestors and itself."""

from typing import Any

import torch
from torch import Tensor

from steering_vectors._models import Attention, MaskKinds


def attention_masks(kinds: MaskKinds, attention: Attention, visible: Tensor, depths: Tensor, dtype: torch.dtype) -> Any:
    """Return additive masks ``(packs, 1, n, n)``, one or by kind of layer.

    ``visible (packs, n, n)`` is True where a token is an ancestor or the token itself. ``depths (packs, n)`` are the
    tokens' places in their prompts.
    """
    masks: dict[str | None, Tensor] = {}
    for name, kind in kinds.items():
        seen = visible
        if kind == "sliding_attention" and attention.window is not None:
            seen = visible & (depths[:, :, None] - depths[:, None, :] < attention.window)
        elif kind == "chunked_attention":
            chunk = depths // attention.chunk
            seen = visible & (chunk[:, :, None] == chunk[:, None, :])
        masks[name] = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        masks[name] = masks[name].masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    return masks.get(None, masks)
