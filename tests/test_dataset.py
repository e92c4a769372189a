from __future__ import annotations

import gc
import pickle
import threading
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import sparse

from stores import N_OBS, N_VARS, Store, expected_X, joinids_of, make_obs
from tiledbsoma_ml import ExperimentDataset, QueryIDs, experiment_dataloader
from tiledbsoma_ml._query_ids import Partition
from tiledbsoma_ml.dataset import DEFAULT_IO_BATCH_SIZE

# Invariants -----------------------------------------------------------------------------------------------


def all_mini_batches(dataset: ExperimentDataset, world_size: int, n_workers: int) -> list[list[Any]]:
    """Return one epoch as lists of mini-batches, one list for each worker of each rank, lengths checked."""
    lists = []
    epoch = dataset.epoch
    for rank in range(world_size):
        for worker in range(n_workers):
            info = mock.Mock(id=worker, num_workers=n_workers) if n_workers > 1 else None
            ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
            with (
                mock.patch.dict("os.environ", ranks),
                mock.patch.object(torch.utils.data, "get_worker_info", return_value=info),
            ):
                dataset.set_epoch(epoch)
                lists.append(list(dataset))
                assert len(dataset) == len(lists[-1])
    return lists


@settings(max_examples=60)
@given(
    n_rows=st.integers(0, N_OBS),
    batch_size=st.integers(1, 80),
    chunk_size=st.integers(1, 20),
    chunks_in_io_batch=st.integers(1, 8),
    world_size=st.integers(1, 4),
    n_workers=st.integers(1, 3),
    epoch=st.integers(0, 2),
    seed=st.one_of(st.none(), st.integers(0, 2**32)),
    shuffle=st.booleans(),
    sparse_X=st.booleans(),
    eager=st.booleans(),
)
def test_every_row_comes_once_with_its_own_values_in_equal_batches_for_every_rank(
    store: Store,
    n_rows: int,
    batch_size: int,
    chunk_size: int,
    chunks_in_io_batch: int,
    world_size: int,
    n_workers: int,
    epoch: int,
    seed: int | None,
    shuffle: bool,
    sparse_X: bool,
    eager: bool,
) -> None:
    assume(n_rows == 0 or n_rows >= world_size)
    dataset = store.dataset(
        range(n_rows),
        batch_size=batch_size,
        shuffle_chunk_size=chunk_size,
        io_batch_size=chunk_size * chunks_in_io_batch,
        seed=seed,
        shuffle=shuffle,
        return_sparse_X=sparse_X,
        use_eager_fetch=eager,
    )
    dataset.set_epoch(epoch)
    lists = all_mini_batches(dataset, world_size, n_workers)
    ids = np.concatenate([joinids_of(mini_batches) for mini_batches in lists])
    assert len(np.unique(ids)) == len(ids) == n_rows // world_size * world_size
    sizes = [[len(obs) for _, obs in mini_batches] for mini_batches in lists]
    assert sizes == sizes[:n_workers] * world_size
    assert all(size == batch_size for of_worker in sizes for size in of_worker[:-1])


@given(n_rows=st.integers(2, N_OBS), seed=st.integers(0, 1000), chunk_size=st.sampled_from([1, 3, 16]))
@settings(max_examples=20)
def test_the_same_seed_gives_the_same_epochs_and_another_epoch_another_order(
    store: Store, n_rows: int, seed: int, chunk_size: int
) -> None:
    options = {"batch_size": 32, "seed": seed, "shuffle_chunk_size": chunk_size, "io_batch_size": 48}
    one, other = store.dataset(range(n_rows), **options), store.dataset(range(n_rows), **options)
    epochs = [joinids_of(one) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(joinids_of(other), epoch)
    if n_rows > 20:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[1], epochs[2])


# Epochs ---------------------------------------------------------------------------------------------------


def test_set_epoch_chooses_the_next_epoch_and_later_ones_count_on(store: Store) -> None:
    dataset = store.dataset(batch_size=50, seed=1)
    epochs = [joinids_of(dataset) for _ in range(4)]
    dataset.set_epoch(2)
    assert dataset.epoch == 2
    np.testing.assert_array_equal(joinids_of(dataset), epochs[2])
    np.testing.assert_array_equal(joinids_of(dataset), epochs[3])
    assert dataset.epoch == 3


def test_an_epoch_that_was_left_early_is_followed_by_the_next_one(store: Store) -> None:
    dataset = store.dataset(batch_size=50, seed=1)
    epochs = [joinids_of(dataset) for _ in range(2)]
    dataset.set_epoch(0)
    next(iter(dataset))
    np.testing.assert_array_equal(joinids_of(dataset), epochs[1])


