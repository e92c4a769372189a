"""Mini-batches straight from what is as fast at single rows as at many."""

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
"""Mini-batches are made by at most so many threads, each by one. In a worker, torch has one."""


def random_access_mini_batches(
    batches: Iterator[NDArrayJoinId],
    reader: RandomAccess,
    *,
    batch_size: int,
    is_sparse: bool,
    padding: Padding,
    use_eager_fetch: bool,
) -> Generator[MiniBatch, None, None]:
    """Yield the mini-batches of joinids that come in batches of any size.

    Args:
        batches: The joinids.
        reader: What reads them.
        batch_size: Rows of a mini-batch; the last one may be smaller.
        is_sparse: Whether `X` is sparse.
        padding: How repeated rows are marked.
        use_eager_fetch: Whether the next mini-batches are made on threads while one is used.
    """
    n_threads = min(torch.get_num_threads(), MAX_THREADS) if use_eager_fetch else 0
    pool = Pool((n_threads + 3) * batch_size * reader.n_vars * reader.dtype.itemsize)

    def to_obs(ids: NDArrayJoinId) -> pd.DataFrame:
        return padding.mark(reader.obs(ids), ids)

    def with_memory(ids: NDArrayJoinId) -> tuple[NDArrayJoinId, NDArrayNumber | None]:
        return ids, None if is_sparse else pool.empty((len(ids), reader.n_vars), np.dtype(reader.dtype))

    def make(rows: tuple[NDArrayJoinId, NDArrayNumber | None]) -> MiniBatch:
        ids, X = rows
        if X is None:
            return reader.csr(ids), to_obs(ids)
        reader.fill_dense(ids, X)
        return X[0] if batch_size == 1 else X, to_obs(ids)

    upcoming = map(with_memory, rebatch_joinids(batches, batch_size))
    with EagerMap(make, upcoming, n_threads) if n_threads else nullcontext(map(make, upcoming)) as made:
        yield from made
