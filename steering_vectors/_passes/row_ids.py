"""The token ids of a pass's rows, up to the pass's last column."""

import torch
from torch import Tensor

from steering_vectors._passes.arguments import PassArguments
from steering_vectors._passes.positions import Past


def row_ids(call: PassArguments, past: Past, index: Tensor) -> Tensor:
    """Return the ids ``(batch, past + seq)``, with -1 on padding. Raises ValueError if they are unknown."""
    if call.input_ids is None or call.input_ids.shape != index.shape:
        raise ValueError(
            "the selector asks for the rows' token ids, but the model got embeddings: pass it input_ids, or select "
            "tokens by their index"
        )
    ids = torch.where(index >= 0, call.input_ids.to(index.device).long(), -1)
    if past.is_empty:
        return ids
    if past.row_ids is None:
        raise ValueError(
            f"the selector asks for the rows' token ids, but some of the tokens in the {type(call.cache).__name__} "
            f"were put in while this steering wasn't attached, or can't be recognized since it was changed: run the "
            f"model on the whole text inside the steering, or select tokens by their index"
        )
    before = past.row_ids.to(index.device)
    columns = before.shape[1]
    if call.mask is not None and call.mask.shape[1] >= columns + ids.shape[1]:  # it may be the first to show padding
        before = torch.where(call.mask[:, :columns].to(index.device) != 0, before, -1)
    return torch.cat([before, ids], dim=1)


def first_columns(ids: Tensor | None, columns: int | Tensor) -> Tensor | None:
    """Return the ids in the first columns of rows; None if not so many are known."""
    if ids is None or not isinstance(columns, int) or columns > ids.shape[1]:
        return None
    return ids[:, :columns]
