from __future__ import annotations

from functools import partial

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._order.order import Stored
from tiledbsoma_ml._order.windows import Windows, next_borders


@given(
    n_rows=st.integers(1, 300),
    world_size=st.integers(1, 5),
    steps=st.lists(st.integers(1, 60), max_size=12),
    seed=st.none() | st.integers(0, 9),
    data=st.data(),
)
def test_rows_are_permuted_a_window_at_a_time_by_draws_in_sequence_for_each_rank(
    n_rows: int, world_size: int, steps: list[int], seed: int | None, data: st.DataObject
) -> None:
    size = n_rows // world_size
    borders = [border for border in np.cumsum(steps).tolist() if border < size]
    shares = np.array_split(np.arange(n_rows) * 3, world_size)
    expected: list[int] = []
    for share in shares:
        rng = np.random.default_rng(seed)
        for window in np.split(share[:size], borders):
            expected += window[slice(None) if seed is None else rng.permutation(len(window))].tolist()
        expected += share[size:].tolist()
    windows = Windows(
        order=Stored(joinids=np.arange(n_rows) * 3),
        starts=np.cumsum([0, *map(len, shares)])[:-1].tolist(),
        n_rows_of_rank=size,
        borders=borders,
        make_rng=None if seed is None else partial(np.random.default_rng, seed),
    )
    spans = [sorted(data.draw(st.integers(0, n_rows)) for _ in range(2)) for _ in range(3)]
    found = [row for batch in windows.io_batches([(a, b) for a, b in spans]) for row in batch.tolist()]
    assert found == [row for start, stop in spans for row in expected[start:stop]]


def windows_of(n_rows: int, size: int, starts: list[int], borders: range) -> Windows:
    return Windows(
        order=Stored(joinids=np.arange(n_rows)),
        starts=starts,
        n_rows_of_rank=size,
        borders=borders,
        make_rng=partial(np.random.default_rng, 0),
    )


def test_a_batch_is_what_is_left_of_a_window() -> None:
    windows = windows_of(20, 10, [0, 10], range(4, 10, 4))
    lengths = [len(batch) for batch in windows.io_batches([(0, 20)])]
    assert lengths == [4, 4, 2, 4, 4, 2]
    assert [len(batch) for batch in windows.io_batches([(3, 7), (9, 13)])] == [1, 3, 1, 3]


def test_rows_in_no_window_come_together_and_as_they_are() -> None:
    trimmed = windows_of(11, 3, [0, 4, 8], range(2, 3, 2))
    assert [batch.tolist() for batch in trimmed.io_batches([(3, 4), (7, 8)])] == [[3], [7]]
    repeated = windows_of(5, 4, [0, 4, 8], range(2, 4, 2))
    assert [batch.tolist() for batch in repeated.io_batches([(4, 12)])] == [[4], [0, 1, 2, 3, 4, 0, 1]]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    wanted=st.lists(st.floats(0, 1), min_size=1, max_size=9),
)
def test_a_window_ends_with_the_chunk_in_which_its_border_lies(
    lengths: list[int], wanted: list[float]
) -> None:
    ends = np.cumsum(lengths)
    borders = [max(1, round(share * int(ends[-1]))) for share in wanted]
    assert next_borders(ends, borders) == [int(ends[ends >= border].min()) for border in borders]
