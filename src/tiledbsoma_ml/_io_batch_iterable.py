"""Batches of joinids become batches of rows, read ahead of their use."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing

import attrs
import numpy as np
import tiledbsoma as soma

from tiledbsoma_ml._common import NDArrayJoinId, check_count, seeded_rng
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._query_ids import Chunks, check_joinids
from tiledbsoma_ml._reader import IOBatch, Reader, SOMAReader
from tiledbsoma_ml._threads import ClosedWhenDropped
from tiledbsoma_ml._window import Room

__all__ = ["IOBatch", "IOBatchIterable", "id_batches", "io_batches"]


@attrs.frozen
class IOBatchIterable(Iterable[IOBatch]):
    """The rows of `chunks`, `io_batch_size` at a time, read from a SOMA experiment.

    Args:
        chunks: Joinids, in the order in which they are to be read.
        io_batch_size: Rows per IO batch; the last one may be smaller.
        obs: The open `obs` of the experiment.
        var_joinids: Columns of `X`, in the order in which they are wanted; unique.
        X: The open layer, sparse or dense.
        obs_column_names: Columns of `obs`.
        seed: Of the shuffle.
        shuffle: Whether to permute the rows within each IO batch.
        use_eager_fetch: Whether to read the next IO batch while this one is used.
        epoch: Of the shuffle.
    """

    chunks: Chunks
    io_batch_size: int
    obs: soma.DataFrame
    var_joinids: NDArrayJoinId
    X: soma.SparseNDArray | soma.DenseNDArray
    obs_column_names: Sequence[str] = ("soma_joinid",)
    seed: int | None = None
    shuffle: bool = True
    use_eager_fetch: bool = True
    epoch: int = 0

    def __attrs_post_init__(self) -> None:
        check_count("io_batch_size", self.io_batch_size, suggestion=65_536)

    def __iter__(self) -> ClosedWhenDropped[IOBatch]:
        reader = SOMAReader(
            self.X,
            self.obs,
            check_joinids("var_joinids", self.var_joinids, unique=True),
            obs_column_names=self.obs_column_names,
            obs_joinids=np.concatenate([np.empty(0, dtype=np.int64), *self.chunks]),
        )
        rng = seeded_rng(self.seed, self.epoch) if self.shuffle else None
        batches = id_batches(self.chunks, self.io_batch_size, rng)
        return ClosedWhenDropped(io_batches(batches, reader, use_eager_fetch=self.use_eager_fetch))


def id_batches(
    chunks: Chunks, io_batch_size: int, rng: np.random.Generator | None
) -> Iterator[NDArrayJoinId]:
    """Yield the joinids of `chunks`, put end to end, `io_batch_size` at a time.

    With `rng`, each batch is permuted by the generator's next draw.
    """
    for batch in _rebatched(chunks, io_batch_size):
        yield batch if rng is None else batch[rng.permutation(len(batch))]


def io_batches(
    batches: Iterator[NDArrayJoinId], reader: Reader, *, use_eager_fetch: bool, room: Room | None = None
) -> Generator[IOBatch, None, None]:
    """Yield the rows of each batch of joinids, in one IO batch or more.

    Args:
        batches: The joinids; each batch is read at once.
        reader: Where to read them.
        use_eager_fetch: Whether to read the next batch on a thread, while this one is used.
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


def _rebatched(chunks: Iterable[NDArrayJoinId], size: int) -> Iterator[NDArrayJoinId]:
    pending: list[NDArrayJoinId] = []
    room = size
    for chunk in chunks:
        while len(chunk) >= room:
            yield np.concatenate([*pending, chunk[:room]])
            chunk, pending, room = chunk[room:], [], size
        if len(chunk):
            pending.append(chunk)
            room -= len(chunk)
    if pending:
        yield np.concatenate(pending)
