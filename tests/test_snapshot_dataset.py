"""`snapshot=` changes speed and nothing else: the same mini-batches as from SOMA, in the same order."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma as soma
import torch
from hypothesis import given
from hypothesis import strategies as st

from stores import MEASUREMENT, N_OBS, N_VARS, Store, joinids_of, workers
from tiledbsoma_ml import ExperimentDataset, QueryIDs, Snapshot, experiment_dataloader
from tiledbsoma_ml.snapshot.reader import RowIndex

pytestmark = pytest.mark.filterwarnings("ignore:.* changes nothing here: ")

COLUMNS = ["soma_joinid", "cell_type", "maybe_int", "barcode"]


@pytest.fixture(scope="session")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A snapshot of all rows and columns of the store."""
    path = tmp_path_factory.mktemp("snapshots") / "whole.snapshot"
    with soma.Experiment.open(store.uri) as experiment, experiment.axis_query(MEASUREMENT) as query:
        return Snapshot.create(path, query, obs_column_names=COLUMNS, progress=False)


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


@given(
    rows=st.lists(st.integers(0, N_OBS - 1), unique=True, max_size=60).map(sorted),
    columns=st.lists(st.integers(0, N_VARS - 1), unique=True, min_size=1, max_size=N_VARS),
    batch_size=st.integers(1, 25),
    chunk=st.integers(1, 9),
    n_chunks=st.integers(1, 9),
    shuffle=st.booleans(),
    sparse=st.booleans(),
)
def test_mini_batches_are_those_of_the_experiment_in_every_epoch(
    store: Store,
    whole: Snapshot,
    rows: list[int],
    columns: list[int],
    batch_size: int,
    chunk: int,
    n_chunks: int,
    shuffle: bool,
    sparse: bool,
) -> None:
    streamed, mapped = pair(
        store,
        whole,
        QueryIDs(obs_joinids=rows, var_joinids=columns),
        batch_size=batch_size,
        shuffle_chunk_size=chunk,
        io_batch_size=chunk * n_chunks,
        shuffle=shuffle,
        return_sparse_X=sparse,
    )
    assert len(streamed) == len(mapped)
    for _ in range(2):
        assert_same_batches(streamed, mapped)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["cpu", "gpu_iobatch", "gpu_minibatch"])
def test_a_device_gets_what_it_gets_from_the_experiment(
    store: Store, whole: Snapshot, mode: str, sparse: bool
) -> None:
    options = {"shuffle_mode": mode, "device": "cpu", "shuffle_chunk_size": 8, "io_batch_size": 40}
    streamed, mapped = pair(store, whole, all_ids(), return_sparse_X=sparse, **options)
    assert_same_batches(streamed, mapped)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_workers_get_what_they_get_from_the_experiment(
    store: Store, whole: Snapshot, device: str | None
) -> None:
    options = {"shuffle_chunk_size": 8, "io_batch_size": 40, "device": device, "return_sparse_X": True}
    streamed, mapped = pair(store, whole, all_ids(), **options)
    loaders = [experiment_dataloader(dataset, **workers(2)) for dataset in (streamed, mapped)]
    for _ in range(2):
        assert_same_batches(*loaders)


def test_without_eager_fetch_mini_batches_are_the_same(store: Store, whole: Snapshot) -> None:
    assert_same_batches(*pair(store, whole, all_ids(), use_eager_fetch=False))


def test_parts_of_a_split_read_from_the_one_snapshot(store: Store, whole: Snapshot) -> None:
    streamed, mapped = pair(store, whole, all_ids())
    splits = [dataset.random_split(0.7, 0.3, seed=1) for dataset in (streamed, mapped)]
    for part, other in zip(*splits, strict=True):
        assert_same_batches(part, other)


