"""Rows are read while those before them are used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._reader import Reader
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._window import Room


def read_ahead(
    batches: Iterator[NDArrayJoinId], reader: Reader, *, use_eager_fetch: bool, room: Room | None = None
) -> Generator[Rows[CSR_IO_Buffer], None, None]:
    """Yield the rows of each batch of joinids, in one piece or more.

    Args:
        batches: The joinids; each batch is read at once.
        reader: What reads them.
        use_eager_fetch: Whether the next batch is read on a thread while this one is used.
        room: What the reader may wait for; closed at the end.
    """
    read = (reader.read(batch) for batch in batches)
    with closing(EagerIterator(read) if use_eager_fetch else read) as ahead:
        try:
            for parts in ahead:
                if use_eager_fetch:
                    with EagerIterator(parts) as given_out:
                        yield from given_out
                else:
                    yield from parts
        finally:
            if room is not None:
                room.close()
