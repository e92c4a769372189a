"""`HeldRows`: the rows of one read, stored compactly until they are given out, in the order asked for.

A layer is read fastest in the order in which it is stored, which is not the order in which rows are asked
for. So entries are sorted into pieces as they arrive. A piece is made when it is taken; then its memory is
free for the next read, which is held at the same time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer, smallest_uint
from tiledbsoma_ml._kernels.bits import as_bits
from tiledbsoma_ml._soma.stores import Extents, Pages, Piece
from tiledbsoma_ml._threads import at_rest, at_work, before_exit

CHANGED = (
    "what waits in window_dir must stay as it was written, but has changed: the disk is damaged, or another "
    "program writes to its files; choose another folder."
)

INDEX_TYPE = np.dtype(np.int32)
"""Type of the columns that are given out, which mini-batches keep."""

MOST_COLUMNS = np.iinfo(INDEX_TYPE).max
"""Number of columns up to which they have this type."""

BLOCK_VALUES = 2**18
"""Number of values of a dense block that are searched for non-zeros at once."""


class Columns:
    """The columns that are wanted, and the number that each has in `X`.

    Args:
        var_joinids: Columns in the order in which `X` has them; unique.

    Attributes:
        n: Number of these columns.
        dtype: The smallest type that holds column numbers of `X`.
        first: The key of the first column in `col_of`; see `keys`.
        col_of: The number in `X` of the columns with the keys from `first` on; -1 if one is not wanted.
        are_in_order: Whether `col_of` is 0, 1, 2 and so on.
    """

    TABLE = 2**20
    """Largest size of `col_of` with joinids as keys, unless four times the wanted columns are more."""

    def __init__(self, var_joinids: NDArrayJoinId) -> None:
        self.n = len(var_joinids)
        self.dtype = smallest_uint(self.n)
        self.first = int(var_joinids.min()) if self.n else 0
        n_between = int(var_joinids.max()) - self.first + 1 if self.n else 0
        self._sorted: NDArrayJoinId | None = None
        if n_between <= max(self.TABLE, 4 * self.n):
            self.col_of = np.full(n_between, -1, dtype=np.int32)
            self.col_of[var_joinids - self.first] = np.arange(self.n, dtype=np.int32)
        else:  # they are far apart: the key of a column is its number in the order of joinids
            self.first, self.col_of = 0, np.argsort(var_joinids).astype(np.int32)
            self._sorted = var_joinids[self.col_of]
        self.are_in_order = np.array_equal(self.col_of, np.arange(self.n))

    def keys(self, dim_1: NDArrayJoinId) -> NDArrayJoinId:
        """Return the key of each column in `col_of`; keys of columns that are not wanted may lie outside."""
        if self._sorted is None:
            return dim_1
        found = np.searchsorted(self._sorted, dim_1)
        found[self._sorted.take(found, mode="clip") != dim_1] = self.n
        return found


class ByteLimit:
    """A limit to the bytes that the reads of one iterator hold together.

    The next read fills as the current one is used up. A read that is alone never waits: it exceeds the limit,
    or drops its last piece.
    """

    def __init__(self, n_bytes: float) -> None:
        self._n_bytes = n_bytes
        self._held: dict[HeldRows, int] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        _byte_limits.add(self)

    def take(self, rows: HeldRows, n_bytes: int, *, may_exceed: bool = True) -> bool:
        """Wait until these rows may take more bytes, and return whether they do.

        Args:
            rows: The rows of a read.
            n_bytes: Bytes to take.
            may_exceed: Whether the rows may exceed the limit when no others are held.

        Raises:
            RuntimeError: If this is closed meanwhile.
        """
        with at_rest(), self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_allowed(rows, n_bytes))
            if self._is_closed:
                raise RuntimeError("the iterator was closed while rows were read ahead")
            if not may_exceed and not self._fits(n_bytes):
                return False
            self._held[rows] = self._held.get(rows, 0) + n_bytes
            return True

    def give_back(self, rows: HeldRows, n_bytes: int) -> None:
        """Let other rows take these bytes."""
        with self._changed:
            self._held[rows] -= n_bytes
            if not self._held[rows]:
                del self._held[rows]
            self._changed.notify_all()

    def n_held(self) -> int:
        """Return the number of bytes that are held now."""
        with self._changed:
            return sum(self._held.values())

    def close(self) -> None:
        """End all waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _is_allowed(self, rows: HeldRows, n_bytes: int) -> bool:
        is_alone = sum(self._held.values()) == self._held.get(rows, 0)
        return is_alone or self._fits(n_bytes)

    def _fits(self, n_bytes: int) -> bool:
        return sum(self._held.values()) + n_bytes <= self._n_bytes


_byte_limits: weakref.WeakSet[ByteLimit] = weakref.WeakSet()


