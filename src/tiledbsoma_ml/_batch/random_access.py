"""Mini-batches that are made directly by a reader with `RandomAccess`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext

import numpy as np
import pandas as pd
import torch

from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._common import MiniBatch, NDArrayJoinId, NDArrayNumber
from tiledbsoma_ml._eager_iter import EagerMap
from tiledbsoma_ml._rebatch import rebatch_joinids
from tiledbsoma_ml._rows import Padding
from tiledbsoma_ml._source import RandomAccess

MAX_THREADS = 4
"""Largest number of threads that make mini-batches. In a worker, torch has one thread, and so has this."""


def random_access_mini_batches(
    io_batches: Iterator[NDArrayJoinId],
    reader: RandomAccess,
    *,
    batch_size: int,
    is_sparse: bool,
    padding: Padding,
    use_eager_fetch: bool,
) -> Generator[MiniBatch, None, None]:
    """Yield mini-batches of the rows of IO batches.

    Args:
        io_batches: The joinids of the rows, in arrays of any size.
        reader: The reader of the rows.
        batch_size: Rows per mini-batch. The last one may be smaller.
        is_sparse: Whether `X` is sparse.
        padding: The marks of repeated rows.
        use_eager_fetch: Whether the next mini-batches are made on threads while one is used.
    """
    n_threads = min(torch.get_num_threads(), MAX_THREADS) if use_eager_fetch else 0
    pool = Pool((n_threads + 3) * batch_size * reader.n_vars * reader.dtype.itemsize)

    def to_obs(joinids: NDArrayJoinId) -> pd.DataFrame:
        return padding.mark(reader.obs(joinids), joinids)

    def with_memory(joinids: NDArrayJoinId) -> tuple[NDArrayJoinId, NDArrayNumber | None]:
        shape = len(joinids), reader.n_vars
        return joinids, None if is_sparse else pool.empty(shape, np.dtype(reader.dtype))

    def make(rows: tuple[NDArrayJoinId, NDArrayNumber | None]) -> MiniBatch:
        joinids, X = rows
        if X is None:
            return reader.csr(joinids), to_obs(joinids)
        reader.fill_dense(joinids, X)
        return X[0] if batch_size == 1 else X, to_obs(joinids)

    upcoming = map(with_memory, rebatch_joinids(io_batches, batch_size))
    with EagerMap(make, upcoming, n_threads) if n_threads else nullcontext(map(make, upcoming)) as made:
        yield from made
