from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import sparse

from stores import N_OBS, N_VARS, Store, expected_X, make_obs
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._io_batch_iterable import IOBatch, IOBatchIterable, id_batches, io_batches
from tiledbsoma_ml._window import Columns, Room, Window


def as_chunks(lengths: list[int]) -> list[np.ndarray]:
    """Return chunks of these lengths; no joinid follows from its place."""
    joinids = np.random.default_rng(0).permutation(1000)[: sum(lengths)]
    return np.split(joinids, np.cumsum(lengths)[:-1]) if lengths else []


def batches_of(joinids: np.ndarray, size: int) -> list[np.ndarray]:
    return [joinids[start : start + size] for start in range(0, len(joinids), size)]


chunk_lengths = st.lists(st.integers(0, 12), max_size=7)


# id_batches -----------------------------------------------------------------------------------------------


@given(lengths=chunk_lengths, io_batch_size=st.integers(1, 30))
@example(lengths=[], io_batch_size=5)
@example(lengths=[0, 0], io_batch_size=5)
@example(lengths=[5, 5], io_batch_size=5)
@example(lengths=[3, 0, 4, 0], io_batch_size=5)
@example(lengths=[23], io_batch_size=5)
@example(lengths=[2, 3], io_batch_size=100)
def test_without_a_generator_batches_are_cut_from_the_chunks_put_end_to_end(
    lengths: list[int], io_batch_size: int
) -> None:
    chunks = as_chunks(lengths)
    batches = list(id_batches(chunks, io_batch_size, None))
    expected = batches_of(np.concatenate([np.empty(0, dtype=np.int64), *chunks]), io_batch_size)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in expected]


@given(lengths=chunk_lengths, io_batch_size=st.integers(1, 30), seed=st.one_of(st.none(), st.just(1)))
def test_every_batch_is_full_but_the_last_and_none_is_empty(
    lengths: list[int], io_batch_size: int, seed: int | None
) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    sizes = [len(batch) for batch in id_batches(as_chunks(lengths), io_batch_size, rng)]
    n_full, rest = divmod(sum(lengths), io_batch_size)
    assert sizes == [io_batch_size] * n_full + [rest] * (rest > 0)


@given(lengths=chunk_lengths, io_batch_size=st.integers(1, 30), seed=st.integers(0, 99))
def test_each_batch_is_permuted_by_the_next_draw_of_the_generator(
    lengths: list[int], io_batch_size: int, seed: int
) -> None:
    chunks = as_chunks(lengths)
    shuffled = list(id_batches(chunks, io_batch_size, np.random.default_rng(seed)))
    rng = np.random.default_rng(seed)
    expected = [batch[rng.permutation(len(batch))] for batch in id_batches(chunks, io_batch_size, None)]
    assert [batch.tolist() for batch in shuffled] == [batch.tolist() for batch in expected]


def test_chunks_are_left_as_they_were() -> None:
    chunks, untouched = as_chunks([4, 9]), as_chunks([4, 9])
    for batch in id_batches(chunks, 5, np.random.default_rng(3)):
        batch.sort()
    assert [chunk.tolist() for chunk in chunks] == [chunk.tolist() for chunk in untouched]


# io_batches -----------------------------------------------------------------------------------------------


class MemoryReader:
    """Rows of `expected_X`; counts what it reads, and fails where it is asked to."""

    def __init__(self, error_at: int | None = None, n_parts: int = 1) -> None:
        self.n_read = 0
        self.has_read = [threading.Event() for _ in range(100)]
        self._error_at = error_at
        self._n_parts = n_parts
        self._busy = threading.Lock()

    def read(self, obs_joinids: np.ndarray) -> Iterator[IOBatch]:
        assert self._busy.acquire(blocking=False), "two threads read at once"
        try:
            number, self.n_read = self.n_read, self.n_read + 1
            if number == self._error_at:
                raise OSError(f"batch {number} cannot be read") from KeyError("the cause")
            return iter([self._rows_of(ids) for ids in np.array_split(obs_joinids, self._n_parts)])
        finally:
            self._busy.release()
            self.has_read[number].set()

    def _rows_of(self, obs_joinids: np.ndarray) -> IOBatch:
        csr = sparse.csr_matrix(expected_X(obs_joinids, range(N_VARS)))
        matrix = CSR_IO_Buffer.from_pjd(csr.indptr, csr.indices, csr.data, csr.shape)
        return matrix, make_obs(obs_joinids)


def eager_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "EagerIterator" in thread.name}


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = eager_threads()
    yield
    assert eager_threads() <= before


