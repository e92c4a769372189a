"""Sizes that are chosen, budgets and windows, through datasets on real experiments."""

from __future__ import annotations

import gc
import logging
import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import N_OBS, N_VARS, Store, expected_X, joinids_of, make_obs, workers
from tiledbsoma_ml import ExperimentDataset, QueryIDs, experiment_dataloader
from tiledbsoma_ml._dataset import mini_batches as mini_batches_module
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._dataset import auto as _auto
from tiledbsoma_ml._device import DeviceRows
from tiledbsoma_ml._order import sizes as order_sizes
from tiledbsoma_ml._order.plan import Plan
from tiledbsoma_ml._soma import reader as _reader
from tiledbsoma_ml._soma import source as _soma_source
from tiledbsoma_ml._soma.reader import SOMAReader
from tiledbsoma_ml._soma.window import Room, Window, preload_kernels

# torch says once per process that its CSR layout is in beta, and that it does not check it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

LONG = 1_000  # seconds; only a failure waits as long

AUTO = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
N_ROWS, TILE = 2000, 32


@pytest.fixture(scope="session")
def large(make_store: Callable[..., Store]) -> Store:
    """2,000 rows in tiles of 32."""
    return make_store(obs_joinids=range(N_ROWS), tile=(TILE, 8))


@pytest.fixture(scope="session")
def dense_store(make_store: Callable[..., Store]) -> Store:
    return make_store(dense=True)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every budget so small that a window holds a few hundred rows of these tiny experiments."""
    monkeypatch.setattr(Budget, "windows", 43_000)


def dataset_of(store: Store, rows: Any = range(N_ROWS), **options: Any) -> ExperimentDataset:
    return store.dataset(rows, **{"batch_size": 32, "seed": 1, "return_sparse_X": True, **AUTO, **options})


def plan(dataset: ExperimentDataset) -> Plan:
    """Return the plan, which says in the log what it costs when it is first asked for."""
    return dataset.plan


def window_lengths(dataset: ExperimentDataset) -> list[int]:
    """Return how many rows are read together, window after window."""
    plan(dataset)  # which reads a sample
    lengths = []
    read_window = SOMAReader.read_window

    def spy(self: SOMAReader, obs_joinids: np.ndarray) -> Window:
        lengths.append(len(obs_joinids))
        return read_window(self, obs_joinids)

    with mock.patch.object(SOMAReader, "read_window", spy):
        joinids_of(dataset)
    return lengths


# Every row once, with its own values ----------------------------------------------------------------------

options_of_reading = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 80),
        "shuffle_chunk_size": st.just("auto") | st.sampled_from([1, 4, 20]),
        "io_batch_size": st.just("auto") | st.sampled_from([20, 60, 300]),
        "shuffle": st.booleans(),
        "return_sparse_X": st.booleans(),
        "use_eager_fetch": st.booleans(),
        "mixing": st.none() | st.sampled_from([0.8, 0.95, 1]),
    }
)
modes = st.sampled_from(
    [{}, {"device": "cpu"}, {"device": "cpu", "shuffle_mode": "gpu_minibatch"}]
) | st.just({"device": "cpu", "shuffle_mode": "gpu_iobatch"})


@settings(max_examples=30)
@given(
    options=options_of_reading,
    mode=modes,
    in_files=st.booleans(),
    window_bytes=st.integers(2_000, 60_000),
    n_rows=st.integers(0, N_OBS),
    scattered=st.booleans(),
)
def test_every_row_comes_once_with_its_own_values_in_a_new_order_every_epoch(
    store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, Any],
    mode: dict[str, Any],
    in_files: bool,
    window_bytes: int,
    n_rows: int,
    scattered: bool,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    files = {"window_dir": folder, "window_budget": "64MiB"} if in_files else {}
    rows = (
        np.sort(np.random.default_rng(n_rows).permutation(N_OBS)[:n_rows]) if scattered else np.arange(n_rows)
    )
    with (
        mock.patch.object(Budget, "windows", window_bytes),
        mock.patch.object(_auto, "_check_holds_a_tile"),
    ):
        dataset = store.dataset(rows, **options, **mode, **files, seed=5)
        same = store.dataset(rows, **options, **mode, **files, seed=5)
        epochs = [list(dataset) for _ in range(2)]
        again = joinids_of(same)
    assert all(len(epoch) == len(dataset) for epoch in epochs)
    assert all(len(obs) == options["batch_size"] for epoch in epochs for _, obs in epoch[:-1])
    first, second = map(joinids_of, epochs)
    assert sorted(first) == sorted(second) == rows.tolist()
    np.testing.assert_array_equal(again, first)
    shuffles = options["shuffle"] and (
        mode.get("shuffle_mode") != "gpu_minibatch" or options["batch_size"] > 4
    )
    if shuffles and n_rows > 20:
        assert first.tolist() != second.tolist()
    if not options["shuffle"]:
        assert first.tolist() == rows.tolist()


@pytest.mark.usefixtures("small_windows")
def test_obs_columns_of_every_type_stay_with_their_rows(large: Store) -> None:
    columns = [*reversed(make_obs(np.arange(1)).columns)]
    for _, obs in dataset_of(large, obs_column_names=columns):
        pd.testing.assert_frame_equal(obs, make_obs(obs["soma_joinid"].to_numpy())[columns])


@pytest.mark.usefixtures("small_windows")
def test_a_query_with_a_filter_and_some_columns_is_read_right(large: Store) -> None:
    with large.query(obs="cell_type == 'T cell'", var=[3, 7, 20]) as query:
        dataset = ExperimentDataset(query, batch_size=32, seed=3, **AUTO)
        rows = query.obs_joinids().to_numpy()
    expected = {
        i: [(1000 * i + j + 1) * ((3 * i + j) % 5 == 0 and i % 7 != 3) for j in (3, 7, 20)] for i in rows
    }
    found = {}
    for X, obs in dataset:
        found |= dict(zip(obs["soma_joinid"], X.tolist(), strict=True))
    assert found == expected


@pytest.mark.usefixtures("small_windows")
def test_parts_of_a_split_keep_the_options_and_together_are_the_query(large: Store) -> None:
    parts = dataset_of(large).random_split(0.7, 0.2, 0.1, seed=2)
    ids = [joinids_of(part) for part in parts]
    assert [len(part) for part in parts] == [-(-len(of_part) // 32) for of_part in ids]
    assert sorted(np.concatenate(ids)) == list(range(N_ROWS))
    assert len(window_lengths(parts[0])) > len(window_lengths(parts[2]))


def test_rows_that_repeat_come_as_often_as_the_query_has_them(store: Store) -> None:
    rows = [3, 3, 50, 7, 7, 7, 290, 11]
    assert sorted(joinids_of(dataset_of(store, rows, batch_size=3))) == sorted(rows)


def test_a_query_without_rows_yields_nothing(store: Store) -> None:
    dataset = dataset_of(store, [])
    assert (list(dataset), len(dataset)) == ([], 0)


def test_a_query_without_columns_yields_obs(store: Store) -> None:
    dataset = store.dataset(range(50), [], batch_size=20, **AUTO)
    assert [X.shape for X, _ in dataset] == [(20, 0), (20, 0), (10, 0)]


# What is read together ------------------------------------------------------------------------------------


def test_where_the_window_holds_the_query_it_is_read_at_once(large: Store) -> None:
    assert window_lengths(dataset_of(large)) == [N_ROWS]
    assert window_lengths(dataset_of(large, memory_budget="128MiB")) == [N_ROWS]


@pytest.mark.parametrize("scattered", [False, True])
def test_no_tile_is_decoded_twice_in_an_epoch_where_runs_are_whole_tiles(
    large: Store, scattered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "windows", 25_000 if scattered else 120_000)
    rows = np.flatnonzero(np.random.default_rng(0).random(N_ROWS) < 0.3) if scattered else np.arange(N_ROWS)
    dataset = dataset_of(large, rows, batch_size=4, mixing=0.8)
    plan(dataset)  # which reads a sample
    tiles = []
    read = soma.SparseNDArray.read

    def spy(self: soma.SparseNDArray, coords: Any) -> Any:
        rows = coords[0]
        asked = np.arange(rows.start, rows.stop + 1) if isinstance(rows, slice) else rows
        tiles.append(set((asked // TILE).tolist()))
        return read(self, coords)

    with mock.patch.object(soma.SparseNDArray, "read", spy):
        assert sorted(joinids_of(dataset)) == rows.tolist()
    assert dataset.plan.sizes(dataset.query_ids).run_length == TILE
    assert len(tiles) > 1
    assert sum(map(len, tiles)) == len(set().union(*tiles)) == len(np.unique(rows // TILE))


def test_windows_are_as_large_as_the_budget_but_for_a_smaller_first_one_and_a_chunk(
    large: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "windows", 160_000)
    # The store is small: say that 15 chunks mix well enough.
    monkeypatch.setattr(order_sizes, "predicted_mixing", lambda n_chunks, _: min(1.0, n_chunks / 15))
    dataset = dataset_of(large, batch_size=4, mixing=1.0)
    sizes = dataset.plan.sizes(dataset.query_ids)
    lengths = window_lengths(dataset)
    assert 2 * sizes.first_window_rows == sizes.window_rows == N_ROWS / 2
    assert lengths[0] < sizes.first_window_rows + sizes.run_length
    assert max(lengths) < sizes.window_rows + sizes.run_length
    assert len(lengths) == 3


@pytest.mark.usefixtures("small_windows")
def test_a_larger_budget_makes_larger_windows(large: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [len(window_lengths(dataset_of(large)))]
    for n_bytes in (80_000, 160_000):
        monkeypatch.setattr(Budget, "windows", n_bytes)
        lengths.append(len(window_lengths(dataset_of(large))))
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 3


def test_dense_mini_batches_are_paid_for_from_the_budget(large: Store) -> None:
    sparse, dense = (dataset_of(large, return_sparse_X=sparse_X) for sparse_X in (True, False))
    budgets = [dataset.iterations.budget.windows for dataset in (sparse, dense)]
    assert budgets[0] - budgets[1] == 3 * 32 * N_VARS * 4


@pytest.mark.usefixtures("small_windows")
def test_rows_that_take_up_more_bytes_make_smaller_windows(large: Store) -> None:
    few, all_columns = large.dataset(range(N_ROWS), [0], **AUTO), large.dataset(range(N_ROWS), **AUTO)
    rows = [d.plan.sizes(d.query_ids).window_rows for d in (few, all_columns)]
    assert rows[0] > rows[1]


@pytest.mark.usefixtures("small_windows")
def test_a_better_mixing_takes_shorter_runs(large: Store) -> None:
    runs = [
        d.plan.sizes(d.query_ids).run_length
        for d in (dataset_of(large, mixing=mixing) for mixing in (0.8, 0.9, 1))
    ]
    assert runs[0] > runs[1] > runs[2] == 1


@pytest.mark.usefixtures("small_windows")
def test_one_size_may_be_auto_and_the_other_a_number(large: Store) -> None:
    only_window = dataset_of(large, shuffle_chunk_size=4)
    orders = joinids_of(only_window)
    runs = np.sort(orders[: window_lengths(only_window)[0]]).reshape(-1, 4)
    assert (runs[:, 0] % 4 == 0).all()
    assert (np.diff(runs) == 1).all()
    only_chunk = dataset_of(large, io_batch_size=100)
    run = only_chunk.plan.sizes(only_chunk.query_ids).run_length
    lengths = window_lengths(only_chunk)
    assert max(lengths) < 100 + run
    assert sum(lengths) == N_ROWS


# Windows in files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [{"shuffle_chunk_size": 10, "io_batch_size": 250}, AUTO, {**AUTO, "io_batch_size": 300}],
    ids=["numbers", "auto", "chunks"],
)
@pytest.mark.parametrize("sparse_X", [False, True])
def test_windows_in_files_give_what_windows_in_memory_give(
    large: Store, tmp_path: Path, sizes: dict[str, Any], sparse_X: bool
) -> None:
    in_memory = dataset_of(large, **sizes, return_sparse_X=sparse_X)
    in_files = dataset_of(
        large, **sizes, return_sparse_X=sparse_X, window_dir=tmp_path, window_budget="64MiB"
    )
    for _ in range(2):
        for (X, obs), (other_X, other_obs) in zip(in_memory, in_files, strict=True):
            assert (other_X != X).sum() == 0
            pd.testing.assert_frame_equal(obs, other_obs)
            assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed on Linux")
def test_windows_in_files_need_few_open_files(large: Store, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 30, hard))
    try:
        dataset = dataset_of(large, io_batch_size=300, window_dir=tmp_path, window_budget="64MiB")
        assert len(joinids_of(dataset)) == N_ROWS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("small_windows")
def test_a_window_in_files_may_be_larger_than_the_memory(large: Store, tmp_path: Path) -> None:
    in_files = dataset_of(large, window_dir=str(tmp_path), window_budget="64MiB")
    assert len(window_lengths(dataset_of(large))) > 3
    assert window_lengths(in_files) == [N_ROWS]


@pytest.mark.parametrize("sizes", [AUTO, {**AUTO, "io_batch_size": 300}], ids=["auto", "chunks"])
def test_the_device_does_not_change_the_order_of_windows_in_memory(
    large: Store, sizes: dict[str, Any]
) -> None:
    on_cpu = dataset_of(large, **sizes)
    on_device = dataset_of(large, **sizes, shuffle_mode="gpu_iobatch", device="cpu")
    for _ in range(2):
        np.testing.assert_array_equal(joinids_of(on_device), joinids_of(on_cpu))


@pytest.mark.usefixtures("small_windows")
def test_the_device_does_not_change_the_order_where_a_window_holds_a_part_of_the_query(large: Store) -> None:
    on_cpu, on_device = dataset_of(large), dataset_of(large, shuffle_mode="gpu_iobatch", device="cpu")
    np.testing.assert_array_equal(joinids_of(on_device), joinids_of(on_cpu))


def test_the_device_does_not_change_the_order_of_windows_in_files(large: Store, tmp_path: Path) -> None:
    options = {"io_batch_size": 300, "window_dir": tmp_path, "window_budget": "64MiB"}
    on_cpu = dataset_of(large, **options)
    on_device = dataset_of(large, **options, shuffle_mode="gpu_iobatch", device="cpu")
    np.testing.assert_array_equal(joinids_of(on_device), joinids_of(on_cpu))


@pytest.mark.parametrize("mode", ["cpu", "gpu_iobatch", "gpu_minibatch"])
def test_windows_in_files_go_to_the_device_in_parts(
    large: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    put, n_rows = DeviceRows.put, []

    def counted(indptr: Any, *args: Any) -> DeviceRows:
        n_rows.append(len(indptr) - 1)
        return put(indptr, *args)

    monkeypatch.setattr(DeviceRows, "put", counted)
    files = {"window_dir": tmp_path, "window_budget": "64MiB"}
    dataset = dataset_of(large, io_batch_size=320, **files, shuffle_mode=mode, device="cpu")
    assert len(joinids_of(dataset)) == N_ROWS
    assert max(n_rows) <= 320 / 10


# Workers --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_workers_read_within_windows_of_their_own_and_yield_every_row_once(
    large: Store, tmp_path: Path, device: str | None
) -> None:
    files = {} if device else {"window_dir": tmp_path, "window_budget": "64MiB"}
    mode = {"shuffle_mode": "gpu_iobatch", "device": device} if device else {}
    dataset = dataset_of(large, batch_size=64, **files, **mode)
    loader = experiment_dataloader(dataset, **workers(2))
    epochs = [list(loader) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 2 == [32, 32]
    orders = [joinids_of(epoch) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(N_ROWS))
    assert orders[0].tolist() != orders[1].tolist()

    in_process = dataset_of(large, batch_size=64, **files, **mode)
    halves = []
    for rows in np.split(np.arange(N_ROWS), 2):
        half = QueryIDs(obs_joinids=rows, var_joinids=range(N_VARS))
        halves.append(list(in_process.over(half)))
    in_turn = [mini_batch for pair in zip(*halves, strict=True) for mini_batch in pair]
    np.testing.assert_array_equal(orders[0], joinids_of(in_turn))
    assert list(tmp_path.iterdir()) == []


# What the log says ----------------------------------------------------------------------------------------


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what was logged since the last call."""
    caplog.set_level(logging.INFO, logger="tiledbsoma_ml")

    def lines() -> list[str]:
        assert {(record.name, record.levelname) for record in caplog.records} <= {("tiledbsoma_ml", "INFO")}
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return lines


