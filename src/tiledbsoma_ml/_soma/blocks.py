"""Where rows wait: blocks of entries, in pages of memory or in stretches of a file."""

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
"""Arrays start at multiples of so many bytes."""


class Block(NamedTuple):
    """Runs of entries: the row and length of each run, then the entries of all, one run after the other."""

    rows: _Ints
    lengths: _Ints
    cols: NDArray[Any]
    values: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self)

    def cut(self, n_entries: int) -> tuple[Block, Block]:
        """Return the first entries and the others; a run that is cut through becomes two."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        run = int(np.searchsorted(ends, n_entries))
        n_before = n_entries - (int(ends[run]) - int(self.lengths[run]))
        first, rest = self.lengths[: run + 1].copy(), self.lengths[run:].copy()
        first[-1], rest[0] = n_before, rest[0] - n_before
        return (
            Block(self.rows[: run + 1], first, self.cols[:n_entries], self.values[:n_entries]),
            Block(self.rows[run:], rest, self.cols[n_entries:], self.values[n_entries:]),
        )


class Part(Protocol):
    """Blocks that wait: those of neighbouring rows. It is filled, then emptied once."""

    nbytes: int

    @property
    def values_dtype(self) -> np.dtype[Any] | None: ...

    def put(self, block: Block) -> None: ...

    def take(self) -> Iterator[Block]: ...


class Pages:
    """Memory in pieces of one size, used again and again.

    Memory that is new to a process is slow to write to at first, and memory that is freed in pieces of many
    sizes is not all of use again. New pages are cut from slabs so large that NumPy asks for huge pages of the
    operating system.

    Args:
        page_bytes: Size of a page.
        slab_bytes: Size of a slab, a multiple of it.

    Attributes:
        page_bytes: Size of a page.
    """

    def __init__(self, *, page_bytes: int = PAGE_BYTES, slab_bytes: int = SLAB_BYTES) -> None:
        self.page_bytes, self._slab_bytes = page_bytes, slab_bytes
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def part(self) -> Part:
        return _Paged(self)

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


class _Paged:
    """Blocks in pages, cut where a page is full."""

    def __init__(self, pages: Pages) -> None:
        self.nbytes = 0
        self._pages = pages
        self._filled: list[tuple[NDArray[np.uint8], list[Block]]] = []
        self._n_free = 0

    def put(self, block: Block) -> None:
        self.nbytes += block.nbytes
        while len(block.cols):
            n_entries = (self._n_free - 16) // (block.cols.itemsize + block.values.itemsize)
            if n_entries < min(len(block.cols), 256):
                self._filled.append((self._pages.take(), []))
                self._n_free = self._pages.page_bytes
            elif n_entries < len(block.cols):
                piece, block = block.cut(n_entries)
                self._put_whole(piece)
            else:
                self._put_whole(block)
                break

    @property
    def values_dtype(self) -> np.dtype[Any] | None:
        """The smallest type that holds all values; None without any."""
        return _widest({block.values.dtype for _, blocks in self._filled for block in blocks})

    def take(self) -> Iterator[Block]:
        for page, blocks in self._filled:
            yield from blocks
            self._pages.give_back(page)
        self._filled = []

    def _put_whole(self, block: Block) -> None:
        page, blocks = self._filled[-1]
        kept = []
        for array in (block.cols, block.values):
            start = self._pages.page_bytes - self._n_free
            kept.append(page[start : start + array.nbytes].view(array.dtype))
            kept[-1][:] = array
            self._n_free -= array.nbytes + -array.nbytes % _ALIGNMENT
        blocks.append(Block(block.rows.copy(), block.lengths.copy(), *kept))


class Extents:
    """Stretches of one size of a file, used again and again.

    The file is unlinked from the start: nothing is left behind, whatever happens. It is as large as the
    stretches that were in use at one time, at most.

    Args:
        folder: The folder in which the file is made.
        size: Bytes of a stretch.
    """

    def __init__(self, folder: Path, size: int = 2**20) -> None:
        self.size = size
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed when dropped
        weakref.finalize(self, self._file.close)
        self._free: list[int] = []
        self._end = 0
        self._lock = threading.Lock()

    def part(self) -> Part:
        return _Filed(self)

    def take(self) -> int:
        """Return where a stretch starts that is free."""
        with self._lock:
            if self._free:
                return self._free.pop()
            self._end += self.size
            return self._end - self.size

    def give_back(self, start: int) -> None:
        with self._lock:
            self._free.append(start)

    def write(self, data: memoryview, start: int) -> int:
        """Write the first bytes of `data`; return how many these were."""
        try:
            return os.pwrite(self._file.fileno(), data, start)
        except OSError as err:
            raise OSError(
                err.errno,
                f"window_dir={str(self._folder)!r} must take what waits to be given out, but: {err.strerror}"
                "; choose another folder, or lower window_budget where the disk is full.",
            ) from err

    def read(self, into: memoryview, start: int) -> None:
        """Read as many bytes as there is room for."""
        while into:
            n_read = os.preadv(self._file.fileno(), [into], start)
            assert n_read
            into, start = into[n_read:], start + n_read


class _Filed:
    """Blocks put end to end in extents; the last ones wait in memory until it is worth writing them."""

    BUFFER = 2**16

    def __init__(self, extents: Extents) -> None:
        self.nbytes = 0
        self._is_worth_writing = min(self.BUFFER, extents.size // 4)
        self._extents = extents
        self._starts: list[int] = []
        self._n_free = 0
        self._waiting = bytearray()
        self._layout: list[tuple[int, int, np.dtype[Any], np.dtype[Any]]] = []

    def put(self, block: Block) -> None:
        self.nbytes += block.nbytes
        self._layout.append((len(block.rows), len(block.cols), block.cols.dtype, block.values.dtype))
        for array in block:
            self._waiting += array.data
            self._waiting += bytes(-array.nbytes % _ALIGNMENT)
        if len(self._waiting) >= self._is_worth_writing:
            self._write()

    @property
    def values_dtype(self) -> np.dtype[Any] | None:
        """The smallest type that holds all values; None without any."""
        return _widest({value_type for *_, value_type in self._layout})

    def take(self) -> Iterator[Block]:
        content, start = self._content(), 0

        def next_array(n: int, dtype: Any) -> NDArray[Any]:
            nonlocal start
            array: NDArray[Any] = content[start : start + n * np.dtype(dtype).itemsize].view(dtype)
            start += array.nbytes + -array.nbytes % _ALIGNMENT
            return array

        for n_runs, n, col_type, value_type in self._layout:
            rows, lengths = next_array(n_runs, np.int32), next_array(n_runs, np.int32)
            yield Block(rows, lengths, next_array(n, col_type), next_array(n, value_type))
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
        """Return all bytes, and give the extents back."""
        size, n_written = self._extents.size, len(self._starts) * self._extents.size - self._n_free
        content = np.empty(n_written + len(self._waiting), dtype=np.uint8)
        for k, start in enumerate(self._starts):
            self._extents.read(content[k * size : min((k + 1) * size, n_written)].data, start)
            self._extents.give_back(start)
        content[n_written:] = np.frombuffer(self._waiting, dtype=np.uint8)
        self._starts, self._n_free, self._waiting = [], 0, bytearray()
        return content


def _widest(dtypes: set[np.dtype[Any]]) -> np.dtype[Any] | None:
    """Return the type that holds the values of all: one that was not narrowed, else the largest."""
    return max(dtypes, key=lambda dtype: (dtype.kind != "u", dtype.itemsize), default=None)
