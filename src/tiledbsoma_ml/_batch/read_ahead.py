"""Rows are read while those before them are used."""

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
"""Rows that come together, and whether what is read at once ends with them."""


def read_ahead(
    batches: Iterator[NDArrayJoinId], reader: Reader, *, use_eager_fetch: bool
) -> Generator[Piece, None, None]:
    """Yield the rows of each batch of joinids, in one piece or more.

    Args:
        batches: The joinids; each batch is read at once.
        reader: What reads them; closed at the end.
        use_eager_fetch: Whether the next batch is read on a thread while this one is used.
    """
    read = (_with_end(reader.read(batch), len(batch)) for batch in batches)
    with closing(EagerIterator(read) if use_eager_fetch else read) as ahead:
        try:
            for pieces in ahead:
                if use_eager_fetch:
                    with EagerIterator(pieces) as given_out:
                        yield from given_out
                else:
                    yield from pieces
        finally:
            reader.close()  # nobody waits for rows that are not wanted any longer


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