def _close_limits() -> None:
    """End the waits of all threads: the interpreter waits for them, and no one takes rows any longer."""
    for byte_limit in list(_byte_limits):
        byte_limit.close()


before_exit(_close_limits)


class HeldRows:
    """The rows of a read, which are added in any order, and given out once, in the order asked for.

    Args:
        obs_joinids: The rows asked for; they may repeat.
        columns: The columns asked for.
        dtype: Type of the values. They are stored in the smallest type that holds them exactly.
        n_pieces: Number of pieces in which the rows are given out.
        byte_limit: Limit to the bytes of several reads; None for no limit.
        store: The store that holds the entries; pages of memory of its own if None.
        pool: The memory in which pieces are given out; new memory if None.
        may_repeat: Whether the layer may have a coordinate several times; then its values are added up.
        may_drop: Whether the last pieces are dropped where the limit does not hold all of them.

    Attributes:
        n_rows: Number of the rows that are held: all of them, or the first ones if pieces were dropped.
        sorted_joinids: The joinids of the rows, in ascending order, each once.
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
        pool: Pool | None = None,
        may_repeat: bool = False,
        may_drop: bool = False,
    ) -> None:
        from tiledbsoma_ml._kernels import hold

        self.n_rows = n_rows = len(obs_joinids)
        order = np.argsort(obs_joinids, kind="stable").astype(np.int32)
        ordered = obs_joinids[order]
        is_first = np.diff(ordered, prepend=ordered[0] - 1 if n_rows else 0) != 0
        self.sorted_joinids = ordered[is_first]
        n_pieces = min(n_pieces, max(n_rows, 1))
        self._borders = np.linspace(0, n_rows, n_pieces + 1).astype(np.int32)
        self._columns, self._dtype = columns, dtype
        self._may_repeat, self._may_drop, self._byte_limit = may_repeat, may_drop, byte_limit
        store = store or Pages()
        self._pool = pool or Pool(0)
        self._page_bytes = store.page_bytes
        self._pieces = [store.piece() for _ in range(n_pieces)]
        self._wanted = hold.Wanted(
            joinids=self.sorted_joinids,
            firsts=np.append(np.flatnonzero(is_first), n_rows).astype(np.int32),
            order=order,
            borders=self._borders,
            first_key=columns.first,
            col_of=columns.col_of,
            n_in_order=columns.n if columns.are_in_order else 0,
            col_bytes=2 if columns.dtype == np.uint16 else 4,
        )
        self._filling = hold.Filling(
            counts=np.zeros(n_rows, dtype=np.int32),
            pages=np.zeros(n_pieces, dtype=np.int64),
            ends=np.full(n_pieces, self._page_bytes),  # there is no page that is not full
            page_bytes=self._page_bytes,
            codes=np.zeros(n_pieces, dtype=np.uint8),
            kept=np.empty(self._page_bytes // 3, dtype=f"u{dtype.itemsize}"),
            done=np.zeros(4, dtype=np.int64),
        )

    @property
    def nbytes(self) -> int:
        """Number of bytes that the entries take in the store."""
        return sum(piece.nbytes(end) for piece, end in self._pieces_and_ends())

    def add(self, dim_0: NDArrayJoinId, dim_1: NDArrayJoinId, values: NDArrayNumber) -> None:
        """Add entries of the layer, given by their coordinates; those that are not wanted are ignored."""
        from tiledbsoma_ml._kernels import hold

        bits = as_bits(_contiguous(values, self._dtype))
        entries = hold.Entries(
            dim_0=_contiguous(dim_0, np.dtype(np.int64)),
            keys=_contiguous(self._columns.keys(dim_1), np.dtype(np.int64)),
            values=_as_numbers(bits, self._dtype),
            bits=bits,
        )
        assert len(entries.dim_0) == len(entries.keys) == len(bits)
        self._filling.done[:] = 0
        while (piece := hold.hold_entries(entries, self._wanted, self._filling)) != hold.DONE:
            assert piece >= 0
            self._next_page(piece)

    def add_block(self, first_row: int, first_col: int, block: NDArrayNumber) -> None:
        """Add the non-zeros of a dense block of the layer; those that are not wanted are ignored."""
        start, stop = np.searchsorted(self.sorted_joinids, [first_row, first_row + len(block)]).tolist()
        n_rows = max(1, BLOCK_VALUES // block.shape[1])
        for joinids in np.split(self.sorted_joinids[start:stop], range(n_rows, stop - start, n_rows)):
            values = block[joinids - first_row].reshape(-1)
            found = np.flatnonzero(values != 0)  # to search truth values takes a third of the time
            i, j = np.divmod(found, block.shape[1])
            self.add(joinids[i], j + first_col, values[found])

    def __iter__(self) -> Iterator[CSR_IO_Buffer]:
        """Yield the pieces in order; the memory of a piece in the store is free when it is yielded."""
        return self.give_out()

    def give_out(self, *, narrow: bool = False) -> Iterator[CSR_IO_Buffer]:
        """Yield the pieces in order, with `narrow` in the smallest types that hold their columns and values.

        A piece in which a coordinate repeats has values of the type of the layer.
        """
        from tiledbsoma_ml._kernels import hold

        for number, (piece, end) in enumerate(self._pieces_and_ends()):
            n_bytes, dtype, index_type = piece.n_pages * self._page_bytes, self._dtype, INDEX_TYPE
            if narrow:
                code = self._filling.codes[number]
                dtype = dtype if code == hold.AS_IN_LAYER else np.dtype(f"u{1 << code}")
            if narrow or self._columns.n > MOST_COLUMNS:
                index_type = self._columns.dtype
            rows = self._take(number, piece.take(end), index_type, dtype)
            if self._byte_limit is not None and n_bytes:
                self._byte_limit.give_back(self, n_bytes)
            yield rows

    def _pieces_and_ends(self) -> Iterator[tuple[Piece, int]]:
        """Yield each piece, and the number of bytes that are used of its page."""
        return zip(self._pieces, self._filling.ends.tolist(), strict=True)

    def _next_page(self, number: int) -> None:
        """Give a piece an empty page, unless it is dropped because there is none."""
        while not self._take_bytes():
            self._drop_last_piece()
            if number == len(self._pieces):
                return
        filling = self._filling
        filling.pages[number] = self._pieces[number].next_page(int(filling.ends[number]))
        filling.ends[number] = 0

    def _take_bytes(self) -> bool:
        if self._byte_limit is None:
            return True
        may_exceed = not self._may_drop or len(self._pieces) == 1
        return self._byte_limit.take(self, self._page_bytes, may_exceed=may_exceed)

    def _drop_last_piece(self) -> None:
        piece, filling = self._pieces.pop(), self._filling
        n_bytes, n_pieces = piece.n_pages * self._page_bytes, len(self._pieces)
        for _ in piece.take(int(filling.ends[-1])):  # which gives its memory back
            pass
        if self._byte_limit is not None and n_bytes:
            self._byte_limit.give_back(self, n_bytes)
        self._borders = self._borders[: n_pieces + 1]
        self.n_rows = int(self._borders[-1])
        self._wanted = self._wanted._replace(borders=self._borders)
        self._filling = filling._replace(
            counts=filling.counts[: self.n_rows],
            pages=filling.pages[:n_pieces],
            ends=filling.ends[:n_pieces],
            codes=filling.codes[:n_pieces],
        )

    def _take(
        self,
        number: int,
        pages: Iterator[tuple[int, int]],
        index_type: np.dtype[Any],
        dtype: np.dtype[Any],
    ) -> CSR_IO_Buffer:
        """Return the rows of a piece from its pages, given by their addresses and numbers of bytes."""
        from tiledbsoma_ml._kernels.place import ASCENDING, WRONG, place_runs

        counts = self._filling.counts[slice(*self._borders[number : number + 2])]
        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
        n = int(indptr[-1])
        indices, data = self._pool.empty(n, index_type), self._pool.empty(n, dtype)
        bits = as_bits(data)
        free, n_cols = indptr[:-1].copy(), self._columns.n
        slots = indptr, free, indices, _as_numbers(bits, dtype), bits
        results = {
            place_runs(page, n_bytes, self._wanted.col_bytes, n_cols, *slots) for page, n_bytes in pages
        }
        if WRONG in results or not np.array_equal(free, indptr[1:]):
            raise RuntimeError(CHANGED)
        is_canonical = results <= {ASCENDING}
        found = CSR_IO_Buffer(indptr, indices, data, (len(counts), n_cols), is_canonical=is_canonical)
        # A sum may need a wider type than its terms.
        return found.with_repeats_added(self._dtype) if self._may_repeat and not is_canonical else found


def _contiguous(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array without gaps, which may not be written to: one loop is compiled for all arrays."""
    found = np.ascontiguousarray(array, dtype).view()
    found.flags.writeable = False
    return found


def _as_numbers(bits: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return values of a type from their bits; integers and booleans stay as they are."""
    return bits.view(dtype) if dtype.kind == "f" else bits


@cache
def preload_kernels() -> threading.Thread:
    """Load the compiled loops on a thread, which takes half a second; later their first use does not wait."""
    thread = threading.Thread(target=at_work()(_use_kernels), name="preload_kernels")
    thread.start()
    return thread


def _use_kernels() -> None:
    one = np.arange(1)
    rows = HeldRows(one, Columns(one), np.dtype(np.float32))
    rows.add(one, one, np.ones(1, dtype=np.float32))
    for _ in rows:
        pass
