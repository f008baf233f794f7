"""The three arguments by which a steering takes a selection of tokens."""

from steering_vectors._tokens import Selector, TokenSelection, as_selector, integer
from steering_vectors.token_selection import from_index


def one_selection(
    min_token_index: int | None, token_indices: TokenSelection | None, tokens: TokenSelection | None
) -> Selector | None:
    """Return the selector for the three arguments by which ``apply`` takes one; None means all tokens.

    Raises ValueError if more than one is given. The other errors are those of :func:`as_selector`.
    """
    given = {"min_token_index": min_token_index, "token_indices": token_indices, "tokens": tokens}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} were given: choose one of them")
    if min_token_index is not None:
        first = integer(min_token_index, "min_token_index")
        return from_index(first) if first >= 0 else as_selector(slice(first, None))
    selection = token_indices if tokens is None else tokens
    return None if selection is None else as_selector(selection)