@pytest.mark.parametrize("eager", [False, True])
@given(lengths=chunk_lengths, io_batch_size=st.integers(1, 30))
def test_each_batch_holds_the_rows_of_its_joinids_in_their_order(
    eager: bool, lengths: list[int], io_batch_size: int
) -> None:
    chunks = as_chunks(lengths)
    read = list(io_batches(id_batches(chunks, io_batch_size, None), MemoryReader(), use_eager_fetch=eager))
    batches = list(id_batches(chunks, io_batch_size, None))
    assert len(read) == len(batches)
    for (X, obs), batch in zip(read, batches, strict=True):
        np.testing.assert_array_equal(X.slice_tonumpy(slice(None)), expected_X(batch, range(N_VARS)))
        pd.testing.assert_frame_equal(obs, make_obs(batch))


@pytest.mark.parametrize("eager", [False, True])
def test_the_parts_of_each_batch_come_in_order_one_batch_after_the_other(eager: bool) -> None:
    reader = MemoryReader(n_parts=3)
    read = io_batches(id_batches([np.arange(100, 125)], 10, None), reader, use_eager_fetch=eager)
    parts = [obs["soma_joinid"].tolist() for _, obs in read]
    assert [len(part) for part in parts] == [4, 3, 3, 4, 3, 3, 2, 2, 1]
    assert np.concatenate(parts).tolist() == list(range(100, 125))


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("error_at", [0, 2])
def test_an_error_of_the_reader_surfaces_at_its_batch_with_its_cause(eager: bool, error_at: int) -> None:
    reader = MemoryReader(error_at)
    read = io_batches(id_batches([np.arange(50)], 10, None), reader, use_eager_fetch=eager)
    for number in range(error_at):
        assert next(read)[1]["soma_joinid"].tolist() == list(range(10 * number, 10 * number + 10))
    with pytest.raises(OSError, match=f"batch {error_at} cannot be read") as caught:
        next(read)
    assert isinstance(caught.value.__cause__, KeyError)
    assert list(read) == []
    assert reader.n_read == error_at + 1


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_of_the_joinids_surfaces_where_their_batch_would_have_come() -> None:
    def batches() -> Iterator[np.ndarray]:
        yield np.arange(5)
        raise RuntimeError("no more ids")

    read = io_batches(batches(), MemoryReader(), use_eager_fetch=True)
    assert len(next(read)[0]) == 5
    with pytest.raises(RuntimeError, match="no more ids"):
        next(read)


@pytest.mark.usefixtures("no_thread_left")
def test_exactly_one_batch_is_read_ahead() -> None:
    reader = MemoryReader()
    read = io_batches(id_batches([np.arange(80)], 10, None), reader, use_eager_fetch=True)
    assert reader.n_read == 0
    for n_taken in (1, 2, 3):
        next(read)
        assert reader.has_read[n_taken].wait(60), "the next batch is read without being asked for"
    read.close()  # waits for whatever is being read
    assert reader.n_read == 4


def test_without_eager_fetch_nothing_is_read_ahead_and_no_thread_is_started() -> None:
    reader, before = MemoryReader(), eager_threads()
    read = io_batches(id_batches([np.arange(80)], 10, None), reader, use_eager_fetch=False)
    for n_taken in (1, 2, 3):
        next(read)
        assert reader.n_read == n_taken
        assert eager_threads() <= before


@pytest.mark.usefixtures("no_thread_left")
def test_closing_midway_ends_the_thread_and_the_joinids() -> None:
    ended = threading.Event()

    def batches() -> Iterator[np.ndarray]:
        try:
            yield from np.arange(80).reshape(-1, 10)
        finally:
            ended.set()

    read = io_batches(batches(), MemoryReader(), use_eager_fetch=True)
    next(read)
    assert not ended.is_set()
    read.close()
    assert ended.is_set()
    assert list(read) == []


# A reader that waits for room -------------------------------------------------------------------------------


class WaitingReader:
    """Three rows at a time, given out one by one, in windows that share a room for less than two of them."""

    def __init__(self) -> None:
        self.room = Room(1)
        self.has_to_wait = threading.Event()
        self.errors: list[RuntimeError] = []
        has_room = self.room._has_room

        def watched(window: Window, n_bytes: int) -> bool:
            if not (answer := has_room(window, n_bytes)):
                self.has_to_wait.set()
            return answer

        self.room._has_room = watched  # type: ignore[method-assign]

    def read(self, obs_joinids: np.ndarray) -> Iterator[IOBatch]:
        columns = Columns(np.arange(N_VARS))
        window = Window(obs_joinids, columns, np.dtype(np.float32), n_parts=3, room=self.room)
        X = expected_X(obs_joinids, range(N_VARS))
        i, j = X.nonzero()
        try:
            window.add(obs_joinids[i], j, X[i, j])
        except RuntimeError as error:
            self.errors.append(error)
            raise
        return zip(window, (make_obs(obs_joinids[k : k + 1]) for k in range(3)), strict=True)


ROWS = np.array([[5, 4, 9], [1, 0, 7], [8, 2, 6]])


