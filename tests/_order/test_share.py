from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._order.share import Deal, ShuffleScope, Stage, n_yielded_by
from tiledbsoma_ml._query_ids import Partition, Tail

tails = st.sampled_from(["drop", "pad"])
sizes = st.integers(1, 60)
stages = st.lists(st.builds(Stage, st.integers(1, 4), st.integers(1, 3), st.integers(0, 5)), max_size=2).map(
    tuple
)


def places(world_size: int, n_workers: int) -> list[Partition]:
    return [Partition(r, world_size, w, n_workers) for r, w in product(range(world_size), range(n_workers))]


def deal_of(n_rows: int, batch_size: int, tail: Tail, earlier: tuple[Stage, ...] = ()) -> Deal:
    return Deal(n_rows=n_rows, batch_size=batch_size, tail=tail, scope="global", earlier=earlier)


def rows_of(deal: Deal, place: Partition, skip: int = 0) -> list[int]:
    return [row for start, stop in deal.spans(place, skip) for row in range(start, stop)]


@given(sizes, st.integers(1, 9), tails, st.integers(1, 5), st.integers(1, 4))
def test_every_row_is_dealt_once_but_for_the_tail(
    n_rows: int, batch_size: int, tail: Tail, world_size: int, n_workers: int
) -> None:
    deal = deal_of(n_rows, batch_size, tail)
    of_rank = [
        [
            row
            for worker in range(n_workers)
            for row in rows_of(deal, Partition(rank, world_size, worker, n_workers))
        ]
        for rank in range(world_size)
    ]
    assert len({len(rows) for rows in of_rank}) == 1
    rows = np.concatenate(of_rank) % n_rows
    if tail == "drop":
        assert len(np.unique(rows)) == len(rows) == n_rows // world_size * world_size
    else:
        assert set(rows.tolist()) == set(range(n_rows))
        assert len(rows) == -(-n_rows // world_size) * world_size


@given(sizes, st.integers(1, 9), tails, st.integers(1, 5), st.integers(1, 4))
def test_mini_batches_of_a_rank_do_not_depend_on_its_workers(
    n_rows: int, batch_size: int, tail: Tail, world_size: int, n_workers: int
) -> None:
    deal = deal_of(n_rows, batch_size, tail)

    def mini_batches(n_workers: int) -> list[list[int]]:
        found = []
        for worker in range(n_workers):
            place = Partition(0, world_size, worker, n_workers)
            rows = rows_of(deal, place)
            found += [rows[k : k + batch_size] for k in range(0, len(rows), batch_size)]
            assert deal.n_mini_batches(place) == -(-len(rows) // batch_size)
        return found

    assert mini_batches(n_workers) == mini_batches(1)


@given(sizes, st.integers(1, 9), tails, stages, st.integers(1, 4), st.integers(1, 3))
def test_what_others_left_is_dealt_once_with_what_they_yielded(
    n_rows: int, batch_size: int, tail: Tail, earlier: tuple[Stage, ...], world_size: int, n_workers: int
) -> None:
    yielded: list[int] = []
    for k, stage in enumerate(earlier):
        deal = deal_of(n_rows, batch_size, tail, earlier[:k])
        for place in places(stage.world_size, stage.n_workers):
            n = n_yielded_by(place.worker_id, stage.n_workers, stage.n_yielded)
            yielded += rows_of(deal, place)[: n * batch_size]
    deal = deal_of(n_rows, batch_size, tail, earlier)
    now = [rows_of(deal, place) for place in places(world_size, n_workers)]
    real = [row for row in [*yielded, *np.concatenate(now).astype(int).tolist()] if row < n_rows]
    if tail == "drop":
        assert len(set(real)) == len(real)
        assert n_rows - len(real) < max(world_size, 1)
    else:
        assert set(real) == set(range(n_rows))


@given(sizes, st.integers(1, 9), stages, st.integers(1, 5))
def test_without_what_is_marked_as_padding_no_row_is_dealt_twice(
    n_rows: int, batch_size: int, earlier: tuple[Stage, ...], world_size: int
) -> None:
    deal = deal_of(n_rows, batch_size, "pad", earlier)
    real: list[int] = []
    for place in places(world_size, 1):
        padding = [row for start, stop in deal.padding(place) for row in range(start, stop)]
        mine = rows_of(deal, place)
        assert mine[len(mine) - len(padding) :] == padding
        real += mine[: len(mine) - len(padding)]
    assert len(set(real)) == len(real)
    assert max(real, default=0) < n_rows


def test_nothing_is_padded_where_rows_are_dropped() -> None:
    assert deal_of(10, 2, "drop").padding(Partition(3, 4, 0, 1)) == []


@given(sizes, st.integers(1, 9), tails, stages, st.integers(0, 7))
def test_skipping_leaves_out_the_first_mini_batches(
    n_rows: int, batch_size: int, tail: Tail, earlier: tuple[Stage, ...], skip: int
) -> None:
    deal, place = deal_of(n_rows, batch_size, tail, earlier), Partition(1, 2, 1, 2)
    assert rows_of(deal, place, skip) == rows_of(deal, place)[skip * batch_size :]


@pytest.mark.timeout(60)
def test_an_epoch_that_was_resumed_many_times_is_divided_at_once() -> None:
    # Each stage needs what the one before left several times over: forty stages take for ever unless that is
    # computed once.
    deal = deal_of(4_000, 7, "drop", tuple(Stage(3, 2, 1 + k % 3) for k in range(40)))
    n_left = 4_000 - 7 * 3 * sum(stage.n_yielded for stage in deal.earlier)
    found = [rows_of(deal, place) for place in places(3, 2)]
    assert sum(map(len, found)) == n_left - n_left % 3
    assert sum(map(deal.n_mini_batches, places(3, 2))) == sum(-(-len(rows) // 7) for rows in found)


@pytest.mark.parametrize(
    ("n_workers", "n_yielded", "expected"), [(3, 0, [0, 0, 0]), (3, 4, [2, 1, 1]), (1, 4, [4])]
)
def test_workers_take_turns(n_workers: int, n_yielded: int, expected: list[int]) -> None:
    assert [n_yielded_by(worker, n_workers, n_yielded) for worker in range(n_workers)] == expected


@given(sizes, st.integers(1, 9), tails, st.integers(1, 5), st.integers(1, 4))
def test_in_the_scope_partition_a_worker_is_alone_with_the_rows_of_its_partition(
    n_rows: int, batch_size: int, tail: Tail, world_size: int, n_workers: int
) -> None:
    deal = Deal(n_rows=n_rows, batch_size=batch_size, tail=tail, scope="partition")
    for place in places(world_size, n_workers):
        start, stop = place.bounds(n_rows, tail)
        assert rows_of(deal, place) == list(range(stop - start))
        assert deal.n_mini_batches(place) == -(-(stop - start) // batch_size)
        assert rows_of(deal, place, 2) == list(range(2 * batch_size, stop - start))
        assert deal.own(place)[0].n_rows == stop - start


@pytest.mark.parametrize("scope", ["partition", "global"])
@given(sizes, st.integers(1, 9), tails, st.integers(1, 5), st.integers(1, 4))
def test_a_rank_has_the_mini_batches_of_its_workers(
    scope: ShuffleScope, n_rows: int, batch_size: int, tail: Tail, world_size: int, n_workers: int
) -> None:
    deal = Deal(n_rows=n_rows, batch_size=batch_size, tail=tail, scope=scope)
    for rank in range(world_size):
        of_workers = [Partition(rank, world_size, worker, n_workers) for worker in range(n_workers)]
        expected = sum(map(deal.n_mini_batches, of_workers))
        assert deal.n_mini_batches_of_rank(world_size, n_workers) == expected
