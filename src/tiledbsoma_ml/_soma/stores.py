"""`Pages` and `Extents`: stores of memory and of a file, in which the entries of a window wait."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Ints: TypeAlias = NDArray[np.int32]

PAGE_BYTES, SLAB_BYTES = 2**18, 2**25

_ALIGNMENT = 8
"""Arrays start at multiples of this number of bytes."""


class Runs(NamedTuple):
    """Runs of entries: the row and the length of each run, and the entries of all runs, concatenated."""

    rows: _Ints
    lengths: _Ints
    cols: NDArray[Any]
    values: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self)

    def cut(self, n_entries: int) -> tuple[Runs, Runs]:
        """Return the first `n_entries` entries and the others; a run that is cut becomes two runs."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        run = int(np.searchsorted(ends, n_entries))
        n_before = n_entries - (int(ends[run]) - int(self.lengths[run]))
        first, rest = self.lengths[: run + 1].copy(), self.lengths[run:].copy()
        first[-1], rest[0] = n_before, rest[0] - n_before
        return (
            Runs(self.rows[: run + 1], first, self.cols[:n_entries], self.values[:n_entries]),
            Runs(self.rows[run:], rest, self.cols[n_entries:], self.values[n_entries:]),
        )


class RunQueue(Protocol):
    """A queue of runs: those of the rows of one piece. It is filled, then emptied once."""

    nbytes: int

    @property
    def values_dtype(self) -> np.dtype[Any] | None: ...

    def put(self, runs: Runs) -> None: ...

    def take(self) -> Iterator[Runs]: ...


class Pages:
    """A store of pages of memory, all of one size, which are used again and again.

    The first write to memory that is new to a process is slow, and memory that is freed in pieces of many
    sizes cannot all be used again. New pages are cut from slabs that are large enough for NumPy to ask the
    operating system for huge pages.

    Args:
        page_bytes: Size of a page.
        slab_bytes: Size of a slab, a multiple of `page_bytes`.

    Attributes:
        page_bytes: Size of a page.
    """

    def __init__(self, *, page_bytes: int = PAGE_BYTES, slab_bytes: int = SLAB_BYTES) -> None:
        self.page_bytes, self._slab_bytes = page_bytes, slab_bytes
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def queue(self) -> RunQueue:
        return _PagedQueue(self)

    def take(self) -> NDArray[np.uint8]:
        with self._lock:
            if not self._free:
                slab = np.empty(self._slab_bytes, dtype=np.uint8)
                starts = range(0, self._slab_bytes, self.page_bytes)
                self._free = [slab[start : start + self.page_bytes] for start in starts]
            return self._free.pop()

    def give_back(self, page: NDArray[np.uint8]) -> None:
        with self._lock:
            self._free.append(page)


class _PagedQueue:
    """A queue of runs in pages; runs are cut where a page is full."""

    def __init__(self, pages: Pages) -> None:
        self.nbytes = 0
        self._pages = pages
        self._filled: list[tuple[NDArray[np.uint8], list[Runs]]] = []
        self._n_free = 0

    def put(self, runs: Runs) -> None:
        self.nbytes += runs.nbytes
        while len(runs.cols):
            n_entries = (self._n_free - 16) // (runs.cols.itemsize + runs.values.itemsize)
            if n_entries < min(len(runs.cols), 256):
                self._filled.append((self._pages.take(), []))
                self._n_free = self._pages.page_bytes
            elif n_entries < len(runs.cols):
                piece, runs = runs.cut(n_entries)
                self._put_in_page(piece)
            else:
                self._put_in_page(runs)
                break

    @property
    def values_dtype(self) -> np.dtype[Any] | None:
        """The smallest type that holds all values; None without any."""
        return _widest({runs.values.dtype for _, stored in self._filled for runs in stored})

    def take(self) -> Iterator[Runs]:
        for page, stored in self._filled:
            yield from stored
            self._pages.give_back(page)
        self._filled = []

    def _put_in_page(self, runs: Runs) -> None:
        page, stored = self._filled[-1]
        kept = []
        for array in (runs.cols, runs.values):
            start = self._pages.page_bytes - self._n_free
            kept.append(page[start : start + array.nbytes].view(array.dtype))
            kept[-1][:] = array
            self._n_free -= array.nbytes + -array.nbytes % _ALIGNMENT
        stored.append(Runs(runs.rows.copy(), runs.lengths.copy(), *kept))


