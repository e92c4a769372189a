"""`Pages` and `Extents`: stores of memory and of a file, in which the entries of held rows wait."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES, SLAB_BYTES = 2**18, 2**25

MIN_PAGE_BYTES = 2**6


class Piece(Protocol):
    """The pages of one piece of held rows, which are filled one after the other, then taken once."""

    @property
    def n_pages(self) -> int:
        """Number of pages, with the one that is being filled."""

    def nbytes(self, end: int) -> int:
        """Return the number of bytes that are used of all pages; of the last one, `end` bytes are used."""

    def next_page(self, end: int) -> int:
        """Return the address of an empty page; `end` bytes are used of the page that was filled before."""

    def take(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield the address of each page, and the number of bytes that are used of it.

        A page may be read until the next one is taken.
        """


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
        nbytes: Bytes of all pages, taken or not.
    """

    def __init__(self, *, page_bytes: int = PAGE_BYTES, slab_bytes: int = SLAB_BYTES) -> None:
        self.page_bytes, self._slab_bytes = page_bytes, slab_bytes
        self.nbytes = 0
        self._free: list[NDArray[np.uint8]] = []

    @staticmethod
    def shared(page_bytes: int) -> Pages:
        """Return the store of this process that has pages of a size, which lasts while somebody has it."""
        with _all_shared:
            store = _shared.get(page_bytes)
            if store is None:
                store = _shared[page_bytes] = Pages(page_bytes=page_bytes)
            return store

    def __reduce__(self) -> tuple[Callable[[int], Pages], tuple[int]]:
        """Another process has pages of its own."""
        return Pages.shared, (self.page_bytes,)

    def piece(self) -> Piece:
        return _PagedPiece(self)

    def take(self) -> NDArray[np.uint8]:
        """Return a page that nobody else has."""
        try:
            # One step: finalizers give pages back too, and run at any point.
            return self._free.pop()
        except IndexError:
            slab = np.empty(self._slab_bytes, dtype=np.uint8)
            self.nbytes += self._slab_bytes
            first, *others = range(0, self._slab_bytes, self.page_bytes)
            self._free.extend(slab[start : start + self.page_bytes] for start in others)
            return slab[first : first + self.page_bytes]

    def give_back(self, page: NDArray[np.uint8]) -> None:
        """Let others take a page."""
        self._free.append(page)


_shared: weakref.WeakValueDictionary[int, Pages] = weakref.WeakValueDictionary()
_all_shared = threading.Lock()


class _PagedPiece:
    """A piece whose pages are memory; if it is dropped, the store gets them back."""

    def __init__(self, store: Pages) -> None:
        self._store = store
        self._pages: list[NDArray[np.uint8]] = []
        self._ends: list[int] = []
        weakref.finalize(self, _give_back, store, self._pages).atexit = False

    @property
    def n_pages(self) -> int:
        return len(self._pages)

    def nbytes(self, end: int) -> int:
        return sum(self._ends) + (end if self._pages else 0)

    def next_page(self, end: int) -> int:
        if self._pages:
            self._ends.append(end)
        self._pages.append(self._store.take())
        return self._pages[-1].ctypes.data

    def take(self, end: int) -> Iterator[tuple[int, int]]:
        ends = [*self._ends, end][::-1]
        self._ends = []
        self._pages.reverse()
        while self._pages:
            yield self._pages[-1].ctypes.data, ends.pop()
            self._store.give_back(self._pages.pop())


def _give_back(store: Pages, pages: list[NDArray[np.uint8]]) -> None:
    while pages:
        store.give_back(pages.pop())


class Extents:
    """A store of extents of a file, all of one size, which are used again and again.

    The file has no name in its folder, so it disappears with the process, whatever happens. Its size is that
    of the largest number of extents that were in use at one time.

    Args:
        folder: The folder in which the file is made.
        size: Bytes of an extent, a power of two.

    Attributes:
        size: Bytes of an extent.
        page_bytes: Size of a page. An extent has several, so that a piece is not read in small parts.
    """

    LARGEST_PAGE = 2**16

    def __init__(self, folder: Path, size: int = 2**20) -> None:
        self.size, self.page_bytes = size, min(self.LARGEST_PAGE, max(MIN_PAGE_BYTES, size // 4))
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed when dropped
        weakref.finalize(self, self._file.close)
        self._free: list[int] = []
        self._end = 0
        self._lock = threading.Lock()

    def piece(self) -> Piece:
        return _FiledPiece(self)

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


class _FiledPiece:
    """A piece whose pages are written to extents, but for the one that is being filled."""

    def __init__(self, extents: Extents) -> None:
        self._extents = extents
        self._n_per_extent = extents.size // extents.page_bytes
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._page: NDArray[np.uint8] | None = None

    @property
    def n_pages(self) -> int:
        return len(self._ends) + (self._page is not None)

    def nbytes(self, end: int) -> int:
        return sum(self._ends) + (end if self._page is not None else 0)

    def next_page(self, end: int) -> int:
        if self._page is None:
            self._page = np.empty(self._extents.page_bytes, dtype=np.uint8)
        else:
            self._write(self._page[:end])
        return self._page.ctypes.data

    def take(self, end: int) -> Iterator[tuple[int, int]]:
        n, size = self._n_per_extent, self._extents.page_bytes
        content = np.empty(self._extents.size if self._starts else 0, dtype=np.uint8)
        for number, start in enumerate(self._starts):
            ends = self._ends[number * n : (number + 1) * n]
            self._extents.read(content[: (len(ends) - 1) * size + ends[-1]].data, start)
            self._extents.give_back(start)
            yield from ((content.ctypes.data + k * size, n_bytes) for k, n_bytes in enumerate(ends))
        if self._page is not None:
            yield self._page.ctypes.data, end
        self._starts, self._ends, self._page = [], [], None

    def _write(self, page: NDArray[np.uint8]) -> None:
        extent, place = divmod(len(self._ends), self._n_per_extent)
        if extent == len(self._starts):
            self._starts.append(self._extents.take())
        start, left = self._starts[extent] + place * self._extents.page_bytes, page.data
        while left:
            n_written = self._extents.write(left, start)
            start, left = start + n_written, left[n_written:]
        self._ends.append(len(page))
