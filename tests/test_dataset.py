from __future__ import annotations

import pickle
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import sparse

from stores import N_OBS, N_VARS, Store, expected_X, joinids_of, make_obs
from tiledbsoma_ml import ExperimentDataset
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


@settings(max_examples=25)
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
@settings(max_examples=8)
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


# Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [-1, 1.5, True, None])
def test_a_bad_epoch_is_refused(store: Store, epoch: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"epoch={epoch} must be an integer of at least 0"):
        store.dataset().set_epoch(epoch)


@pytest.mark.parametrize("fracs", [(), (0.5, 0.6), (-0.5, 1.5), ("a", "b")])
def test_bad_fractions_are_refused_with_an_example(store: Store, fracs: Any) -> None:
    with pytest.raises(ValueError, match=r"fracs.*try random_split\(0\.8, 0\.2\)"):
        store.dataset().random_split(*fracs)
