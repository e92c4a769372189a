"""Batches of joinids become batches of rows, read ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import attrs
import numpy as np
import tiledbsoma as soma

from tiledbsoma_ml._common import NDArrayJoinId, seeded_rng
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._query_ids import Chunks
from tiledbsoma_ml._reader import IOBatch, Reader, SOMAReader

__all__ = ["IOBatch", "IOBatchIterable", "id_batches", "io_batches"]


@attrs.frozen
class IOBatchIterable(Iterable[IOBatch]):
    """The rows of `chunks`, `io_batch_size` at a time, read from a SOMA experiment.

    Args:
        chunks: Joinids, in the order in which they are to be read.
        io_batch_size: Rows per IO batch; the last one may be smaller.
        obs: The open `obs` of the experiment.
        var_joinids: Columns of `X`, in the order in which they are wanted.
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

    def __iter__(self) -> Iterator[IOBatch]:
        reader = SOMAReader(
            self.X,
            self.obs,
            self.var_joinids,
            obs_column_names=self.obs_column_names,
            obs_joinids=np.concatenate([np.empty(0, dtype=np.int64), *self.chunks]),
        )
        rng = seeded_rng(self.seed, self.epoch) if self.shuffle else None
        batches = id_batches(self.chunks, self.io_batch_size, rng)
        return io_batches(batches, reader, use_eager_fetch=self.use_eager_fetch)


def id_batches(
    chunks: Iterable[NDArrayJoinId], io_batch_size: int, rng: np.random.Generator | None
) -> Iterator[NDArrayJoinId]:
    """Yield the joinids of `chunks`, put end to end, `io_batch_size` at a time.

    With `rng`, each batch is permuted by the generator's next draw.
    """
    for batch in _rebatched(chunks, io_batch_size):
        yield batch if rng is None else batch[rng.permutation(len(batch))]


def io_batches(
    batches: Iterator[NDArrayJoinId], reader: Reader, *, use_eager_fetch: bool
) -> Iterator[IOBatch]:
    """Yield the rows of each batch of joinids; with `use_eager_fetch` the next is read ahead, on a thread."""
    read = (reader.read(batch) for batch in batches)
    with closing(EagerIterator(read) if use_eager_fetch else read) as ahead:
        yield from ahead


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