@pytest.mark.usefixtures("no_thread_left")
def test_a_reader_that_waits_for_room_goes_on_as_rows_are_taken() -> None:
    reader = WaitingReader()
    read = io_batches(iter(ROWS), reader, use_eager_fetch=True, room=reader.room)
    parts = [next(read)]
    assert reader.has_to_wait.wait(60)
    parts += read
    assert ids_in(parts, np.arange(N_VARS)) == ROWS.reshape(-1, 1).tolist()
    assert reader.errors == []


@pytest.mark.usefixtures("no_thread_left")
def test_closing_while_the_reader_waits_for_room_ends_its_thread() -> None:
    reader = WaitingReader()
    read = io_batches(iter(ROWS), reader, use_eager_fetch=True, room=reader.room)
    next(read)
    assert reader.has_to_wait.wait(60)
    read.close()
    assert [str(error) for error in reader.errors] == ["the iterator was closed while rows were read ahead"]
    assert list(read) == []


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_while_rows_are_taken_ends_the_thread_of_a_reader_that_waits_for_room() -> None:
    reader = WaitingReader()
    read = io_batches(iter(ROWS), reader, use_eager_fetch=True, room=reader.room)
    next(read)
    assert reader.has_to_wait.wait(60)
    with pytest.raises(KeyboardInterrupt):
        read.throw(KeyboardInterrupt)
    assert len(reader.errors) == 1


# IOBatchIterable ------------------------------------------------------------------------------------------


def ids_in(batches: list[IOBatch], var_joinids: np.ndarray) -> list[list[int]]:
    """Return the joinids of IO batches, having checked that each row of X is its own."""
    for X, obs in batches:
        np.testing.assert_array_equal(
            X.slice_tonumpy(slice(None)), expected_X(obs["soma_joinid"], var_joinids)
        )
    return [obs["soma_joinid"].tolist() for _, obs in batches]


def test_the_published_arguments_in_their_published_order_give_shuffled_io_batches(store: Store) -> None:
    chunks = [np.arange(200, 264), np.arange(0, 64), np.arange(100, 110)]
    var_joinids = np.array([20, 3, 9, 0])
    with store.locator.open() as (X, obs):
        batches = list(IOBatchIterable(chunks, 96, obs, var_joinids, X, ["soma_joinid"], 42, True, True))
    rng = np.random.default_rng(42)
    expected = [batch[rng.permutation(len(batch))] for batch in batches_of(np.concatenate(chunks), 96)]
    assert ids_in(batches, var_joinids) == [batch.tolist() for batch in expected]


@pytest.mark.parametrize("eager", [False, True])
def test_without_shuffling_rows_come_in_the_order_of_the_chunks(store: Store, eager: bool) -> None:
    chunks = [np.array([5, 200, 3]), np.array([77]), np.arange(300, N_OBS)]
    with store.locator.open() as (X, obs):
        iterable = IOBatchIterable(chunks, 4, obs, np.arange(N_VARS), X, shuffle=False, use_eager_fetch=eager)
        batches = list(iterable)
    expected = batches_of(np.concatenate(chunks), 4)
    assert ids_in(batches, np.arange(N_VARS)) == [batch.tolist() for batch in expected]
    assert all(obs.columns.tolist() == ["soma_joinid"] for _, obs in batches)


def test_obs_columns_come_in_the_order_asked_for_with_the_values_of_their_rows(store: Store) -> None:
    columns = ["stage", "maybe_int", "soma_joinid", "barcode"]
    with store.locator.open() as (X, obs):
        batches = list(IOBatchIterable([np.arange(100)], 30, obs, np.arange(2), X, columns, seed=1))
    for _, frame in batches:
        pd.testing.assert_frame_equal(frame, make_obs(frame["soma_joinid"].to_numpy())[columns])


def test_iterating_again_repeats_the_order_and_another_epoch_has_another(store: Store) -> None:
    with store.locator.open() as (X, obs):
        options = {"seed": 7, "obs": obs, "X": X, "var_joinids": np.arange(N_VARS)}
        first = IOBatchIterable([np.arange(60)], 40, **options)
        later = IOBatchIterable([np.arange(60)], 40, **options, epoch=1)
        orders = [ids_in(list(iterable), np.arange(N_VARS)) for iterable in (first, first, later)]
    assert orders[0] == orders[1] != orders[2]
    assert [sorted(ids) for ids in orders[2]] == [list(range(40)), list(range(40, 60))]


def test_no_chunks_give_no_io_batches(store: Store) -> None:
    with store.locator.open() as (X, obs):
        assert list(IOBatchIterable([], 40, obs, np.arange(N_VARS), X)) == []


def test_an_io_batch_size_of_no_rows_is_refused(store: Store) -> None:
    with (
        store.locator.open() as (X, obs),
        pytest.raises(ValueError, match="io_batch_size=0 must be a positive"),
    ):
        IOBatchIterable([], 0, obs, np.arange(N_VARS), X)
