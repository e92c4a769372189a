"""A source that somebody else wrote is read as an experiment is: in every order, dealt and resumed alike."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix_source import MatrixReader, MatrixSource, matrix_source
from snapshots import make as make_snapshot
from stores import N_OBS, Store, joinids_of, workers
from tiledbsoma_ml import (
    ExperimentDataset,
    Fields,
    Layout,
    QueryIDs,
    Rows,
    Snapshot,
    Source,
    experiment_dataloader,
)
from tiledbsoma_ml._soma.source import SOMASource
from tiledbsoma_ml.snapshot.source import SnapshotSource
from tiledbsoma_ml.testing import check_source

COLUMNS = ("soma_joinid", "cell_type", "barcode")


def pair(store: Store, n_rows: int = N_OBS, **options: Any) -> tuple[ExperimentDataset, ExperimentDataset]:
    """Return a dataset of the first rows of the test experiment, and one of a source with the same rows."""
    given_options = {"batch_size": 16, "seed": 3, "obs_column_names": COLUMNS, **options}
    source = matrix_source()
    ids = QueryIDs(obs_joinids=range(n_rows), var_joinids=source.query_ids.var_joinids)
    of_experiment = store.dataset(ids.obs_joinids, ids.var_joinids, **given_options)
    return of_experiment, ExperimentDataset(source=source, query_ids=ids, **given_options)


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
    make_snapshot(tmp_path / "compressed", matrix_source(), obs_column_names=NAMES, compression="zstd")
    check_source(of_snapshot(tmp_path / "compressed", None), obs_column_names=NAMES)


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
        of_experiment, of_source = pair(store, 101, **options, **ranks, **device)
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
def test_a_reader_is_closed_whenever_an_epoch_ends(n_taken: int | None) -> None:
    opened: list[MatrixReader] = []

    class Noted(MatrixSource):
        def open(self, *args: Any) -> MatrixReader:
            opened.append(super().open(*args))
            return opened[-1]

    iterator = iter(ExperimentDataset(source=matrix_source(kind=Noted), batch_size=50))
    list(itertools.islice(iterator, n_taken))
    iterator.close()
    assert len(opened) == (0 if n_taken == 0 else 1)
    assert all(reader.is_closed for reader in opened)


@pytest.mark.parametrize("n_more", [-3, 2])
@pytest.mark.parametrize("device", [{}, {"device": "cpu", "shuffle_mode": "gpu_iobatch"}])
def test_a_reader_that_gives_too_few_or_too_many_rows_is_told(n_more: int, device: dict[str, Any]) -> None:
    def wrong(rows: Rows[Any]) -> Rows[Any]:
        is_last = len(rows) < 30
        return rows.take(np.arange(len(rows) + n_more) % len(rows)) if is_last else rows

    with pytest.raises(ValueError, match="a source must give the 311 rows that it is asked for, but gave 3"):
        list(ExperimentDataset(source=matrix_source(given=wrong), batch_size=8, **device))


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
