"""Select tokens: where a pass's tokens stand, and which of them a list, a slice, a mask or a function means.

Selectors combine into others. Prompts and sequences of token ids are found in the rows of a pass.
"""

from steering_vectors._tokens.combined import CombinableSelector, lifted
from steering_vectors._tokens.indices import (
    TokenSelection,
    as_selector,
    integer,
    is_one_of,
    per_row,
)
from steering_vectors._tokens.positions import (
    Selector,
    TokenPositions,
    goes_by_row_or_end,
    may_need_prompt_length,
    needs_row_ids,
    selected,
)
from steering_vectors._tokens.prompts import Prompt, prompt_length, prompt_of
from steering_vectors._tokens.sequences import is_open, token_ids

__all__ = [
    "CombinableSelector",
    "Prompt",
    "Selector",
    "TokenPositions",
    "TokenSelection",
    "as_selector",
    "goes_by_row_or_end",
    "integer",
    "is_one_of",
    "is_open",
    "lifted",
    "may_need_prompt_length",
    "needs_row_ids",
    "per_row",
    "prompt_length",
    "prompt_of",
    "selected",
    "token_ids",
]