@pytest.mark.usefixtures("small_windows")
def test_the_log_says_what_auto_stands_for(large: Store, log: Callable[[], list[str]]) -> None:
    dataset = dataset_of(large, mixing=0.9)
    sizes = dataset.plan.sizes(dataset.query_ids)
    [line] = log()
    found = re.fullmatch(
        r"runs of (\d+) rows in windows of (\d+) rows \((\d+) MiB\): mixing (0\.\d\d) of random is predicted",
        line,
    )
    assert found is not None
    assert [int(found[1]), int(found[2])] == [sizes.run_length, sizes.window_rows]
    assert float(found[4]) == pytest.approx(sizes.mixing, abs=0.005)
    assert float(found[4]) >= 0.9
    joinids_of(dataset)
    assert log() == []


def test_the_log_says_so_where_a_window_holds_the_query(large: Store, log: Callable[[], list[str]]) -> None:
    plan(dataset_of(large))
    assert log() == ["runs of 32 rows in windows of 2,000 rows (0 MiB): mixing 1.00 of random is predicted"]


def test_the_log_says_how_much_costly_sizes_read_and_what_to_write_instead(
    large: Store, log: Callable[[], list[str]]
) -> None:
    plan(dataset_of(large, shuffle_chunk_size=2, io_batch_size=64))
    [line] = log()
    assert line == (
        "shuffle_chunk_size=2 and io_batch_size=64 read every row about 13 times in an epoch, because it is "
        "stored in tiles of 32 rows; shuffle_chunk_size='auto' and io_batch_size='auto' read less and mix as "
        "well"
    )
    plan(dataset_of(large))
    assert len(log()) == 1


