from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stores import N_OBS, N_VARS, Store
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._query_ids import Partition, SamplingMethods

SEEDS = st.integers(0, 2**32)
METHODS = st.sampled_from(SamplingMethods)

# Fractions that sum to 1, zeros included, from whole weights.
FRACS = (
    st.lists(st.integers(0, 9), min_size=1, max_size=5)
    .filter(any)
    .map(lambda weights: [weight / sum(weights) for weight in weights])
)


def ids_of(n_rows: int, step: int = 3) -> QueryIDs:
    """Return the ids of a query whose joinids are not the rows' places in it."""
    return QueryIDs(obs_joinids=np.arange(n_rows) * step + 5, var_joinids=[4, 2])


# Partition ------------------------------------------------------------------------------------------------


@given(n_rows=st.integers(0, 500), world_size=st.integers(1, 9), n_workers=st.integers(1, 9))
def test_ranks_are_cut_like_array_split_and_trimmed_to_one_length_then_workers_like_array_split(
    n_rows: int, world_size: int, n_workers: int
) -> None:
    rows = np.arange(n_rows)
    for rank, of_rank in enumerate(np.array_split(rows, world_size)):
        trimmed = of_rank[: n_rows // world_size]
        for worker, expected in enumerate(np.array_split(trimmed, n_workers)):
            start, stop = Partition(rank, world_size, worker, n_workers).bounds(n_rows)
            np.testing.assert_array_equal(rows[start:stop], expected)


@given(n_rows=st.integers(0, 500), world_size=st.integers(1, 9), n_workers=st.integers(1, 9))
def test_parts_are_disjoint_equal_for_every_rank_and_leave_out_fewer_rows_than_there_are_ranks(
    n_rows: int, world_size: int, n_workers: int
) -> None:
    ids = ids_of(n_rows)
    parts = [
        [ids.partitioned(Partition(rank, world_size, worker, n_workers)) for worker in range(n_workers)]
        for rank in range(world_size)
    ]
    rows = np.concatenate([part.obs_joinids for of_rank in parts for part in of_rank])
    assert len(np.unique(rows)) == len(rows) == n_rows - n_rows % world_size
    assert np.isin(rows, ids.obs_joinids).all()
    sizes = [[len(part.obs_joinids) for part in of_rank] for of_rank in parts]
    assert sizes == sizes[:1] * world_size
    assert max(sizes[0]) - min(sizes[0]) <= 1


def test_a_part_keeps_its_columns_and_says_whose_it_is() -> None:
    partition = Partition(rank=1, world_size=2, worker_id=0, n_workers=2)
    part = ids_of(8).partitioned(partition)
    assert part.obs_joinids.tolist() == [17, 20]
    assert part.var_joinids.tolist() == [4, 2]
    assert part.partition == partition
    assert ids_of(8).partition is None


def test_the_place_of_this_process_is_found_out_if_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(31)
    assert ids.partitioned().partition == Partition(0, 1, 0, 1)
    np.testing.assert_array_equal(ids.partitioned().obs_joinids, ids.obs_joinids)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=2, num_workers=4))
    part, expected = ids.partitioned(None), ids.partitioned(Partition(1, 3, 2, 4))
    assert part.partition == expected.partition
    np.testing.assert_array_equal(part.obs_joinids, expected.obs_joinids)


def test_an_unknown_tail_is_refused() -> None:
    with pytest.raises(ValueError, match="tail='keep' must be 'drop' or 'pad'; try 'drop'"):
        ids_of(10).partitioned(Partition(0, 2, 0, 1), "keep")  # type: ignore[arg-type]


