"""`Window`: the rows of one read, stored compactly, which are given out in pieces in the order asked for.

A layer is read fastest in the order in which it is stored, which is not the order in which rows are asked
for. So entries are sorted into pieces as they arrive. A piece is made when it is taken; then its memory is
free for the next window, which is filled at the same time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer, smallest_uint
from tiledbsoma_ml._kernels.bits import as_bits
from tiledbsoma_ml._soma.stores import Extents, Pages, RunQueue, Runs
from tiledbsoma_ml._threads import at_rest, at_work, before_exit

_Ints: TypeAlias = NDArray[np.int32]


class Columns:
    """The columns that are wanted, and the number that each has in `X`.

    Args:
        var_joinids: Columns in the order in which `X` has them; unique.

    Attributes:
        n: Number of these columns.
        dtype: The smallest type that holds column numbers of `X`.
        first: The key of the first column in `col_of`; see `keys`.
        col_of: The number in `X` of the columns with the keys from `first` on; -1 if one is not wanted.
    """

    TABLE = 2**20
    """Largest size of `col_of` with joinids as keys, unless four times the wanted columns are more."""

    def __init__(self, var_joinids: NDArrayJoinId) -> None:
        self.n = len(var_joinids)
        self.dtype = smallest_uint(self.n)
        self.first = int(var_joinids.min()) if self.n else 0
        n_between = int(var_joinids.max()) - self.first + 1 if self.n else 0
        self._are_neighbours = n_between == self.n
        self._sorted: NDArrayJoinId | None = None
        if n_between <= max(self.TABLE, 4 * self.n):
            self.col_of = np.full(n_between, -1, dtype=np.int32)
            self.col_of[var_joinids - self.first] = np.arange(self.n, dtype=np.int32)
        else:  # they are far apart: the key of a column is its number in the order of joinids
            self.first, self.col_of = 0, np.argsort(var_joinids).astype(np.int32)
            self._sorted = var_joinids[self.col_of]

    def include_all(self, dim_1: NDArrayJoinId) -> bool:
        """Whether all of these columns are wanted; False also if a quick check does not show it."""
        if not self._are_neighbours or not len(dim_1):
            return False
        return bool(dim_1.min() >= self.first and dim_1.max() < self.first + self.n)

    def of_neighbours(self, first: int, n: int) -> NDArray[np.int32]:
        """Return the number in `X` of each of `n` neighbouring columns; -1 if it is not wanted."""
        keys = self.keys(np.arange(first, first + n)) - self.first
        are_known = (keys >= 0) & (keys < len(self.col_of))
        found = np.full(n, -1, dtype=np.int32)
        found[are_known] = self.col_of[keys[are_known]]
        return found

    def keys(self, dim_1: NDArrayJoinId) -> NDArrayJoinId:
        """Return the key of each column in `col_of`; keys of columns that are not wanted may lie outside."""
        if self._sorted is None:
            return dim_1
        found = np.searchsorted(self._sorted, dim_1)
        found[self._sorted.take(found, mode="clip") != dim_1] = self.n
        return found


class ByteLimit:
    """A limit to the bytes that the windows of one iterator hold together.

    The next window fills as the current one is used up. A window that is alone never waits, so a window that
    is larger than the limit can be filled, too.
    """

    def __init__(self, n_bytes: float) -> None:
        self._n_bytes = n_bytes
        self._held: dict[Window, int] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        _byte_limits.add(self)

    def take(self, window: Window, n_bytes: int) -> None:
        """Wait until the window may hold more bytes; raise a RuntimeError if this is closed meanwhile."""
        with at_rest(), self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_allowed(window, n_bytes))
            if self._is_closed:
                raise RuntimeError("the iterator was closed while rows were read ahead")
            self._held[window] = self._held.get(window, 0) + n_bytes

    def give_back(self, window: Window, n_bytes: int) -> None:
        """Let other windows hold these bytes."""
        with self._changed:
            self._held[window] -= n_bytes
            if not self._held[window]:
                del self._held[window]
            self._changed.notify_all()

    def close(self) -> None:
        """End all waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _is_allowed(self, window: Window, n_bytes: int) -> bool:
        total = sum(self._held.values())
        return total + n_bytes <= self._n_bytes or total == self._held.get(window, 0)


_byte_limits: weakref.WeakSet[ByteLimit] = weakref.WeakSet()


def _close_limits() -> None:
    """End the waits of all threads: the interpreter waits for them, and no one takes rows any longer."""
    for byte_limit in list(_byte_limits):
        byte_limit.close()


before_exit(_close_limits)


