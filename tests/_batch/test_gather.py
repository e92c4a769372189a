"""Rows of matrices in memory, of a snapshot, in memory that is used again."""

from __future__ import annotations

import numpy as np
import pytest

from stores import N_OBS, N_VARS, expected_X
from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml.snapshot import Snapshot


def test_reading_all_rows_over_and_over_keeps_no_more_memory_than_a_limit(
    whole: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "SMALL", 1)
    reader = whole.reader(kept_bytes=2**14)
    for n in range(50, N_OBS, 20):
        reader.csr(whole.query_ids.obs_joinids[:n])
    assert 0 < reader.kept_bytes <= 2**14


def test_mini_batches_that_are_held_stay_as_they_are(
    whole: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "SMALL", 1)
    reader = whole.reader()
    rng = np.random.default_rng(0)
    held = []
    for _ in range(20):
        rows = rng.integers(0, N_OBS, 400)
        X = reader.csr(rows)
        if len(held) < 10 and rng.random() < 0.5:
            held.append((rows, X if rng.random() < 0.5 else X.data, X.toarray()))
    for rows, kept, X in held:
        np.testing.assert_array_equal(X, expected_X(rows, range(N_VARS)))
        data = kept if isinstance(kept, np.ndarray) else kept.data
        np.testing.assert_array_equal(data, X[X != 0])
