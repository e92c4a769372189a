from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml._order.mixing import Sharing, predicted_mixing
from tiledbsoma_ml._order.sizes import (
    CENSUS_ROWS,
    TOLERANCE,
    Layout,
    Sizes,
    choose_sizes,
    window_borders,
)

# Windows --------------------------------------------------------------------------------------------------


def sizes_of(window_rows: int, first: int) -> Sizes:
    return Sizes(run_length=64, window_rows=window_rows, first_window_rows=first, mixing=1.0)


@given(n_rows=st.integers(1, 10_000), window=st.integers(1, 3000), data=st.data())
def test_the_first_windows_grow_by_doubling_and_the_others_are_even(
    n_rows: int, window: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(1, window))
    borders = window_borders(n_rows, sizes_of(window, first))
    lengths = np.diff([0, *borders]).tolist()
    growing = 0
    while growing < len(lengths) and lengths[growing] == first * 2**growing < window:
        growing += 1
    others = lengths[growing:]
    assert sum(lengths) == n_rows
    assert min(lengths) > 0
    assert max(lengths) <= window
    assert len(others) == 0 or max(others) - min(others) <= 1
    grown = sum(lengths[:growing])
    assert len(others) == -(-(n_rows - grown) // window)
    assert first * 2**growing >= window or grown + first * 2**growing >= n_rows


# What "auto" stands for -----------------------------------------------------------------------------------


def chosen(
    ids: NDArray[np.int64],
    row_tile: int,
    window_rows: int,
    batch_size: int,
    mixing: float | None,
    **sharing: Any,
) -> Sizes:
    layout = Layout(row_tile, 100.0)
    shared = Sharing(n_rows=len(ids), batch_size=batch_size, **sharing)
    return choose_sizes(ids, layout=layout, window_rows=window_rows, mixing=mixing, sharing=shared)


def mixing_of(ids: NDArray[np.int64], run: int, window_rows: float, batch_size: int) -> float:
    """Return the predicted mixing of runs of one process."""
    sharing = Sharing(n_rows=len(ids), batch_size=batch_size)
    chunk_rows = len(ids) / len(np.unique(ids // run))
    return predicted_mixing(sharing, chunk_rows=chunk_rows, window_rows=window_rows, ends_with_chunk=True)


def target_of(n_rows: int, batch_size: int) -> float:
    """Return the mixing to reach if none is asked for: that of the defaults, here or in a large query."""
    queries = [Sharing(n_rows=n, batch_size=batch_size) for n in (n_rows, CENSUS_ROWS)]
    found = [predicted_mixing(query, chunk_rows=64, window_rows=65_536) for query in queries]
    return min(found) - TOLERANCE


def run_lengths(row_tile: int) -> list[int]:
    """Return the tile, its half, its quarter, … longest first."""
    return [row_tile // 2**k for k in range(20) if row_tile % 2**k == 0]


queries = st.builds(
    lambda n_rows, share, seed: np.flatnonzero(np.random.default_rng(seed).random(n_rows) < share),
    st.sampled_from([1000, 20_000]),
    st.sampled_from([0.02, 0.3, 1.0]),
    st.integers(0, 9),
)


@settings(max_examples=40)
@given(
    ids=queries,
    row_tile=st.sampled_from([1, 7, 64, 96, 2048]),
    window_rows=st.integers(1, 25_000),
    batch_size=st.sampled_from([1, 16, 128, 1024]),
    mixing=st.none() | st.sampled_from([0.8, 0.9, 0.99, 1.0]),
)
def test_auto_takes_the_longest_runs_that_reach_the_target_and_windows_as_large_as_they_may_be(
    ids: NDArray[np.int64], row_tile: int, window_rows: int, batch_size: int, mixing: float | None
) -> None:
    assume(len(ids))
    sizes = chosen(ids, row_tile, window_rows, batch_size, mixing)
    n_windows = -(-len(ids) // window_rows)
    assert sizes.window_rows == -(-len(ids) // n_windows)
    assert 1 <= sizes.first_window_rows <= sizes.window_rows
    if n_windows == 1:
        assert sizes == Sizes(
            run_length=row_tile, window_rows=len(ids), first_window_rows=len(ids), mixing=1.0
        )
        return
    if row_tile == 1:  # single rows are a true shuffle, whatever the window
        assert (sizes.run_length, sizes.mixing) == (1, 1.0)
        return
    target = target_of(len(ids), batch_size) if mixing is None else mixing
    reached = {run: mixing_of(ids, run, sizes.window_rows, batch_size) for run in run_lengths(row_tile)}
    enough = [run for run in reached if reached[run] >= target]
    assert sizes.run_length == (max(enough) if enough else min(reached))
    assert sizes.mixing == pytest.approx(reached[sizes.run_length])


@settings(max_examples=40)
@given(
    n_windows=st.integers(2, 40),
    row_tile=st.sampled_from([64, 2048]),
    batch_size=st.sampled_from([16, 128, 1024]),
    mixing=st.none() | st.sampled_from([0.8, 0.9, 0.95]),
)
def test_the_first_window_is_as_small_as_mixes_well_enough_but_holds_some_mini_batches(
    n_windows: int, row_tile: int, batch_size: int, mixing: float | None
) -> None:
    ids = np.arange(400_000)
    sizes = chosen(ids, row_tile, len(ids) // n_windows, batch_size, mixing)
    target = target_of(len(ids), batch_size) if mixing is None else mixing

    def mixes(rows: float) -> bool:
        return mixing_of(ids, sizes.run_length, rows, batch_size) >= target

    if sizes.mixing >= target:
        assert mixes(sizes.first_window_rows + 1)
    else:
        assert sizes.first_window_rows == sizes.window_rows
    assert sizes.first_window_rows >= min(2 * batch_size, sizes.window_rows)
    assert sizes.first_window_rows <= 4 * batch_size or not mixes(sizes.first_window_rows / 2)


def test_where_the_window_holds_the_query_runs_are_whole_tiles_whatever_the_mixing() -> None:
    scattered = np.arange(0, 100_000, 10)
    for mixing in (None, 0.8, 1.0):
        sizes = chosen(scattered, 2048, 10_000, 1024, mixing)
        assert sizes == Sizes(run_length=2048, window_rows=10_000, first_window_rows=10_000, mixing=1.0)


def test_a_mixing_of_one_takes_runs_of_one_row_where_the_window_does_not_hold_the_query() -> None:
    sizes = chosen(np.arange(100_000), 2048, 50_000, 1024, 1.0)
    assert (sizes.run_length, sizes.window_rows, sizes.first_window_rows) == (1, 50_000, 3125)
    assert chosen(np.arange(100_000), 96, 50_000, 1024, 1.0).run_length == 3


def test_better_mixing_is_bought_with_shorter_runs() -> None:
    runs = [
        chosen(np.arange(2_000_000), 2048, 300_000, 1024, mixing).run_length
        for mixing in (0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
    ]
    assert runs == sorted(runs, reverse=True)
    assert len(set(runs)) >= 4


def test_scattered_rows_are_taken_in_longer_runs_because_these_hold_fewer_of_them() -> None:
    dense, scattered = np.arange(500_000), np.arange(500_000) * 10
    of_dense, of_scattered = (chosen(ids, 2048, 100_000, 1024, None) for ids in (dense, scattered))
    assert (of_dense.run_length, of_scattered.run_length) == (128, 1024)
    assert of_scattered.mixing >= target_of(500_000, 1024)


# The table in shared/design.md: 2 GiB hold some 262,000 to 340,000 rows of a Census of 100 million cells.
def test_a_census_of_a_hundred_million_cells_is_read_in_runs_of_256_to_512_rows() -> None:
    sizes = chosen(np.arange(100_000_000), 2048, 300_000, 1024, None)
    assert sizes.run_length in (256, 512)
    assert 0.98 * 300_000 <= sizes.window_rows <= 300_000
    assert sizes.mixing >= 0.95


def test_ranks_that_share_the_rows_need_windows_for_their_share_only() -> None:
    ids = np.arange(100_000)
    for world_size, window_rows in ((1, 50_000), (4, 25_000), (10, 10_000)):
        shared = {"world_size": world_size, "scope": "global"}
        assert chosen(ids, 2048, 50_000, 1024, None, **shared).window_rows == window_rows


def test_ranks_that_share_the_rows_take_shorter_runs_though_a_window_holds_a_share() -> None:
    ids = np.arange(200_000)
    runs = [
        chosen(ids, 2048, 10**9, 1024, None, scope="global", world_size=n).run_length for n in (1, 2, 4, 8)
    ]
    assert runs == [2048, 512, 128, 64]
    many = Sharing(n_rows=200_000, batch_size=1024, scope="global", world_size=16)
    defaults = predicted_mixing(many, chunk_rows=64, window_rows=65_536)
    assert chosen(ids, 2048, 10**9, 1024, None, scope="global", world_size=16).mixing >= defaults - TOLERANCE


def test_workers_change_no_size_in_the_scope_global() -> None:
    ids = np.arange(200_000)
    one, many = (
        chosen(ids, 2048, 30_000, 128, None, scope="global", world_size=2, n_workers=n) for n in (1, 4)
    )
    assert one == many


@settings(max_examples=30)
@given(
    world_size=st.integers(1, 16),
    n_workers=st.integers(1, 4),
    window_rows=st.integers(1000, 100_000),
    mixing=st.none() | st.sampled_from([0.8, 0.9, 1.0]),
)
def test_the_sizes_of_a_part_are_those_of_its_rows_alone_but_mixing_is_that_of_the_whole_query(
    world_size: int, n_workers: int, window_rows: int, mixing: float | None
) -> None:
    shared = Sharing(n_rows=500_000, batch_size=128, world_size=world_size, n_workers=n_workers)
    part, layout = np.arange(500_000 // shared.n_parts), Layout(2048, 1.0)
    sizes = choose_sizes(part, layout=layout, window_rows=window_rows, mixing=mixing, sharing=shared)
    alone = chosen(part, 2048, window_rows, 128, mixing)
    assert attrs.evolve(sizes, mixing=0.0) == attrs.evolve(alone, mixing=0.0)
    most = predicted_mixing(shared, chunk_rows=1, window_rows=len(part))
    assert sizes.mixing <= most + TOLERANCE
    assert sizes.mixing == alone.mixing or shared.n_parts > 1


def test_where_every_row_can_be_read_by_itself_a_window_is_no_larger_than_helps() -> None:
    sizes = chosen(np.arange(200_000), 1, 10**9, 128, None)
    assert sizes.window_rows == 50_000
    assert chosen(np.arange(200_000), 2, 10**9, 128, None).window_rows == 200_000
