"""`read_ahead`: reads rows while the rows before them are used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeAlias

import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._order.reads import IO_BATCH, ReadSize
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._source import Reader

Piece: TypeAlias = tuple[Rows[CSR_IO_Buffer], bool]
"""A piece of an IO batch, and whether it is the last piece of that IO batch."""


def read_ahead(
    io_batches: Iterator[NDArrayJoinId],
    reader: Reader,
    *,
    use_eager_fetch: bool,
    next_size: Callable[[int], ReadSize] | None = None,
) -> Generator[Piece, None, None]:
    """Yield the rows of each IO batch, in one or more pieces.

    Args:
        io_batches: The joinids of each IO batch.
        reader: The reader of the rows, which is closed at the end.
        use_eager_fetch: Whether the next read is made on a thread while the rows of this one are used.
        next_size: Returns the size of the next read, from the number of rows that were read; if None, each
            IO batch is a read.
    """
    begun = _reads(io_batches, reader, next_size)
    with closing(EagerIterator(begun) if use_eager_fetch else begun) as ahead:
        try:
            for pieces in ahead:
                if use_eager_fetch:
                    with EagerIterator(pieces) as given_out:
                        yield from given_out
                else:
                    yield from pieces
        finally:
            reader.close()  # this ends a read that still waits, though its rows are not wanted any longer


class _Upcoming:
    """The joinids that are to be read next: those of IO batches that follow each other."""

    def __init__(self, io_batches: Iterator[NDArrayJoinId]) -> None:
        self._io_batches = io_batches
        self._rest = np.empty(0, dtype=np.int64)
        self.n_taken = 0

    def __bool__(self) -> bool:
        while not len(self._rest):
            following = next(self._io_batches, None)
            if following is None:
                return False
            self._rest = following
        return True

    def take(self, size: ReadSize) -> tuple[list[NDArrayJoinId], list[bool]]:
        """Return the joinids of a read, in arrays for one IO batch each, and which of these end it."""
        arrays, are_ends, n_rows = list[NDArrayJoinId](), list[bool](), 0
        while n_rows < size.n_rows and self:
            if arrays and n_rows + len(self._rest) > size.most >= len(self._rest):
                break  # the next read has these rows as a whole
            n = size.most - n_rows
            arrays.append(self._rest[:n])
            self._rest = self._rest[n:]
            are_ends.append(not len(self._rest))
            n_rows += len(arrays[-1])
        self.n_taken += n_rows
        return arrays, are_ends


def _reads(
    io_batches: Iterator[NDArrayJoinId], reader: Reader, next_size: Callable[[int], ReadSize] | None
) -> Generator[Iterator[Piece], None, None]:
    """Yield the pieces of each read."""
    upcoming = _Upcoming(io_batches)
    while upcoming:
        arrays, are_ends = upcoming.take(IO_BATCH if next_size is None else next_size(upcoming.n_taken))
        joinids = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        yield _cut(reader.read(joinids), list(zip(map(len, arrays), are_ends, strict=True)))


def _cut(pieces: Iterable[Rows[CSR_IO_Buffer]], spans: Sequence[tuple[int, bool]]) -> Iterator[Piece]:
    """Yield the rows of a read, cut into spans: the rows of each, and whether it ends an IO batch."""
    n_rows = n_lacking = sum(n for n, _ in spans)
    following = iter(spans)
    n_left, is_end = next(following)
    for rows in pieces:
        n_lacking -= len(rows)
        if n_lacking < 0:
            break
        start = 0
        while start < len(rows):
            stop = min(start + n_left, len(rows))
            n_left -= stop - start
            piece = rows if stop - start == len(rows) else rows.slice(start, stop)
            yield piece, is_end and not n_left
            start = stop
            if not n_left:
                n_left, is_end = next(following, (0, False))
    if n_lacking:
        raise ValueError(
            f"a source must give the {n_rows:,} rows that it is asked for, but gave {n_rows - n_lacking:,}; "
            "tiledbsoma_ml.testing.check_source tells more."
        )