def test_a_part_is_not_partitioned_again() -> None:
    part = ids_of(8).partitioned(Partition(0, 2, 0, 1))
    with pytest.raises(
        ValueError, match=r"these are the part of Partition\(rank=0, world_size=2, .*; take the query"
    ):
        part.partitioned(Partition(0, 2, 0, 1))


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ((2, 2, 0, 1), r"rank=2 must lie in 0 … 1 \(world_size=2\)"),
        ((-1, 2, 0, 1), r"rank=-1 must lie in 0 … 1"),
        ((0, 2, 3, 3), r"worker_id=3 must lie in 0 … 2 \(n_workers=3\)"),
    ],
)
def test_a_place_beyond_those_that_there_are_is_refused(
    place: tuple[int, int, int, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Partition(*place)


# Shuffled chunks ------------------------------------------------------------------------------------------


@given(n_rows=st.integers(0, 300), size=st.integers(1, 40), seed=SEEDS, epoch=st.integers(0, 5))
def test_chunks_are_those_of_a_plain_loop_shuffled_by_the_generator_of_seed_and_epoch(
    n_rows: int, size: int, seed: int, epoch: int
) -> None:
    ids = ids_of(n_rows)
    expected = [ids.obs_joinids[start : start + size] for start in range(0, n_rows, size)]
    np.random.default_rng([seed, epoch]).shuffle(expected)
    chunks = ids.shuffle_chunks(size, seed=seed, epoch=epoch)
    assert [chunk.tolist() for chunk in chunks] == [chunk.tolist() for chunk in expected]


@given(n_rows=st.integers(0, 300), size=st.integers(1, 40), seed=st.none() | SEEDS)
def test_chunks_are_consecutive_runs_that_hold_every_row_once(
    n_rows: int, size: int, seed: int | None
) -> None:
    ids = ids_of(n_rows)
    chunks = ids.shuffle_chunks(size, seed)
    in_query_order = sorted(chunks, key=lambda chunk: chunk[0])
    assert [row for chunk in in_query_order for row in chunk] == ids.obs_joinids.tolist()
    assert all(len(chunk) == size for chunk in in_query_order[:-1])
    assert len(chunks) == -(-n_rows // size)


def test_epoch_0_is_the_default_and_every_seed_and_epoch_has_its_own_order() -> None:
    ids = ids_of(300)

    def order(*seed_and_epoch: Any) -> list[int]:
        return np.concatenate(ids.shuffle_chunks(4, *seed_and_epoch)).tolist()

    assert order(1) == order(1, 0)
    orders = [order(1, 0), order(1, 1), order(1, 2), order(2, 0), order(2, 1), order(None), order(None)]
    assert len(set(map(tuple, orders))) == len(orders)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-4, ValueError), (1.5, TypeError)])
def test_a_chunk_size_that_is_not_a_positive_integer_is_refused(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^shuffle_chunk_size={size} must be a positive integer.*; try 64\.$"):
        ids_of(8).shuffle_chunks(size)


# Splits ---------------------------------------------------------------------------------------------------


@given(n_rows=st.integers(0, 300), fracs=FRACS, seed=st.none() | SEEDS, method=METHODS)
def test_parts_of_a_split_are_sorted_disjoint_and_together_the_query(
    n_rows: int, fracs: list[float], seed: int | None, method: Any
) -> None:
    ids = ids_of(n_rows)
    parts = ids.random_split(*fracs, seed=seed, method=method)
    assert len(parts) == len(fracs)
    assert all((np.diff(part.obs_joinids) > 0).all() for part in parts)
    rows = np.concatenate([part.obs_joinids for part in parts])
    np.testing.assert_array_equal(np.sort(rows), ids.obs_joinids)
    assert all(part.var_joinids.tolist() == ids.var_joinids.tolist() for part in parts)


@given(n_rows=st.integers(0, 300), fracs=FRACS, seed=SEEDS)
def test_deterministic_sizes_are_cut_at_the_nearest_row_for_every_seed(
    n_rows: int, fracs: list[float], seed: int
) -> None:
    parts = ids_of(n_rows).random_split(*fracs, seed=seed, method="deterministic")
    cuts = np.cumsum([len(part.obs_joinids) for part in parts])
    assert (np.abs(cuts - np.cumsum(fracs) * n_rows) <= 0.5 + 1e-9).all()


@given(n_rows=st.integers(0, 300), fracs=FRACS, seed=SEEDS)
def test_stochastic_rounding_gives_the_floor_or_the_ceiling_of_every_share(
    n_rows: int, fracs: list[float], seed: int
) -> None:
    parts = ids_of(n_rows).random_split(*fracs, seed=seed, method="stochastic_rounding")
    sizes = np.array([len(part.obs_joinids) for part in parts])
    shares = n_rows * np.array(fracs)
    assert (np.floor(shares + 1e-9) <= sizes).all()
    assert (sizes <= np.ceil(shares - 1e-9)).all()


@pytest.mark.parametrize("fracs", [(0.53, 0.47), (0.15, 0.25, 0.25, 0.35), (0.12, 0.83, 0.05)])
@pytest.mark.parametrize("method", ["multinomial", "stochastic_rounding"])
def test_over_many_seeds_the_mean_size_of_a_part_is_its_share(fracs: tuple[float, ...], method: Any) -> None:
    ids, n_seeds = ids_of(10), 2000
    sizes = [
        [len(part.obs_joinids) for part in ids.random_split(*fracs, seed=seed, method=method)]
        for seed in range(n_seeds)
    ]
    five_standard_errors = 5 * np.std(sizes, axis=0) / np.sqrt(n_seeds)
    assert (np.std(sizes, axis=0) > 0).all()
    assert (np.abs(np.mean(sizes, axis=0) - 10 * np.array(fracs)) < five_standard_errors).all()


@given(n_rows=st.integers(50, 300), seed=SEEDS, method=METHODS)
def test_the_same_seed_gives_the_same_split_and_another_seed_another(
    n_rows: int, seed: int, method: Any
) -> None:
    def split(seed: int) -> list[list[int]]:
        return [
            part.obs_joinids.tolist()
            for part in ids_of(n_rows).random_split(0.5, 0.5, seed=seed, method=method)
        ]

    assert split(seed) == split(seed)
    assert split(seed) != split(seed + 1)


@given(seed=SEEDS, method=METHODS)
def test_a_part_can_be_split_again(seed: int, method: Any) -> None:
    train, rest = ids_of(100).random_split(0.6, 0.4, seed=seed, method=method)
    val, test = rest.random_split(0.5, 0.5, seed=seed, method=method)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([val.obs_joinids, test.obs_joinids])), rest.obs_joinids
    )
    assert not np.isin(rest.obs_joinids, train.obs_joinids).any()


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_the_shares_may_be_one_list_of_them(kind: Any) -> None:
    ids = ids_of(30)
    assert ids.random_split(kind([0.7, 0.3]), seed=1) == ids.random_split(0.7, 0.3, seed=1)


