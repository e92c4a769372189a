"""Rows of matrices in memory, of a snapshot, in memory that is used again."""

from __future__ import annotations

import numpy as np

from stores import N_OBS, N_VARS, expected_X
from tiledbsoma_ml._batch.pool import SMALL_BYTES
from tiledbsoma_ml.snapshot import Snapshot

MANY = 40_000  # values of so many rows take up more than `SMALL_BYTES`


def test_reading_many_rows_over_and_over_keeps_no_more_memory_than_a_limit(whole: Snapshot) -> None:
    reader = whole.reader(pool_bytes=2**21)
    for n in range(MANY, 2 * MANY, MANY // 4):
        reader.csr(np.arange(n) % N_OBS)
    assert SMALL_BYTES < reader.free_bytes <= 2**21


def test_mini_batches_that_are_held_stay_as_they_are(whole: Snapshot) -> None:
    reader = whole.reader()
    rng = np.random.default_rng(0)
    held = []
    for _ in range(12):
        rows = rng.integers(0, N_OBS, MANY)
        X = reader.csr(rows)
        if len(held) < 6 and rng.random() < 0.5:
            held.append((rows, X if rng.random() < 0.5 else X.data, X.toarray()))
    for rows, kept, X in held:
        np.testing.assert_array_equal(X, expected_X(rows, range(N_VARS)))
        data = kept if isinstance(kept, np.ndarray) else kept.data
        np.testing.assert_array_equal(data, X[X != 0])
