"""What "auto" stands for, through datasets on real experiments."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiledbsoma as soma

from stores import N_OBS, N_VARS, Store, expected_X, joinids_of
from tiledbsoma_ml import ExperimentDataset
from tiledbsoma_ml._order.mixing import Sharing, predicted_mixing
from windows import AUTO, N_ROWS, SMALL, TILE, dataset_of, plan, window_lengths

# What is read together ------------------------------------------------------------------------------------


def test_where_the_window_holds_the_query_it_is_read_at_once(large: Store) -> None:
    assert window_lengths(dataset_of(large)) == [N_ROWS]
    assert window_lengths(dataset_of(large, memory_budget="128MiB")) == [N_ROWS]


@pytest.mark.parametrize("scattered", [False, True])
def test_no_tile_is_decoded_twice_in_an_epoch_where_runs_are_whole_tiles(
    large: Store, scattered: bool
) -> None:
    windows_bytes = 25_000 if scattered else 120_000
    rows = np.flatnonzero(np.random.default_rng(0).random(N_ROWS) < 0.3) if scattered else np.arange(N_ROWS)
    dataset = dataset_of(large, rows, windows_bytes=windows_bytes, batch_size=4, mixing=0.8)
    plan(dataset)  # which reads a sample
    tiles = []
    read = soma.SparseNDArray.read

    def spy(self: soma.SparseNDArray, coords: Any) -> Any:
        rows = coords[0]
        asked = np.arange(rows.start, rows.stop + 1) if isinstance(rows, slice) else rows
        tiles.append(set((asked // TILE).tolist()))
        return read(self, coords)

    with mock.patch.object(soma.SparseNDArray, "read", spy):
        assert sorted(joinids_of(dataset)) == rows.tolist()
    assert dataset.plan.sizes(dataset.query_ids).run_length == TILE
    assert len(tiles) > 1
    assert sum(map(len, tiles)) == len(set().union(*tiles)) == len(np.unique(rows // TILE))


def test_windows_are_as_large_as_the_budget_but_for_a_smaller_first_one_and_a_chunk(
    make_store: Callable[..., Store],
) -> None:
    n_rows = 2 * N_ROWS
    store = make_store(obs_joinids=range(n_rows), tile=(TILE, 8))
    alone = Sharing(n_rows=n_rows, batch_size=4)
    of_30_chunks = predicted_mixing(alone, chunk_rows=TILE, window_rows=30 * TILE, ends_with_chunk=True)
    options = {"windows_bytes": 320_000, "batch_size": 4, "mixing": of_30_chunks}
    dataset = dataset_of(store, range(n_rows), **options)
    sizes = dataset.plan.sizes(dataset.query_ids)
    lengths = window_lengths(dataset)
    assert 2 * sizes.first_window_rows == sizes.window_rows == n_rows / 2
    assert lengths[0] < sizes.first_window_rows + sizes.run_length
    assert max(lengths) < sizes.window_rows + sizes.run_length
    assert len(lengths) == 3


def test_a_larger_budget_makes_larger_windows(large: Store) -> None:
    lengths = [
        len(window_lengths(dataset_of(large, windows_bytes=n_bytes))) for n_bytes in (SMALL, 80_000, 160_000)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 3


def test_dense_mini_batches_are_paid_for_from_the_budget(large: Store) -> None:
    sparse, dense = (dataset_of(large, return_sparse_X=sparse_X) for sparse_X in (True, False))
    budgets = [dataset.iterations.budget.windows for dataset in (sparse, dense)]
    assert budgets[0] - budgets[1] == 3 * 32 * N_VARS * 4


def test_rows_that_take_up_more_bytes_make_smaller_windows(large: Store) -> None:
    few, all_columns = (
        dataset_of(large, var_joinids=columns, windows_bytes=SMALL) for columns in ([0], range(N_VARS))
    )
    rows = [d.plan.sizes(d.query_ids).window_rows for d in (few, all_columns)]
    assert rows[0] > rows[1]


def test_a_better_mixing_takes_shorter_runs(large: Store) -> None:
    runs = [
        d.plan.sizes(d.query_ids).run_length
        for d in (dataset_of(large, windows_bytes=SMALL, mixing=mixing) for mixing in (0.8, 0.9, 1))
    ]
    assert runs[0] > runs[1] > runs[2] == 1


def test_one_size_may_be_auto_and_the_other_a_number(large: Store) -> None:
    only_window = dataset_of(large, windows_bytes=SMALL, shuffle_chunk_size=4)
    orders = joinids_of(only_window)
    runs = np.sort(orders[: window_lengths(only_window)[0]]).reshape(-1, 4)
    assert (runs[:, 0] % 4 == 0).all()
    assert (np.diff(runs) == 1).all()
    only_chunk = dataset_of(large, windows_bytes=SMALL, io_batch_size=100)
    run = only_chunk.plan.sizes(only_chunk.query_ids).run_length
    windows = only_chunk.plan.id_batches(only_chunk.query_ids, seed=1, epoch=0)
    lengths = [len(window) for window in windows]
    assert max(lengths) < 100 + run
    assert sum(lengths) == N_ROWS


# Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixing", "error", "message"),
    [
        (0.5, ValueError, "mixing=0.5 must lie from 0.8 to 1; try 0.95."),
        (1.01, ValueError, "mixing=1.01 must lie from 0.8 to 1; try 0.95."),
        (float("nan"), ValueError, "mixing=nan must lie from 0.8 to 1; try 0.95."),
        (True, TypeError, "mixing=True must be a number from 0.8 to 1, or None; try 0.95."),
        ("x", TypeError, "mixing='x' must be a number from 0.8 to 1, or None; try 0.95."),
    ],
)
def test_a_bad_mixing_is_refused_in_one_sentence_before_any_data_is_read(
    store: Store, mixing: object, error: type[Exception], message: str
) -> None:
    with (
        store.query() as query,
        mock.patch.object(soma.DataFrame, "read", side_effect=AssertionError("obs was read")),
        pytest.raises(error) as caught,
    ):
        ExperimentDataset(query, mixing=mixing)
    assert str(caught.value) == message


@pytest.mark.parametrize("mixing", [0.8, 1, np.float64(0.9), None])
def test_every_mixing_from_0_8_to_1_is_accepted(large: Store, mixing: float | None) -> None:
    assert dataset_of(large, mixing=mixing).plan.mixing == mixing


@pytest.mark.parametrize(
    "options", [{"shuffle_chunk_size": "auto"}, {"io_batch_size": "auto"}, AUTO], ids=str
)
def test_auto_on_a_dense_layer_reads_whole_tiles_as_on_a_sparse_one(
    dense_store: Store, options: dict[str, Any]
) -> None:
    sizes = {"shuffle_chunk_size": 64, "io_batch_size": 65_536, **options}
    dataset = dataset_of(
        dense_store, range(N_OBS), windows_bytes=SMALL, batch_size=40, return_sparse_X=False, **sizes
    )
    assert dataset.plan.layout is not None
    assert dataset.plan.layout.row_tile == 64
    batches = list(dataset)
    assert sorted(joinids_of(batches)) == list(range(N_OBS))
    for X, obs in batches:
        np.testing.assert_array_equal(X, expected_X(obs["soma_joinid"], range(N_VARS)))


def test_a_dense_layer_takes_budgets_and_windows_in_files(dense_store: Store, tmp_path: Path) -> None:
    dataset = dense_store.dataset(
        batch_size=40,
        shuffle_chunk_size=8,
        io_batch_size=80,
        memory_budget="256MiB",
        window_dir=tmp_path,
        window_budget="64MiB",
    )
    assert sorted(joinids_of(dataset)) == list(range(N_OBS))


@pytest.fixture(scope="session")
def in_one_tile(make_store: Callable[..., Store]) -> Store:
    return make_store(tile=(3_000_000, 8))


def in_huge_tiles(store: Store, **options: Any) -> ExperimentDataset:
    """Return a dataset of a layer whose one tile is said to take up hundreds of MiB."""
    return dataset_of(
        store, range(N_OBS), row_bytes=2**20, **{"batch_size": 1, "return_sparse_X": False, **options}
    )


BUDGET_SENTENCE = (
    r"memory_budget=(\d+) MiB must hold three mini-batches and one tile of 311 rows beside buffers, "
    r"(\d+) MiB; raise it, or take a smaller batch_size or return_sparse_X=True\."
)


def refused_budget(store: Store, **options: Any) -> tuple[int, int]:
    """Return the MiB that were given, and that are said to be needed."""
    with pytest.raises(ValueError, match="memory_budget") as caught:
        plan(in_huge_tiles(store, **options))
    found = re.fullmatch(BUDGET_SENTENCE, str(caught.value))
    assert found is not None, caught.value
    return int(found[1]), int(found[2])


def test_a_budget_that_does_not_hold_a_tile_says_what_is_needed(in_one_tile: Store) -> None:
    given_mib, needed_mib = refused_budget(in_one_tile, memory_budget="128MiB")
    assert given_mib == 128
    assert 256 < needed_mib < 1024
    assert refused_budget(in_one_tile, memory_budget="64MiB")[0] == 64
    assert in_huge_tiles(in_one_tile, batch_size=100, memory_budget="1GiB").plan.is_auto


def test_sparse_mini_batches_are_not_offered_where_they_are_sparse_already(in_one_tile: Store) -> None:
    with pytest.raises(
        ValueError, match=r"^memory_budget=128 MiB must hold one tile of .* buffers, \d+ MiB; raise it\.$"
    ):
        plan(in_huge_tiles(in_one_tile, memory_budget="128MiB", return_sparse_X=True))


def test_a_budget_that_does_not_hold_three_dense_mini_batches_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"memory_budget=256 MiB must hold three mini-batches and one tile"):
        plan(store.dataset(**AUTO, memory_budget="256MiB", batch_size=10**6))
    assert store.dataset(**AUTO, memory_budget="256MiB", batch_size=10**6, return_sparse_X=True).plan


def test_a_tile_that_does_not_fit_is_no_matter_where_the_window_is_a_number(in_one_tile: Store) -> None:
    for chunk in (64, "auto"):
        sizes = {"shuffle_chunk_size": chunk, "io_batch_size": 65_536}
        dataset = in_huge_tiles(in_one_tile, batch_size=50, memory_budget="64MiB", **sizes)
        assert sorted(joinids_of(dataset)) == list(range(N_OBS))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_budget_that_is_said_to_be_needed_is_enough(in_one_tile: Store, device: str | None) -> None:
    _, needed_mib = refused_budget(in_one_tile, memory_budget="256MiB", device=device)
    assert in_huge_tiles(in_one_tile, memory_budget=f"{needed_mib}MiB", device=device).plan.is_auto


def test_a_window_budget_that_does_not_hold_a_tile_is_what_is_named(
    in_one_tile: Store, tmp_path: Path
) -> None:
    files = {"window_dir": tmp_path, "window_budget": "64MiB"}
    with pytest.raises(ValueError, match=r"^window_budget"):
        plan(in_huge_tiles(in_one_tile, memory_budget="2GiB", **files))


def test_a_tile_larger_than_the_layer_takes_up_no_more_than_its_rows(in_one_tile: Store) -> None:
    dataset = in_one_tile.dataset(**AUTO, memory_budget="64MiB")
    assert sorted(joinids_of(dataset)) == list(range(N_OBS))


def test_a_numpy_number_is_a_number(large: Store) -> None:
    assert dataset_of(large, mixing=np.float32(0.9))