def test_sizes_that_are_cheap_or_do_not_matter_are_not_worth_a_line(
    store: Store, large: Store, log: Callable[[], list[str]]
) -> None:
    plan(large.dataset(range(N_ROWS)))  # the defaults: an IO batch holds the query
    plan(dataset_of(large, shuffle_chunk_size=32, io_batch_size=64))
    plan(dataset_of(large, shuffle_chunk_size=2, io_batch_size=64, shuffle=False))
    plan(dataset_of(large, shuffle=False))
    of_mini_batches = {"shuffle_mode": "gpu_minibatch", "device": "cpu"}
    plan(dataset_of(large, **of_mini_batches, shuffle_chunk_size=2, io_batch_size=64))
    plan(dataset_of(large, [], **AUTO))
    for part in dataset_of(large, []).random_split(0.5, 0.5):
        plan(part)
    assert log() == []


def test_nothing_is_measured_for_a_log_that_nobody_reads(large: Store) -> None:
    with mock.patch.object(_soma_source, "row_tile", side_effect=AssertionError("the layer was opened")):
        plan(dataset_of(large, shuffle_chunk_size=2, io_batch_size=64))


@pytest.mark.usefixtures("small_windows")
def test_the_log_says_the_runs_that_were_asked_for_where_the_window_alone_is_auto(
    large: Store, log: Callable[[], list[str]]
) -> None:
    plan(dataset_of(large, shuffle_chunk_size=4, batch_size=8))
    [line] = log()
    assert line.startswith("runs of 4 rows in windows of ")


