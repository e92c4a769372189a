from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml._order.order import Order, Stored
from tiledbsoma_ml._order.plan import EpochPart, PartPlan, Plan
from tiledbsoma_ml._order.share import ALONE, Stage
from tiledbsoma_ml._order.sizes import ENOUGH_ROWS, Layout
from tiledbsoma_ml._query_ids import Partition, QueryIDs

# The batches of an epoch ----------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw any plan that a dataset makes; those without "auto" have no layout."""
    chunk = draw(st.none() | st.just("auto") | st.integers(1, 40))
    io_batch = draw(
        st.just("auto") | st.integers(1, 8).map(lambda n: n * (chunk if isinstance(chunk, int) else 9))
    )
    is_auto = "auto" in (chunk, io_batch)
    return Plan(
        shuffle_chunk_size=chunk,
        io_batch_size=io_batch,
        batch_size=draw(st.sampled_from([1, 5, 30])),
        permutes=chunk is not None and draw(st.booleans()),
        mixing=draw(st.none() | st.floats(0.8, 1.0)),
        layout=Layout(draw(st.sampled_from([1, 3, 8, 64])), 10.0, draw(st.integers(1, 250)))
        if is_auto
        else None,
    )


id_lists = st.lists(st.integers(0, 400), unique=True, max_size=150) | st.integers(0, 400).map(
    lambda n: list(range(n))
)


def batches_of(plan: Plan, joinids: Any, seed: int = 1, epoch: int = 0) -> list[list[int]]:
    ids = QueryIDs(obs_joinids=joinids, var_joinids=[0])
    return [batch.tolist() for batch in plan.id_batches(ids, seed=seed, epoch=epoch)]


def flat(batches: list[list[int]]) -> list[int]:
    return [joinid for batch in batches for joinid in batch]


