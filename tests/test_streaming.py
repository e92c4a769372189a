"""Windows of rows, in memory and in files, through datasets: every row once, with its own values."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import N_OBS, N_VARS, Store, joinids_of, make_obs, workers
from tiledbsoma_ml import ExperimentDataset, QueryIDs, Rows, experiment_dataloader
from windows import AUTO, N_ROWS, SMALL, dataset_of, window_lengths

# Every row once, with its own values ----------------------------------------------------------------------


options_of_reading = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 80),
        "shuffle_chunk_size": st.just("auto") | st.sampled_from([1, 4, 20]),
        "io_batch_size": st.just("auto") | st.sampled_from([20, 60, 300]),
        "shuffle": st.booleans(),
        "return_sparse_X": st.booleans(),
        "use_eager_fetch": st.booleans(),
        "mixing": st.none() | st.sampled_from([0.8, 0.95, 1]),
    }
)
modes = st.sampled_from(
    [{}, {"device": "cpu"}, {"device": "cpu", "shuffle_mode": "gpu_minibatch"}]
) | st.just({"device": "cpu", "shuffle_mode": "gpu_iobatch"})


@settings(max_examples=15)
@given(
    options=options_of_reading,
    mode=modes,
    in_files=st.booleans(),
    windows_bytes=st.integers(8_000, 60_000),
    n_rows=st.integers(0, N_OBS),
    scattered=st.booleans(),
)
def test_every_row_comes_once_with_its_own_values_in_a_new_order_every_epoch(
    store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, Any],
    mode: dict[str, Any],
    in_files: bool,
    windows_bytes: int,
    n_rows: int,
    scattered: bool,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    files = {"window_dir": folder, "window_budget": "64MiB"} if in_files else {}
    rows = (
        np.sort(np.random.default_rng(n_rows).permutation(N_OBS)[:n_rows]) if scattered else np.arange(n_rows)
    )
    dataset, same = (
        dataset_of(store, rows, windows_bytes=windows_bytes, **options, **mode, **files, seed=5)
        for _ in range(2)
    )
    epochs = [list(dataset) for _ in range(2)]
    again = joinids_of(same)
    assert all(len(epoch) == len(dataset) for epoch in epochs)
    assert all(len(obs) == options["batch_size"] for epoch in epochs for _, obs in epoch[:-1])
    first, second = map(joinids_of, epochs)
    assert sorted(first) == sorted(second) == rows.tolist()
    np.testing.assert_array_equal(again, first)
    shuffles = options["shuffle"] and (
        mode.get("shuffle_mode") != "gpu_minibatch" or options["batch_size"] > 4
    )
    if shuffles and n_rows > 20:
        assert first.tolist() != second.tolist()
    if not options["shuffle"]:
        assert first.tolist() == rows.tolist()


def test_obs_columns_of_every_type_stay_with_their_rows(large: Store) -> None:
    columns = [*reversed(make_obs(np.arange(1)).columns)]
    for _, obs in dataset_of(large, windows_bytes=SMALL, obs_column_names=columns):
        pd.testing.assert_frame_equal(obs, make_obs(obs["soma_joinid"].to_numpy())[columns])


def test_a_query_with_a_filter_and_some_columns_is_read_right(large: Store) -> None:
    with large.query(obs="cell_type == 'T cell'", var=[3, 7, 20]) as query:
        ids = QueryIDs.create(query)
    rows = ids.obs_joinids
    dataset = dataset_of(large, rows, ids.var_joinids, windows_bytes=SMALL, seed=3, return_sparse_X=False)
    expected = {
        i: [(1000 * i + j + 1) * ((3 * i + j) % 5 == 0 and i % 7 != 3) for j in (3, 7, 20)] for i in rows
    }
    found = {}
    for X, obs in dataset:
        found |= dict(zip(obs["soma_joinid"], X.tolist(), strict=True))
    assert found == expected


def test_parts_of_a_split_keep_the_options_and_together_are_the_query(large: Store) -> None:
    parts = dataset_of(large, windows_bytes=SMALL).random_split(0.7, 0.2, 0.1, seed=2)
    ids = [joinids_of(part) for part in parts]
    assert [len(part) for part in parts] == [-(-len(of_part) // 32) for of_part in ids]
    assert sorted(np.concatenate(ids)) == list(range(N_ROWS))
    assert len(window_lengths(parts[0])) > len(window_lengths(parts[2]))


def test_rows_that_repeat_come_as_often_as_the_query_has_them(store: Store) -> None:
    rows = [3, 3, 50, 7, 7, 7, 290, 11]
    assert sorted(joinids_of(dataset_of(store, rows, batch_size=3))) == sorted(rows)


def test_a_query_without_rows_yields_nothing(store: Store) -> None:
    dataset = dataset_of(store, [])
    assert (list(dataset), len(dataset)) == ([], 0)


def test_a_query_without_columns_yields_obs(store: Store) -> None:
    dataset = store.dataset(range(50), [], batch_size=20, **AUTO)
    assert [X.shape for X, _ in dataset] == [(20, 0), (20, 0), (10, 0)]


# Windows in files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [{"shuffle_chunk_size": 10, "io_batch_size": 250}, AUTO, {**AUTO, "io_batch_size": 300}],
    ids=["numbers", "auto", "chunks"],
)
@pytest.mark.parametrize("sparse_X", [False, True])
def test_windows_in_files_give_what_windows_in_memory_give(
    large: Store, tmp_path: Path, sizes: dict[str, Any], sparse_X: bool
) -> None:
    in_memory = dataset_of(large, **sizes, return_sparse_X=sparse_X)
    in_files = dataset_of(
        large, **sizes, return_sparse_X=sparse_X, window_dir=tmp_path, window_budget="64MiB"
    )
    for _ in range(2):
        for (X, obs), (other_X, other_obs) in zip(in_memory, in_files, strict=True):
            assert (other_X != X).sum() == 0
            pd.testing.assert_frame_equal(obs, other_obs)
            assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed on Linux")
def test_windows_in_files_need_few_open_files(large: Store, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 30, hard))
    try:
        dataset = dataset_of(large, io_batch_size=300, window_dir=tmp_path, window_budget="64MiB")
        assert len(joinids_of(dataset)) == N_ROWS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_window_in_files_may_be_larger_than_the_memory(large: Store, tmp_path: Path) -> None:
    in_files = dataset_of(large, windows_bytes=SMALL, window_dir=str(tmp_path), window_budget="64MiB")
    assert len(window_lengths(dataset_of(large, windows_bytes=SMALL))) > 3
    assert window_lengths(in_files) == [N_ROWS]


@pytest.mark.parametrize("sizes", [AUTO, {**AUTO, "io_batch_size": 300}], ids=["auto", "chunks"])
def test_the_device_does_not_change_the_order_of_windows_in_memory(
    large: Store, sizes: dict[str, Any]
) -> None:
    on_cpu = dataset_of(large, **sizes)
    on_device = dataset_of(large, **sizes, shuffle_mode="gpu_iobatch", device="cpu")
    for _ in range(2):
        np.testing.assert_array_equal(joinids_of(on_device), joinids_of(on_cpu))


def test_the_device_does_not_change_the_order_where_a_window_holds_a_part_of_the_query(large: Store) -> None:
    on_cpu, on_device = (
        dataset_of(large, windows_bytes=SMALL),
        dataset_of(large, windows_bytes=SMALL, shuffle_mode="gpu_iobatch", device="cpu"),
    )
    np.testing.assert_array_equal(joinids_of(on_device), joinids_of(on_cpu))


def test_the_device_does_not_change_the_order_of_windows_in_files(large: Store, tmp_path: Path) -> None:
    options = {"io_batch_size": 300, "window_dir": tmp_path, "window_budget": "64MiB"}
    on_cpu = dataset_of(large, **options)
    on_device = dataset_of(large, **options, shuffle_mode="gpu_iobatch", device="cpu")
    np.testing.assert_array_equal(joinids_of(on_device), joinids_of(on_cpu))


@pytest.mark.parametrize("mode", ["cpu", "gpu_iobatch", "gpu_minibatch"])
def test_windows_in_files_go_to_the_device_in_parts(large: Store, tmp_path: Path, mode: str) -> None:
    n_rows = []

    class Counted(Rows[Any]):
        """Rows that tell how many of them go to a device at once."""

        def to(self, device: torch.device) -> Any:
            n_rows.append(len(self))
            return Rows.to(self, device)

    files = {"window_dir": tmp_path, "window_budget": "64MiB"}
    dataset = dataset_of(large, io_batch_size=320, rows_held=320, **files, shuffle_mode=mode, device="cpu")
    dataset.source.given = lambda rows: Counted(obs_joinids=rows.obs_joinids, X=rows.X, obs=rows.obs)
    assert len(joinids_of(dataset)) == N_ROWS
    assert sum(n_rows) == N_ROWS
    assert max(n_rows) <= 320 / 10


# Workers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu"])
def test_workers_read_within_windows_of_their_own_and_yield_every_row_once(
    large: Store, tmp_path: Path, device: str | None
) -> None:
    files = {} if device else {"window_dir": tmp_path, "window_budget": "64MiB"}
    mode = {"shuffle_mode": "gpu_iobatch", "device": device} if device else {}
    dataset = dataset_of(large, windows_bytes=SMALL, batch_size=64, **files, **mode)
    loader = experiment_dataloader(dataset, **workers(2))
    epochs = [list(loader) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 2 == [32, 32]
    orders = [joinids_of(epoch) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(N_ROWS))
    assert orders[0].tolist() != orders[1].tolist()

    in_process = dataset_of(large, windows_bytes=SMALL, batch_size=64, **files, **mode)
    halves = []
    for rows in np.split(np.arange(N_ROWS), 2):
        half = QueryIDs(obs_joinids=rows, var_joinids=range(N_VARS))
        halves.append(list(in_process.over(half)))
    in_turn = [mini_batch for pair in zip(*halves, strict=True) for mini_batch in pair]
    np.testing.assert_array_equal(orders[0], joinids_of(in_turn))
    assert list(tmp_path.iterdir()) == []


# Bad input ------------------------------------------------------------------------------------------------


def test_rows_that_obs_lacks_are_named_with_auto_as_without(store: Store) -> None:
    with pytest.raises(ValueError, match="obs_joinids must exist in obs, but 1 do not, 316 for instance"):
        list(dataset_of(store, [1, N_OBS + 5]))


def test_query_ids_are_not_changed_by_reading(store: Store) -> None:
    ids = QueryIDs(obs_joinids=np.arange(100)[::-1], var_joinids=range(N_VARS))
    before = ids.obs_joinids.copy()
    joinids_of(ExperimentDataset(x_locator=store.locator, query_ids=ids, **AUTO))
    np.testing.assert_array_equal(ids.obs_joinids, before)