# Errors and leaving early ---------------------------------------------------------------------------------


def eager_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "EagerIterator" in thread.name}


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = eager_threads()
    yield
    gc.collect()
    assert eager_threads() <= before


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make rooms tiny, so that a window waits until the one before is given out; set when one has to."""
    event = threading.Event()

    class TinyRoom(Room):
        def __init__(self, n_bytes: float) -> None:
            super().__init__(1)

        def _has_room(self, window: Window, n_bytes: int) -> bool:
            answer = super()._has_room(window, n_bytes)
            if not answer:
                event.set()
            return answer

    monkeypatch.setattr(_soma_source, "Room", TinyRoom)
    return event


in_memory_or_files = pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])


def windows_in(in_files: bool, folder: Path) -> dict[str, Any]:
    """Return options of windows of 300 rows."""
    files = {"window_dir": folder, "window_budget": "64MiB"} if in_files else {}
    return {"io_batch_size": 300, "batch_size": 20, **files}


@pytest.mark.usefixtures("no_thread_left")
@in_memory_or_files
def test_rows_that_wait_for_room_come_when_a_slow_consumer_takes_those_before(
    large: Store, tmp_path: Path, waits: threading.Event, in_files: bool
) -> None:
    mini_batches = []
    for mini_batch in dataset_of(large, **windows_in(in_files, tmp_path)):
        if not mini_batches:
            assert waits.wait(LONG)  # the second window is waiting: only now go on
        mini_batches.append(mini_batch)
    assert sorted(joinids_of(mini_batches)) == list(range(N_ROWS))
    expected = dataset_of(large, io_batch_size=300, batch_size=20)
    np.testing.assert_array_equal(joinids_of(mini_batches), joinids_of(expected))


@pytest.mark.usefixtures("no_thread_left")
@in_memory_or_files
@pytest.mark.parametrize("through_loader", [False, True])
def test_leaving_while_the_reader_waits_for_room_ends_cleanly(
    large: Store, tmp_path: Path, waits: threading.Event, in_files: bool, through_loader: bool
) -> None:
    dataset = dataset_of(large, **windows_in(in_files, tmp_path))
    mini_batches = iter(experiment_dataloader(dataset) if through_loader else dataset)
    next(mini_batches)
    assert waits.wait(LONG)
    del mini_batches
    gc.collect()
    waits.clear()
    assert sorted(joinids_of(dataset)) == list(range(N_ROWS))  # and the next epoch is as if nothing had been


@pytest.mark.usefixtures("no_thread_left")
def test_leaving_while_the_next_window_is_waited_for_stops_reading_it(large: Store, tmp_path: Path) -> None:
    n_tables, n_read, n_windows = 3000, 0, 0
    is_waited_for, is_left = threading.Event(), threading.Event()
    read_ahead, entries, close = mini_batches_module.read_ahead, _reader._sparse_entries, Room.close

    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        with closing(read_ahead(*args, **options)) as pieces:
            for rows, is_last in pieces:
                yield rows, is_last
                if is_last:
                    is_waited_for.set()

    def slow(*args: Any) -> Iterator[Any]:
        nonlocal n_read, n_windows
        n_windows += 1
        if n_windows == 1:
            yield from entries(*args)
            return
        one_entry = [column[:1] for column in next(entries(*args))]
        assert is_left.wait(LONG)
        for _ in range(n_tables):
            n_read += 1
            yield one_entry

    def leave(self: Room) -> None:
        close(self)
        is_left.set()

    options = {**windows_in(False, tmp_path), "shuffle_chunk_size": 20}
    with (
        mock.patch.object(mini_batches_module, "read_ahead", watched),
        mock.patch.object(_reader, "_sparse_entries", slow),
    ):
        mini_batches = iter(dataset_of(large, **options))
        for _ in range(300 // 20):
            next(mini_batches)
        assert is_waited_for.wait(LONG)
        with mock.patch.object(Room, "close", leave):
            mini_batches.close()
    assert n_read < n_tables


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_of_the_consumer_while_the_reader_waits_for_room_is_the_one_that_is_seen(
    large: Store, tmp_path: Path, waits: threading.Event
) -> None:
    def train() -> None:
        for _ in dataset_of(large, **windows_in(False, tmp_path)):
            assert waits.wait(LONG)
            raise ZeroDivisionError("in the training step")

    with pytest.raises(ZeroDivisionError, match="in the training step") as caught:
        train()
    assert caught.value.__context__ is None


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("eager", [False, True])
@in_memory_or_files
def test_an_error_while_reading_ahead_surfaces_when_the_rows_before_were_yielded_with_its_cause(
    large: Store, tmp_path: Path, in_files: bool, eager: bool
) -> None:
    dataset = dataset_of(
        large, use_eager_fetch=eager, **windows_in(in_files, tmp_path), shuffle_chunk_size=20
    )
    preload_kernels().join()  # it adds to a window of its own
    add, n_added = Window.add, []

    def fail_later(self: Window, *table: np.ndarray) -> None:
        if self not in n_added:
            n_added.append(self)
        if len(n_added) == 3:
            raise OSError("the disk is gone") from KeyError("the cause")
        add(self, *table)

    yielded: list[Any] = []
    with (
        mock.patch.object(Window, "add", fail_later),
        pytest.raises(OSError, match="the disk is gone") as caught,
    ):
        yielded.extend(iter(dataset))
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(joinids_of(yielded)) == 600
    assert sorted(joinids_of(dataset)) == list(range(N_ROWS))


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_of_the_storage_while_an_epoch_is_read_surfaces(make_store: Callable[..., Store]) -> None:
    own = make_store(obs_joinids=range(N_ROWS), tile=(TILE, 8))
    mini_batches = iter(dataset_of(own, io_batch_size=64, batch_size=20, use_eager_fetch=False))
    next(mini_batches)
    for file in Path(own.uri).glob("ms/RNA/X/raw/__fragments/*/*.tdb"):
        file.unlink()
    with pytest.raises(soma.SOMAError):
        joinids_of(mini_batches)


# Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory_budget": 0}, ValueError, "memory_budget=0 must be at least 64 MiB; try '2GiB'."),
        ({"memory_budget": -1}, ValueError, "memory_budget=-1 must be at least 64 MiB; try '2GiB'."),
        (
            {"memory_budget": "63MiB"},
            ValueError,
            "memory_budget='63MiB' must be at least 64 MiB; try '2GiB'.",
        ),
        (
            {"memory_budget": True},
            TypeError,
            "memory_budget=True must be a number of bytes or a string; try memory_budget='2GiB'.",
        ),
        (
            {"memory_budget": 2.5e9},
            TypeError,
            "memory_budget=2500000000.0 must be a number of bytes or a string; try memory_budget='2GiB'.",
        ),
        (
            {"memory_budget": None},
            TypeError,
            "memory_budget=None must be a number of bytes or a string; try memory_budget='2GiB'.",
        ),
        (
            {"memory_budget": "2 apples"},
            ValueError,
            "memory_budget='2 apples' must be a number of bytes, with a unit or without; try '2GiB'.",
        ),
        (
            {"io_batch_size": "big"},
            ValueError,
            "io_batch_size='big' must be a positive integer or 'auto'; try 'auto'.",
        ),
        (
            {"shuffle_chunk_size": "tile"},
            ValueError,
            "shuffle_chunk_size='tile' must be a positive integer or 'auto'; try 'auto'.",
        ),
        (
            {"shuffle_chunk_size": "auto", "io_batch_size": 0},
            ValueError,
            "io_batch_size=0 must be a positive integer; try 65536.",
        ),
        (
            {"window_dir": "/no/such/folder", "window_budget": "1GiB"},
            ValueError,
            "window_dir='/no/such/folder' must be an existing folder; make it, or choose another.",
        ),
        (
            {"window_dir": __file__, "window_budget": "1GiB"},
            ValueError,
            f"window_dir={__file__!r} must be an existing folder; make it, or choose another.",
        ),
        (
            {"window_dir": "/"},
            ValueError,
            "window_dir='/' needs a limit; add window_budget='64GiB'.",
        ),
        (
            {"window_budget": "64GiB"},
            ValueError,
            "window_budget needs a folder on a local disk; add window_dir='/path'.",
        ),
        (
            {"window_dir": "/", "window_budget": "63MiB"},
            ValueError,
            "window_budget='63MiB' must be at least 64 MiB; try '2GiB'.",
        ),
        (
            {"window_dir": "/", "window_budget": 1.5},
            TypeError,
            "window_budget=1.5 must be a number of bytes or a string; try window_budget='2GiB'.",
        ),
        (
            {"window_dir": "/", "window_budget": "1048576TiB"},
            ValueError,
            "window_budget=1073741824.0 GiB must fit into window_dir='/', where ",
        ),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence_before_any_data_is_read(
    store: Store, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with (
        store.query() as query,
        mock.patch.object(soma.SparseNDArray, "read", side_effect=AssertionError("X was read")),
        mock.patch.object(soma.DataFrame, "read", side_effect=AssertionError("obs was read")),
        pytest.raises(error) as caught,
    ):
        ExperimentDataset(query, **options)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("mixing", "error", "message"),
    [
        (0.5, ValueError, "mixing=0.5 must lie from 0.8 to 1; try 0.95."),
        (1.01, ValueError, "mixing=1.01 must lie from 0.8 to 1; try 0.95."),
        (float("nan"), ValueError, "mixing=nan must lie from 0.8 to 1; try 0.95."),
        (True, TypeError, "mixing=True must be a number from 0.8 to 1, or None; try 0.95."),
        ("x", TypeError, "mixing='x' must be a number from 0.8 to 1, or None; try 0.95."),
    ],
)
def test_a_bad_mixing_is_refused_in_one_sentence_before_any_data_is_read(
    store: Store, mixing: object, error: type[Exception], message: str
) -> None:
    with (
        store.query() as query,
        mock.patch.object(soma.DataFrame, "read", side_effect=AssertionError("obs was read")),
        pytest.raises(error) as caught,
    ):
        ExperimentDataset(query, mixing=mixing)
    assert str(caught.value) == message


def test_a_window_budget_above_the_free_space_says_how_much_there_is(store: Store, tmp_path: Path) -> None:
    with (
        mock.patch("shutil.disk_usage", return_value=mock.Mock(free=3 * 2**29)),
        pytest.raises(ValueError, match="window_budget") as caught,
    ):
        store.dataset(window_dir=tmp_path, window_budget="2GiB")
    assert str(caught.value) == (
        f"window_budget=2.0 GiB must fit into window_dir={str(tmp_path)!r}, where 1.5 GiB are free; "
        "lower it, or choose another folder."
    )


@pytest.mark.parametrize("mixing", [0.8, 1, np.float64(0.9), None])
def test_every_mixing_from_0_8_to_1_is_accepted(large: Store, mixing: float | None) -> None:
    assert dataset_of(large, mixing=mixing).plan.mixing == mixing


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    "options", [{"shuffle_chunk_size": "auto"}, {"io_batch_size": "auto"}, AUTO], ids=str
)
def test_auto_on_a_dense_layer_reads_whole_tiles_as_on_a_sparse_one(
    dense_store: Store, options: dict[str, Any]
) -> None:
    dataset = dense_store.dataset(batch_size=40, seed=1, **options)
    assert dataset.plan.layout is not None
    assert dataset.plan.layout.row_tile == 64
    batches = list(dataset)
    assert sorted(joinids_of(batches)) == list(range(N_OBS))
    for X, obs in batches:
        np.testing.assert_array_equal(X, expected_X(obs["soma_joinid"], range(N_VARS)))


def test_a_dense_layer_takes_budgets_and_windows_in_files(dense_store: Store, tmp_path: Path) -> None:
    dataset = dense_store.dataset(
        batch_size=40,
        shuffle_chunk_size=8,
        io_batch_size=80,
        memory_budget="256MiB",
        window_dir=tmp_path,
        window_budget="64MiB",
    )
    assert sorted(joinids_of(dataset)) == list(range(N_OBS))


@pytest.fixture(scope="session")
def in_one_tile(make_store: Callable[..., Store]) -> Store:
    return make_store(tile=(3_000_000, 8))


@pytest.fixture
def in_huge_tiles(in_one_tile: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The tile of this layer takes up hundreds of MiB."""
    monkeypatch.setattr(_reader, "BYTES_PER_JOINID", 2**20)
    return in_one_tile


