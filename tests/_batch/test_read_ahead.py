from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from stores import N_VARS, eager_threads, expected_X, make_obs
from tiledbsoma_ml._batch.read_ahead import Piece, read_ahead
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._io_batch_iterable import id_batches
from tiledbsoma_ml._order.reads import ReadSize
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.held_rows import ByteLimit, Columns, HeldRows


def as_chunks(lengths: list[int]) -> list[np.ndarray]:
    """Return chunks of these lengths; no joinid follows from its place."""
    joinids = np.random.default_rng(0).permutation(1000)[: sum(lengths)]
    return np.split(joinids, np.cumsum(lengths)[:-1]) if lengths else []


chunk_lengths = st.lists(st.integers(0, 12), max_size=7)


class MemoryReader:
    """Rows of `expected_X`; counts what it reads, and fails where it is asked to."""

    def __init__(self, error_at: int | None = None, n_pieces: int = 1) -> None:
        self.n_read = self.n_closed = 0
        self.has_read = [threading.Event() for _ in range(100)]
        self._error_at = error_at
        self._n_pieces = n_pieces
        self._busy = threading.Lock()

    def read(self, obs_joinids: np.ndarray) -> Iterator[Rows[Any]]:
        assert self._busy.acquire(blocking=False), "two threads read at once"
        try:
            number, self.n_read = self.n_read, self.n_read + 1
            if number == self._error_at:
                raise OSError(f"batch {number} cannot be read") from KeyError("the cause")
            return iter([self._rows_of(ids) for ids in np.array_split(obs_joinids, self._n_pieces)])
        finally:
            self._busy.release()
            self.has_read[number].set()

    def close(self) -> None:
        self.n_closed += 1

    def _rows_of(self, obs_joinids: np.ndarray) -> Rows[Any]:
        csr = sparse.csr_matrix(expected_X(obs_joinids, range(N_VARS)))
        matrix = CSR_IO_Buffer.from_pjd(csr.indptr, csr.indices, csr.data, csr.shape)
        return Rows(obs_joinids=obs_joinids, X=matrix, obs=make_obs(obs_joinids))


@pytest.mark.parametrize("eager", [False, True])
@settings(max_examples=25)
@given(lengths=chunk_lengths, io_batch_size=st.integers(1, 30))
def test_each_batch_holds_the_rows_of_its_joinids_in_their_order(
    eager: bool, lengths: list[int], io_batch_size: int
) -> None:
    chunks = as_chunks(lengths)
    read = list(read_ahead(id_batches(chunks, io_batch_size, None), MemoryReader(), use_eager_fetch=eager))
    batches = list(id_batches(chunks, io_batch_size, None))
    assert len(read) == len(batches)
    for (rows, is_last), batch in zip(read, batches, strict=True):
        assert is_last
        assert rows.obs_joinids.tolist() == batch.tolist()
        np.testing.assert_array_equal(rows.X.slice_tonumpy(slice(None)), expected_X(batch, range(N_VARS)))
        pd.testing.assert_frame_equal(rows.obs, make_obs(batch))


@pytest.mark.parametrize("eager", [False, True])
def test_the_parts_of_each_batch_come_in_order_one_batch_after_the_other(eager: bool) -> None:
    reader = MemoryReader(n_pieces=3)
    read = read_ahead(id_batches([np.arange(100, 125)], 10, None), reader, use_eager_fetch=eager)
    pieces = list(read)
    parts = [rows.obs_joinids.tolist() for rows, _ in pieces]
    assert [len(part) for part in parts] == [4, 3, 3, 4, 3, 3, 2, 2, 1]
    assert [is_last for _, is_last in pieces] == 3 * [False, False, True]
    assert np.concatenate(parts).tolist() == list(range(100, 125))


@given(
    lengths=st.lists(st.integers(0, 9), max_size=9),
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=4),
    n_pieces=st.integers(1, 6),
    eager=st.booleans(),
)
def test_whatever_is_read_at_once_rows_come_in_order_and_are_cut_where_their_io_batches_end(
    lengths: list[int], sizes: list[tuple[int, int]], n_pieces: int, eager: bool
) -> None:
    starts = []

    def next_size(n_read: int) -> ReadSize:
        n_rows, more = sizes[len(starts) % len(sizes)]
        starts.append(n_read)
        return ReadSize(n_rows=n_rows, most=n_rows + more)

    reader = MemoryReader(n_pieces=n_pieces)
    pieces = list(read_ahead(iter(as_chunks(lengths)), reader, use_eager_fetch=eager, next_size=next_size))
    assert reader.n_read == len(starts)
    for (n_rows, more), size in zip(sizes, np.diff([*starts, sum(lengths)]), strict=False):
        assert size <= n_rows + more
    found, rows = list[list[int]](), list[int]()
    for piece, is_last in pieces:
        rows += piece.obs_joinids.tolist()
        np.testing.assert_array_equal(
            piece.X.slice_tonumpy(slice(None)), expected_X(piece.obs_joinids, range(N_VARS))
        )
        if is_last:
            found.append(rows)
            rows = []
    assert rows == []
    assert found == [batch.tolist() for batch in as_chunks(lengths) if len(batch)]


