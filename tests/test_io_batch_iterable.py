from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stores import N_OBS, N_VARS, Store, expected_X, make_obs
from tiledbsoma_ml._io_batch_iterable import IOBatch, IOBatchIterable, id_batches


def as_chunks(lengths: list[int]) -> list[np.ndarray]:
    """Return chunks of these lengths; no joinid follows from its place."""
    joinids = np.random.default_rng(0).permutation(1000)[: sum(lengths)]
    return np.split(joinids, np.cumsum(lengths)[:-1]) if lengths else []


def batches_of(joinids: np.ndarray, size: int) -> list[np.ndarray]:
    return [joinids[start : start + size] for start in range(0, len(joinids), size)]


chunk_lengths = st.lists(st.integers(0, 12), max_size=7)


# id_batches -----------------------------------------------------------------------------------------------


@given(lengths=chunk_lengths, io_batch_size=st.integers(1, 30))
@example(lengths=[], io_batch_size=5)
@example(lengths=[0, 0], io_batch_size=5)
@example(lengths=[5, 5], io_batch_size=5)
@example(lengths=[3, 0, 4, 0], io_batch_size=5)
@example(lengths=[23], io_batch_size=5)
@example(lengths=[2, 3], io_batch_size=100)
def test_without_a_generator_batches_are_cut_from_the_chunks_put_end_to_end(
    lengths: list[int], io_batch_size: int
) -> None:
    chunks = as_chunks(lengths)
    batches = list(id_batches(chunks, io_batch_size, None))
    expected = batches_of(np.concatenate([np.empty(0, dtype=np.int64), *chunks]), io_batch_size)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in expected]


@given(lengths=chunk_lengths, io_batch_size=st.integers(1, 30), seed=st.one_of(st.none(), st.just(1)))
def test_every_batch_is_full_but_the_last_and_none_is_empty(
    lengths: list[int], io_batch_size: int, seed: int | None
) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    sizes = [len(batch) for batch in id_batches(as_chunks(lengths), io_batch_size, rng)]
    n_full, rest = divmod(sum(lengths), io_batch_size)
    assert sizes == [io_batch_size] * n_full + [rest] * (rest > 0)


@given(lengths=chunk_lengths, io_batch_size=st.integers(1, 30), seed=st.integers(0, 99))
def test_each_batch_is_permuted_by_the_next_draw_of_the_generator(
    lengths: list[int], io_batch_size: int, seed: int
) -> None:
    chunks = as_chunks(lengths)
    shuffled = list(id_batches(chunks, io_batch_size, np.random.default_rng(seed)))
    rng = np.random.default_rng(seed)
    expected = [batch[rng.permutation(len(batch))] for batch in id_batches(chunks, io_batch_size, None)]
    assert [batch.tolist() for batch in shuffled] == [batch.tolist() for batch in expected]


def test_chunks_are_left_as_they_were() -> None:
    chunks, untouched = as_chunks([4, 9]), as_chunks([4, 9])
    for batch in id_batches(chunks, 5, np.random.default_rng(3)):
        batch.sort()
    assert [chunk.tolist() for chunk in chunks] == [chunk.tolist() for chunk in untouched]


# IOBatchIterable ------------------------------------------------------------------------------------------


def ids_in(batches: list[IOBatch], var_joinids: np.ndarray) -> list[list[int]]:
    """Return the joinids of IO batches, having checked that each row of X is its own."""
    for X, obs in batches:
        np.testing.assert_array_equal(
            X.slice_tonumpy(slice(None)), expected_X(obs["soma_joinid"], var_joinids)
        )
    return [obs["soma_joinid"].tolist() for _, obs in batches]


def test_the_published_arguments_in_their_published_order_give_shuffled_io_batches(store: Store) -> None:
    chunks = [np.arange(200, 264), np.arange(0, 64), np.arange(100, 110)]
    var_joinids = np.array([20, 3, 9, 0])
    with store.locator.open() as (X, obs):
        batches = list(IOBatchIterable(chunks, 96, obs, var_joinids, X, ["soma_joinid"], 42, True, True))
    rng = np.random.default_rng(42)
    expected = [batch[rng.permutation(len(batch))] for batch in batches_of(np.concatenate(chunks), 96)]
    assert ids_in(batches, var_joinids) == [batch.tolist() for batch in expected]


@pytest.mark.parametrize("eager", [False, True])
def test_without_shuffling_rows_come_in_the_order_of_the_chunks(store: Store, eager: bool) -> None:
    chunks = [np.array([5, 200, 3]), np.array([77]), np.arange(300, N_OBS)]
    with store.locator.open() as (X, obs):
        iterable = IOBatchIterable(chunks, 4, obs, np.arange(N_VARS), X, shuffle=False, use_eager_fetch=eager)
        batches = list(iterable)
    expected = batches_of(np.concatenate(chunks), 4)
    assert ids_in(batches, np.arange(N_VARS)) == [batch.tolist() for batch in expected]
    assert all(obs.columns.tolist() == ["soma_joinid"] for _, obs in batches)


def test_obs_columns_come_in_the_order_asked_for_with_the_values_of_their_rows(store: Store) -> None:
    columns = ["stage", "maybe_int", "soma_joinid", "barcode"]
    with store.locator.open() as (X, obs):
        batches = list(IOBatchIterable([np.arange(100)], 30, obs, np.arange(2), X, columns, seed=1))
    for _, frame in batches:
        pd.testing.assert_frame_equal(frame, make_obs(frame["soma_joinid"].to_numpy())[columns])


def test_iterating_again_repeats_the_order_and_another_epoch_has_another(store: Store) -> None:
    with store.locator.open() as (X, obs):
        options = {"seed": 7, "obs": obs, "X": X, "var_joinids": np.arange(N_VARS)}
        first = IOBatchIterable([np.arange(60)], 40, **options)
        later = IOBatchIterable([np.arange(60)], 40, **options, epoch=1)
        orders = [ids_in(list(iterable), np.arange(N_VARS)) for iterable in (first, first, later)]
    assert orders[0] == orders[1] != orders[2]
    assert [sorted(ids) for ids in orders[2]] == [list(range(40)), list(range(40, 60))]


def test_no_chunks_give_no_io_batches(store: Store) -> None:
    with store.locator.open() as (X, obs):
        assert list(IOBatchIterable([], 40, obs, np.arange(N_VARS), X)) == []


def test_an_io_batch_size_of_no_rows_is_refused(store: Store) -> None:
    with (
        store.locator.open() as (X, obs),
        pytest.raises(ValueError, match="io_batch_size=0 must be a positive"),
    ):
        IOBatchIterable([], 0, obs, np.arange(N_VARS), X)


@pytest.mark.parametrize("name", ["shuffle", "use_eager_fetch"])
def test_an_option_that_is_true_or_false_refuses_what_is_neither(store: Store, name: str) -> None:
    with store.locator.open() as (X, obs), pytest.raises(TypeError, match=f"{name}='no' must be True or"):
        IOBatchIterable([], 8, obs, np.arange(N_VARS), X, **{name: "no"})