@settings(max_examples=200)
@given(plan=plans(), joinids=id_lists, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_every_row_is_in_one_batch_and_no_batch_is_empty(
    plan: Plan, joinids: list[int], seed: int, epoch: int
) -> None:
    batches = batches_of(plan, joinids, seed, epoch)
    assert sorted(flat(batches)) == sorted(joinids)
    assert all(batches)


@given(plan=plans(), joinids=id_lists, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_the_same_seed_and_epoch_give_the_same_batches(
    plan: Plan, joinids: list[int], seed: int, epoch: int
) -> None:
    assert batches_of(plan, joinids, seed, epoch) == batches_of(plan, joinids, seed, epoch)


@given(plan=plans(), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_every_epoch_and_every_seed_has_its_own_order_and_without_chunks_there_is_one(
    plan: Plan, seed: int, epoch: int
) -> None:
    plan = attrs.evolve(plan, permutes=plan.shuffle_chunk_size is not None)
    orders = {
        str(flat(batches_of(plan, range(200), *which)))
        for which in [(seed, epoch), (seed, epoch + 1), (seed + 100, epoch)]
    }
    assert len(orders) == (1 if plan.shuffle_chunk_size is None else 3)


@given(plan=plans(), joinids=id_lists)
def test_what_is_not_shuffled_keeps_the_order_of_the_query(plan: Plan, joinids: list[int]) -> None:
    unshuffled = attrs.evolve(plan, shuffle_chunk_size=None, permutes=False)
    if unshuffled.io_batch_size == "auto" or unshuffled.layout is None:
        unshuffled = attrs.evolve(unshuffled, layout=Layout(8, 10.0, 50))
    assert flat(batches_of(unshuffled, joinids)) == joinids


@given(plan=plans().filter(lambda plan: plan.layout is not None), joinids=id_lists.filter(bool))
def test_with_auto_no_run_is_in_two_batches_and_so_no_tile_where_runs_are_whole_tiles(
    plan: Plan, joinids: list[int]
) -> None:
    plan = attrs.evolve(plan, shuffle_chunk_size="auto")
    assert plan.layout is not None
    sizes = plan.sizes(QueryIDs(obs_joinids=joinids, var_joinids=[0]))
    batches = batches_of(plan, joinids)
    runs = [run for batch in batches for run in {joinid // sizes.run_length for joinid in batch}]
    assert len(runs) == len(set(runs))
    if len(joinids) <= sizes.window_rows:
        assert sizes.run_length == plan.layout.row_tile
        assert len(batches) == 1


@given(plan=plans().filter(lambda plan: plan.layout is not None), joinids=id_lists, seed=st.integers(0, 99))
def test_with_auto_the_order_of_the_query_does_not_matter(plan: Plan, joinids: list[int], seed: int) -> None:
    plan = attrs.evolve(plan, shuffle_chunk_size="auto")
    assert batches_of(plan, joinids, seed) == batches_of(plan, sorted(joinids), seed)


@given(plan=plans().filter(lambda plan: plan.layout is not None), joinids=id_lists.filter(bool).map(sorted))
def test_a_batch_is_no_larger_than_the_window_but_for_its_last_chunk(plan: Plan, joinids: list[int]) -> None:
    assert plan.layout is not None
    sizes = plan.sizes(QueryIDs(obs_joinids=joinids, var_joinids=[0]))
    chunk = plan.shuffle_chunk_size if isinstance(plan.shuffle_chunk_size, int) else sizes.run_length
    assert max(map(len, batches_of(plan, joinids))) < sizes.window_rows + chunk


def test_a_batch_is_no_larger_than_the_window_where_an_unsorted_query_is_not_shuffled() -> None:
    plan = Plan(
        shuffle_chunk_size=None,
        io_batch_size="auto",
        batch_size=8,
        permutes=False,
        layout=Layout(64, 100.0, 100),
    )
    assert max(map(len, batches_of(plan, range(1000)[::-1]))) < 100 + 64


def test_an_unshuffled_query_is_read_in_windows_that_are_no_larger_than_helps() -> None:
    plan = Plan(
        shuffle_chunk_size=None,
        io_batch_size="auto",
        batch_size=8,
        permutes=False,
        layout=Layout(2048, 10.0, 10**8),
    )
    lengths = [len(batch) for batch in batches_of(plan, range(300_000))]
    assert max(lengths) <= ENOUGH_ROWS
    assert [length % 2048 for length in lengths[:-1]] == [0] * (len(lengths) - 1)


@pytest.mark.parametrize("scope", ["partition", "global"])
@pytest.mark.parametrize("size", [2, "auto"])
def test_a_plan_is_a_handful_of_objects_whatever_the_number_of_chunks(scope: Any, size: Any) -> None:
    ids = QueryIDs(obs_joinids=np.arange(100_000), var_joinids=[0])
    layout = Layout(2, 1.0) if size == "auto" else None
    plan = Plan(
        shuffle_chunk_size=size,
        io_batch_size=100,
        batch_size=10,
        permutes=True,
        scope=scope,
        layout=layout,
    )
    before = sys.getallocatedblocks()
    batches = plan.of(EpochPart(ids=ids, partition=Partition(0, 1, 0, 1), seed=0, epoch=0)).io_batches()
    next(batches)
    assert sys.getallocatedblocks() - before < 10_000  # of 50,000 chunks


def test_rows_that_repeat_come_as_often_as_the_query_has_them() -> None:
    plan = Plan(
        shuffle_chunk_size="auto",
        io_batch_size="auto",
        batch_size=4,
        permutes=True,
        layout=Layout(8, 10.0, 20),
    )
    joinids = [3, 3, 50, 7, 7, 7, 90, 11, *range(100, 140)]
    assert sorted(flat(batches_of(plan, joinids))) == sorted(joinids)


# Where neither size is "auto" the order is that of tiledbsoma-ml 0.1.0: tests/golden has its batches.
def test_numbers_are_cut_as_they_always_were() -> None:
    ids = QueryIDs(obs_joinids=np.arange(100), var_joinids=[0])
    plan = Plan(shuffle_chunk_size=4, io_batch_size=12, batch_size=5, permutes=True)
    chunks = [np.arange(4 * k, 4 * k + 4) for k in np.random.default_rng(7).permutation(25)]
    rng = np.random.default_rng(7)
    batches = np.split(np.concatenate(chunks), range(12, 100, 12))
    expected = [batch[rng.permutation(len(batch))].tolist() for batch in batches]
    assert [batch.tolist() for batch in plan.id_batches(ids, seed=7, epoch=0)] == expected


def test_a_window_has_as_many_rows_as_it_may_hold() -> None:
    layout = Layout(64, 250.0, 1000)
    plan = Plan(
        shuffle_chunk_size="auto",
        io_batch_size="auto",
        batch_size=128,
        permutes=True,
        layout=layout,
    )
    ids = QueryIDs(obs_joinids=np.arange(10_000), var_joinids=[0])
    assert plan.sizes(ids).window_rows == 1000
    assert attrs.evolve(plan, io_batch_size=500).sizes(ids).window_rows == 500
    assert attrs.evolve(plan, layout=Layout(64, 250.0, 10**8)).sizes(ids).window_rows == 10_000


# Ranks and workers, in both scopes ------------------------------------------------------------------------


def permuted(rows: NDArray[np.int64], window: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    windows = np.split(rows, range(window, len(rows), window))
    return np.concatenate([piece[rng.permutation(len(piece))] for piece in windows])


def in_chunks(rows: NDArray[np.int64], chunk: int, seed: int) -> NDArray[np.int64]:
    chunks = np.array_split(rows, range(chunk, len(rows), chunk))
    return np.concatenate([chunks[k] for k in np.random.default_rng(seed).permutation(len(chunks))])


def expected_mini_batches(plan: Plan, n_rows: int, place: Partition, seed: int) -> list[list[int]]:
    """Return what a worker yields, as the documentation has it: one array operation for each sentence."""
    assert isinstance(plan.shuffle_chunk_size, int)
    assert isinstance(plan.io_batch_size, int)
    is_global, size = plan.scope == "global", n_rows // place.world_size
    rows = np.arange(n_rows) * 2
    order = in_chunks(rows, plan.shuffle_chunk_size, seed) if is_global else rows
    share, n_real = np.array_split(order, place.world_size)[place.rank][:size], size
    if plan.tail == "pad":
        size = -(-n_rows // place.world_size)
        share = np.resize(order, size * place.world_size)[place.rank * size :][:size]
        n_real = min(max(n_rows - place.rank * size, 0), size)
    if is_global:
        window = max(1, plan.io_batch_size // plan.batch_size) * plan.batch_size
        share = np.concatenate([permuted(share[:n_real], window, seed), share[n_real:]])
    else:
        own = np.array_split(share, place.n_workers)[place.worker_id]
        share = permuted(in_chunks(own, plan.shuffle_chunk_size, seed), plan.io_batch_size, seed)
    mini_batches = [share[k : k + plan.batch_size].tolist() for k in range(0, len(share), plan.batch_size)]
    if not is_global:
        return mini_batches
    numbers = np.array_split(np.arange(len(mini_batches)), place.n_workers)[place.worker_id]
    return [mini_batches[k] for k in numbers.tolist()]


sizes_of_plans = st.fixed_dictionaries(
    {
        "shuffle_chunk_size": st.integers(1, 20),
        "n_chunks": st.integers(1, 8),
        "batch_size": st.integers(1, 30),
        "scope": st.sampled_from(["partition", "global"]),
        "tail": st.sampled_from(["drop", "pad"]),
    }
)


def plan_of(sizes: dict[str, Any]) -> Plan:
    chunk, n_chunks = sizes["shuffle_chunk_size"], sizes["n_chunks"]
    options = {name: value for name, value in sizes.items() if name != "n_chunks"}
    return Plan(**options, io_batch_size=chunk * n_chunks, permutes=True)


@settings(max_examples=400)
@given(
    sizes=sizes_of_plans,
    n_rows=st.integers(1, 300),
    world_size=st.integers(1, 4),
    n_workers=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_each_worker_yields_what_the_documentation_says(
    sizes: dict[str, Any], n_rows: int, world_size: int, n_workers: int, seed: int
) -> None:
    assume(n_rows >= world_size)
    plan, ids = plan_of(sizes), QueryIDs(obs_joinids=np.arange(n_rows) * 2, var_joinids=[0])
    for rank, worker in product(range(world_size), range(n_workers)):
        place = Partition(rank, world_size, worker, n_workers)
        planned = plan.of(EpochPart(ids=ids, partition=place, seed=seed, epoch=0))
        rows = flat([batch.tolist() for batch in planned.io_batches()])
        expected = expected_mini_batches(plan, n_rows, place, seed)
        assert rows == flat(expected)
        assert planned.n_mini_batches == len(expected)
        assert set(rows) <= set(planned.obs_joinids.tolist())


@given(
    sizes=sizes_of_plans,
    n_rows=st.integers(1, 120),
    world_size=st.integers(1, 5),
    n_workers=st.integers(1, 3),
    earlier=st.lists(st.builds(Stage, st.integers(1, 4), st.integers(1, 3), st.integers(0, 4)), max_size=2),
    permutes=st.booleans(),
)
def test_each_row_that_is_padding_is_yielded_by_another_rank_as_well(
    sizes: dict[str, Any],
    n_rows: int,
    world_size: int,
    n_workers: int,
    earlier: list[Stage],
    permutes: bool,
) -> None:
    plan = attrs.evolve(plan_of(sizes), tail="pad", permutes=permutes)
    stages = tuple(earlier) if plan.scope == "global" else ()
    ids = QueryIDs(obs_joinids=np.arange(n_rows), var_joinids=[0])
    real: list[int] = []
    every: list[int] = []
    for rank, worker in product(range(world_size), range(n_workers)):
        place = Partition(rank, world_size, worker, n_workers)
        planned = plan.of(EpochPart(ids=ids, partition=place, seed=1, epoch=0, earlier=stages))
        rows = flat([batch.tolist() for batch in planned.io_batches()])
        every += rows
        real += [row for row in rows if row not in set(planned.padding().tolist())]
    assert len(set(real)) == len(real)
    assert set(real) == set(every)


@pytest.mark.parametrize("scope", ["partition", "global"])
def test_the_order_of_a_part_is_computed_once_whatever_is_asked(scope: Any) -> None:
    plan = Plan(shuffle_chunk_size=4, io_batch_size=8, batch_size=2, permutes=True, scope=scope, tail="pad")
    ids = QueryIDs(obs_joinids=np.arange(101), var_joinids=[0])
    planned = plan.of(EpochPart(ids=ids, partition=Partition(1, 2, 0, 1), seed=0, epoch=0))
    order = planned.order
    batches: Iterator[Any] = planned.io_batches()
    next(batches)
    assert planned.padding().tolist()
    assert len(planned.obs_joinids) == 51
    assert flat([batch.tolist() for batch in planned.io_batches()])[8:] == flat([b.tolist() for b in batches])
    assert planned.order is order


@pytest.mark.parametrize("scope", ["partition", "global"])
@pytest.mark.parametrize("n_rows", [49, 51])
def test_an_order_of_another_length_than_the_query_is_refused(n_rows: int, scope: Any) -> None:
    class Resized(PartPlan):
        def draw_order(self) -> Order:
            return Stored(joinids=np.resize(self.ids.obs_joinids, n_rows))

    plan = Plan(shuffle_chunk_size=4, io_batch_size=8, batch_size=2, permutes=True, scope=scope)
    ids = QueryIDs(obs_joinids=np.arange(50), var_joinids=[0])
    planned = Resized(plan=plan, part=EpochPart(ids=ids, partition=ALONE, seed=0, epoch=0))
    with pytest.raises(ValueError, match=f"n_rows={n_rows} of Stored must be the number of joinids, 50"):
        next(planned.io_batches())


def test_what_one_reads_together_is_said_by_the_plan() -> None:
    ids = QueryIDs(obs_joinids=np.arange(1000), var_joinids=[0])

    def planned(**options: Any) -> tuple[int, int, float]:
        plan = Plan(**{"batch_size": 10, "permutes": True, **options})
        part = plan.of(EpochPart(ids=ids, partition=Partition(0, 2, 0, 1), seed=0, epoch=0))
        return part.chunk_rows, part.window_rows, part.predicted_mixing()

    numbers = {"shuffle_chunk_size": 4, "io_batch_size": 64}
    assert planned(**numbers)[:2] == (4, 64)
    assert planned(**numbers, scope="global")[:2] == (4, 60)
    assert 0.98 < planned(**numbers | {"io_batch_size": 512}, scope="global")[2] < 1
    assert 0.5 < planned(**numbers)[2] < 1
    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto", "layout": Layout(64, 1.0, 500)}
    assert planned(**auto)[:2] == (64, 500)
    assert 0.5 < planned(**auto)[2] < 1, "a rank has the rows of half of the datasets"
    sevens = {"shuffle_chunk_size": 7, "io_batch_size": "auto", "layout": Layout(64, 1.0, 250)}
    assert planned(**sevens)[:2] == (7, 252)
    assert planned(**sevens, scope="global")[:2] == (7, 250)


# Resuming -------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    n_rows=st.integers(1, 20_000),
    batch_size=st.integers(1, 200),
    chunk=st.sampled_from([1, 7, 64, "auto", None]),
    n_chunks=st.integers(1, 50),
    scope=st.sampled_from(["partition", "global"]),
    place=st.sampled_from([Partition(0, 1, 0, 1), Partition(1, 2, 2, 3), Partition(2, 3, 0, 2)]),
    share=st.floats(0, 1),
    epoch=st.integers(0, 2),
)
def test_skipping_leaves_the_rest_of_a_part_as_it_was(
    n_rows: int,
    batch_size: int,
    chunk: Any,
    n_chunks: int,
    scope: Any,
    place: Partition,
    share: float,
    epoch: int,
) -> None:
    size = chunk if isinstance(chunk, int) else 16
    plan = Plan(
        shuffle_chunk_size=chunk,
        io_batch_size=n_chunks * size,
        batch_size=batch_size,
        permutes=chunk is not None,
        layout=Layout(64, 10.0) if chunk == "auto" else None,
        scope=scope,
    )
    ids = QueryIDs(obs_joinids=np.arange(n_rows) * 2, var_joinids=[0])

    def rows(skip: int) -> list[int]:
        part = EpochPart(ids=ids, partition=place, seed=1, epoch=epoch, skip=skip)
        return np.concatenate([np.empty(0, np.int64), *plan.of(part).io_batches()]).tolist()

    whole = rows(0)
    skip = round(share * -(-len(whole) // batch_size))
    assert rows(skip) == whole[skip * batch_size :]


def test_a_plan_of_many_ranks_and_workers_over_many_rows_is_that_of_its_part() -> None:
    ids = QueryIDs(obs_joinids=np.arange(200_000), var_joinids=[0])
    plan = Plan(shuffle_chunk_size=64, io_batch_size=2048, batch_size=128, permutes=True, scope="global")
    places = [Partition(rank, 64, worker, 8) for rank, worker in product(range(64), range(8))]
    parts = [EpochPart(ids=ids, partition=place, seed=1, epoch=2) for place in places]
    rows = np.concatenate([row for part in parts for row in plan.of(part).io_batches()])
    assert len(rows) == len(np.unique(rows)) == 200_000
