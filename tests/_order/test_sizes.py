from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml._order.sizes import (
    REFERENCE_CHUNKS,
    TOLERANCE,
    Layout,
    Sizes,
    choose_sizes,
    predicted_mixing,
    window_borders,
)

# Predicted mixing -----------------------------------------------------------------------------------------


# "How well a window mixes" in shared/design.md, for mini-batches of 1,024: chunks in a window, and datasets.
@pytest.mark.parametrize(
    ("n_chunks", "mixing"), [(1024, 0.96), (32, 0.59), (166, 0.83), (332, 0.89), (664, 0.94), (1328, 0.97)]
)
def test_the_prediction_agrees_with_the_simulated_census(n_chunks: int, mixing: float) -> None:
    assert predicted_mixing(n_chunks, 1024) == pytest.approx(mixing, abs=0.03)


@given(
    n_chunks=st.floats(1, 10**7),
    factor=st.floats(1, 100),
    batch_size=st.sampled_from([1, 2, 16, 128, 1024, 4096, 100_000]),
)
def test_more_chunks_in_a_window_never_mix_worse_and_never_better_than_at_random(
    n_chunks: float, factor: float, batch_size: int
) -> None:
    fewer, more = (predicted_mixing(n, batch_size) for n in (n_chunks, n_chunks * factor))
    assert fewer <= more + 1e-9
    assert more <= 1 + 1e-9


def test_mini_batches_of_few_rows_are_judged_by_16_that_follow_each_other() -> None:
    assert {predicted_mixing(32, batch_size) for batch_size in (1, 2, 16)} == {predicted_mixing(32, 16)}
    assert 0 == predicted_mixing(1, 2) < predicted_mixing(32, 2) < 1


@pytest.mark.parametrize("batch_size", [1, 32, 1024, 10**6])
def test_a_window_of_countless_chunks_mixes_like_a_random_order(batch_size: int) -> None:
    assert predicted_mixing(10**9, batch_size) == pytest.approx(1.0, abs=1e-4)


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
    world_size: int = 1,
) -> Sizes:
    return choose_sizes(
        ids,
        layout=Layout(row_tile, 100.0),
        window_rows=window_rows,
        batch_size=batch_size,
        mixing=mixing,
        world_size=world_size,
    )


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
    target = predicted_mixing(REFERENCE_CHUNKS, batch_size) - TOLERANCE if mixing is None else mixing
    reached = {
        run: predicted_mixing(sizes.window_rows * len(np.unique(ids // run)) / len(ids), batch_size)
        for run in run_lengths(row_tile)
    }
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
    target = predicted_mixing(REFERENCE_CHUNKS, batch_size) - TOLERANCE if mixing is None else mixing

    def mixes(rows: float) -> bool:
        return predicted_mixing(rows / sizes.run_length, batch_size) >= target

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
    assert (sizes.run_length, sizes.window_rows, sizes.first_window_rows) == (1, 50_000, 50_000)
    assert chosen(np.arange(100_000), 96, 50_000, 1024, 1.0).run_length == 3


def test_better_mixing_is_bought_with_shorter_runs() -> None:
    runs = [
        chosen(np.arange(2_000_000), 2048, 300_000, 1024, mixing).run_length
        for mixing in (0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
    ]
    assert runs == sorted(runs, reverse=True)
    assert len(set(runs)) >= 5


def test_scattered_rows_are_taken_in_longer_runs_because_these_hold_fewer_of_them() -> None:
    dense, scattered = np.arange(500_000), np.arange(500_000) * 10
    of_dense, of_scattered = (chosen(ids, 2048, 100_000, 1024, None) for ids in (dense, scattered))
    assert (of_dense.run_length, of_scattered.run_length) == (64, 1024)
    assert of_scattered.mixing >= predicted_mixing(REFERENCE_CHUNKS, 1024) - TOLERANCE


# The table in shared/design.md: 2 GiB hold some 262,000 to 340,000 rows of a Census of 100 million cells.
def test_a_census_of_a_hundred_million_cells_is_read_in_runs_of_256_to_512_rows() -> None:
    sizes = chosen(np.arange(100_000_000), 2048, 300_000, 1024, None)
    assert sizes.run_length in (256, 512)
    assert 0.98 * 300_000 <= sizes.window_rows <= 300_000
    assert sizes.mixing >= 0.95


def test_ranks_that_share_the_rows_need_windows_for_their_share_only() -> None:
    ids = np.arange(100_000)
    assert chosen(ids, 2048, 30_000, 1024, None, world_size=4) == Sizes(
        run_length=2048, window_rows=25_000, first_window_rows=25_000, mixing=1.0
    )
    assert chosen(ids, 2048, 20_000, 1024, None, world_size=4).window_rows == 12_500


def test_where_every_row_can_be_read_by_itself_a_window_is_no_larger_than_helps() -> None:
    sizes = chosen(np.arange(200_000), 1, 10**9, 128, None)
    assert sizes.window_rows == 50_000
    assert chosen(np.arange(200_000), 2, 10**9, 128, None).window_rows == 200_000
