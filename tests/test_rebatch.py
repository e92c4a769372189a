from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiledbsoma_ml._rebatch import rebatch, rebatch_joinids

lengths = st.lists(st.integers(0, 12), max_size=7)


def pieces_of(sizes: list[int]) -> list[np.ndarray]:
    """Return the numbers 0, 1, … in pieces of these sizes."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []


@given(sizes=lengths, size=st.integers(1, 30))
@example(sizes=[], size=5)
@example(sizes=[0, 0], size=5)
@example(sizes=[5, 5], size=5)
@example(sizes=[3, 0, 4, 0], size=5)
@example(sizes=[23], size=5)
def test_batches_are_cut_from_what_the_pieces_are_put_end_to_end(sizes: list[int], size: int) -> None:
    whole = list(range(sum(sizes)))
    expected = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert [batch.tolist() for batch in rebatch_joinids(pieces_of(sizes), size)] == expected
    cuts = list(rebatch(pieces_of(sizes), size, lambda piece, start, stop: piece[start:stop]))
    assert [np.concatenate(batch).tolist() for batch in cuts] == expected
    assert all(len(cut) for batch in cuts for cut in batch)


def test_a_batch_is_not_waited_for_longer_than_its_last_item() -> None:
    taken = []

    def pieces() -> Iterator[np.ndarray]:
        for number, piece in enumerate(pieces_of([3, 2, 4])):
            taken.append(number)
            yield piece

    batches = rebatch_joinids(pieces(), 5)
    assert next(batches).tolist() == [0, 1, 2, 3, 4]
    assert taken == [0, 1]


def test_an_error_of_the_pieces_comes_after_the_whole_batches() -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield np.arange(7)
        raise OSError("no more")

    batches = rebatch_joinids(pieces(), 3)
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(OSError, match="no more"):
        next(batches)