def test_a_split_does_not_change_the_query() -> None:
    ids = ids_of(50)
    ids.random_split(0.5, 0.5, seed=1)
    ids.shuffle_chunks(8, seed=1)
    np.testing.assert_array_equal(ids.obs_joinids, np.arange(50) * 3 + 5)


@pytest.mark.parametrize(
    ("fracs", "message"),
    [
        ((), r"^fracs must hold at least one fraction; try random_split\(0\.8, 0\.2\)\.$"),
        ((-0.2, 1.2), r"^fracs=\(-0\.2, 1\.2\) must each lie from 0 to 1; try random_split\(0\.8, 0\.2\)\.$"),
        ((1.5,), r"^fracs=\(1\.5,\) must each lie from 0 to 1; try"),
        ((0.5, float("nan")), r"^fracs=\(0\.5, nan\) must each lie from 0 to 1; try"),
        ((float("inf"), 0.1), r"^fracs=\(inf, 0\.1\) must each lie from 0 to 1; try"),
        ((0.5, 0.4), r"^fracs=\(0\.5, 0\.4\) must sum to 1, not 0\.9; try random_split\(0\.8, 0\.2\)\.$"),
        ((0.8, 0.8), r"^fracs=\(0\.8, 0\.8\) must sum to 1, not 1\.6; try"),
        (("most", "rest"), r"^fracs=\('most', 'rest'\) must be numbers from 0 to 1; try"),
        (([0.5, None],), r"^fracs=\(0\.5, None\) must be numbers from 0 to 1; try"),
        ((0.5, None), r"^fracs=\(0\.5, None\) must be numbers from 0 to 1; try"),
    ],
)
@pytest.mark.parametrize("method", SamplingMethods)
def test_fractions_that_are_no_shares_of_a_whole_are_refused(
    fracs: tuple[Any, ...], message: str, method: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        ids_of(10).random_split(*fracs, method=method)


def test_an_unknown_method_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ValueError, match="method='random' must be one of") as caught:
        ids_of(10).random_split(0.5, 0.5, method="random")  # type: ignore[arg-type]
    assert str(caught.value).endswith("one of 'deterministic', 'multinomial', 'stochastic_rounding'.")


# Queries --------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_query(store: Store) -> None:
    with store.query(obs=[5, 9, 2], var=[3, 1]) as query:
        ids = QueryIDs.create(query)
    assert sorted(ids.obs_joinids) == [2, 5, 9]
    assert sorted(ids.var_joinids) == [1, 3]
    assert (ids.obs_joinids.dtype, ids.var_joinids.dtype, ids.partition) == (np.int64, np.int64, None)


def test_a_query_without_a_filter_has_every_row_and_column(store: Store) -> None:
    with store.query() as query:
        ids = QueryIDs.create(query)
    assert ids.obs_joinids.tolist() == list(range(N_OBS))
    assert ids.var_joinids.tolist() == list(range(N_VARS))


def test_a_query_by_value_has_the_rows_with_that_value(store: Store) -> None:
    with store.query(obs="cell_type == 'T cell'") as query:
        assert QueryIDs.create(query).obs_joinids.tolist() == list(range(1, N_OBS, 3))


def test_printing_counts_rows_and_columns() -> None:
    ids = QueryIDs(obs_joinids=np.arange(1_234), var_joinids=[0, 1])
    assert repr(ids) == "<QueryIDs: 1,234 rows by 2 columns>"
    part = ids.partitioned(Partition(rank=0, world_size=2, worker_id=0, n_workers=1))
    assert repr(part).startswith("<QueryIDs: 617 rows by 2 columns; Partition(rank=0,")


