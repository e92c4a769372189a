from __future__ import annotations

import re
import sys
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml import _plan
from tiledbsoma_ml._budget import FIXED_BYTES, MIN_BUDGET, Budget, parse_bytes
from tiledbsoma_ml._plan import (
    REFERENCE_CHUNKS,
    TOLERANCE,
    UNSHUFFLED_ROWS,
    EpochPart,
    Layout,
    Plan,
    Sizes,
    choose_sizes,
    predicted_mixing,
    read_amplification,
    window_borders,
)
from tiledbsoma_ml._query_ids import Partition, QueryIDs

GIB, MIB = 2**30, 2**20

# Budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "n_bytes"),
    [
        (MIN_BUDGET, 64 * MIB),
        (10**12, 10**12),
        ("2GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        ("2 GiB", 2 * GIB),
        (" 2GiB ", 2 * GIB),
        ("2Gi", 2 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("2GB", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("64MiB", 64 * MIB),
        ("512m", 512 * 10**6),
        ("100000KiB", 100_000 * 1024),
        ("3TiB", 3 * 2**40),
        ("1TB", 10**12),
        ("134217728", 128 * MIB),
        ("134217728B", 128 * MIB),
    ],
)
def test_a_budget_is_a_number_of_bytes_or_a_string_with_a_unit(value: int | str, n_bytes: int) -> None:
    assert parse_bytes("memory_budget", value) == n_bytes


@given(n_bytes=st.integers(MIN_BUDGET, 2**60))
def test_a_number_and_its_digits_are_the_same_budget(n_bytes: int) -> None:
    assert parse_bytes("memory_budget", n_bytes) == n_bytes
    assert parse_bytes("memory_budget", f"{n_bytes // MIB}MiB") == n_bytes // MIB * MIB


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "memory_budget=0 must be at least 64 MiB; try '2GiB'."),
        (-1, ValueError, "memory_budget=-1 must be at least 64 MiB; try '2GiB'."),
        (MIN_BUDGET - 1, ValueError, "memory_budget=67108863 must be at least 64 MiB; try '2GiB'."),
        ("63MiB", ValueError, "memory_budget='63MiB' must be at least 64 MiB; try '2GiB'."),
        ("64MB", ValueError, "memory_budget='64MB' must be at least 64 MiB; try '2GiB'."),
        ("2", ValueError, "memory_budget='2' must be at least 64 MiB; try '2GiB'."),
        (True, TypeError, "memory_budget=True must be a number of bytes or a string; "),
        (2e9, TypeError, "memory_budget=2000000000.0 must be a number of bytes or a string; "),
        (None, TypeError, "memory_budget=None must be a number of bytes or a string; "),
        ([1], TypeError, "memory_budget=[1] must be a number of bytes or a string; "),
        (
            "2 apples",
            ValueError,
            "memory_budget='2 apples' must be a number of bytes, with a unit or without;",
        ),
        ("", ValueError, "memory_budget='' must be a number of bytes, with a unit or without; try '2GiB'."),
        ("-2GiB", ValueError, "memory_budget='-2GiB' must be a number of bytes, with a unit or without; "),
        ("GiB", ValueError, "memory_budget='GiB' must be a number of bytes, with a unit or without; "),
        ("1e9", ValueError, "memory_budget='1e9' must be a number of bytes, with a unit or without; "),
        ("2GiB 1", ValueError, "memory_budget='2GiB 1' must be a number of bytes, with a unit or without; "),
        ("inf", ValueError, "memory_budget='inf' must be a number of bytes, with a unit or without; "),
    ],
)
def test_a_bad_budget_is_refused_in_one_sentence_with_an_example(
    value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        parse_bytes("memory_budget", value)
    assert str(caught.value).startswith(message)
    assert re.search(r"; try (memory_budget=)?'2GiB'\.$", str(caught.value))


def test_the_minimum_is_the_callers() -> None:
    assert parse_bytes("window_budget", "1MiB", minimum=MIB) == MIB
    with pytest.raises(ValueError, match=r"^window_budget='1MiB' must be at least 2 MiB"):
        parse_bytes("window_budget", "1MiB", minimum=2 * MIB)


def test_a_numpy_integer_is_an_integer() -> None:
    assert parse_bytes("memory_budget", np.int64(GIB)) == GIB


def test_a_string_of_too_many_digits_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="memory_budget="):
        parse_bytes("memory_budget", "9" * 400 + "TiB")


