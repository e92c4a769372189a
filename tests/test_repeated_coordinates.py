"""A layer may keep all values that were written to a coordinate, as the Census' do: every path adds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma
import torch
from scipy import sparse

from stores import expected_X, make_experiment
from tiledbsoma_ml import ExperimentDataset, Snapshot

N_OBS, N_VARS = 90, 20


@contextmanager
def query_with_repeats(folder: Path, dtype: Any) -> Iterator[tuple[soma.ExperimentAxisQuery, np.ndarray]]:
    """Query an experiment of which a third was written three times, as 200, 100, and what was there.

    Yields:
        The query, and its X as SciPy adds it up.
    """
    uri = make_experiment(folder / "experiment", obs_joinids=range(N_OBS), n_vars=N_VARS)
    dims = {"soma_dim_0": {"tile": 16}, "soma_dim_1": {"tile": 8}}
    config = {"tiledb": {"create": {"allows_duplicates": True, "dims": dims, "capacity": 64}}}
    i, j = expected_X(range(N_OBS), range(N_VARS)).nonzero()
    with soma.Experiment.open(uri, "w") as experiment:
        X = experiment.ms["RNA"].X.add_new_sparse_ndarray(
            "twice", type=pa.from_numpy_dtype(dtype), shape=(N_OBS, N_VARS), platform_config=config
        )
    for value, step in ((1, 1), (200, 3), (100, 3)):
        entries = slice(None, None, step)
        values = np.full(len(i[entries]), value, dtype)
        with soma.SparseNDArray.open(X.uri, "w") as X:
            X.write(pa.table({"soma_dim_0": i[entries], "soma_dim_1": j[entries], "soma_data": values}))
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA") as query:
        table = query.X("twice").tables().concat()
        i, j, values = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        yield query, sparse.coo_matrix((values, (i, j)), shape=(N_OBS, N_VARS)).toarray()


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])  # which holds sums, and which does not
def test_all_paths_add_up_what_was_written_to_one_coordinate(tmp_path: Path, dtype: Any) -> None:
    with query_with_repeats(tmp_path, dtype) as (query, expected):
        assert expected.max() == np.array(301).astype(dtype)
        snapshot = Snapshot.create(tmp_path / "snapshot", query, layer_name="twice", progress=False)
        assert snapshot.nnz == np.count_nonzero(expected)
        sizes = {"batch_size": 7, "shuffle_chunk_size": 4, "io_batch_size": 40}
        in_files = {"window_dir": tmp_path, "window_budget": "64MiB"}
        on_device = {"device": "cpu", "snapshot": snapshot}
        for path in ({}, in_files, {"snapshot": snapshot}, {"device": "cpu"}, on_device):
            for is_sparse in (False, True):
                dataset = ExperimentDataset(query, "twice", return_sparse_X=is_sparse, **sizes, **path)
                for X, obs in dataset:
                    np.testing.assert_array_equal(dense(X), expected[obs["soma_joinid"]])


def dense(X: Any) -> np.ndarray:
    """Return X as an array, having checked that it is canonical if it is sparse."""
    if isinstance(X, torch.Tensor):
        return X.to_dense().numpy()
    if isinstance(X, np.ndarray):
        return X
    assert X.has_canonical_format
    assert sparse.csr_matrix((X.data, X.indices, X.indptr), shape=X.shape).has_canonical_format
    return X.toarray()