def test_a_query_of_a_closed_experiment_is_refused(store: Store) -> None:
    with store.query() as query:
        pass
    with pytest.raises(ValueError, match="must be open; build the dataset inside") as caught:
        QueryIDs.create(query)
    assert repr(store.uri) in str(caught.value)


@pytest.mark.parametrize("partition", [None, Partition(1, 2, 0, 3)])
def test_ids_survive_pickling(partition: Partition | None) -> None:
    ids = ids_of(20) if partition is None else ids_of(20).partitioned(partition)
    copy = pickle.loads(pickle.dumps(ids))
    np.testing.assert_array_equal(copy.obs_joinids, ids.obs_joinids)
    np.testing.assert_array_equal(copy.var_joinids, ids.var_joinids)
    assert copy.partition == partition


def test_ids_are_equal_if_their_rows_columns_and_partition_are() -> None:
    assert ids_of(3) == ids_of(3)
    assert ids_of(3) != ids_of(4)
    assert ids_of(3) != attrs.evolve(ids_of(3), var_joinids=[2, 4])
    assert ids_of(3) != ids_of(3).partitioned(Partition(0, 1, 0, 1))


def test_ids_cannot_be_assigned_to() -> None:
    ids = ids_of(3)
    with pytest.raises(AttributeError):
        ids.obs_joinids = np.arange(2)  # type: ignore[misc]


# What joinids may be --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["obs_joinids", "var_joinids"])
@pytest.mark.parametrize(
    ("joinids", "error", "message"),
    [
        (np.array([True, False]), TypeError, "must be joinids, not a mask of 2 rows; try joinids"),
        ([0.0, 1.7], TypeError, "must be integers that fit into int64, not float64"),
        (["0", "1"], TypeError, "must be integers that fit into int64, not <U1"),
        ([2**64], TypeError, "must be integers that fit into int64, not object"),
        ([3, -1], ValueError, "must lie from 0 to 9223372036854775807, but -1 does not"),
        (np.array([2**63], np.uint64), ValueError, "but 9223372036854775808 does not"),
        ([[0, 1], [2, 3]], ValueError, r"must have one dimension, not the shape \(2, 2\)"),
        (5, ValueError, r"must have one dimension, not the shape \(\)"),
    ],
)
def test_what_is_no_list_of_joinids_is_refused(
    name: str, joinids: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{name} .*{message}"):
        QueryIDs(**{"obs_joinids": [0], "var_joinids": [0], name: joinids})


def test_columns_must_differ_and_rows_may_repeat() -> None:
    with pytest.raises(ValueError, match="var_joinids must differ from each other, but 4 repeats"):
        QueryIDs(obs_joinids=[0], var_joinids=[9, 4, 2, 4])
    assert QueryIDs(obs_joinids=[3, 3, 1], var_joinids=[9, 4]).obs_joinids.tolist() == [3, 3, 1]


@pytest.mark.parametrize(
    "joinids",
    [[4, 2], range(4, 0, -2), np.array([4, 2], np.uint8), pd.Series([4, 2], dtype="Int64"), pa.array([4, 2])],
)
def test_integers_of_every_kind_are_joinids(joinids: Any) -> None:
    ids = QueryIDs(obs_joinids=joinids, var_joinids=joinids)
    for found in (ids.obs_joinids, ids.var_joinids):
        assert (found.dtype, found.tolist()) == (np.int64, [4, 2])
    assert QueryIDs(obs_joinids=[], var_joinids=()).obs_joinids.dtype == np.int64


def test_what_is_written_into_an_array_of_joinids_does_not_change_the_query() -> None:
    obs_joinids, var_joinids = np.arange(9), np.arange(3, dtype=np.uint16)
    ids = QueryIDs(obs_joinids=obs_joinids, var_joinids=var_joinids)
    obs_joinids[:], var_joinids[:] = 5, 0
    assert ids == QueryIDs(obs_joinids=range(9), var_joinids=range(3))
    with pytest.raises(ValueError, match="read-only"):
        ids.obs_joinids[0] = 5


def test_joinids_that_are_masked_in_places_are_refused() -> None:
    masked = np.ma.array([5, 3, 9], mask=[False, True, False])
    with pytest.raises(TypeError, match=r"some are masked; try ids.compressed()"):
        QueryIDs(obs_joinids=masked, var_joinids=[0])
    assert QueryIDs(obs_joinids=masked.compressed(), var_joinids=[0]).obs_joinids.tolist() == [5, 9]
