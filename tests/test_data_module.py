from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from data_modules import FIXED_SIZES, SIZES, make
from matrix_source import matrix_source
from stores import N_OBS, N_VARS, Store, expected_X, joinids_of, workers
from tiledbsoma_ml import ExperimentDataModule, MemorySource, Snapshot


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def batches(data: ExperimentDataModule, loader: Any) -> Iterator[Any]:
    """Yield what Lightning gives to the model, on the CPU."""
    for mini_batch in loader:
        yield data.on_after_batch_transfer(data.on_before_batch_transfer(mini_batch, 0), 0)


# Parts ----------------------------------------------------------------------------------------------------


def test_the_parts_are_disjoint_and_together_the_query(store: Store) -> None:
    data = make(store, slice(10, 109), **SIZES)
    parts = [data.train_ids.obs_joinids, data.val_ids.obs_joinids, data.test_ids.obs_joinids]
    assert [len(part) for part in parts] == [60, 30, 10]
    assert sorted(np.concatenate(parts)) == list(range(10, 110))
    np.testing.assert_array_equal(data.query_ids.obs_joinids, range(10, 110))
    assert data.n_vars == N_VARS


def test_the_split_depends_on_the_seed_and_on_neither_rank_nor_epoch(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(store)
    train = data.train_ids.obs_joinids
    for _ in range(2):
        assert sorted(joinids_of(data.train_dataloader())) == train.tolist()
    as_rank(monkeypatch, 1, 3)
    np.testing.assert_array_equal(make(store).train_ids.obs_joinids, train)
    assert set(make(store, seed=4).train_ids.obs_joinids) != set(train)


def test_training_rows_come_in_a_new_order_every_epoch_and_others_in_that_of_the_query(store: Store) -> None:
    data = make(store)
    loader = data.train_dataloader()
    first, second = joinids_of(loader), joinids_of(loader)
    assert first.tolist() != second.tolist()
    assert sorted(first) == sorted(second) == data.train_ids.obs_joinids.tolist()
    for loader, ids in [(data.val_dataloader(), data.val_ids), (data.test_dataloader(), data.test_ids)]:
        for _ in range(2):
            np.testing.assert_array_equal(joinids_of(loader), ids.obs_joinids)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_predict_yields_all_rows_in_the_order_of_the_query_with_their_joinids(
    store: Store, n_workers: int
) -> None:
    data = make(store, obs_column_names=["cell_type"], dataloader_kwargs=workers(n_workers))
    loader = data.predict_dataloader()
    np.testing.assert_array_equal(joinids_of(loader), range(N_OBS))
    assert data.val_dataloader().num_workers == n_workers


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_every_row_that_is_not_marked_as_padding_is_evaluated_once_over_all_ranks(
    monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    data = ExperimentDataModule(source=matrix_source(), batch_size=16, seed=3)
    counted: dict[str, list[int]] = {"val": [], "test": [], "predict": []}
    n_steps: dict[str, set[int]] = {"val": set(), "test": set(), "predict": set()}
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        for part in counted:
            loader = getattr(data, f"{part}_dataloader")()
            mini_batches = list(loader)
            n_steps[part].add(len(mini_batches))
            assert len(loader) == len(mini_batches)
            for _, obs in mini_batches:
                counted[part] += obs["soma_joinid"][~obs["is_padding"]].tolist()
    assert {part: len(steps) for part, steps in n_steps.items()} == {"val": 1, "test": 1, "predict": 1}
    assert counted["predict"] == list(range(N_OBS))
    assert counted["val"] == data.val_ids.obs_joinids.tolist()
    assert counted["test"] == data.test_ids.obs_joinids.tolist()


def test_every_rank_has_the_same_number_of_training_steps_and_other_rows(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        loader = make(store).train_dataloader()
        rows.append(joinids_of(loader))
        assert len(loader) == 6
    assert [len(own) for own in rows] == [83, 83, 83]
    assert sorted(np.concatenate(rows)) == make(store).train_ids.obs_joinids.tolist()
    as_rank(monkeypatch, 0, 3)
    assert make(store).train_dataloader().dataset.shuffle_scope == "global"


# Batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "sparse"), [(16, False), (16, True), (1, False), (1, True)])
def test_x_is_a_tensor_of_two_dimensions(store: Store, batch_size: int, sparse: bool) -> None:
    data = make(store, slice(0, 29), batch_size=batch_size, return_sparse_X=sparse)
    for X, obs in batches(data, data.predict_dataloader()):
        assert X.layout is (torch.sparse_csr if sparse else torch.strided)
        assert X.dtype is torch.float32
        np.testing.assert_array_equal(X.to_dense(), expected_X(obs["soma_joinid"], range(N_VARS)))


def test_the_transforms_are_applied_one_after_the_other_in_the_training_process(store: Store) -> None:
    pids = set()

    def transform(batch: Any) -> Any:
        pids.add(os.getpid())
        X, obs = batch
        return X, torch.tensor(obs["cell_type"].cat.codes.to_numpy())

    def device_transform(batch: Any) -> Any:
        X, codes = batch
        return {"X": X.to_dense(), "codes": codes}

    data = make(
        store,
        slice(0, 29),
        obs_column_names=["cell_type"],
        return_sparse_X=True,
        transform=transform,
        device_transform=device_transform,
        dataloader_kwargs=workers(1),
    )
    codes = torch.cat([batch["codes"] for batch in batches(data, data.predict_dataloader())])
    assert codes.tolist() == [row % 3 for row in range(30)]
    assert pids == {os.getpid()}


def test_columns_of_obs_and_var_can_be_read_before_training(store: Store, tmp_path: Path) -> None:
    data = make(store, slice(5, 24))
    assert data.read_obs(["n_genes"])["n_genes"].tolist() == list(range(5, 25))
    assert data.read_var(["feature_id"])["feature_id"].tolist() == [f"gene{j}" for j in range(N_VARS)]
    with pytest.raises(ValueError, match=r"obs_column_names='celltype' must be .* did you mean 'cell_type'"):
        data.read_obs(["celltype"])
    with store.query(slice(5, 24)) as query:
        Snapshot.create(tmp_path / "s", query, obs_column_names=["n_genes"], progress=False)
    data = ExperimentDataModule(snapshot=Snapshot.open(tmp_path / "s"))
    assert data.read_obs(["n_genes"])["n_genes"].tolist() == list(range(5, 25))
    assert data.read_var(["feature_id"])["feature_id"].tolist() == [f"gene{j}" for j in range(N_VARS)]


# Snapshots ------------------------------------------------------------------------------------------------


def test_a_snapshot_is_made_once_of_the_whole_query_and_gives_the_same_batches(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    streamed, mapped = make(store, **FIXED_SIZES), make(store, **FIXED_SIZES, snapshot=True)
    for loader in ("val_dataloader", "train_dataloader", "predict_dataloader"):
        np.testing.assert_array_equal(
            joinids_of(getattr(mapped, loader)()), joinids_of(getattr(streamed, loader)())
        )
    [folder] = (tmp_path / "tiledbsoma_ml").glob("*.snapshot")
    snapshot = Snapshot.open(folder)
    assert len(snapshot) == N_OBS
    alone = ExperimentDataModule(snapshot=snapshot, batch_size=16, seed=3)
    np.testing.assert_array_equal(alone.train_ids.obs_joinids, streamed.train_ids.obs_joinids)
    np.testing.assert_array_equal(joinids_of(alone.test_dataloader()), joinids_of(streamed.test_dataloader()))


# Like any data module -------------------------------------------------------------------------------------


def test_printing_makes_no_loader_and_so_no_snapshot(store: Store, tmp_path: Path) -> None:
    data = make(store, snapshot=tmp_path / "s")
    assert str(data) == repr(data)
    for fact in (
        "<ExperimentDataModule: 311 rows by 23 columns; ",
        "batch_size=16",
        "train=249 rows, val=31 rows",
    ):
        assert fact in repr(data)
    assert "<td style='text-align:left'>249 rows</td>" in data._repr_html_()
    assert not list(tmp_path.iterdir())


class Mine(ExperimentDataModule):
    def __init__(self, source: Any, factor: int, **options: Any) -> None:
        super().__init__(source, **options)
        self.save_hyperparameters()


def test_a_subclass_saves_its_hyperparameters_and_leaves_the_query_out(store: Store) -> None:
    with store.query() as query:
        data = Mine(query, 3, batch_size=8)
    assert dict(data.hparams) == dict(data.hparams_initial) == {"factor": 3, "batch_size": 8}


@pytest.mark.parametrize("is_snapshot", [False, True])
def test_a_batch_size_that_is_set_holds_for_all_parts(
    store: Store, tmp_path: Path, is_snapshot: bool
) -> None:
    options = {"snapshot": tmp_path / "s"} if is_snapshot else {}
    data, expected = make(store, **FIXED_SIZES, **options), make(store, **FIXED_SIZES, batch_size=40)
    first = list(data.train_dataloader())
    data.batch_size = 40
    assert (data.batch_size, len(first[0][1])) == (40, 16)
    expected._train.set_epoch(1)  # the first one is over
    for part in ("train", "val", "test", "predict"):
        loader, fresh = (getattr(each, f"{part}_dataloader")() for each in (data, expected))
        found = list(loader)
        assert max(len(obs) for _, obs in found) == min(40, sum(len(obs) for _, obs in found))
        assert len(found) == len(loader) == len(fresh)
        np.testing.assert_array_equal(joinids_of(found), joinids_of(fresh))
    if is_snapshot:  # nothing but the snapshot is needed
        alone = ExperimentDataModule(snapshot=Snapshot.open(tmp_path / "s"), batch_size=16, seed=3)
        alone.batch_size = 40
        np.testing.assert_array_equal(joinids_of(alone.val_dataloader()), joinids_of(data.val_dataloader()))


def test_a_setting_that_is_not_in_use_is_told_once_and_at_the_line_of_the_user(
    store: Store, tmp_path: Path
) -> None:
    unused = {"mixing": 0.9, "window_dir": tmp_path, "window_budget": 2**26}
    with store.query() as query, pytest.warns(UserWarning, match=" changes nothing here: ") as told:
        data = ExperimentDataModule(query, snapshot=tmp_path / "s", **FIXED_SIZES, **unused)
    assert [str(warning.message).partition("=")[0] for warning in told] == ["mixing", "window_dir"]
    assert {warning.filename for warning in told} == {__file__}
    data.batch_size = 40  # says nothing: a warning is an error
    assert "window_dir (not in use)" in data._repr_html_()


def test_a_column_of_obs_that_is_called_as_the_marks_are_needs_another_name_of_these() -> None:
    frame = pd.DataFrame({"is_padding": ["mine"] * 10})
    source = MemorySource(sparse.csr_matrix(np.ones((10, 2), np.float32)), frame)
    options = {"source": source, "obs_column_names": ["is_padding"], "batch_size": 4}
    with pytest.raises(ValueError, match=r"padding_column_name='is_padding' must not .* try 'is_repeated'\."):
        ExperimentDataModule(**options)
    data = ExperimentDataModule(**options, padding_column_name="is_repeated")
    [(_, obs)] = data.val_dataloader()
    assert obs.columns.tolist() == ["is_padding", "soma_joinid", "is_repeated"]
    assert obs["is_padding"].tolist() == ["mine"]
    assert obs["is_repeated"].tolist() == [False]


def test_repeats_in_training_batches_are_marked_as_well(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        data = make(store, tail="pad", **FIXED_SIZES)
        for _, obs in data.train_dataloader():
            counted += obs["soma_joinid"][~obs["is_padding"]].tolist()
    assert sorted(counted) == data.train_ids.obs_joinids.tolist()


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 0.5}, r"train_size=0.5, val_size=0.1, test_size=0.1 must be shares .* sum to 1"),
        (
            {"train_size": 1.2, "val_size": -0.3},
            r"train_size=1.2, val_size=-0.3, test_size=0.1 must",
        ),
        (
            {"train_size": 0.899, "val_size": 0.001, "test_size": 0.1},
            r"val_size=0.001 must give at least one row, and gives none of 311; make it larger, select",
        ),
        ({"seed": -1}, r"seed=-1 must be an integer of at least 0"),
    ],
)
def test_sizes_that_make_no_parts_are_refused(store: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(store, **options)


def test_a_seed_must_be_given_because_ranks_share_it(store: Store) -> None:
    with pytest.raises(TypeError, match=r"seed=None must be an integer of at least 0"):
        make(store, seed=None)


def test_a_part_of_size_0_has_no_loader_where_lightning_allows_it(store: Store) -> None:
    data = make(store, train_size=1.0, val_size=0, test_size=0)
    assert data.val_dataloader() == []
    assert sorted(joinids_of(data.train_dataloader())) == list(range(N_OBS))
    with pytest.raises(ValueError, match=r"test_size must give each of 1 ranks .* and gives 0"):
        data.test_dataloader()


def test_fewer_training_rows_than_ranks_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(store, slice(0, 2), train_size=1.0, val_size=0, test_size=0)
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(ValueError, match=r"train_size must give each of 4 ranks .* and gives 3"):
        data.train_dataloader()
