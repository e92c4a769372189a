"""The rows of one read, kept compactly in memory or in files, given out part by part in the order asked for.

A layer is fastest to read in the order in which it is stored, and unlike that in which rows are wanted. So
entries are sorted as they arrive, into parts of neighbouring places; when a part is wanted its rows are put
together, and what it held is free for the window that is filled meanwhile.
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
from tiledbsoma_ml._soma.blocks import Block, Extents, Pages, Part
from tiledbsoma_ml._threads import at_rest, at_work, before_exit

_Ints: TypeAlias = NDArray[np.int32]


class Columns:
    """The columns that are wanted, and where each goes.

    Args:
        var_joinids: Columns in the order in which they are wanted; unique.

    Attributes:
        n: Number of these columns.
        dtype: The smallest type that holds their places.
        first: The number of the first column in `place_of`; see `numbers`.
        place_of: Where each column goes, from `first` on; -1 if it is not wanted.
    """

    TABLE = 2**20
    """A table of every column from the first to the last may have so many, or four times those wanted."""

    def __init__(self, var_joinids: NDArrayJoinId) -> None:
        self.n = len(var_joinids)
        self.dtype = smallest_uint(self.n)
        self.first = int(var_joinids.min()) if self.n else 0
        n_between = int(var_joinids.max()) - self.first + 1 if self.n else 0
        self._are_neighbours = n_between == self.n
        self._sorted: NDArrayJoinId | None = None
        if n_between <= max(self.TABLE, 4 * self.n):
            self.place_of = np.full(n_between, -1, dtype=np.int32)
            self.place_of[var_joinids - self.first] = np.arange(self.n, dtype=np.int32)
        else:  # far apart: they are numbered in the order of their joinids
            self.first, self.place_of = 0, np.argsort(var_joinids).astype(np.int32)
            self._sorted = var_joinids[self.place_of]

    def include_all(self, dim_1: NDArrayJoinId) -> bool:
        """Whether every one of some columns is wanted, as far as that is quick to tell."""
        if not self._are_neighbours or not len(dim_1):
            return False
        return bool(dim_1.min() >= self.first and dim_1.max() < self.first + self.n)

    def places(self, first: int, n: int) -> NDArray[np.int32]:
        """Return where each of `n` neighbouring columns goes; -1 if it is not wanted."""
        numbers = self.numbers(np.arange(first, first + n)) - self.first
        are_known = (numbers >= 0) & (numbers < len(self.place_of))
        found = np.full(n, -1, dtype=np.int32)
        found[are_known] = self.place_of[numbers[are_known]]
        return found

    def numbers(self, dim_1: NDArrayJoinId) -> NDArrayJoinId:
        """Return the numbers of columns: `place_of` has the wanted ones among these, and may lack others."""
        if self._sorted is None:
            return dim_1
        found = np.searchsorted(self._sorted, dim_1)
        found[self._sorted.take(found, mode="clip") != dim_1] = self.n
        return found


class Room:
    """Bytes that the windows of one iterator may hold together: the next one fills as this one is used up.

    A window that holds all there is waits for nothing, so that one which is larger than foreseen can end.
    """

    def __init__(self, n_bytes: float) -> None:
        self._n_bytes = n_bytes
        self._held: dict[Window, int] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        _rooms.add(self)

    def take(self, window: Window, n_bytes: int) -> None:
        """Wait until there is room for more; raise a RuntimeError if the room is closed meanwhile."""
        with at_rest(), self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(window, n_bytes))
            if self._is_closed:
                raise RuntimeError("the iterator was closed while rows were read ahead")
            self._held[window] = self._held.get(window, 0) + n_bytes

    def give_back(self, window: Window, n_bytes: int) -> None:
        """Make room for others."""
        with self._changed:
            self._held[window] -= n_bytes
            if not self._held[window]:
                del self._held[window]
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_room(self, window: Window, n_bytes: int) -> bool:
        total = sum(self._held.values())
        return total + n_bytes <= self._n_bytes or total == self._held.get(window, 0)


_rooms: weakref.WeakSet[Room] = weakref.WeakSet()


def _close_rooms() -> None:
    """Let no thread wait for the use of rows that nobody will use: the interpreter waits for the thread."""
    for room in list(_rooms):
        room.close()


before_exit(_close_rooms)


class Window:
    """Rows of a layer, filled in any order, and given out once in the order asked for.

    Args:
        obs_joinids: The rows asked for; they may repeat.
        columns: The columns asked for.
        dtype: Type of the values, which are kept in the smallest type that holds them exactly.
        n_parts: Number of parts in which they are given out.
        room: Limits the bytes that are held.
        store: Keeps them until they are given out; memory of its own if None.
        may_repeat: Whether the layer may have a coordinate more than once: its values are added up.
    """

    def __init__(
        self,
        obs_joinids: NDArrayJoinId,
        columns: Columns,
        dtype: np.dtype[Any],
        *,
        n_parts: int = 1,
        room: Room | None = None,
        store: Pages | Extents | None = None,
        may_repeat: bool = False,
    ) -> None:
        n_rows = len(obs_joinids)
        self._order = np.argsort(obs_joinids, kind="stable").astype(np.int32)
        ordered = obs_joinids[self._order]
        is_first = np.diff(ordered, prepend=ordered[0] - 1 if n_rows else 0) != 0
        self.sorted_ids = ordered[is_first]
        self._first = np.append(np.flatnonzero(is_first), n_rows) if len(self.sorted_ids) < n_rows else None
        self._columns = columns
        self._dtype = dtype
        self._may_repeat = may_repeat
        self._room = room
        self._borders = np.linspace(0, n_rows, min(n_parts, max(n_rows, 1)) + 1).astype(np.int32)
        n_parts = len(self._borders) - 1
        self._counts = np.zeros(n_rows, dtype=np.int32)
        store = store or Pages()
        self._parts = [store.part() for _ in range(n_parts)]
        self._scratch = np.empty(0, columns.dtype), np.empty(0, dtype)
        self.nbytes = 0

    def add(self, dim_0: NDArrayJoinId, dim_1: NDArrayJoinId, values: NDArrayNumber) -> None:
        """Take the wanted ones among entries of the layer, given by their coordinates."""
        from tiledbsoma_ml._kernels import window as kernels

        places, starts, stops = self._find_runs(dim_0)
        lengths = stops - starts
        columns = self._columns
        if not columns.include_all(dim_1):
            dim_1 = columns.numbers(dim_1)
            kernels.count_kept(dim_1, columns.first, columns.place_of, starts, stops, lengths)

        def copy(begins: NDArray[np.int64], cols: NDArray[Any], kept: NDArray[Any]) -> None:
            as_they_are = kept.dtype == values.dtype
            source, target = (as_bits(a) if as_they_are else a for a in (values, kept))
            first, place_of = columns.first, columns.place_of
            kernels.copy_runs(dim_1, source, first, place_of, starts, stops, begins, cols, target)

        self._add_runs(places, lengths, _narrowed(values), copy)

    def add_block(self, first_row: int, first_col: int, block: NDArrayNumber) -> None:
        """Take what is wanted, and not zero, of a dense block, which starts at a row and a column."""
        from tiledbsoma_ml._kernels import window as kernels

        start, stop = np.searchsorted(self.sorted_ids, [first_row, first_row + len(block)]).tolist()
        lines = (self.sorted_ids[start:stop] - first_row).astype(np.int32)
        places, repeats = self._places(np.arange(start, stop))
        lines = lines if repeats is None else np.repeat(lines, repeats)
        col_of = self._columns.places(first_col, block.shape[1])
        lengths = np.empty(len(lines), dtype=np.int32)
        kernels.count_nonzeros(block, lines, col_of, lengths)

        def copy(begins: NDArray[np.int64], cols: NDArray[Any], kept: NDArray[Any]) -> None:
            kernels.copy_nonzeros(block, lines, col_of, begins, cols, kept)

        self._add_runs(places, lengths, _narrowed(block.reshape(-1)), copy)

    def _add_runs(
        self,
        places: _Ints,
        lengths: _Ints,
        dtype: np.dtype[Any],
        copy: Callable[[NDArray[np.int64], NDArray[Any], NDArray[Any]], None],
    ) -> None:
        """Take runs of entries of one row each: where these go, how long they are, and what copies them.

        It is told where each run begins among the columns and values, in a type that holds all of these.
        """
        from tiledbsoma_ml._kernels import window as kernels

        kernels.add_lengths(places, lengths, self._counts)
        part_of = (np.searchsorted(self._borders, places, side="right") - 1).astype(np.uint16)
        by_part = np.argsort(part_of, kind="stable")
        ends = np.cumsum(np.append(0, lengths[by_part]), dtype=np.int64)
        begins = np.empty(len(lengths), dtype=np.int64)
        begins[by_part] = ends[:-1]
        cols, kept = self._room_for(int(ends[-1]), dtype)
        copy(begins, cols, kept)
        runs = np.searchsorted(part_of[by_part], np.arange(len(self._parts) + 1))
        entries = ends[runs]
        places, lengths = places[by_part], lengths[by_part]
        for part in np.flatnonzero(np.diff(runs)).tolist():
            mine, its = slice(*runs[part : part + 2]), slice(*entries[part : part + 2])
            rows = places[mine] - self._borders[part]
            self._put(part, Block(rows, lengths[mine], cols[its], kept[its]))

    def __iter__(self) -> Iterator[CSR_IO_Buffer]:
        """Yield the parts in order; what a part held is free once it is made."""
        return self.give_out()

    def give_out(self, *, narrow: bool = False) -> Iterator[CSR_IO_Buffer]:
        """Yield the parts in order, with `narrow` in the smallest type that is known to hold their values.

        A part in which a coordinate repeats comes in the layer's own type.
        """
        for number, part in enumerate(self._parts):
            counts = self._counts[slice(*self._borders[number : number + 2])]
            rows = self._finish(part, counts, part.values_dtype if narrow else None)
            n_bytes, part.nbytes = part.nbytes, 0
            if self._room is not None and n_bytes:
                self._room.give_back(self, n_bytes)
            yield rows

    def _find_runs(self, dim_0: NDArrayJoinId) -> tuple[_Ints, _Ints, _Ints]:
        """Return where runs of entries of one row belong, and their borders."""
        from tiledbsoma_ml._kernels import window as kernels

        rows, starts, stops = (np.empty(len(dim_0), dtype=np.int32) for _ in range(3))
        n_runs = kernels.find_runs(dim_0, self.sorted_ids, rows, starts, stops)
        rows, starts, stops = rows[:n_runs], starts[:n_runs], stops[:n_runs]
        places, repeats = self._places(rows)
        if repeats is not None:
            starts, stops = np.repeat(starts, repeats), np.repeat(stops, repeats)
        return places, starts, stops

    def _places(self, rows: NDArray[Any]) -> tuple[_Ints, NDArray[np.int64] | None]:
        """Return where rows of `sorted_ids` go, and how often each, if not once."""
        if self._first is None:
            return self._order[rows], None
        first = self._first[rows]
        repeats = self._first[rows + 1] - first
        nth = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return self._order[np.repeat(first, repeats) + nth], repeats

    def _room_for(self, n_entries: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return memory for columns and values, which is good until the next call."""
        if len(self._scratch[0]) < n_entries:
            self._scratch = np.empty(n_entries, self._columns.dtype), np.empty(n_entries, self._dtype)
        return self._scratch[0], self._scratch[1].view(dtype)

    def _put(self, part: int, block: Block) -> None:
        if self._room is not None:
            self._room.take(self, block.nbytes)
        self._parts[part].put(block)
        self.nbytes += block.nbytes

    def _finish(self, part: Part, counts: _Ints, dtype: np.dtype[Any] | None) -> CSR_IO_Buffer:
        """Return the rows of a part, which has so many entries in each, and empty it."""
        from tiledbsoma_ml._kernels import window as kernels

        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
        indices = np.empty(indptr[-1], dtype=self._columns.dtype)
        data = np.empty(indptr[-1], dtype=dtype or self._dtype)
        free = indptr[:-1].copy()
        for rows, lengths, cols, values in part.take():
            as_they_are = values.dtype == data.dtype
            kernels.place_runs(
                rows,
                lengths,
                cols,
                as_bits(values) if as_they_are else values,
                free,
                indices,
                as_bits(data) if as_they_are else data,
            )
        found = CSR_IO_Buffer(indptr, indices, data, (len(counts), self._columns.n))
        # A sum may need a wider type than what is added.
        return found.with_repeats_added(self._dtype) if self._may_repeat else found


@cache
def preload_kernels() -> threading.Thread:
    """Load the compiled loops on a thread: it takes half a second that nobody has to wait for later."""
    thread = threading.Thread(target=at_work()(_use_kernels), name="preload_kernels")
    thread.start()
    return thread


def _use_kernels() -> None:
    one = np.arange(1)
    window = Window(one, Columns(one), np.dtype(np.float32))
    read = one.copy()
    for value in (1.0, 0.5):
        values = np.array([value], dtype=np.float32)
        for array in (read, values):  # other loops than those for arrays that can be written to
            array.flags.writeable = False
        window.add(read, read, values)
    for _ in window:
        pass


def _narrowed(values: NDArrayNumber) -> np.dtype[Any]:
    """Return the smallest type that holds the values exactly: for counts an unsigned integer."""
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