def test_a_read_has_whole_io_batches_unless_one_is_too_large() -> None:
    io_batches, asked = iter(as_chunks([4, 4, 4, 25, 3, 3])), list[int]()

    class Asked(MemoryReader):
        def read(self, obs_joinids: np.ndarray) -> Iterator[Rows[CSR_IO_Buffer]]:
            asked.append(len(obs_joinids))
            return super().read(obs_joinids)

    size = ReadSize(n_rows=7, most=10)
    list(read_ahead(io_batches, Asked(), use_eager_fetch=False, next_size=lambda n_read: size))
    assert asked == [8, 10, 10, 9, 6]


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("error_at", [0, 2])
def test_an_error_of_the_reader_surfaces_at_its_batch_with_its_cause(eager: bool, error_at: int) -> None:
    reader = MemoryReader(error_at)
    read = read_ahead(id_batches([np.arange(50)], 10, None), reader, use_eager_fetch=eager)
    for number in range(error_at):
        assert next(read)[0].obs_joinids.tolist() == list(range(10 * number, 10 * number + 10))
    with pytest.raises(OSError, match=f"batch {error_at} cannot be read") as caught:
        next(read)
    assert isinstance(caught.value.__cause__, KeyError)
    assert list(read) == []
    assert (reader.n_read, reader.n_closed) == (error_at + 1, 1)


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_of_the_joinids_surfaces_where_their_batch_would_have_come() -> None:
    def batches() -> Iterator[np.ndarray]:
        yield np.arange(5)
        raise RuntimeError("no more ids")

    read = read_ahead(batches(), MemoryReader(), use_eager_fetch=True)
    assert len(next(read)[0]) == 5
    with pytest.raises(RuntimeError, match="no more ids"):
        next(read)


@pytest.mark.usefixtures("no_thread_left")
def test_exactly_one_batch_is_read_ahead() -> None:
    reader = MemoryReader()
    read = read_ahead(id_batches([np.arange(80)], 10, None), reader, use_eager_fetch=True)
    assert reader.n_read == 0
    for n_taken in (1, 2, 3):
        next(read)
        assert reader.has_read[n_taken].wait(60), "the next batch is read without being asked for"
    read.close()  # waits for whatever is being read
    assert (reader.n_read, reader.n_closed) == (4, 1)


def test_without_eager_fetch_nothing_is_read_ahead_and_no_thread_is_started() -> None:
    reader, before = MemoryReader(), eager_threads()
    read = read_ahead(id_batches([np.arange(80)], 10, None), reader, use_eager_fetch=False)
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

    read = read_ahead(batches(), MemoryReader(), use_eager_fetch=True)
    next(read)
    assert not ended.is_set()
    read.close()
    assert ended.is_set()
    assert list(read) == []


# A reader that waits for others -----------------------------------------------------------------------------


class WaitingReader:
    """Three rows at a time, given out one by one, in windows that share a limit for less than two of them."""

    def __init__(self) -> None:
        self.byte_limit = ByteLimit(1)
        self.has_to_wait = threading.Event()
        self.errors: list[RuntimeError] = []
        is_allowed = self.byte_limit._is_allowed

        def watched(window: HeldRows, n_bytes: int) -> bool:
            if not (answer := is_allowed(window, n_bytes)):
                self.has_to_wait.set()
            return answer

        self.byte_limit._is_allowed = watched  # type: ignore[method-assign]

    def read(self, obs_joinids: np.ndarray) -> Iterator[Rows[Any]]:
        columns = Columns(np.arange(N_VARS))
        window = HeldRows(obs_joinids, columns, np.dtype(np.float32), n_pieces=3, byte_limit=self.byte_limit)
        X = expected_X(obs_joinids, range(N_VARS))
        i, j = X.nonzero()
        try:
            window.add(obs_joinids[i], j, X[i, j])
        except RuntimeError as error:
            self.errors.append(error)
            raise
        return (
            Rows(obs_joinids=ids, X=X, obs=make_obs(ids))
            for X, ids in zip(window, obs_joinids.reshape(3, 1), strict=True)
        )

    def close(self) -> None:
        self.byte_limit.close()


def ids_in(pieces: list[Piece]) -> list[list[int]]:
    """Return the joinids of rows, having checked that each row of X is its own."""
    for rows, _ in pieces:
        found = rows.X.slice_tonumpy(slice(None))
        np.testing.assert_array_equal(found, expected_X(rows.obs_joinids, range(N_VARS)))
    return [rows.obs_joinids.tolist() for rows, _ in pieces]


ROWS = np.array([[5, 4, 9], [1, 0, 7], [8, 2, 6]])


@pytest.mark.usefixtures("no_thread_left")
def test_a_reader_that_waits_for_bytes_goes_on_as_rows_are_taken() -> None:
    reader = WaitingReader()
    read = read_ahead(iter(ROWS), reader, use_eager_fetch=True)
    parts = [next(read)]
    assert reader.has_to_wait.wait(60)
    parts += read
    assert ids_in(parts) == ROWS.reshape(-1, 1).tolist()
    assert reader.errors == []


@pytest.mark.usefixtures("no_thread_left")
def test_closing_while_the_reader_waits_for_bytes_ends_its_thread() -> None:
    reader = WaitingReader()
    read = read_ahead(iter(ROWS), reader, use_eager_fetch=True)
    next(read)
    assert reader.has_to_wait.wait(60)
    read.close()
    assert [str(error) for error in reader.errors] == ["the iterator was closed while rows were read ahead"]
    assert list(read) == []


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_while_rows_are_taken_ends_the_thread_of_a_reader_that_waits_for_bytes() -> None:
    reader = WaitingReader()
    read = read_ahead(iter(ROWS), reader, use_eager_fetch=True)
    next(read)
    assert reader.has_to_wait.wait(60)
    with pytest.raises(KeyboardInterrupt):
        read.throw(KeyboardInterrupt)
    assert len(reader.errors) == 1
