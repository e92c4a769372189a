"""`read_ahead`: reads rows while the rows before them are used."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import TypeAlias

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._source import Reader

Piece: TypeAlias = tuple[Rows[CSR_IO_Buffer], bool]
"""A piece of an IO batch, and whether it is the last piece of that IO batch."""


def read_ahead(
    io_batches: Iterator[NDArrayJoinId], reader: Reader, *, use_eager_fetch: bool
) -> Generator[Piece, None, None]:
    """Yield the rows of each IO batch, in one or more pieces.

    Args:
        io_batches: The joinids of each IO batch, which is one read.
        reader: The reader of the rows, which is closed at the end.
        use_eager_fetch: Whether the next IO batch is read on a thread while the rows of this one are used.
    """
    begun = (_with_end(reader.read(joinids), len(joinids)) for joinids in io_batches)
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


def _with_end(pieces: Iterable[Rows[CSR_IO_Buffer]], n_rows: int) -> Iterator[Piece]:
    n_lacking = n_rows
    for rows in pieces:
        n_lacking -= len(rows)
        if n_lacking < 0:
            break
        yield rows, n_lacking == 0
    if n_lacking:
        raise ValueError(
            f"a source must give the {n_rows:,} rows that it is asked for, but gave {n_rows - n_lacking:,}; "
            "tiledbsoma_ml.testing.check_source tells more."
        )