def test_a_snapshot_needs_no_experiment(whole: Snapshot) -> None:
    for snapshot in (whole, whole.path, str(whole.path)):
        dataset = ExperimentDataset(snapshot=snapshot, batch_size=50, seed=1, obs_column_names=COLUMNS)
        assert sorted(joinids_of(dataset)) == list(range(N_OBS))
        assert dataset.x_locator is None
    part = QueryIDs(obs_joinids=[4, 9, 200], var_joinids=[0, 1])
    read = joinids_of(ExperimentDataset(snapshot=whole, query_ids=part, shuffle=False))
    assert read.tolist() == [4, 9, 200]


def test_the_layer_is_that_of_the_query_whichever_the_snapshot_has_first(
    make_store: Any, tmp_path: Path
) -> None:
    two = make_store()
    scaled = np.full((N_OBS, N_VARS), 0.5, np.float32)
    with soma.Experiment.open(two.uri, "w") as experiment:
        X = experiment.ms[MEASUREMENT].X
        array = X.add_new_dense_ndarray("scaled", type=pa.float32(), shape=scaled.shape)
        array.write((), pa.Tensor.from_numpy(scaled))
    with two.query() as query:
        options = {"layer_name": "scaled", "layers": ["raw"], "progress": False}
        Snapshot.create(tmp_path / "s", query, **options)
        for layer_name in (None, "scaled"):
            asked = {"layer_name": layer_name, "shuffle": False, "batch_size": N_OBS}
            streamed, mapped = (
                ExperimentDataset(query, **asked, snapshot=path) for path in (None, tmp_path / "s")
            )
            assert mapped.layer_name == (layer_name or "raw")
            assert_same_batches(streamed, mapped)


def test_what_is_not_at_the_path_is_made_when_it_is_first_iterated_and_used_from_then_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some" / "new.snapshot"
    streamed, mapped = pair(store, path, all_ids())
    assert not path.exists()
    assert_same_batches(streamed, mapped)
    assert Snapshot.open(path).shape == (N_OBS, N_VARS)
    monkeypatch.setattr(Snapshot, "create_from", None)  # nothing is made a second time
    assert_same_batches(*pair(store, path, all_ids()))


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


def test_auto_is_a_true_shuffle_of_single_rows(store: Store, whole: Snapshot) -> None:
    auto = pair(store, whole, all_ids(), shuffle_chunk_size="auto", io_batch_size="auto")[1]
    single = pair(store, whole, all_ids(), shuffle_chunk_size=1)[1]
    np.testing.assert_array_equal(joinids_of(auto), joinids_of(single))
    quality = auto.shuffle_quality("cell_type")
    assert quality.mixing == pytest.approx(1, abs=0.1)
    assert quality.n_batches == len(auto)


# Bad input ------------------------------------------------------------------------------------------------


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


def test_a_snapshot_whose_experiment_cannot_be_listed_is_used_with_a_warning(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlisted(_: object) -> None:
        raise OSError

    ids = QueryIDs(obs_joinids=np.arange(20), var_joinids=np.arange(N_VARS))
    known = {"x_locator": store.locator, "query_ids": ids, "snapshot": tmp_path / "x.snapshot"}
    next(iter(ExperimentDataset(**known)))
    monkeypatch.setattr("tiledbsoma_ml._soma.versions.open_vfs", unlisted)
    with pytest.warns(UserWarning, match=r"holds .* as of 20.*; whether obs, var, X/raw changed since"):
        dataset = ExperimentDataset(**known)
    assert len(joinids_of(dataset)) == 20


@pytest.mark.parametrize("scope", ["partition", "global"])
def test_in_an_epoch_rows_are_looked_up_once_a_mini_batch_at_a_time(
    store: Store, whole: Snapshot, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dataset = pair(store, whole, all_ids(), batch_size=50, shuffle_scope=scope)
    sizes, find = [], RowIndex.find
    monkeypatch.setattr(RowIndex, "find", lambda self, ids: sizes.append(len(ids)) or find(self, ids))
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2))
    n_rows = len(joinids_of(dataset))
    assert max(sizes) == 50
    assert sum(sizes) == 2 * n_rows, "once for X, once for obs"
