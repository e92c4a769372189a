from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrix_source import matrix_source
from pairs import all_ids, assert_same_batches, pair
from stores import N_OBS, N_VARS, Store, joinids_of, workers
from tiledbsoma_ml import ExperimentDataset, QueryIDs, Snapshot, experiment_dataloader


def test_a_dataset_yields_the_same_from_a_source_and_from_a_snapshot_of_it(path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 20, "shuffle_chunk_size": 8, "io_batch_size": 64, "seed": 3}
    plain = ExperimentDataset(source=matrix_source(), **options)
    stored = ExperimentDataset(source=matrix_source(), snapshot=path, **options)
    joinids = joinids_of(plain)
    assert joinids.tolist() == joinids_of(stored).tolist() != list(range(N_OBS))
    Snapshot.open(path).verify()
    with pytest.raises(ValueError, match=r"content\['version'\] is '1' there, not '2'"):
        ExperimentDataset(source=matrix_source(content={"version": "2"}), snapshot=path, **options)


def test_what_is_not_at_the_path_is_made_when_it_is_first_iterated_and_used_from_then_on(
    store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "some" / "new.snapshot"
    streamed, mapped = pair(store, path, all_ids())
    assert not path.exists()
    assert_same_batches(streamed, mapped)
    assert Snapshot.open(path).shape == (N_OBS, N_VARS)
    made = path.stat()
    assert_same_batches(*pair(store, path, all_ids()))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_workers_wait_for_a_snapshot_that_is_made_before_they_start(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "new.snapshot"
    loader = experiment_dataloader(pair(store, path, all_ids())[1], **workers(1))
    assert sorted(i for _, obs in loader for i in obs["soma_joinid"]) == list(range(N_OBS))


def test_true_stands_for_a_folder_in_the_cache_directory_named_by_what_it_holds(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert_same_batches(*pair(store, True, all_ids()))
    [made] = (tmp_path / "tiledbsoma_ml").glob("*.snapshot")
    assert made.stem == Snapshot.open(made).fingerprint
    list(pair(store, True, all_ids())[1])
    list(pair(store, True, QueryIDs(obs_joinids=[1, 2], var_joinids=[0]))[1])
    assert len(list((tmp_path / "tiledbsoma_ml").glob("*.snapshot"))) == 2


def test_a_snapshot_of_other_rows_or_columns_or_without_a_column_of_obs_is_refused_at_once(
    store: Store, tmp_path: Path
) -> None:
    part = QueryIDs(obs_joinids=[1, 2, 3], var_joinids=[0, 1])
    path = tmp_path / "part.snapshot"
    list(pair(store, path, part)[1])
    for ids, name in (
        (QueryIDs(obs_joinids=[1, 4], var_joinids=[0]), "obs_joinids"),
        (QueryIDs(obs_joinids=[1], var_joinids=[5]), "var_joinids"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .* of the snapshot .*another path"):
            pair(store, path, ids)
    with pytest.raises(ValueError, match="obs_column_names='stage' must be a column of obs in the snapshot"):
        pair(store, path, part, obs_column_names=["stage"])


def test_a_path_with_something_else_is_refused_at_once_and_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a snapshot"):
        pair(store, tmp_path, all_ids())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_path_without_a_snapshot_and_without_a_query_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        ExperimentDataset(snapshot=tmp_path / "none.snapshot")
    with pytest.raises(ValueError, match="snapshot=True needs a query"):
        ExperimentDataset(snapshot=True)


def test_a_snapshot_of_another_experiment_that_appears_after_a_dataset_was_built_is_refused(
    store: Store, make_store: Any, tmp_path: Path
) -> None:
    path, ids = tmp_path / "x.snapshot", QueryIDs(obs_joinids=np.arange(20), var_joinids=np.arange(N_VARS))
    first, second = (
        ExperimentDataset(x_locator=source.locator, query_ids=ids, snapshot=path)
        for source in (make_store(obs_joinids=range(20), n_vars=N_VARS), store)
    )
    in_worker = pickle.dumps(second)
    assert sorted(joinids_of(first)) == list(range(20))
    with pytest.raises(ValueError, match=r"the experiment is .* there, not"):
        next(iter(second))
    with pytest.raises(ValueError, match=r"the experiment is .* there, not"):
        next(iter(pickle.loads(in_worker)))
