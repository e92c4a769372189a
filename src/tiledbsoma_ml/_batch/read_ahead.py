"""`read_ahead`: reads rows while the rows before them are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeAlias

import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._order.reads import IO_BATCH, ReadSize
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._source import Reader, TiledReader

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


_Span: TypeAlias = tuple[NDArrayJoinId, bool]
"""Rows of one IO batch that are read together, and whether the IO batch ends with them."""


class _Upcoming:
    """The joinids that are to be read next: those of IO batches that follow each other."""

    def __init__(self, io_batches: Iterator[NDArrayJoinId]) -> None:
        self._io_batches = io_batches
        self._rests = deque[NDArrayJoinId]()  # of IO batches
        self.n_read = 0

    def __bool__(self) -> bool:
        while not self._rests:
            following = next(self._io_batches, None)
            if following is None:
                return False
            if len(following):
                self._rests.append(following)
        return True

    def take(self, size: ReadSize) -> list[_Span]:
        """Return the rows of a read."""
        spans, n_rows = list[_Span](), 0
        while n_rows < size.n_rows and self:
            rest = self._rests.popleft()
            if spans and n_rows + len(rest) > size.most >= len(rest):
                self._rests.appendleft(rest)  # the next read has these rows as a whole
                break
            n = min(len(rest), size.most - n_rows)
            if n < len(rest):
                self._rests.appendleft(rest[n:])
            spans.append((rest[:n], n == len(rest)))
            n_rows += n
        self.n_read += n_rows
        return spans

    def keep(self, spans: list[_Span], n_rows: int) -> list[_Span]:
        """Return the first rows of a read that was just taken, and take the others back."""
        kept, back, n_left = list[_Span](), list[_Span](), n_rows
        for array, is_end in spans:
            n = min(n_left, len(array))
            if n:
                kept.append((array[:n], is_end and n == len(array)))
            if n < len(array):
                back.append((array[n:], is_end))
            n_left -= n
        for array, is_end in reversed(back):
            whole = array if is_end else np.concatenate([array, self._rests.popleft()])
            self._rests.appendleft(whole)
            self.n_read -= len(array)
        return kept


def _reads(
    io_batches: Iterator[NDArrayJoinId], reader: Reader, next_size: Callable[[int], ReadSize] | None
) -> Generator[Iterator[Piece], None, None]:
    """Yield the pieces of each read."""
    upcoming = _Upcoming(io_batches)
    while upcoming:
        spans = upcoming.take(IO_BATCH if next_size is None else next_size(upcoming.n_read))
        joinids = spans[0][0] if len(spans) == 1 else np.concatenate([array for array, _ in spans])
        if isinstance(reader, TiledReader):
            n_rows, pieces = reader.read_some(joinids)
            spans = upcoming.keep(spans, n_rows)
        else:
            pieces = reader.read(joinids)
        yield _cut(pieces, [(len(array), is_end) for array, is_end in spans])


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
