"""`snapshot=` changes speed and nothing else: the same mini-batches as from SOMA, in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma
from hypothesis import given, settings
from hypothesis import strategies as st

from pairs import COLUMNS, all_ids, assert_same_batches, pair
from stores import MEASUREMENT, N_OBS, N_VARS, Store, joinids_of, workers
from tiledbsoma_ml import (
    ExperimentDataset,
    Fields,
    QueryIDs,
    RandomAccess,
    Snapshot,
    TiledReader,
    experiment_dataloader,
)
from tiledbsoma_ml._budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.* changes nothing here: ")


@settings(max_examples=30)
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
    either: Snapshot,
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
        either,
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


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["cpu", "gpu_iobatch", "gpu_minibatch"])
def test_a_device_gets_what_it_gets_from_the_experiment(
    store: Store, either: Snapshot, mode: str, sparse: bool
) -> None:
    options = {"shuffle_mode": mode, "device": "cpu", "shuffle_chunk_size": 8, "io_batch_size": 40}
    streamed, mapped = pair(store, either, all_ids(), return_sparse_X=sparse, **options)
    assert_same_batches(streamed, mapped)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_workers_get_what_they_get_from_the_experiment(
    store: Store, either: Snapshot, device: str | None
) -> None:
    options = {"shuffle_chunk_size": 8, "io_batch_size": 40, "device": device, "return_sparse_X": True}
    streamed, mapped = pair(store, either, all_ids(), **options)
    loaders = [experiment_dataloader(dataset, **workers(2)) for dataset in (streamed, mapped)]
    for _ in range(2):
        assert_same_batches(*loaders)


def test_without_eager_fetch_mini_batches_are_the_same(store: Store, either: Snapshot) -> None:
    assert_same_batches(*pair(store, either, all_ids(), use_eager_fetch=False))


def test_an_epoch_goes_on_where_it_was_left(either: Snapshot) -> None:
    options = {"snapshot": either, "batch_size": 16, "seed": 5, "shuffle_chunk_size": 4, "io_batch_size": 40}
    whole_epoch = joinids_of(ExperimentDataset(**options))
    loader, n_first = experiment_dataloader(ExperimentDataset(**options)), 5
    for _ in zip(range(n_first), loader, strict=False):
        pass
    other = experiment_dataloader(ExperimentDataset(**options))
    other.load_state_dict(loader.state_dict())
    np.testing.assert_array_equal(joinids_of(other), whole_epoch[16 * n_first :])


def test_reads_of_a_compressed_snapshot_have_several_io_batches_where_that_decodes_less(
    compressed: Snapshot,
) -> None:
    dataset = ExperimentDataset(snapshot=compressed, shuffle_chunk_size=4, io_batch_size=40, seed=5)
    reader = dataset.source.open(dataset.query_ids, Fields(obs_column_names=["soma_joinid"]), Budget(2**26))
    assert isinstance(reader, TiledReader)
    assert not isinstance(reader, RandomAccess)
    assert (dataset.source.row_tile, reader.row_tile) == (64, 64)
    assert reader.n_rows_held() > N_OBS
    layout = dataset.source.layout(dataset.query_ids, Budget(2**26))
    assert (layout.row_tile, layout.window_rows) == (64, reader.n_rows_held())


def test_parts_of_a_split_read_from_the_one_snapshot(store: Store, either: Snapshot) -> None:
    streamed, mapped = pair(store, either, all_ids())
    splits = [dataset.random_split(0.7, 0.3, seed=1) for dataset in (streamed, mapped)]
    for part, other in zip(*splits, strict=True):
        assert_same_batches(part, other)


def test_a_snapshot_needs_no_experiment(either: Snapshot) -> None:
    for snapshot in (either, either.path, str(either.path)):
        dataset = ExperimentDataset(snapshot=snapshot, batch_size=50, seed=1, obs_column_names=COLUMNS)
        assert sorted(joinids_of(dataset)) == list(range(N_OBS))
        assert dataset.x_locator is None
    part = QueryIDs(obs_joinids=[4, 9, 200], var_joinids=[0, 1])
    read = joinids_of(ExperimentDataset(snapshot=either, query_ids=part, shuffle=False))
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


def test_auto_is_a_true_shuffle_of_single_rows(store: Store, whole: Snapshot) -> None:
    auto = pair(store, whole, all_ids(), shuffle_chunk_size="auto", io_batch_size="auto")[1]
    single = pair(store, whole, all_ids(), shuffle_chunk_size=1)[1]
    np.testing.assert_array_equal(joinids_of(auto), joinids_of(single))
    quality = auto.shuffle_quality("cell_type")
    assert quality.mixing == pytest.approx(1, abs=0.1)
    assert quality.n_batches == len(auto)