class Window:
    """The rows of a read, which are added in any order, and given out once, in the order asked for.

    Args:
        obs_joinids: The rows asked for; they may repeat.
        columns: The columns asked for.
        dtype: Type of the values. They are stored in the smallest type that holds them exactly.
        n_pieces: Number of pieces in which the rows are given out.
        byte_limit: Limit to the bytes of several windows; None for no limit.
        store: The store that holds the entries; pages of memory of its own if None.
        may_repeat: Whether the layer may have a coordinate several times; then its values are added up.
    """

    def __init__(
        self,
        obs_joinids: NDArrayJoinId,
        columns: Columns,
        dtype: np.dtype[Any],
        *,
        n_pieces: int = 1,
        byte_limit: ByteLimit | None = None,
        store: Pages | Extents | None = None,
        may_repeat: bool = False,
    ) -> None:
        n_rows = len(obs_joinids)
        self._order = np.argsort(obs_joinids, kind="stable").astype(np.int32)
        ordered = obs_joinids[self._order]
        is_first = np.diff(ordered, prepend=ordered[0] - 1 if n_rows else 0) != 0
        self.sorted_joinids = ordered[is_first]
        self._first = (
            np.append(np.flatnonzero(is_first), n_rows) if len(self.sorted_joinids) < n_rows else None
        )
        self._columns = columns
        self._dtype = dtype
        self._may_repeat = may_repeat
        self._byte_limit = byte_limit
        self._borders = np.linspace(0, n_rows, min(n_pieces, max(n_rows, 1)) + 1).astype(np.int32)
        n_pieces = len(self._borders) - 1
        self._counts = np.zeros(n_rows, dtype=np.int32)
        store = store or Pages()
        self._queues = [store.queue() for _ in range(n_pieces)]
        self._scratch = np.empty(0, columns.dtype), np.empty(0, dtype)
        self.nbytes = 0

    def add(self, dim_0: NDArrayJoinId, dim_1: NDArrayJoinId, values: NDArrayNumber) -> None:
        """Add entries of the layer, given by their coordinates; those that are not wanted are ignored."""
        from tiledbsoma_ml._kernels import window as kernels

        rows, starts, stops = self._find_runs(dim_0)
        lengths = stops - starts
        columns = self._columns
        if not columns.include_all(dim_1):
            dim_1 = columns.keys(dim_1)
            kernels.count_wanted(dim_1, columns.first, columns.col_of, starts, stops, lengths)

        def copy(begins: NDArray[np.int64], cols: NDArray[Any], out: NDArray[Any]) -> None:
            is_same_type = out.dtype == values.dtype
            source, target = (as_bits(a) if is_same_type else a for a in (values, out))
            first, col_of = columns.first, columns.col_of
            kernels.copy_runs(dim_1, source, first, col_of, starts, stops, begins, cols, target)

        self._add_runs(rows, lengths, narrow_dtype(values), copy)

    def add_block(self, first_row: int, first_col: int, block: NDArrayNumber) -> None:
        """Add the non-zeros of a dense block of the layer; those that are not wanted are ignored."""
        from tiledbsoma_ml._kernels import window as kernels

        start, stop = np.searchsorted(self.sorted_joinids, [first_row, first_row + len(block)]).tolist()
        lines = (self.sorted_joinids[start:stop] - first_row).astype(np.int32)
        rows, repeats = self._rows_asked_for(np.arange(start, stop))
        lines = lines if repeats is None else np.repeat(lines, repeats)
        col_of = self._columns.of_neighbours(first_col, block.shape[1])
        lengths = np.empty(len(lines), dtype=np.int32)
        kernels.count_nonzeros(block, lines, col_of, lengths)

        def copy(begins: NDArray[np.int64], cols: NDArray[Any], out: NDArray[Any]) -> None:
            kernels.copy_nonzeros(block, lines, col_of, begins, cols, out)

        self._add_runs(rows, lengths, narrow_dtype(block.reshape(-1)), copy)

    def _add_runs(
        self,
        rows: _Ints,
        lengths: _Ints,
        dtype: np.dtype[Any],
        copy: Callable[[NDArray[np.int64], NDArray[Any], NDArray[Any]], None],
    ) -> None:
        """Add runs of entries, each of one of the rows asked for.

        Args:
            rows: The number of the row of each run.
            lengths: Number of entries of each run.
            dtype: A type that holds all values.
            copy: Writes the runs. It gets the begin of each run, and the arrays for columns and for values.
        """
        from tiledbsoma_ml._kernels import window as kernels

        kernels.add_lengths(rows, lengths, self._counts)
        piece_of = (np.searchsorted(self._borders, rows, side="right") - 1).astype(np.uint16)
        by_piece = np.argsort(piece_of, kind="stable")
        ends = np.cumsum(np.append(0, lengths[by_piece]), dtype=np.int64)
        begins = np.empty(len(lengths), dtype=np.int64)
        begins[by_piece] = ends[:-1]
        cols, values = self._scratch_for(int(ends[-1]), dtype)
        copy(begins, cols, values)
        runs = np.searchsorted(piece_of[by_piece], np.arange(len(self._queues) + 1))
        entries = ends[runs]
        rows, lengths = rows[by_piece], lengths[by_piece]
        for piece in np.flatnonzero(np.diff(runs)).tolist():
            mine, its = slice(*runs[piece : piece + 2]), slice(*entries[piece : piece + 2])
            rows_of_piece = rows[mine] - self._borders[piece]
            self._put(piece, Runs(rows_of_piece, lengths[mine], cols[its], values[its]))

    def __iter__(self) -> Iterator[CSR_IO_Buffer]:
        """Yield the pieces in order; the memory of a piece in the store is free when it is yielded."""
        return self.give_out()

    def give_out(self, *, narrow: bool = False) -> Iterator[CSR_IO_Buffer]:
        """Yield the pieces in order, with `narrow` in the smallest type that is known to hold their values.

        A piece in which a coordinate repeats comes in the type of the layer.
        """
        for number, queue in enumerate(self._queues):
            counts = self._counts[slice(*self._borders[number : number + 2])]
            rows = self._finish(queue, counts, queue.values_dtype if narrow else None)
            n_bytes, queue.nbytes = queue.nbytes, 0
            if self._byte_limit is not None and n_bytes:
                self._byte_limit.give_back(self, n_bytes)
            yield rows

    def _find_runs(self, dim_0: NDArrayJoinId) -> tuple[_Ints, _Ints, _Ints]:
        """Return the row asked for of each run of entries of one row, and the start and stop of the run."""
        from tiledbsoma_ml._kernels import window as kernels

        found, starts, stops = (np.empty(len(dim_0), dtype=np.int32) for _ in range(3))
        n_runs = kernels.find_runs(dim_0, self.sorted_joinids, found, starts, stops)
        found, starts, stops = found[:n_runs], starts[:n_runs], stops[:n_runs]
        rows, repeats = self._rows_asked_for(found)
        if repeats is not None:
            starts, stops = np.repeat(starts, repeats), np.repeat(stops, repeats)
        return rows, starts, stops

    def _rows_asked_for(self, found: NDArray[Any]) -> tuple[_Ints, NDArray[np.int64] | None]:
        """Return the rows asked for that have the joinids `sorted_joinids[found]`.

        Also returns how often each of these joinids was asked for; None if each was asked for once.
        """
        if self._first is None:
            return self._order[found], None
        first = self._first[found]
        repeats = self._first[found + 1] - first
        nth = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return self._order[np.repeat(first, repeats) + nth], repeats

    def _scratch_for(self, n_entries: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return arrays for columns and values, which may be used until the next call."""
        if len(self._scratch[0]) < n_entries:
            self._scratch = np.empty(n_entries, self._columns.dtype), np.empty(n_entries, self._dtype)
        return self._scratch[0], self._scratch[1].view(dtype)

    def _put(self, piece: int, runs: Runs) -> None:
        if self._byte_limit is not None:
            self._byte_limit.take(self, runs.nbytes)
        self._queues[piece].put(runs)
        self.nbytes += runs.nbytes

    def _finish(self, queue: RunQueue, counts: _Ints, dtype: np.dtype[Any] | None) -> CSR_IO_Buffer:
        """Return the rows of a piece, with `counts` entries in each, and empty its queue."""
        from tiledbsoma_ml._kernels import window as kernels

        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
        indices = np.empty(indptr[-1], dtype=self._columns.dtype)
        data = np.empty(indptr[-1], dtype=dtype or self._dtype)
        free = indptr[:-1].copy()
        for rows, lengths, cols, values in queue.take():
            is_same_type = values.dtype == data.dtype
            kernels.place_runs(
                rows,
                lengths,
                cols,
                as_bits(values) if is_same_type else values,
                free,
                indices,
                as_bits(data) if is_same_type else data,
            )
        found = CSR_IO_Buffer(indptr, indices, data, (len(counts), self._columns.n))
        # A sum may need a wider type than its terms.
        return found.with_repeats_added(self._dtype) if self._may_repeat else found


@cache
def preload_kernels() -> threading.Thread:
    """Load the compiled loops on a thread, which takes half a second; later their first use does not wait."""
    thread = threading.Thread(target=at_work()(_use_kernels), name="preload_kernels")
    thread.start()
    return thread


def _use_kernels() -> None:
    one = np.arange(1)
    window = Window(one, Columns(one), np.dtype(np.float32))
    read = one.copy()
    for value in (1.0, 0.5):
        values = np.array([value], dtype=np.float32)
        for array in (read, values):  # read-only arrays have loops of their own
            array.flags.writeable = False
        window.add(read, read, values)
    for _ in window:
        pass


def narrow_dtype(values: NDArrayNumber) -> np.dtype[Any]:
    """Return the smallest type that holds the values exactly; for counts, an unsigned integer."""
    from tiledbsoma_ml._kernels import window as kernels

    if not len(values) or values.dtype.itemsize == 1:
        return values.dtype
    if values.dtype.type in (np.float32, np.float64):
        holds_counts = kernels.are_counts(values, as_bits(values))
    else:
        holds_counts = values.dtype.kind in "iu" and values.min() >= 0
    for narrow in (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32)):
        if holds_counts and values.max() <= np.iinfo(narrow).max and narrow.itemsize < values.dtype.itemsize:
            return narrow
    return values.dtype