@given(total=st.integers(MIN_BUDGET, 2**50), is_remote=st.booleans())
@example(total=MIN_BUDGET, is_remote=False)
def test_the_parts_of_a_budget_are_within_it(total: int, is_remote: bool) -> None:
    budget = Budget(total, is_remote)
    assert budget.windows + budget.tiledb + 9 * budget.buffer + min(FIXED_BYTES, total // 2) <= total
    assert 16 * MIB <= budget.tiledb <= total / 4
    assert MIB <= budget.buffer <= total / 64


@given(total=st.integers(MIN_BUDGET, 2**40), more=st.integers(1, 2**40))
def test_of_a_larger_budget_no_part_is_smaller(total: int, more: int) -> None:
    small, large = Budget(total), Budget(total + more)
    assert large.tiledb >= small.tiledb
    assert large.buffer >= small.buffer
    if more >= MIB:
        assert large.windows > small.windows


@pytest.mark.parametrize(("total", "least_share"), [(256 * MIB, 0.3), (GIB, 0.55), (2 * GIB, 0.7)])
def test_most_of_a_large_budget_is_for_windows(total: int, least_share: float) -> None:
    assert Budget(total).windows >= least_share * total


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


# Read amplification ---------------------------------------------------------------------------------------


@given(
    chunk=st.integers(1, 5000),
    io_batch=st.integers(1, 10**6),
    tile=st.integers(1, 5000),
    n=st.integers(1, 10**7),
)
def test_tiles_are_decoded_once_at_least_and_once_per_chunk_or_io_batch_at_most(
    chunk: int, io_batch: int, tile: int, n: int
) -> None:
    times = read_amplification(chunk, io_batch, tile, n)
    assert 1 <= times <= max(1, n / io_batch) + 1e-9
    assert times <= max(1, tile / chunk) + 1e-6 or n < tile


def test_tiles_are_decoded_once_where_an_io_batch_holds_the_query_or_tiles_are_as_small_as_chunks() -> None:
    assert read_amplification(64, 10**6, 2048, 500_000) == 1
    assert read_amplification(64, 65_536, 64, 500_000) == 1
    assert read_amplification(2048, 65_536, 2048, 500_000) == 1


def test_the_documented_defaults_decode_tiles_of_the_census_layout_many_times() -> None:
    assert read_amplification(64, 65_536, 2048, 500_000) == pytest.approx(7.5, abs=0.3)
    assert read_amplification(64, 65_536, 2048, 100_000_000) == pytest.approx(32, abs=1)


@pytest.mark.parametrize(
    ("chunk", "io_batch", "tile"), [(16, 2048, 512), (64, 1024, 512), (64, 8192, 1024), (512, 4096, 512)]
)
def test_the_prediction_agrees_with_chunks_that_are_shuffled_and_counted(
    chunk: int, io_batch: int, tile: int
) -> None:
    ids = QueryIDs(obs_joinids=np.arange(40_960), var_joinids=[0])
    plan = Plan(shuffle_chunk_size=chunk, io_batch_size=io_batch, batch_size=1, permutes=True)
    n_decoded = [
        len(np.unique(batch // tile))
        for seed in range(5)
        for batch in plan.id_batches(ids, seed=seed, epoch=0)
    ]
    counted = sum(n_decoded) / 5 / (40_960 / tile)
    assert read_amplification(chunk, io_batch, tile, 40_960) == pytest.approx(counted, rel=0.06)


# Chunks that follow tiles ---------------------------------------------------------------------------------

sorted_ids = st.builds(
    lambda ids, gaps: np.sort(np.array(ids, dtype=np.int64)) * gaps,
    st.lists(st.integers(0, 300), max_size=60) | st.integers(0, 300).map(lambda n: list(range(n))),
    st.sampled_from([1, 3, 100]),
)


@given(ids=sorted_ids, run_length=st.integers(1, 70))
def test_chunks_are_the_ids_of_each_run_that_has_any(ids: NDArray[np.int64], run_length: int) -> None:
    chunks = np.split(ids, _plan._chunk_starts(ids, run_length)[1:]) if len(ids) else []
    assert np.concatenate([*chunks, np.empty(0, np.int64)]).tolist() == ids.tolist()
    runs = [set((chunk // run_length).tolist()) for chunk in chunks]
    assert all(len(run) == 1 for run in runs)
    assert len(set().union(*runs)) == len(chunks)


def test_chunks_of_millions_of_ids_are_the_same_as_of_few() -> None:
    ids = np.flatnonzero(np.random.default_rng(0).random(4 * 2**20) < 0.6)
    assert len(ids) > 2 * 2**20
    starts = _plan._chunk_starts(ids, 2048)
    assert np.array_equal(starts, np.unique(ids // 2048, return_index=True)[1])


# Windows --------------------------------------------------------------------------------------------------


def sizes_of(window_rows: int, first: int | None = None) -> Sizes:
    return Sizes(64, window_rows, window_rows if first is None else first, 1.0)


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


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    window=st.integers(1, 200),
    first=st.integers(1, 200),
    seed=st.none() | st.integers(0, 9),
)
def test_every_chunk_is_in_one_batch_which_ends_with_the_chunk_in_which_its_border_lies(
    lengths: list[int], window: int, first: int, seed: int | None
) -> None:
    ids = np.random.default_rng(1).permutation(5000)[: sum(lengths)]
    ends = np.cumsum(lengths)
    borders = window_borders(len(ids), sizes_of(window, min(first, window)))
    rng = None if seed is None else np.random.default_rng(seed)
    in_order = _plan._Sequence(ids, np.arange, ends)
    batches = list(_plan._batches(in_order, _plan._next_ends(ends, borders), rng, 0))
    stops = np.cumsum([len(batch) for batch in batches])
    assert stops.tolist() == sorted({int(ends[ends >= border].min()) for border in borders})
    replay = np.random.default_rng(seed)
    for batch, stop in zip(batches, stops, strict=True):
        expected = ids[stop - len(batch) : stop]
        order = slice(None) if rng is None else replay.permutation(len(batch))
        assert batch.tolist() == expected[order].tolist()


# What "auto" stands for -----------------------------------------------------------------------------------


def run_lengths(row_tile: int) -> list[int]:
    """Return the tile, its half, its quarter, … longest first."""
    return [row_tile // 2**k for k in range(20) if row_tile % 2**k == 0]


queries = st.builds(
    lambda n_rows, share, seed: np.flatnonzero(np.random.default_rng(seed).random(n_rows) < share),
    st.sampled_from([1000, 20_000]),
    st.sampled_from([0.02, 0.3, 1.0]),
    st.integers(0, 9),
)


@settings(max_examples=60)
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
    sizes = choose_sizes(ids, Layout(row_tile, 100.0), window_rows, batch_size, mixing)
    n_windows = -(-len(ids) // window_rows)
    assert sizes.window_rows == -(-len(ids) // n_windows)
    assert 1 <= sizes.first_window_rows <= sizes.window_rows
    if n_windows == 1:
        assert sizes == Sizes(row_tile, len(ids), len(ids), 1.0)
        return
    target = predicted_mixing(REFERENCE_CHUNKS, batch_size) - TOLERANCE if mixing is None else mixing
    reached = {
        run: predicted_mixing(sizes.window_rows * len(np.unique(ids // run)) / len(ids), batch_size)
        for run in run_lengths(row_tile)
    }
    enough = [run for run in reached if reached[run] >= target]
    assert sizes.run_length == (max(enough) if enough else min(reached))
    assert sizes.mixing == pytest.approx(reached[sizes.run_length])


@settings(max_examples=60)
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
    sizes = choose_sizes(ids, Layout(row_tile, 100.0), len(ids) // n_windows, batch_size, mixing)
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
        sizes = choose_sizes(scattered, Layout(2048, 100.0), 10_000, 1024, mixing)
        assert sizes == Sizes(2048, 10_000, 10_000, 1.0)


def test_a_mixing_of_one_takes_runs_of_one_row_where_the_window_does_not_hold_the_query() -> None:
    sizes = choose_sizes(np.arange(100_000), Layout(2048, 100.0), 50_000, 1024, 1.0)
    assert (sizes.run_length, sizes.window_rows, sizes.first_window_rows) == (1, 50_000, 50_000)
    assert choose_sizes(np.arange(100_000), Layout(96, 100.0), 50_000, 1024, 1.0).run_length == 3


def test_better_mixing_is_bought_with_shorter_runs() -> None:
    runs = [
        choose_sizes(np.arange(2_000_000), Layout(2048, 100.0), 300_000, 1024, mixing).run_length
        for mixing in (0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
    ]
    assert runs == sorted(runs, reverse=True)
    assert len(set(runs)) >= 5


def test_scattered_rows_are_taken_in_longer_runs_because_these_hold_fewer_of_them() -> None:
    dense, scattered = np.arange(500_000), np.arange(500_000) * 10
    options = {"window_rows": 100_000, "batch_size": 1024, "mixing": None, "layout": Layout(2048, 100.0)}
    of_dense, of_scattered = choose_sizes(dense, **options), choose_sizes(scattered, **options)
    assert (of_dense.run_length, of_scattered.run_length) == (64, 1024)
    assert of_scattered.mixing >= predicted_mixing(REFERENCE_CHUNKS, 1024) - TOLERANCE


# The table in shared/design.md: 2 GiB hold some 262,000 to 340,000 rows of a Census of 100 million cells.
@pytest.mark.parametrize("window_rows", [262_000, 340_000])
def test_a_census_of_a_hundred_million_cells_is_read_in_runs_of_256_to_512_rows(window_rows: int) -> None:
    sizes = choose_sizes(np.arange(100_000_000), Layout(2048, 8192.0), window_rows, 1024, None)
    assert sizes.run_length in (256, 512)
    assert 0.98 * window_rows <= sizes.window_rows <= window_rows
    assert sizes.mixing >= 0.95


def test_the_window_holds_as_many_rows_as_the_bytes_allow() -> None:
    layout = Layout(64, 250.0)
    plan = Plan(
        shuffle_chunk_size="auto",
        io_batch_size="auto",
        batch_size=128,
        permutes=True,
        layout=layout,
        window_bytes=250 * 1000,
    )
    ids = QueryIDs(obs_joinids=np.arange(10_000), var_joinids=[0])
    assert plan.sizes(ids).window_rows == 1000
    assert attrs.evolve(plan, io_batch_size=500).sizes(ids).window_rows == 500
    assert attrs.evolve(plan, window_bytes=10**9).sizes(ids).window_rows == 10_000


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
        layout=Layout(draw(st.sampled_from([1, 3, 8, 64])), 10.0) if is_auto else None,
        window_bytes=draw(st.integers(10, 2500)) if is_auto else 0,
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
        unshuffled = attrs.evolve(unshuffled, layout=Layout(8, 10.0), window_bytes=500)
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
        layout=Layout(64, 100.0),
        window_bytes=100 * 100,
    )
    assert max(map(len, batches_of(plan, range(1000)[::-1]))) < 100 + 64


def test_an_unshuffled_query_is_read_in_windows_that_are_no_larger_than_helps() -> None:
    plan = Plan(
        shuffle_chunk_size=None,
        io_batch_size="auto",
        batch_size=8,
        permutes=False,
        layout=Layout(2048, 10.0),
        window_bytes=10**9,
    )
    lengths = [len(batch) for batch in batches_of(plan, range(300_000))]
    assert max(lengths) <= UNSHUFFLED_ROWS
    assert [length % 2048 for length in lengths[:-1]] == [0] * (len(lengths) - 1)


@settings(max_examples=200)
@given(plan=plans(), joinids=id_lists, seed=st.integers(0, 99), data=st.data())
def test_what_is_skipped_is_left_out_and_the_rest_comes_in_the_same_order(
    plan: Plan, joinids: list[int], seed: int, data: st.DataObject
) -> None:
    ids = QueryIDs(obs_joinids=joinids, var_joinids=[0])
    skip = data.draw(st.integers(0, len(joinids)))
    left = [batch.tolist() for batch in plan.id_batches(ids, seed=seed, epoch=0, skip=skip)]
    assert flat(left) == flat(batches_of(plan, joinids, seed))[skip:]
    assert all(left)


@given(
    size=st.integers(1, 70),
    joinids=id_lists.filter(bool),
    seed=st.integers(0, 99),
    run_length=st.none() | st.integers(1, 70),
    data=st.data(),
)
def test_any_stretch_of_shuffled_chunks_is_that_of_the_chunks_put_end_to_end_over_and_over(
    size: int, joinids: list[int], seed: int, run_length: int | None, data: Any
) -> None:
    ids, rng = np.sort(joinids), np.random.default_rng(seed)
    if run_length is None:
        starts = np.arange(0, len(ids), size)
        sequence = _plan._Sequence(ids, _plan.shuffled_chunks(len(ids), size, np.random.default_rng(seed)))
    else:
        starts = _plan._chunk_starts(ids, run_length)
        tiles = _plan.shuffled_tiles(ids, run_length, np.random.default_rng(seed))
        sequence = _plan._Sequence(ids, *tiles)
    chunks = np.split(ids, starts[1:])
    whole = np.concatenate([chunks[k] for k in rng.permutation(len(chunks))])
    start, stop = sorted(data.draw(st.integers(0, 2 * len(ids))) for _ in range(2))
    with mock.patch.object(_plan._Sequence, "BLOCK", data.draw(st.sampled_from([1, 7, 2**18]))):
        assert sequence.rows(start, stop).tolist() == np.tile(whole, 2)[start:stop].tolist()


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
    batches = plan.batches_of(EpochPart(ids=ids, place=Partition(0, 1, 0, 1), seed=0, epoch=0))
    next(batches)
    assert sys.getallocatedblocks() - before < 10_000  # of 50,000 chunks


def test_rows_that_repeat_come_as_often_as_the_query_has_them() -> None:
    plan = Plan(
        shuffle_chunk_size="auto",
        io_batch_size="auto",
        batch_size=4,
        permutes=True,
        layout=Layout(8, 10.0),
        window_bytes=200,
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
