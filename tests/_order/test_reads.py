from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._order.plan import EpochPart, PartPlan, Plan
from tiledbsoma_ml._order.reads import ReadSize, chunks_per_tile, tile_rows
from tiledbsoma_ml._order.share import ALONE
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import Partition, QueryIDs

TILE = 512


def planned(
    obs_joinids: np.ndarray,
    chunk: int | str | None,
    io_batch: int | str,
    *,
    partition: Partition = ALONE,
    scope: str = "partition",
    seed: int = 0,
) -> PartPlan:
    layout = Layout(TILE, 100.0, 4096) if "auto" in (chunk, io_batch) else None
    plan = Plan(
        shuffle_chunk_size=chunk,  # type: ignore[arg-type]
        io_batch_size=io_batch,  # type: ignore[arg-type]
        batch_size=16,
        permutes=chunk is not None,
        layout=layout,
        scope=scope,  # type: ignore[arg-type]
    )
    ids = QueryIDs(obs_joinids=obs_joinids, var_joinids=[0])
    return plan.of(EpochPart(ids=ids, partition=partition, seed=seed, epoch=0))


def n_times_decoded(part: PartPlan, read_rows: int) -> float:
    """Count how often a tile is decoded in an epoch of reads of about so many rows."""
    io_batches = list(part.io_batches())
    n_io_batches = round(read_rows / len(io_batches[-2])) if len(io_batches) > 1 else 1
    if n_io_batches:
        groups = [io_batches[i : i + n_io_batches] for i in range(0, len(io_batches), n_io_batches)]
        reads = [np.concatenate(group) for group in groups]
    else:
        reads = [
            io_batch[i : i + read_rows] for io_batch in io_batches for i in range(0, len(io_batch), read_rows)
        ]
    n_tiles = part.read_sizes(TILE).n_rows / tile_rows(part.ids.obs_joinids, TILE)
    return sum(len(np.unique(read // TILE)) for read in reads) / n_tiles


DENSE, SCATTERED = np.arange(40_960), np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.3)


@pytest.mark.parametrize("obs_joinids", [DENSE, SCATTERED], ids=["all", "scattered"])
@pytest.mark.parametrize("read_rows", [300, 4100, 8200, 10**6])
@pytest.mark.parametrize("chunk", [1, 16, 64, 500, 512, 2000, None, "auto"])
def test_what_is_decoded_is_predicted(
    obs_joinids: np.ndarray, chunk: int | str | None, read_rows: int
) -> None:
    parts = [planned(obs_joinids, chunk, "auto" if chunk == "auto" else 4100, seed=seed) for seed in range(3)]
    counted = np.mean([n_times_decoded(part, read_rows) for part in parts])
    predicted = parts[0].read_sizes(TILE).n_times_decoded(read_rows)
    assert predicted == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(("scope", "chunk"), [("partition", 16), ("global", 16), ("global", 512)])
@pytest.mark.parametrize("read_rows", [1024, 4096])
def test_what_a_rank_of_many_decodes_is_predicted(scope: str, chunk: int, read_rows: int) -> None:
    part = planned(DENSE, chunk, 1024, partition=Partition(1, 4, 0, 1), scope=scope)
    counted = n_times_decoded(part, read_rows)
    assert part.read_sizes(TILE).n_times_decoded(read_rows) == pytest.approx(counted, rel=0.15)


def test_tiles_and_chunks_of_many_rows_are_counted_on_some() -> None:
    obs_joinids = np.arange(3_000_000) * 2
    assert tile_rows(obs_joinids, 2048) == pytest.approx(1024, rel=0.02)
    assert chunks_per_tile(obs_joinids, 2048, 64) == 16
    assert chunks_per_tile(obs_joinids, 2048, 1024) == 1
    assert chunks_per_tile(obs_joinids, 2048, 1536) == pytest.approx(4 / 3, rel=0.02)


@pytest.mark.parametrize(
    ("n_rows", "n_held", "expected"),
    [
        (40_960, 50_000, [40_960]),  # one IO batch decodes nearly as many tiles as all rows
        (40_960, 30_000, [20_480, 20_480]),  # and so does half of the rows: both reads are as large
        (10**6, 50_000, [1, 49_796, 49_800]),  # training waits for the first read: one IO batch
        (10**6, 3000, [2995, 2995]),  # memory does not hold an IO batch
    ],
)
def test_reads_are_as_large_as_memory_holds_but_for_a_first_one_that_is_quick(
    n_rows: int, n_held: int, expected: list[int]
) -> None:
    sizes = planned(np.arange(n_rows), 16, 4096).read_sizes(TILE)
    n_left = n_rows
    for wanted in expected:
        size = sizes.choose(n_left, n_held)
        assert size.n_rows == pytest.approx(wanted, rel=2e-3)
        assert size.most == (int(1.1 * n_held) if wanted == 1 else n_held)
        n_left -= size.n_rows if wanted > 1 else 4096


@pytest.mark.parametrize(
    ("chunk", "io_batch", "n_held"),
    [(512, 4096, 20_000), ("auto", 4000, 4000), (None, 4096, 20_000), (16, 50_000, 50_000)],
)
def test_where_more_at_once_saves_nothing_each_io_batch_is_a_read(
    chunk: int | None, io_batch: int, n_held: int
) -> None:
    size = planned(DENSE, chunk, io_batch).read_sizes(TILE).choose(len(DENSE), n_held)
    assert size.n_rows == 1


def test_small_reads_of_rows_in_order_are_made_larger_as_a_tile_would_be_decoded_by_each() -> None:
    size = planned(DENSE, None, 64).read_sizes(TILE).choose(len(DENSE) - 64, 4096)
    assert size == ReadSize(n_rows=4090, most=4096)


@given(
    n_rows=st.integers(1, 20_000),
    chunk=st.integers(1, 3000) | st.none(),
    io_batch=st.integers(1, 3000),
    n_held=st.integers(1, 30_000),
    row_tile=st.integers(1, 5000),
)
def test_a_read_has_a_row_and_no_more_than_memory_holds(
    n_rows: int, chunk: int | None, io_batch: int, n_held: int, row_tile: int
) -> None:
    sizes = planned(np.arange(n_rows), chunk, io_batch).read_sizes(row_tile)
    assert sizes.n_times_decoded(n_rows) == pytest.approx(1)
    n_left = n_rows
    for _ in range(10):
        size = sizes.choose(n_left, n_held)
        assert 1 <= size.n_rows <= size.most <= 1.1 * n_held
        n_left -= min(n_left, size.n_rows)
        if not n_left:
            break


def test_the_documented_defaults_decode_tiles_many_times_unless_memory_holds_the_query() -> None:
    sizes = planned(np.arange(500_000), 64, 65_536).read_sizes(2048)
    assert sizes.predicted_amplification(500_000) == 1
    assert sizes.predicted_amplification(250_000) == pytest.approx(2)
    assert sizes.predicted_amplification(65_536) == pytest.approx(8, abs=0.2)
    sizes = planned(np.arange(20_000_000), 64, 65_536).read_sizes(2048)
    assert sizes.predicted_amplification(340_000) == pytest.approx(25, abs=1)
    sizes = planned(np.arange(20_000_000), 2048, 65_536).read_sizes(2048)
    assert sizes.predicted_amplification(340_000) == pytest.approx(1, abs=0.01)
