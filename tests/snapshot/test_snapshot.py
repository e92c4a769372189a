from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

from snapshots import ALL_OBS, make
from stores import N_OBS, N_VARS, Store, expected_X, make_obs, workers
from tiledbsoma_ml.snapshot import Snapshot

# The same rows as from SOMA -------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [[5, 9, 100, 101, 310], slice(60, 70), "cell_type == 'B cell'", []])
@pytest.mark.parametrize("var", [None, [3, 7, 20]])
def test_a_snapshot_holds_the_rows_and_columns_of_its_query(
    store: Store, tmp_path: Path, query: Any, var: list[int] | None
) -> None:
    snapshot = make(tmp_path / "part.snapshot", store, query, var, obs_column_names=["score"])
    with store.query(query, var) as asked:
        assert sorted(asked.obs_joinids().to_pylist()) == snapshot.obs_joinids.tolist()
        assert asked.var_joinids().to_pylist() == snapshot.var_joinids.tolist()
    X, obs = snapshot[:]
    expected = expected_X(snapshot.obs_joinids, snapshot.var_joinids)
    np.testing.assert_array_equal(X.toarray(), expected)
    assert (snapshot.shape, len(snapshot)) == (expected.shape, len(expected))
    assert snapshot.nnz == np.count_nonzero(expected)
    assert obs["score"].tolist() == (snapshot.obs_joinids / 7).tolist()
    snapshot.verify()


# Map-style ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (7, [7]),
        (-1, [N_OBS - 1]),
        (np.int64(3), [3]),
        (slice(10, 20), range(10, 20)),
        (slice(None, None, -50), range(N_OBS - 1, -1, -50)),
        ([3, 5, 3], [3, 5, 3]),
        (np.array([-2, 0]), [N_OBS - 2, 0]),
        (np.arange(N_OBS) % 60 == 1, range(1, N_OBS, 60)),
        ([], []),
    ],
)
def test_indexing_gives_rows_as_numpy_does(either: Snapshot, index: Any, rows: Sequence[int]) -> None:
    X, obs = either[index]
    np.testing.assert_array_equal(X.toarray(), expected_X(rows, range(N_VARS)).reshape(-1, N_VARS))
    pd.testing.assert_frame_equal(obs, make_obs(np.array(rows, dtype=np.int64))[ALL_OBS], check_dtype=False)


def test_rows_that_are_not_there_are_an_index_error(either: Snapshot) -> None:
    for index in (N_OBS, -N_OBS - 1, [0, N_OBS]):
        with pytest.raises(IndexError):
            either[index]


def identity(item: Any) -> Any:
    return item


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_data_loader_takes_mini_batches_in_the_order_of_any_sampler(
    either: Snapshot, n_workers: int
) -> None:
    weights = [float(i < 10) for i in range(N_OBS)]
    for sampler in (RandomSampler(either), WeightedRandomSampler(weights, 40)):
        batches = BatchSampler(sampler, batch_size=16, drop_last=False)
        loader = DataLoader(either, sampler=batches, batch_size=None, **workers(n_workers))
        rows = []
        for X, obs in loader:
            joinids = obs["n_genes"].tolist()
            rows += joinids
            np.testing.assert_array_equal(X.toarray(), expected_X(joinids, range(N_VARS)))
        if isinstance(sampler, RandomSampler):
            assert sorted(rows) == list(range(N_OBS))
            if n_workers:
                return
        else:
            assert len(rows) == 40
            assert max(rows) < 10


def test_a_snapshot_is_pickled_as_its_path(either: Snapshot, copied_either: Path, store: Store) -> None:
    pickled = pickle.dumps(either)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled)[[5]][0].toarray(), either[5][0].toarray())
    replaced = pickle.dumps(Snapshot.open(copied_either))
    shutil.rmtree(copied_either)
    make(copied_either, store, [1, 2])
    with pytest.raises(ValueError, match="must be the one that was pickled"):
        pickle.loads(replaced)


def test_to_anndata_gives_rows_as_an_anndata(either: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, expected in ((None, range(N_OBS)), ([7, 2], [7, 2]), (slice(4), range(4))):
        adata = either.to_anndata(rows)
        np.testing.assert_array_equal(adata.X.toarray(), expected_X(expected, range(N_VARS)))
        assert adata.obs["n_genes"].tolist() == list(expected)
        assert adata.var["feature_id"].tolist() == either.var["feature_id"].tolist()
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(ImportError, match="pip install"):
        either.to_anndata()


# Files ----------------------------------------------------------------------------------------------------


def test_an_empty_path_is_no_path_of_a_snapshot(store: Store) -> None:
    def create(path: str) -> Snapshot:
        with store.query() as query:
            return Snapshot.create(path, query)

    for take in (Snapshot.open, create):
        with pytest.raises(ValueError, match=r"^path='' must not be empty"):
            take("")
    with pytest.raises(ValueError, match=r"^snapshot='' must not be empty"):
        store.dataset(snapshot="")


def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ValueError, match=r"must be a snapshot, but has no manifest\.json"):
            Snapshot.open(path)
