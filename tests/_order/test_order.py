from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, seeded_rng
from tiledbsoma_ml._order.order import STEP_ROWS, Chunked, Order, Stored, Tiled, chunk_starts, in_order
from tiledbsoma_ml._order.share import Deal
from tiledbsoma_ml._order.windows import Windows
from tiledbsoma_ml._query_ids import Partition
from tiledbsoma_ml.testing import check_order

# Chunks that follow tiles ---------------------------------------------------------------------------------

sorted_joinids = st.builds(
    lambda ids, gaps: np.sort(np.array(ids, dtype=np.int64)) * gaps,
    st.lists(st.integers(0, 300), max_size=60) | st.integers(0, 300).map(lambda n: list(range(n))),
    st.sampled_from([1, 3, 100]),
)


@given(ids=sorted_joinids, run_length=st.integers(1, 70))
def test_chunks_are_the_ids_of_each_run_that_has_any(ids: NDArray[np.int64], run_length: int) -> None:
    chunks = np.split(ids, chunk_starts(ids, run_length)[1:]) if len(ids) else []
    assert np.concatenate([*chunks, np.empty(0, np.int64)]).tolist() == ids.tolist()
    runs = [set((chunk // run_length).tolist()) for chunk in chunks]
    assert all(len(run) == 1 for run in runs)
    assert len(set().union(*runs)) == len(chunks)


def test_chunks_of_millions_of_ids_are_the_same_as_of_few() -> None:
    ids = np.flatnonzero(np.random.default_rng(0).random(4 * 2**20) < 0.6)
    assert len(ids) > 2 * 2**20
    starts = chunk_starts(ids, 2048)
    assert np.array_equal(starts, np.unique(ids // 2048, return_index=True)[1])


def test_ids_that_are_in_order_are_not_copied() -> None:
    ids = np.array([3, 3, 8, 90])
    assert in_order(ids) is ids
    assert in_order(ids[::-1]).tolist() == ids.tolist()


# Orders ---------------------------------------------------------------------------------------------------

id_lists = st.lists(st.integers(0, 400), unique=True, min_size=1, max_size=150)


@given(
    size=st.integers(1, 70),
    joinids=id_lists,
    seed=st.integers(0, 99),
    is_tiled=st.booleans(),
    data=st.data(),
)
def test_any_stretch_of_shuffled_chunks_is_that_of_the_chunks_put_end_to_end(
    size: int, joinids: list[int], seed: int, is_tiled: bool, data: Any
) -> None:
    ids = np.sort(joinids) if is_tiled else np.array(joinids)
    order = (Tiled if is_tiled else Chunked).draw(ids, size, np.random.default_rng(seed))
    chunks = np.split(ids, chunk_starts(ids, size)[1:] if is_tiled else range(size, len(ids), size))
    whole = np.concatenate([chunks[k] for k in np.random.default_rng(seed).permutation(len(chunks))])
    start, stop = sorted(data.draw(st.integers(0, len(ids))) for _ in range(2))
    assert order.rows(start, stop).tolist() == whole[start:stop].tolist()
    assert order.n_rows == len(ids)


@pytest.mark.parametrize("kind", [Chunked, Tiled])
def test_a_stretch_that_is_computed_in_several_steps_is_that_of_its_parts(kind: Any) -> None:
    n_rows = 2 * STEP_ROWS + 5_000
    order = kind.draw(np.arange(n_rows), 1_000, np.random.default_rng(0))
    whole = order.rows(0, n_rows)
    assert np.array_equal(np.sort(whole), np.arange(n_rows))
    parts = [order.rows(start, min(start + 70_000, n_rows)) for start in range(0, n_rows, 70_000)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(order.rows(7, n_rows - 3), whole[7:-3])


@given(joinids=id_lists, run_length=st.integers(1, 70))
def test_the_borders_of_tiles_are_where_the_run_changes(joinids: list[int], run_length: int) -> None:
    order = Tiled.draw(np.sort(joinids), run_length, np.random.default_rng(0))
    runs = order.rows(0, order.n_rows) // run_length
    assert order.borders.tolist() == [*(np.flatnonzero(np.diff(runs)) + 1).tolist(), len(joinids)]


def test_the_order_of_the_query_is_given_out_as_a_copy() -> None:
    ids = np.array([5, 1, 9])
    order = Stored(joinids=ids)
    rows = order.rows(0, 2)
    rows[:] = 0
    assert order.rows(0, 3).tolist() == ids.tolist() == [5, 1, 9]


# An order of one's own ------------------------------------------------------------------------------------


class Weighted:
    """A sampler: as many draws as there are rows, each row as likely as its weight says."""

    borders = ()

    def __init__(
        self, joinids: NDArrayJoinId, weights: NDArray[np.float64], rng: np.random.Generator
    ) -> None:
        self.n_rows = len(joinids)
        self._drawn = rng.choice(joinids, self.n_rows, p=weights / weights.sum())

    def rows(self, start: int, stop: int) -> NDArrayJoinId:
        return self._drawn[start:stop].copy()


@pytest.mark.parametrize("permutes", [False, True])
def test_a_sampler_of_a_dozen_lines_is_dealt_to_ranks_and_workers_like_any_order(permutes: bool) -> None:
    weights = np.where(np.arange(1000) < 100, 9.0, 0.1)
    order: Order = Weighted(np.arange(1000), weights, seeded_rng(1, 0))
    check_order(order, np.arange(1000))
    drawn = order.rows(0, 1000)
    assert (drawn < 100).mean() > 0.8
    deal = Deal(n_rows=order.n_rows, batch_size=10, tail="drop", scope="global")
    windows = Windows(
        order=order,
        starts=[0, 500],
        n_rows_of_rank=500,
        borders=range(50, 500, 50),
        make_rng=(lambda: seeded_rng(1, 0)) if permutes else None,
    )
    found = [
        np.concatenate(list(windows.io_batches(deal.spans(Partition(rank, 2, worker, 3)))))
        for rank, worker in product(range(2), range(3))
    ]
    yielded = np.concatenate(found)
    assert yielded.tolist() == drawn.tolist() if not permutes else yielded.tolist() != drawn.tolist()
    assert np.sort(yielded.reshape(-1, 50)).tolist() == np.sort(drawn.reshape(-1, 50)).tolist()