BUDGET_SENTENCE = (
    r"memory_budget=(\d+) MiB must hold three mini-batches and one tile of 311 rows beside buffers, "
    r"(\d+) MiB; raise it, or take a smaller batch_size or return_sparse_X=True\."
)


def refused_budget(store: Store, **options: Any) -> tuple[int, int]:
    """Return the MiB that were given, and that are said to be needed."""
    with pytest.raises(ValueError, match="memory_budget") as caught:
        plan(store.dataset(**{**AUTO, **options}))
    found = re.fullmatch(BUDGET_SENTENCE, str(caught.value))
    assert found is not None, caught.value
    return int(found[1]), int(found[2])


def test_a_budget_that_does_not_hold_a_tile_says_what_is_needed(in_huge_tiles: Store) -> None:
    given_mib, needed_mib = refused_budget(in_huge_tiles, memory_budget="128MiB")
    assert given_mib == 128
    assert 256 < needed_mib < 1024
    assert refused_budget(in_huge_tiles, memory_budget="64MiB")[0] == 64
    assert in_huge_tiles.dataset(batch_size=100, **AUTO, memory_budget="1GiB").plan.is_auto


def test_sparse_mini_batches_are_not_offered_where_they_are_sparse_already(in_huge_tiles: Store) -> None:
    with pytest.raises(
        ValueError, match=r"^memory_budget=128 MiB must hold one tile of .* buffers, \d+ MiB; raise it\.$"
    ):
        plan(in_huge_tiles.dataset(**AUTO, memory_budget="128MiB", return_sparse_X=True))


