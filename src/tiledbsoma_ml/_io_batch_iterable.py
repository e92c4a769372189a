"""`IOBatchIterable` of tiledbsoma-ml 0.1.0: reads IO batches of shuffled rows, ahead of their use."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeAlias

import attrs
import numpy as np
import pandas as pd
import tiledbsoma as soma

from tiledbsoma_ml._batch.read_ahead import Piece, read_ahead
from tiledbsoma_ml._common import NDArrayJoinId, check_bool, check_count, seeded_rng
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._query_ids import Chunks, check_joinids
from tiledbsoma_ml._rebatch import rebatch_joinids
from tiledbsoma_ml._soma.reader import SOMAReader
from tiledbsoma_ml._threads import ClosedWhenDropped

__all__ = ["IOBatch", "IOBatchIterable", "id_batches"]

IOBatch: TypeAlias = tuple[CSR_IO_Buffer, pd.DataFrame]
"""Rows of `X` and the same rows of `obs`, read together."""


@attrs.frozen
class IOBatchIterable(Iterable[IOBatch]):
    """An iterable over the IO batches of the rows of `chunks`, which are read from a SOMA experiment.

    Args:
        chunks: Joinids of the rows, in order.
        io_batch_size: Rows per IO batch. The last one may be smaller.
        obs: The open `obs` of the experiment.
        var_joinids: Columns of `X` to return, in this order; unique.
        X: The open layer, sparse or dense.
        obs_column_names: Columns of `obs`.
        seed: Seed of the shuffle.
        shuffle: Whether to permute the rows within each IO batch.
        use_eager_fetch: Whether to read the next IO batch while this one is used.
        epoch: Epoch of the shuffle.
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
        check_bool("shuffle", self.shuffle)
        check_bool("use_eager_fetch", self.use_eager_fetch)

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
        pieces = read_ahead(batches, reader, use_eager_fetch=self.use_eager_fetch)
        return ClosedWhenDropped(_as_io_batches(pieces))


def id_batches(
    chunks: Chunks, io_batch_size: int, rng: np.random.Generator | None
) -> Iterator[NDArrayJoinId]:
    """Yield the joinids of the concatenated `chunks`, `io_batch_size` at a time.

    With `rng`, each batch is permuted by the next draw of the generator.
    """
    for batch in rebatch_joinids(chunks, io_batch_size):
        yield batch if rng is None else batch[rng.permutation(len(batch))]


def _as_io_batches(pieces: Generator[Piece, None, None]) -> Generator[IOBatch, None, None]:
    with closing(pieces):
        for rows, _ in pieces:
            yield rows.X, rows.obs
