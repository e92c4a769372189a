"""A `MemorySource` trains like an experiment: the same mini-batches, on ranks, in workers, after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from stores import N_OBS, N_VARS, Store, expected_X, workers
from tiledbsoma_ml import ExperimentDataset, MemorySource, QueryIDs, experiment_dataloader

IDS = QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(N_VARS))
FIXED = {"batch_size": 16, "shuffle_chunk_size": 4, "io_batch_size": 64, "seed": 3}
AUTO = {"batch_size": 16, "shuffle_chunk_size": "auto", "io_batch_size": "auto", "seed": 3}


@pytest.fixture(scope="module", params=["csr", "csc", "dense", "on disk, CSR", "on disk, dense"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MemorySource:
    """Return the cells of `stores`, in one of several kinds of matrices."""
    X = expected_X(range(N_OBS), range(N_VARS))
    obs = pd.DataFrame({"n": np.arange(N_OBS) * 2}, index=[f"cell{i}" for i in range(N_OBS)])
    kind = request.param
    matrix = X if "dense" in kind else sparse.csc_matrix(X) if kind == "csc" else sparse.csr_matrix(X)
    if "disk" not in kind:
        return MemorySource(matrix, obs)
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    anndata.AnnData(matrix, obs=obs).write_h5ad(path)
    return MemorySource.from_anndata(anndata.read_h5ad(path, backed="r"))


def epoch(dataset: Any) -> tuple[list[int], np.ndarray]:
    """Return the joinids and the dense X of an epoch, whose rows are those of `stores`."""
    batches = list(dataset)
    joinids = [joinid for _, obs in batches for joinid in obs["soma_joinid"].tolist()]
    X = [x.toarray() if sparse.issparse(x) else x for x, _ in batches]
    np.testing.assert_array_equal(np.concatenate(X), expected_X(joinids, range(X[0].shape[1])))
    return joinids, np.concatenate(X)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_mini_batches_are_those_of_the_experiment(
    store: Store, source: MemorySource, is_sparse: bool
) -> None:
    options: dict[str, Any] = {"return_sparse_X": is_sparse, **FIXED}
    theirs = ExperimentDataset(x_locator=store.locator, query_ids=IDS, **options)
    ours = ExperimentDataset(source=source, **options)
    for _ in range(2):
        assert epoch(ours)[0] == epoch(theirs)[0]


def test_auto_yields_every_row_once_and_shuffles_truly_where_rows_are_in_memory(source: MemorySource) -> None:
    dataset = ExperimentDataset(source=source, obs_column_names=["soma_joinid", "n"], **AUTO)
    first, second = epoch(dataset)[0], epoch(dataset)[0]
    assert sorted(first) == sorted(second) == list(range(N_OBS))
    assert first != second
    if source.row_tile == 1:
        neighbours = np.abs(np.diff(first)) == 1
        assert neighbours.mean() < 0.1
    assert [n for _, obs in dataset for n in (obs["n"] - 2 * obs["soma_joinid"]).tolist()] == [0] * N_OBS


def test_rows_on_disk_may_wait_in_a_file(source: MemorySource, tmp_path: Path) -> None:
    options = {"source": source, "window_dir": tmp_path, "window_budget": "64MiB"}
    for sizes in (AUTO, FIXED):
        assert (
            epoch(ExperimentDataset(**options, **sizes))[0]
            == epoch(ExperimentDataset(source=source, **sizes))[0]
        )


def test_ranks_share_the_rows(source: MemorySource) -> None:
    parts = [
        epoch(ExperimentDataset(source=source, shuffle_scope="global", ranks=(rank, 2), **FIXED))[0]
        for rank in range(2)
    ]
    assert len(parts[0]) == len(parts[1]) == N_OBS // 2
    assert len(set(parts[0]) | set(parts[1])) == 2 * (N_OBS // 2)


def test_training_goes_on_where_it_ended(source: MemorySource) -> None:
    whole = epoch(ExperimentDataset(source=source, **AUTO))[0]
    dataset = ExperimentDataset(source=source, **AUTO)
    batches = iter(dataset)
    for _ in range(5):
        next(batches)
    state = dataset.state_dict()
    resumed = ExperimentDataset(source=source, **AUTO)
    resumed.load_state_dict(state)
    assert epoch(resumed)[0] == whole[5 * 16 :]


def test_workers_have_copies(tmp_path: Path) -> None:
    X = sparse.csr_matrix(expected_X(range(N_OBS), range(N_VARS)))
    source = MemorySource(X, pd.DataFrame(index=range(N_OBS)))
    dataset = ExperimentDataset(source=source, shuffle_scope="global", **FIXED)
    loader = experiment_dataloader(dataset, **workers(2))
    assert sorted(epoch(loader)[0]) == list(range(N_OBS))


def test_a_split_and_fewer_columns_are_parts_of_the_source(source: MemorySource) -> None:
    some = QueryIDs(obs_joinids=range(0, N_OBS, 2), var_joinids=range(5))
    train, test = ExperimentDataset(source=source, query_ids=some, **FIXED).random_split(0.5, 0.5, seed=0)
    found = epoch(train)[0] + epoch(test)[0]
    assert sorted(found) == list(range(0, N_OBS, 2))


def test_what_is_not_there_is_told_when_the_dataset_is_built(source: MemorySource) -> None:
    with pytest.raises(ValueError, match="obs_column_names='m' must be a column of obs"):
        ExperimentDataset(source=source, obs_column_names=["m"])
    more = QueryIDs(obs_joinids=[N_OBS], var_joinids=[0])
    with pytest.raises(ValueError, match="must be rows of obs"):
        ExperimentDataset(source=source, query_ids=more)
