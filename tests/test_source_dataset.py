"""A source that somebody else wrote is read as an experiment is: in every order, dealt and resumed alike."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix_source import MatrixReader, MatrixSource, matrix_source
from stores import N_OBS, Store, joinids_of, workers
from tiledbsoma_ml import ExperimentDataset, Fields, Layout, QueryIDs, Snapshot, Source, experiment_dataloader
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._soma.source import SOMASource
from tiledbsoma_ml.snapshot.source import SnapshotSource
from tiledbsoma_ml.testing import check_source

COLUMNS = ("soma_joinid", "cell_type", "barcode")


def pair(store: Store, **options: Any) -> tuple[ExperimentDataset, ExperimentDataset]:
    """Return a dataset of the test experiment, and one of a source with the same rows."""
    given_options = {"batch_size": 16, "seed": 3, "obs_column_names": COLUMNS, **options}
    source = matrix_source()
    ids = source.query_ids
    of_experiment = store.dataset(ids.obs_joinids, ids.var_joinids, **given_options)
    return of_experiment, ExperimentDataset(source=source, **given_options)


def assert_same(batches: Any, others: Any) -> None:
    for (X, obs), (other_X, other_obs) in zip(batches, others, strict=True):
        assert type(X) is type(other_X)
        dense, other = (x.to_dense().numpy() if hasattr(x, "to_dense") else x for x in (X, other_X))
        dense, other = (x.toarray() if hasattr(x, "toarray") else x for x in (dense, other))
        np.testing.assert_array_equal(dense, other)
        assert obs["soma_joinid"].tolist() == other_obs["soma_joinid"].tolist()
        assert obs["cell_type"].tolist() == other_obs["cell_type"].tolist()


NAMES = ["cell_type", "maybe_int", "barcode"]


def of_snapshot(path: Path, of: Source | None) -> SnapshotSource:
    fields, ids = Fields(obs_column_names=NAMES), None if of is None else of.query_ids
    return SnapshotSource(path, of=of, ids=ids, fields=fields, layer_name=None, memory_bytes=2**28)


def test_sources_do_what_a_source_must(store: Store, tmp_path: Path) -> None:
    with store.query() as query:
        ids = QueryIDs.create(query)
    of_experiment = SOMASource(store.locator, ids)
    of_experiment.check(ids, Fields(obs_column_names=NAMES))
    check_source(matrix_source(), obs_column_names=NAMES)
    check_source(of_experiment, obs_column_names=NAMES)
    check_source(of_snapshot(tmp_path / "of an experiment", of_experiment), obs_column_names=NAMES)
    check_source(of_snapshot(tmp_path / "of a matrix", matrix_source()), obs_column_names=NAMES)
    check_source(of_snapshot(tmp_path / "of a matrix", None), obs_column_names=NAMES)


@settings(max_examples=8)
@given(
    scope=st.sampled_from(["partition", "global"]),
    tail=st.sampled_from(["drop", "pad"]),
    world_size=st.integers(1, 3),
    chunk=st.sampled_from([1, 4]),
    io_batch=st.sampled_from([4, 40, 400]),
    sparse_X=st.booleans(),
    eager=st.booleans(),
    device=st.sampled_from([{}, {"device": "cpu"}, {"device": "cpu", "shuffle_mode": "gpu_iobatch"}]),
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_every_rank_gets_the_mini_batches_that_it_gets_from_an_experiment(
    store: Store,
    scope: str,
    tail: str,
    world_size: int,
    chunk: int,
    io_batch: int,
    sparse_X: bool,
    eager: bool,
    device: dict[str, Any],
) -> None:
    options = {"shuffle_scope": scope, "tail": tail, "shuffle_chunk_size": chunk, "io_batch_size": io_batch}
    for rank in range(world_size):
        ranks = {"ranks": (rank, world_size), "use_eager_fetch": eager, "return_sparse_X": sparse_X}
        of_experiment, of_source = pair(store, **options, **ranks, **device)
        assert len(of_source) == len(of_experiment)
        for _ in range(2):
            assert_same(of_source, of_experiment)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_workers_get_what_they_get_from_an_experiment(store: Store, device: str | None) -> None:
    datasets = pair(store, shuffle_chunk_size=4, io_batch_size=40, device=device, shuffle_scope="global")
    loaders = [experiment_dataloader(dataset, **workers(2)) for dataset in datasets]
    for _ in range(2):
        assert_same(*loaders)


def test_an_epoch_is_resumed_after_any_mini_batch() -> None:
    def dataset() -> ExperimentDataset:
        return ExperimentDataset(source=matrix_source(), batch_size=50, seed=3, shuffle_chunk_size=4)

    whole = [obs["soma_joinid"].tolist() for _, obs in dataset()]
    assert len(whole) == 7
    for n_taken in range(len(whole)):
        left, resumed = dataset(), dataset()
        assert len(list(itertools.islice(left, n_taken))) == n_taken
        resumed.load_state_dict(left.state_dict())
        assert [obs["soma_joinid"].tolist() for _, obs in resumed] == whole[n_taken:]


def test_a_snapshot_of_it_yields_the_same_and_is_made_once(tmp_path: Path) -> None:
    options = {"batch_size": 16, "seed": 3, "obs_column_names": COLUMNS}
    streamed = ExperimentDataset(source=matrix_source(), **options)
    first = ExperimentDataset(source=matrix_source(), snapshot=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()
    assert_same(first, streamed)
    made = Snapshot.open(tmp_path / "s")
    assert made.shape == matrix_source().X.shape
    again = ExperimentDataset(source=matrix_source(), snapshot=made, **options)
    assert_same(again, ExperimentDataset(source=matrix_source(), **options))
    with pytest.raises(ValueError, match="must be made from the source that is given, but"):
        ExperimentDataset(source=matrix_source(content={"version": "2"}), snapshot=made, **options)


def test_workers_read_the_snapshot_that_is_made_before_they_start(tmp_path: Path) -> None:
    dataset = ExperimentDataset(source=matrix_source(), snapshot=tmp_path / "s", batch_size=16, seed=3)
    assert sorted(joinids_of(experiment_dataloader(dataset, **workers(2)))) == list(range(N_OBS))


@pytest.mark.parametrize("row_tile", [1, 64])
def test_auto_follows_how_it_is_stored(row_tile: int) -> None:
    source = matrix_source()
    source.row_tile = row_tile
    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
    dataset = ExperimentDataset(source=source, batch_size=16, seed=3, **auto)
    assert dataset.plan.sizes(dataset.query_ids).run_length == row_tile
    orders = [joinids_of(dataset).tolist() for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(N_OBS))
    assert orders[0] != orders[1]


def test_a_part_of_it_is_read_by_joinids_of_ones_own_and_can_be_split() -> None:
    ids = QueryIDs(obs_joinids=[5, 300, 7, 8], var_joinids=[4, 2])
    dataset = ExperimentDataset(source=matrix_source(), query_ids=ids, batch_size=4, shuffle=False)
    [(X, obs)] = dataset
    assert obs["soma_joinid"].tolist() == [5, 300, 7, 8]
    np.testing.assert_array_equal(X, matrix_source().X[[5, 300, 7, 8]][:, [4, 2]].toarray())
    halves = ExperimentDataset(source=matrix_source(), batch_size=4).random_split(0.5, 0.5, seed=1)
    assert sorted(np.concatenate([joinids_of(half) for half in halves])) == list(range(N_OBS))


def test_how_well_it_is_mixed_can_be_measured() -> None:
    options = {"batch_size": 32, "seed": 1, "shuffle_chunk_size": 1}
    quality = ExperimentDataset(source=matrix_source(), **options).shuffle_quality("cell_type")
    assert 0.9 < quality.mixing <= 1.1


@pytest.mark.parametrize("n_taken", [0, 1, 3, None])
def test_a_reader_is_closed_whenever_an_epoch_ends(
    monkeypatch: pytest.MonkeyPatch, n_taken: int | None
) -> None:
    opened, closed = [], []
    init = MatrixReader.__init__
    monkeypatch.setattr(MatrixReader, "__init__", lambda *args: (opened.append(args[0]), init(*args))[1])
    monkeypatch.setattr(MatrixReader, "close", lambda reader: closed.append(reader))
    iterator = iter(ExperimentDataset(source=matrix_source(), batch_size=50))
    list(itertools.islice(iterator, n_taken))
    iterator.close()
    assert len(opened) == (0 if n_taken == 0 else 1)
    assert set(map(id, closed)) == set(map(id, opened))


def test_what_it_does_not_have_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MatrixSource, "open", None)
    with pytest.raises(ValueError, match="obs_column_names='cell_typ' must be a column of obs; did you mean"):
        ExperimentDataset(source=matrix_source(), obs_column_names=["cell_typ"])
    with pytest.raises(ValueError, match=r"not source, layer_name|not layer_name, source"):
        ExperimentDataset(source=matrix_source(), layer_name="raw")


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"source=str must have all members of a tiledbsoma_ml\.Source, but lacks query_ids"
    ):
        ExperimentDataset(source="cells.h5ad")  # type: ignore[arg-type]


def test_an_address_without_its_layer_is_refused(store: Store) -> None:
    ids = QueryIDs(obs_joinids=[0], var_joinids=[0])
    for wrong in ({"layer_name": "nope"}, {"measurement_name": "nada"}):
        [(name, value)] = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value!r} must be a"):
            ExperimentDataset(x_locator=attrs.evolve(store.locator, **wrong), query_ids=ids)


@pytest.mark.parametrize("wrong", [{"obs_joinids": [N_OBS]}, {"var_joinids": [999]}])
def test_rows_and_columns_that_the_source_lacks_are_refused(wrong: dict[str, Any]) -> None:
    ids = QueryIDs(**{"obs_joinids": [0], "var_joinids": [0], **wrong})
    with pytest.raises(
        ValueError, match=f"{next(iter(wrong))} must be those of the source, but 1 of 1 are not"
    ):
        ExperimentDataset(source=matrix_source(), query_ids=ids)


def test_other_rows_of_a_dataset_have_its_columns() -> None:
    dataset = ExperimentDataset(source=matrix_source(), batch_size=4)
    ids = dataset.query_ids
    part = dataset.over(attrs.evolve(ids, obs_joinids=[8, 3]))
    assert sorted(joinids_of(part)) == [3, 8]
    with pytest.raises(ValueError, match="query_ids must have the columns of the dataset, in their order"):
        dataset.over(QueryIDs(obs_joinids=[8, 3], var_joinids=ids.var_joinids[::-1]))


def test_the_layout_of_an_experiment_is_that_of_the_rows_and_columns_that_are_asked_for(store: Store) -> None:
    few, all_columns = (QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(n)) for n in (1, 20))
    source = SOMASource(store.locator, all_columns)
    before = source.layout(all_columns, Budget(2**30))
    assert source.layout(few, Budget(2**30)).bytes_per_row < before.bytes_per_row
    assert source.layout(all_columns, Budget(2**30)) == before


def test_forked_workers_find_out_nothing_that_is_known(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"shuffle_chunk_size": "auto", "io_batch_size": "auto", "batch_size": 16}
    dataset = store.dataset(obs_column_names=["soma_joinid", "maybe_int"], **options)
    loader = experiment_dataloader(dataset, num_workers=2, multiprocessing_context="fork")
    pid, layout = os.getpid(), SOMASource.layout

    def in_this_process(*args: Any) -> Any:
        assert os.getpid() == pid, "found out again"
        return layout(*args)

    monkeypatch.setattr(SOMASource, "layout", in_this_process)
    for _ in range(2):
        batches = list(loader)
        assert sorted(joinids_of(batches)) == list(range(N_OBS))
        assert {str(obs["maybe_int"].dtype) for _, obs in batches} == {"Int64"}


def test_a_pickled_dataset_of_a_part_has_a_source_of_its_rows(store: Store) -> None:
    part, _ = store.dataset().random_split(0.2, 0.8, seed=1)
    copied = pickle.loads(pickle.dumps(part))
    np.testing.assert_array_equal(copied.source.query_ids.obs_joinids, part.query_ids.obs_joinids)
    assert len(ExperimentDataset(source=copied.source)) == len(part.query_ids.obs_joinids)


class ByPlace(MatrixSource):
    """A source that finds rows by their place among all: its `query_ids` are not to be touched."""

    def obs(self, obs_joinids: np.ndarray, column_names: Any) -> pd.DataFrame:
        return super().obs(np.searchsorted(self.query_ids.obs_joinids, obs_joinids), column_names)


class Fixed(MatrixSource):
    @property
    def query_ids(self) -> QueryIDs:  # type: ignore[override]
        return QueryIDs(obs_joinids=np.arange(self.X.shape[0]), var_joinids=np.arange(self.X.shape[1]))

    @query_ids.setter
    def query_ids(self, ids: QueryIDs) -> None:
        if "frame" in self.__dict__ and hasattr(self, "_content"):
            raise AttributeError("cannot be set")


@pytest.mark.parametrize("kind", [ByPlace, Fixed])
def test_the_rows_of_a_source_stay_its_own_in_a_pickled_dataset_of_a_part(kind: type[MatrixSource]) -> None:
    whole = matrix_source()
    source = kind(whole.X, whole.frame)
    options = {"batch_size": 8, "seed": 1, "obs_column_names": ["soma_joinid", "barcode"]}
    _, part = ExperimentDataset(source=source, **options).random_split(0.6, 0.4, seed=2)
    copied = pickle.loads(pickle.dumps(part))
    assert len(copied.source.query_ids.obs_joinids) == N_OBS
    for (X, obs), (other_X, other_obs) in zip(part, copied, strict=True):
        np.testing.assert_array_equal(X, other_X)
        pd.testing.assert_frame_equal(obs, other_obs)


@pytest.mark.parametrize("n_more", [-3, 2])
@pytest.mark.parametrize("device", [{}, {"device": "cpu", "shuffle_mode": "gpu_iobatch"}])
def test_a_reader_that_gives_too_few_or_too_many_rows_is_told(
    monkeypatch: pytest.MonkeyPatch, n_more: int, device: dict[str, Any]
) -> None:
    read = MatrixReader.read

    def wrong(self: MatrixReader, obs_joinids: np.ndarray) -> Any:
        few = obs_joinids[:n_more] if n_more < 0 else np.append(obs_joinids, obs_joinids[:n_more])
        return read(self, few)

    monkeypatch.setattr(MatrixReader, "read", wrong)
    with pytest.raises(ValueError, match="a source must give the 311 rows that it is asked for, but gave 3"):
        list(ExperimentDataset(source=matrix_source(), batch_size=8, **device))


def test_a_layout_that_failed_can_be_asked_for_again_and_its_error_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
    dataset = ExperimentDataset(source=matrix_source(), batch_size=8, **auto)
    with monkeypatch.context() as patch:
        patch.setattr(MatrixSource, "layout", lambda *_: {}.nothing)
        for _ in range(2):
            with pytest.raises(AttributeError, match="'dict' object has no attribute 'nothing'"):
                dataset.plan  # noqa: B018
    assert sorted(joinids_of(dataset)) == list(range(N_OBS))


def test_parts_on_several_threads_ask_for_the_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, asked = MatrixSource.layout, []

    def slow(*args: Any) -> Any:
        asked.append(args)
        time.sleep(0.05)
        return layout(*args)

    monkeypatch.setattr(MatrixSource, "layout", slow)
    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
    parts = ExperimentDataset(source=matrix_source(), batch_size=8, **auto).random_split(0.5, 0.5, seed=1)
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda part: part.plan, [*parts, *parts]))
    assert len(asked) == 1
    assert all(plan is plans[0] for plan in plans)


@pytest.mark.parametrize(("name", "value"), [("row_tile", 0), ("bytes_per_row", float("nan"))])
def test_a_layout_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value} must be "):
        Layout(**{"row_tile": 1, "bytes_per_row": 8.0, name: value})


@pytest.mark.parametrize("of", ["an experiment", "a matrix"])
def test_a_dataset_of_a_snapshot_can_be_pickled_again_and_again(
    store: Store, tmp_path: Path, of: str
) -> None:
    options = {"snapshot": tmp_path / "s", "batch_size": 16, "seed": 3, "obs_column_names": COLUMNS}
    if of == "a matrix":
        dataset = ExperimentDataset(source=matrix_source(), **options)
    else:
        dataset = store.dataset(**options)
    whole = list(dataset)
    content = dataset.source.content
    for _ in range(3):
        dataset = pickle.loads(pickle.dumps(dataset))
        dataset.set_epoch(0)
        assert dataset.source.content == content
        assert_same(dataset, whole)