def test_a_budget_that_does_not_hold_three_dense_mini_batches_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"memory_budget=256 MiB must hold three mini-batches and one tile"):
        plan(store.dataset(**AUTO, memory_budget="256MiB", batch_size=10**6))
    assert store.dataset(**AUTO, memory_budget="256MiB", batch_size=10**6, return_sparse_X=True).plan


def test_a_tile_that_does_not_fit_is_no_matter_where_the_window_is_a_number(in_huge_tiles: Store) -> None:
    for sizes in ({}, {"shuffle_chunk_size": "auto"}):
        dataset = in_huge_tiles.dataset(batch_size=50, memory_budget="64MiB", **sizes)
        assert sorted(joinids_of(dataset)) == list(range(N_OBS))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_budget_that_is_said_to_be_needed_is_enough(in_huge_tiles: Store, device: str | None) -> None:
    _, needed_mib = refused_budget(in_huge_tiles, memory_budget="256MiB", device=device)
    assert in_huge_tiles.dataset(**AUTO, memory_budget=f"{needed_mib}MiB", device=device).plan.is_auto


def test_a_window_budget_that_does_not_hold_a_tile_is_what_is_named(
    in_huge_tiles: Store, tmp_path: Path
) -> None:
    files = {"window_dir": tmp_path, "window_budget": "64MiB"}
    with pytest.raises(ValueError, match=r"^window_budget"):
        plan(in_huge_tiles.dataset(**AUTO, memory_budget="2GiB", **files))


def test_a_tile_larger_than_the_layer_takes_up_no_more_than_its_rows(in_one_tile: Store) -> None:
    dataset = in_one_tile.dataset(**AUTO, memory_budget="64MiB")
    assert sorted(joinids_of(dataset)) == list(range(N_OBS))


def test_rows_that_obs_lacks_are_named_with_auto_as_without(store: Store) -> None:
    with pytest.raises(ValueError, match="obs_joinids must exist in obs, but 1 do not, 316 for instance"):
        list(dataset_of(store, [1, N_OBS + 5]))


def test_a_numpy_number_is_a_number(large: Store) -> None:
    assert dataset_of(large, mixing=np.float32(0.9))


def test_query_ids_are_not_changed_by_reading(store: Store) -> None:
    ids = QueryIDs(obs_joinids=np.arange(100)[::-1], var_joinids=range(N_VARS))
    before = ids.obs_joinids.copy()
    joinids_of(ExperimentDataset(x_locator=store.locator, query_ids=ids, **AUTO))
    np.testing.assert_array_equal(ids.obs_joinids, before)
