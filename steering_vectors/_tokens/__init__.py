"""Select tokens: where a pass's tokens stand, and which of them a list, a slice, a mask or a function means.

Prompts are found in the rows of a pass.
"""

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
    selected,
)
from steering_vectors._tokens.prompts import Prompt, prompt_length, prompt_of

__all__ = [
    "Prompt",
    "Selector",
    "TokenPositions",
    "TokenSelection",
    "as_selector",
    "goes_by_row_or_end",
    "integer",
    "is_one_of",
    "may_need_prompt_length",
    "per_row",
    "prompt_length",
    "prompt_of",
    "selected",
]
