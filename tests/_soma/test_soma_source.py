"""Rows of an experiment that wait for others, and what happens if one leaves early or reading fails."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma

from stores import N_OBS, Store, joinids_of
from tiledbsoma_ml import QueryIDs, experiment_dataloader
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._soma.held_rows import ByteLimit, HeldRows
from tiledbsoma_ml._soma.source import SOMASource, n_streams
from tiledbsoma_ml._soma.stores import Pages
from windows import LONG, N_ROWS, TILE, WindowsBudget, dataset_of


class TinyLimit(ByteLimit):
    """So tiny that a read waits until the one before is given out; none drops rows."""

    def __init__(self, has_to_wait: threading.Event) -> None:
        super().__init__(1)
        self.has_to_wait = has_to_wait

    def take(self, rows: HeldRows, n_bytes: int, *, may_exceed: bool = True) -> bool:
        return super().take(rows, n_bytes)

    def _is_allowed(self, window: HeldRows, n_bytes: int) -> bool:
        answer = super()._is_allowed(window, n_bytes)
        if not answer:
            self.has_to_wait.set()
        return answer


@pytest.fixture
def waits() -> threading.Event:
    """Set when a window of `tiny_rooms` has to wait."""
    return threading.Event()


@pytest.fixture
def tiny_rooms(waits: threading.Event) -> dict[str, Any]:
    return {"make_limit": lambda _: TinyLimit(waits)}


in_memory_or_files = pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])


def windows_in(in_files: bool, folder: Path) -> dict[str, Any]:
    """Return options of windows of 300 rows."""
    files = {"window_dir": folder, "window_budget": "64MiB"} if in_files else {}
    return {"io_batch_size": 300, "rows_held": 300, "batch_size": 20, **files}


@pytest.mark.usefixtures("no_thread_left")
@in_memory_or_files
def test_rows_that_wait_for_bytes_come_when_a_slow_consumer_takes_those_before(
    large: Store, tmp_path: Path, waits: threading.Event, tiny_rooms: Any, in_files: bool
) -> None:
    mini_batches = []
    for mini_batch in dataset_of(large, **windows_in(in_files, tmp_path), **tiny_rooms):
        if not mini_batches:
            assert waits.wait(LONG)  # the second window is waiting: only now go on
        mini_batches.append(mini_batch)
    assert sorted(joinids_of(mini_batches)) == list(range(N_ROWS))
    expected = dataset_of(large, io_batch_size=300, batch_size=20)
    np.testing.assert_array_equal(joinids_of(mini_batches), joinids_of(expected))


@pytest.mark.usefixtures("no_thread_left")
@in_memory_or_files
@pytest.mark.parametrize("through_loader", [False, True])
def test_leaving_while_the_reader_waits_for_bytes_ends_cleanly(
    large: Store,
    tmp_path: Path,
    waits: threading.Event,
    tiny_rooms: Any,
    in_files: bool,
    through_loader: bool,
) -> None:
    dataset = dataset_of(large, **windows_in(in_files, tmp_path), **tiny_rooms)
    mini_batches = iter(experiment_dataloader(dataset) if through_loader else dataset)
    next(mini_batches)
    assert waits.wait(LONG)
    del mini_batches
    gc.collect()
    waits.clear()
    assert sorted(joinids_of(dataset)) == list(range(N_ROWS))  # and the next epoch is as if nothing had been


@pytest.mark.usefixtures("no_thread_left")
def test_leaving_while_the_next_window_is_waited_for_stops_reading_it(large: Store, tmp_path: Path) -> None:
    n_tables, n_read = 3000, 0
    is_read, is_left = threading.Event(), threading.Event()
    read = soma.SparseNDArray.read

    class TellingLimit(ByteLimit):
        def close(self) -> None:
            super().close()
            is_left.set()

    def slowly(array: soma.SparseNDArray, coords: Any) -> Any:
        found = read(array, coords)
        if len(dataset.source.asked) == 1:
            return found
        return SimpleNamespace(tables=lambda: one_entry_at_a_time(next(iter(found.tables()))))

    def one_entry_at_a_time(table: pa.Table) -> Iterator[pa.Table]:
        nonlocal n_read
        is_read.set()
        assert is_left.wait(LONG)
        for _ in range(n_tables):
            n_read += 1
            yield table.slice(0, 1)

    options = {**windows_in(False, tmp_path), "shuffle_chunk_size": 20}
    dataset = dataset_of(large, make_limit=TellingLimit, **options)
    with mock.patch.object(soma.SparseNDArray, "read", slowly):
        mini_batches = iter(dataset)
        for _ in range(300 // 20):
            next(mini_batches)
        assert is_read.wait(LONG)
        mini_batches.close()
    assert n_read < n_tables


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_of_the_consumer_while_the_reader_waits_for_bytes_is_the_one_that_is_seen(
    large: Store, tmp_path: Path, waits: threading.Event, tiny_rooms: Any
) -> None:
    def train() -> None:
        for _ in dataset_of(large, **windows_in(False, tmp_path), **tiny_rooms):
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
    read = soma.SparseNDArray.read

    def fail_later(array: soma.SparseNDArray, coords: Any) -> Any:
        if len(dataset.source.asked) == 3:
            raise OSError("the disk is gone") from KeyError("the cause")
        return read(array, coords)

    yielded: list[Any] = []
    with (
        mock.patch.object(soma.SparseNDArray, "read", fail_later),
        pytest.raises(OSError, match="the disk is gone") as caught,
    ):
        yielded.extend(iter(dataset))
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(joinids_of(yielded)) == 600
    assert sorted(joinids_of(dataset)) == list(range(N_ROWS))


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_of_the_storage_while_an_epoch_is_read_surfaces(make_store: Callable[..., Store]) -> None:
    own = make_store(obs_joinids=range(N_ROWS), tile=(TILE, 8))
    mini_batches = iter(dataset_of(own, io_batch_size=64, rows_held=64, batch_size=20, use_eager_fetch=False))
    next(mini_batches)
    for file in Path(own.uri).glob("ms/RNA/X/raw/__fragments/*/*.tdb"):
        file.unlink()
    with pytest.raises(soma.SOMAError):
        joinids_of(mini_batches)


def test_the_layout_of_an_experiment_is_that_of_the_rows_and_columns_that_are_asked_for(store: Store) -> None:
    few, all_columns = (QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(n)) for n in (1, 20))
    source = SOMASource(store.locator, all_columns)
    before = source.layout(all_columns, Budget(2**30))
    assert source.layout(few, Budget(2**30)).bytes_per_row < before.bytes_per_row
    assert source.layout(all_columns, Budget(2**30)) == before


@pytest.mark.parametrize(
    ("latency", "total", "expected"),
    [
        (0.05, 2**31, 4),
        (0.01, 2**31, 2),
        (0.001, 2**31, 1),
        (0.0, 2**31, 1),
        (0.05, 2**30, 2),
        (0.05, 2**28, 1),
    ],
)
def test_a_late_store_is_read_in_as_many_streams_as_hide_it_and_memory_allows(
    latency: float, total: int, expected: int
) -> None:
    assert n_streams(latency, Budget(total, is_remote=True)) == expected
    assert n_streams(latency, Budget(total)) == 1


def test_epochs_use_the_same_pages_and_these_are_gone_with_the_dataset(large: Store) -> None:
    windows_bytes = 2**22
    dataset = dataset_of(large, windows_bytes=windows_bytes, io_batch_size=300, batch_size=20)
    page_bytes = WindowsBudget(2**31, windows_bytes=windows_bytes).share_of_windows().page_bytes
    store = Pages.shared(page_bytes)
    joinids_of(dataset)
    n_bytes = store.nbytes
    assert n_bytes
    next(iter(dataset))
    joinids_of(dataset)
    assert store.nbytes == n_bytes
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is not None
    del dataset
    gc.collect()
    assert gone() is None