def test_asking_for_an_iterator_begins_no_epoch(store: Store) -> None:
    dataset = store.dataset(batch_size=50, seed=1)
    iter(dataset)
    joinids_of(dataset)
    assert dataset.epoch == 0


def test_without_a_seed_datasets_differ_and_so_do_their_epochs(store: Store) -> None:
    one, other = store.dataset(batch_size=50), store.dataset(batch_size=50)
    assert one.seed is None
    epochs = [joinids_of(one), joinids_of(one), joinids_of(other)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_without_a_seed_workers_of_one_dataset_agree_on_the_order(store: Store) -> None:
    dataset = store.dataset(batch_size=50)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(joinids_of(dataset), joinids_of(copy))


def test_not_shuffling_keeps_the_order_of_the_query(store: Store) -> None:
    rows = [5, 200, 3, 77]
    assert joinids_of(store.dataset(rows, shuffle=False, batch_size=3)).tolist() == rows


# Shapes and sizes -----------------------------------------------------------------------------------------


def test_the_documented_defaults_give_one_row_at_a_time(store: Store) -> None:
    with store.query(obs=slice(0, 4)) as query:
        dataset = ExperimentDataset(query)
    X, obs = next(iter(dataset))
    assert X.shape == (N_VARS,)
    assert obs.columns.tolist() == ["soma_joinid"]
    assert obs.index.tolist() == [0]
    assert (dataset.shape, len(dataset)) == ((5, N_VARS), 5)
    assert dataset.io_batch_size == DEFAULT_IO_BATCH_SIZE == 65536


def test_sparse_x_is_a_canonical_csr_matrix_of_two_dimensions(store: Store) -> None:
    for batch_size in (1, 40):
        X, _ = next(iter(store.dataset(batch_size=batch_size, return_sparse_X=True)))
        assert isinstance(X, sparse.csr_matrix)
        assert X.has_canonical_format
        assert X.shape == (batch_size, N_VARS)


def test_a_batch_size_above_the_number_of_rows_gives_one_mini_batch(store: Store) -> None:
    dataset = store.dataset(range(30), batch_size=1000)
    assert [len(obs) for _, obs in dataset] == [30]
    assert len(dataset) == 1


def test_one_row_is_enough(store: Store) -> None:
    dataset = store.dataset([17], batch_size=10)
    assert joinids_of(dataset).tolist() == [17]


def test_a_query_without_rows_yields_nothing(store: Store) -> None:
    with store.query(obs="cell_type == 'unseen'") as query:
        dataset = ExperimentDataset(query, obs_column_names=["cell_type"], batch_size=10)
    assert (list(dataset), len(dataset), dataset.shape) == ([], 0, (0, N_VARS))


def test_a_query_without_columns_yields_obs_and_an_x_without_columns(store: Store) -> None:
    for sparse_X in (False, True):
        dataset = store.dataset(range(30), [], batch_size=20, return_sparse_X=sparse_X)
        assert [X.shape for X, _ in dataset] == [(20, 0), (10, 0)]


def test_rows_without_any_value_are_yielded_as_zeros(store: Store) -> None:
    empty_rows = [3, 10, 17, 24]
    assert not expected_X(empty_rows, range(N_VARS)).any()
    for sparse_X in (False, True):
        assert (
            sorted(joinids_of(store.dataset(empty_rows, batch_size=3, return_sparse_X=sparse_X)))
            == empty_rows
        )


def test_an_experiment_with_gaps_between_its_joinids_is_read_right(make_store: Any) -> None:
    with_gaps = make_store(obs_joinids=[*range(0, 50, 3), *range(200, 260, 7), 1000])
    with with_gaps.query() as query:
        dataset = ExperimentDataset(query, batch_size=7, seed=0)
        assert sorted(joinids_of(dataset)) == sorted(query.obs_joinids().to_pylist())


def test_a_value_filter_selects_rows_and_their_values(store: Store) -> None:
    with store.query(obs="cell_type == 'T cell'") as query:
        dataset = ExperimentDataset(query, batch_size=16)
    assert sorted(joinids_of(dataset)) == list(range(1, N_OBS, 3))


def test_columns_come_in_the_order_of_the_var_joinids(store: Store) -> None:
    var_joinids = [20, 3, 9, 0]
    dataset = store.dataset(range(40), var_joinids, batch_size=15)
    for X, obs in dataset:
        np.testing.assert_array_equal(X, expected_X(obs["soma_joinid"], var_joinids))
    assert dataset.shape[1] == 4


@pytest.mark.parametrize("dense", [False, True])
def test_an_integer_layer_sparse_or_dense_keeps_its_dtype(make_store: Any, dense: bool) -> None:
    integers = make_store(dtype=np.uint16, dense=dense, obs_joinids=range(60))
    for sparse_X in (False, True):
        dataset = integers.dataset(range(60), batch_size=25, return_sparse_X=sparse_X)
        assert {X.dtype for X, _ in dataset} == {np.dtype(np.uint16)}
        assert sorted(joinids_of(dataset)) == list(range(60))


# obs ------------------------------------------------------------------------------------------------------


def test_obs_columns_of_every_type_come_back_in_the_order_asked_for(store: Store) -> None:
    columns = [*reversed(make_obs(np.arange(1)).columns)]
    dataset = store.dataset(obs_column_names=columns, batch_size=40, io_batch_size=64, seed=5)
    for _, obs in dataset:
        pd.testing.assert_frame_equal(obs, make_obs(obs["soma_joinid"].to_numpy())[columns])


def test_categories_that_no_row_of_the_query_has_are_kept(store: Store) -> None:
    dataset = store.dataset([0, 3, 6], obs_column_names=["cell_type"], batch_size=2)
    for _, obs in dataset:
        assert obs["cell_type"].cat.categories.tolist() == ["B cell", "T cell", "NK cell", "unseen"]


def test_the_joinid_is_returned_only_when_asked_for(store: Store) -> None:
    _, obs = next(iter(store.dataset(obs_column_names=["barcode"])))
    assert obs.columns.tolist() == ["barcode"]


# Splits ---------------------------------------------------------------------------------------------------


def test_parts_of_a_split_are_disjoint_cover_the_query_and_keep_the_options(store: Store) -> None:
    dataset = store.dataset(
        batch_size=50, obs_column_names=["soma_joinid", "stage"], return_sparse_X=True, seed=1
    )
    train, test = dataset.random_split(0.75, 0.25, seed=3)
    ids = [joinids_of(train), joinids_of(test)]
    assert sorted(np.concatenate(ids)) == list(range(N_OBS))
    assert len(ids[0]) in (233, 234)
    assert sparse.issparse(next(iter(train))[0])


def test_a_part_can_be_split_again_and_has_epochs_of_its_own(store: Store) -> None:
    whole = store.dataset(batch_size=50, seed=1)
    rest, test = whole.random_split(0.8, 0.2, seed=3)
    train, val = rest.random_split(0.5, 0.5, seed=4)
    joinids_of(train)
    joinids_of(train)
    assert (train.epoch, val.epoch, rest.epoch, whole.epoch) == (1, 0, 0, 0)
    assert sorted(np.concatenate([joinids_of(part) for part in (train, val, test)])) == list(range(N_OBS))


# Where it runs --------------------------------------------------------------------------------------------


def test_a_dataset_outlives_the_query_and_the_experiment_it_was_made_from(store: Store) -> None:
    with store.query() as query:
        dataset = ExperimentDataset(query, batch_size=100)
    assert query.experiment.closed
    assert sorted(joinids_of(dataset)) == list(range(N_OBS))


def test_a_pickled_dataset_yields_the_same_mini_batches(store: Store) -> None:
    dataset = store.dataset(batch_size=50, seed=9)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(joinids_of(copy), joinids_of(dataset))


def test_rank_and_world_size_are_read_when_iteration_starts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = store.dataset(range(100), batch_size=10, shuffle=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert joinids_of(dataset).tolist() == list(range(50, 100))
    assert len(dataset) == 5


def test_leaving_an_epoch_early_leaves_no_thread_behind(store: Store) -> None:
    before = set(threading.enumerate())
    for mini_batch in store.dataset(batch_size=4, io_batch_size=64):
        assert mini_batch
        break
    gc.collect()
    assert not {thread for thread in set(threading.enumerate()) - before if "EagerIterator" in thread.name}


def test_reading_ahead_changes_nothing(store: Store) -> None:
    eager, lazy = (
        store.dataset(batch_size=30, io_batch_size=64, seed=2, use_eager_fetch=e) for e in (True, False)
    )
    for (X, obs), (other_X, other_obs) in zip(eager, lazy, strict=True):
        np.testing.assert_array_equal(X, other_X)
        pd.testing.assert_frame_equal(obs, other_obs)


# Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0 must be a positive integer; try 128."),
        ({"batch_size": -5}, ValueError, "batch_size=-5 must be a positive integer; try 128."),
        ({"batch_size": 1.0}, TypeError, "batch_size=1.0 must be a positive integer, not a float; try 128."),
        ({"batch_size": True}, TypeError, "batch_size=True must be a positive integer, not a bool; try 128."),
        ({"io_batch_size": 0}, ValueError, "io_batch_size=0 must be a positive integer; try 65536."),
        (
            {"io_batch_size": 2.5},
            TypeError,
            "io_batch_size=2.5 must be a positive integer, not a float; try 65536.",
        ),
        ({"shuffle_chunk_size": -1}, ValueError, "shuffle_chunk_size=-1 must be a positive integer; try 64."),
        (
            {"shuffle_chunk_size": False},
            TypeError,
            "shuffle_chunk_size=False must be a positive integer, not a bool",
        ),
        (
            {"io_batch_size": 100, "shuffle_chunk_size": 64},
            ValueError,
            "io_batch_size=100 must be a multiple of shuffle_chunk_size=64; try 128.",
        ),
        ({"seed": -1}, ValueError, "seed=-1 must be an integer of at least 0; try 42."),
        ({"seed": "42"}, TypeError, "seed='42' must be an integer of at least 0, not a str; try 42."),
        (
            {"shuffle_mode": "tpu"},
            ValueError,
            "shuffle_mode='tpu' must be one of 'cpu', 'gpu_iobatch', 'gpu_minibatch' or 'gpu'.",
        ),
        (
            {"obs_column_names": ["celltype"]},
            ValueError,
            "obs_column_names='celltype' must be a column of obs; did you mean 'cell_type'?",
        ),
        (
            {"obs_column_names": []},
            ValueError,
            "obs_column_names=[] must hold at least one name; try ['soma_joinid']",
        ),
        (
            {"obs_column_names": "stage"},
            TypeError,
            "obs_column_names='stage' must be a list of names; try ['stage'].",
        ),
        (
            {"obs_column_names": ["stage", "stage"]},
            ValueError,
            "obs_column_names=['stage', 'stage'] must differ from each other; name each column once.",
        ),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence_before_any_data_is_read(
    store: Store, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with (
        store.query() as query,
        mock.patch.object(soma.SparseNDArray, "read", side_effect=AssertionError("X was read")),
        mock.patch.object(soma.DataFrame, "read", side_effect=AssertionError("obs was read")),
        pytest.raises(error) as caught,
    ):
        ExperimentDataset(query, **options)
    assert str(caught.value).startswith(message)


def test_numpy_integers_are_integers(store: Store) -> None:
    dataset = store.dataset(batch_size=np.int64(7), seed=np.uint32(3))
    assert (dataset.batch_size, dataset.seed) == (7, 3)


def test_the_io_batch_size_need_not_be_a_multiple_when_not_shuffling(store: Store) -> None:
    assert joinids_of(store.dataset(shuffle=False, io_batch_size=100)).tolist() == list(range(N_OBS))


def test_an_unknown_layer_is_named_with_the_nearest_one(store: Store) -> None:
    with (
        store.query() as query,
        pytest.raises(
            ValueError,
            match=r"layer_name='rwa' must be an X layer of measurement 'RNA'; did you mean 'raw'\?",
        ),
    ):
        ExperimentDataset(query, layer_name="rwa")


def test_obs_columns_are_checked_for_a_locator_too(store: Store) -> None:
    with pytest.raises(
        ValueError, match=r"obs_column_names='stag' must be a column of obs; did you mean 'stage'\?"
    ):
        store.dataset(obs_column_names=["stag"])


def test_a_query_on_a_closed_experiment_is_refused(store: Store) -> None:
    with store.query() as query:
        pass
    with pytest.raises(ValueError, match=r"the experiment .* must be open; build the dataset inside"):
        ExperimentDataset(query)


def test_what_is_no_query_is_refused(store: Store) -> None:
    with soma.Experiment.open(store.uri) as experiment:
        for given_query in (experiment, store.uri):
            with pytest.raises(
                TypeError, match=rf"query must be .* not of type {type(given_query).__name__}; try"
            ):
                ExperimentDataset(given_query)


def test_a_query_of_no_cells_is_told(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with store.query(obs="cell_type == 'none of them'") as query:
        dataset = ExperimentDataset(query)
    assert [record.levelname for record in caplog.records if "selects no cells" in record.message] == [
        "WARNING"
    ]
    assert not list(dataset)


def test_printing_says_what_a_dataset_yields(store: Store) -> None:
    facts = (
        f"311 rows by 23 columns; source={store.uri!r}, batch_size=16, shuffle_chunk_size=64, "
        "io_batch_size=65,536, shuffle=shuffle_scope='partition', seed=3, X=dense, obs=soma_joinid, "
        "rank=0 of 1"
    )
    dataset = store.dataset(batch_size=16, seed=3)
    assert str(dataset) == repr(dataset) == f"<ExperimentDataset: {facts}>"
    loader = experiment_dataloader(dataset)
    assert repr(loader) == f"<ExperimentDataLoader: {facts}, num_workers=0>"
    assert "<td style='text-align:left'>311 rows by 23 columns</td>" in dataset._repr_html_()
    assert "<th style='text-align:left'>num_workers</th>" in loader._repr_html_()


def test_printing_says_what_auto_stands_for_as_soon_as_it_is_known(store: Store) -> None:
    dataset = store.dataset(batch_size=16, shuffle_chunk_size="auto", io_batch_size="auto")
    with mock.patch.object(soma.SparseNDArray, "read", side_effect=AssertionError("X was read")):
        unknown = "auto, which is found out when it is needed"
        assert f"shuffle_chunk_size={unknown}, io_batch_size={unknown}" in repr(dataset)
    list(dataset)
    known = "shuffle_chunk_size=auto: runs of 64 rows, io_batch_size=auto: windows of 311 rows"
    assert known in repr(dataset)


def test_either_a_query_or_a_locator_with_ids_must_be_given(store: Store) -> None:
    ids = QueryIDs(obs_joinids=[0], var_joinids=[0])
    with store.query() as query:
        for given_arguments, listed in [
            ({}, "not none of them"),
            ({"query": query, "query_ids": ids}, "not query, query_ids"),
            (
                {"query": query, "x_locator": store.locator, "query_ids": ids},
                "not query, x_locator, query_ids",
            ),
            ({"x_locator": store.locator}, "not x_locator"),
            (
                {"layer_name": "raw", "x_locator": store.locator, "query_ids": ids},
                "not layer_name, x_locator, query_ids",
            ),
        ]:
            with pytest.raises(
                ValueError, match=r"either query .* or both x_locator and query_ids"
            ) as caught:
                ExperimentDataset(**given_arguments)
            assert listed in str(caught.value)


@pytest.mark.parametrize("epoch", [-1, 1.5, True, None])
def test_a_bad_epoch_is_refused(store: Store, epoch: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"epoch={epoch} must be an integer of at least 0"):
        store.dataset().set_epoch(epoch)


@pytest.mark.parametrize("fracs", [(), (0.5, 0.6), (-0.5, 1.5), ("a", "b")])
def test_bad_fractions_are_refused_with_an_example(store: Store, fracs: Any) -> None:
    with pytest.raises(ValueError, match=r"fracs.*try random_split\(0\.8, 0\.2\)"):
        store.dataset().random_split(*fracs)


def test_a_part_of_a_query_is_refused(store: Store) -> None:
    part = QueryIDs(obs_joinids=range(8), var_joinids=range(3)).partitioned(Partition(0, 2, 0, 1))
    with pytest.raises(
        ValueError, match=r"query_ids must be the rows of all, and these are the part of Part"
    ):
        ExperimentDataset(x_locator=store.locator, query_ids=part)
    whole = attrs.evolve(part, partition=None)
    assert len(ExperimentDataset(x_locator=store.locator, query_ids=whole)) == 4


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 3), ("shuffle", False), ("obs_column_names", []), ("query_ids", None)]
)
def test_what_the_order_was_made_with_cannot_be_changed(store: Store, name: str, value: Any) -> None:
    dataset = store.dataset(range(8), batch_size=4)
    with pytest.raises(AttributeError, match=f"{name} of a dataset cannot be changed, .* another dataset"):
        setattr(dataset, name, value)
    [first, _] = dataset.random_split(0.5, 0.5)
    for made in (dataset, first, pickle.loads(pickle.dumps(first))):
        assert (made.batch_size, made.shuffle, made.obs_column_names) == (4, True, ["soma_joinid"])


def test_the_form_of_x_can_be_changed(store: Store) -> None:
    dataset = store.dataset(range(8), batch_size=8)
    dataset.return_sparse_X = True
    [(X, _)] = dataset
    assert isinstance(X, sparse.csr_matrix)
