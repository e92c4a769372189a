"""Datasets of an experiment and of a snapshot of it, and whether they yield the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from stores import N_OBS, N_VARS, Store
from tiledbsoma_ml import ExperimentDataset, QueryIDs

COLUMNS = ["soma_joinid", "cell_type", "maybe_int", "barcode"]


def pair(store: Store, snapshot: Any, ids: QueryIDs, **options: Any) -> list[ExperimentDataset]:
    """Return datasets with the same options over the same rows, from SOMA and from the snapshot."""
    options = {"obs_column_names": COLUMNS, "seed": 3, "batch_size": 16, **options}
    return [
        ExperimentDataset(x_locator=store.locator, query_ids=ids, snapshot=source, **options)
        for source in (None, snapshot)
    ]


def dense(X: Any) -> np.ndarray:
    if isinstance(X, torch.Tensor):
        return X.to_dense().numpy()
    return X.toarray() if hasattr(X, "toarray") else np.asarray(X)


def assert_same_batches(a: Any, b: Any) -> None:
    streamed, mapped = list(a), list(b)
    assert len(streamed) == len(mapped)
    for (X, obs), (other_X, other_obs) in zip(streamed, mapped, strict=True):
        assert type(X) is type(other_X)
        assert dense(X).dtype == dense(other_X).dtype
        np.testing.assert_array_equal(dense(X), dense(other_X))
        pd.testing.assert_frame_equal(obs, other_obs)


def all_ids() -> QueryIDs:
    return QueryIDs(obs_joinids=np.arange(N_OBS), var_joinids=np.arange(N_VARS))
