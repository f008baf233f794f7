"""The processes that share a call; what they say to each other is tested in ``wrapped/test_distributed.py``."""

from hypothesis import given
from hypothesis import strategies as st

from steering_vectors._processes import Processes


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_contiguous_even_and_whole(count: int, processes: int) -> None:
    shares = []
    for rank in range(processes):
        one = Processes()
        one.rank, one.count = rank, processes
        shares.append(one.share(count))
    assert [n for share in shares for n in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_alone_has_all_and_asks_nobody() -> None:
    alone = Processes()
    assert alone.share(7) == range(7)
    alone.check_alike("a step", "a word")