class Extents:
    """A store of extents of a file, all of one size, which are used again and again.

    The file has no name in its folder, so it disappears with the process, whatever happens. Its size is that
    of the largest number of extents that were in use at one time.

    Args:
        folder: The folder in which the file is made.
        size: Bytes of an extent.
    """

    def __init__(self, folder: Path, size: int = 2**20) -> None:
        self.size = size
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed when dropped
        weakref.finalize(self, self._file.close)
        self._free: list[int] = []
        self._end = 0
        self._lock = threading.Lock()

    def queue(self) -> RunQueue:
        return _FiledQueue(self)

    def take(self) -> int:
        """Return the start of a free extent."""
        with self._lock:
            if self._free:
                return self._free.pop()
            self._end += self.size
            return self._end - self.size

    def give_back(self, start: int) -> None:
        with self._lock:
            self._free.append(start)

    def write(self, data: memoryview, start: int) -> int:
        """Write the first bytes of `data`, and return the number of bytes that were written."""
        try:
            return os.pwrite(self._file.fileno(), data, start)
        except OSError as err:
            raise OSError(
                err.errno,
                f"window_dir={str(self._folder)!r} must take what waits to be given out, but: {err.strerror}"
                "; choose another folder, or lower window_budget where the disk is full.",
            ) from err

    def read(self, into: memoryview, start: int) -> None:
        """Fill `into` with the bytes of the file from `start` on."""
        while into:
            n_read = os.preadv(self._file.fileno(), [into], start)
            assert n_read
            into, start = into[n_read:], start + n_read


class _FiledQueue:
    """A queue of runs, concatenated in extents; the last ones wait in memory until a write is worth it."""

    BUFFER = 2**16

    def __init__(self, extents: Extents) -> None:
        self.nbytes = 0
        self._is_worth_writing = min(self.BUFFER, extents.size // 4)
        self._extents = extents
        self._starts: list[int] = []
        self._n_free = 0
        self._waiting = bytearray()
        self._layout: list[tuple[int, int, np.dtype[Any], np.dtype[Any]]] = []

    def put(self, runs: Runs) -> None:
        self.nbytes += runs.nbytes
        self._layout.append((len(runs.rows), len(runs.cols), runs.cols.dtype, runs.values.dtype))
        for array in runs:
            self._waiting += array.data
            self._waiting += bytes(-array.nbytes % _ALIGNMENT)
        if len(self._waiting) >= self._is_worth_writing:
            self._write()

    @property
    def values_dtype(self) -> np.dtype[Any] | None:
        """The smallest type that holds all values; None without any."""
        return _widest({value_type for *_, value_type in self._layout})

    def take(self) -> Iterator[Runs]:
        content, start = self._content(), 0

        def next_array(n: int, dtype: Any) -> NDArray[Any]:
            nonlocal start
            array: NDArray[Any] = content[start : start + n * np.dtype(dtype).itemsize].view(dtype)
            start += array.nbytes + -array.nbytes % _ALIGNMENT
            return array

        for n_runs, n, col_type, value_type in self._layout:
            rows, lengths = next_array(n_runs, np.int32), next_array(n_runs, np.int32)
            yield Runs(rows, lengths, next_array(n, col_type), next_array(n, value_type))
        self._layout = []

    def _write(self) -> None:
        size, left = self._extents.size, memoryview(self._waiting)
        while left:
            if not self._n_free:
                self._starts.append(self._extents.take())
                self._n_free = size
            n_written = self._extents.write(left[: self._n_free], self._starts[-1] + size - self._n_free)
            self._n_free -= n_written
            left = left[n_written:]
        self._waiting = bytearray()

    def _content(self) -> NDArray[np.uint8]:
        """Return all bytes, and give back the extents."""
        size, n_written = self._extents.size, len(self._starts) * self._extents.size - self._n_free
        content = np.empty(n_written + len(self._waiting), dtype=np.uint8)
        for k, start in enumerate(self._starts):
            self._extents.read(content[k * size : min((k + 1) * size, n_written)].data, start)
            self._extents.give_back(start)
        content[n_written:] = np.frombuffer(self._waiting, dtype=np.uint8)
        self._starts, self._n_free, self._waiting = [], 0, bytearray()
        return content


def _widest(dtypes: set[np.dtype[Any]]) -> np.dtype[Any] | None:
    """Return the type that holds the values of all types: one that was not narrowed, else the largest."""
    return max(dtypes, key=lambda dtype: (dtype.kind != "u", dtype.itemsize), default=None)
