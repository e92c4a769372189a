"""What the log says of an order when the first epoch begins."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stores import Store, joinids_of
from tiledbsoma_ml import ExperimentDataset, Snapshot, experiment_dataloader
from tiledbsoma_ml._query_ids import Partition
from windows import N_ROWS, SMALL, dataset_of

Log = Callable[[], list[str]]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    """Return what was logged since the last call."""
    caplog.set_level(logging.INFO, logger="tiledbsoma_ml")

    def lines() -> list[str]:
        assert {(record.name, record.levelname) for record in caplog.records} <= {("tiledbsoma_ml", "INFO")}
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return lines


def begin(dataset: ExperimentDataset) -> None:
    next(iter(dataset))


# What "auto" stands for -----------------------------------------------------------------------------------


def test_the_log_says_once_what_auto_stands_for(large: Store, log: Log) -> None:
    dataset = dataset_of(large, windows_bytes=SMALL, mixing=0.9)
    sizes = dataset.plan.sizes(dataset.query_ids)
    assert log() == []
    joinids_of(dataset)
    [line] = log()
    found = re.fullmatch(
        r"runs of (\d+) rows in windows of (\d+) rows \((\d+) MiB\): mixing (0\.\d\d) of random is predicted",
        line,
    )
    assert found is not None
    assert [int(found[1]), int(found[2])] == [sizes.run_length, sizes.window_rows]
    assert float(found[4]) == pytest.approx(sizes.mixing, abs=0.005)
    assert float(found[4]) >= 0.9
    joinids_of(dataset)
    assert log() == []


def test_the_log_says_so_where_a_window_holds_the_query(large: Store, log: Log) -> None:
    begin(dataset_of(large))
    assert log() == ["runs of 32 rows in windows of 2,000 rows (0 MiB): mixing 1.00 of random is predicted"]


def test_the_log_says_the_runs_that_were_asked_for_where_the_window_alone_is_auto(
    large: Store, log: Log
) -> None:
    begin(dataset_of(large, windows_bytes=SMALL, shuffle_chunk_size=4, batch_size=8))
    assert log()[0].startswith("runs of 4 rows in windows of ")


def test_sizes_that_are_given_or_order_nothing_are_not_worth_a_line(large: Store, log: Log) -> None:
    begin(dataset_of(large, shuffle_chunk_size=64, io_batch_size=2048))
    begin(dataset_of(large, shuffle=False))
    joinids_of(dataset_of(large, []))
    assert log() == []


# Ranks and workers ----------------------------------------------------------------------------------------


def test_the_log_says_the_sizes_and_the_mixing_of_ranks_that_share_the_rows(large: Store, log: Log) -> None:
    dataset = dataset_of(large, ranks=(1, 4), shuffle_scope="global")
    begin(dataset)
    sizes = dataset.plan.of(dataset.iterations.part(0, Partition(1, 4, 0, 1))).sizes
    assert sizes is not None
    window = f"windows of 500 rows (0 MiB): mixing {sizes.mixing:.2f} of random is predicted"
    assert log()[0] == f"runs of {sizes.run_length} rows in {window}"
    assert sizes.mixing < 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_log_says_once_that_parts_are_shuffled_by_themselves_and_names_the_other_scope(
    large: Store, log: Log, num_workers: int
) -> None:
    dataset = dataset_of(large, ranks=(0, 2), shuffle_chunk_size=8, io_batch_size=64)
    loader = experiment_dataloader(dataset, num_workers=num_workers)
    for _ in range(2):
        list(loader)
    [line] = [line for line in log() if "shuffle_scope" in line]
    n_parts = 2 * max(1, num_workers)
    assert f"each of the {n_parts} parts of ranks and workers by itself" in line
    assert "'global' shuffles the whole query" in line
    part = dataset.plan.of(dataset.iterations.part(0, Partition(0, 2, 0, max(1, num_workers))))
    assert f"mixing {part.predicted_mixing():.2f} of random is predicted" in line


def shared(**options: Any) -> dict[str, Any]:
    return {"ranks": (0, 8), "shuffle_scope": "global", "shuffle_chunk_size": 4, **options}


def test_the_log_says_how_often_ranks_of_the_scope_global_read_rows_and_names_the_snapshot(
    large: Store, log: Log, tmp_path: Any
) -> None:
    begin(dataset_of(large, **shared()))
    [line] = [line for line in log() if "same tiles" in line]
    found = re.search(
        r"the 8 ranks and workers .* at least (\d\.\d) times in an epoch; snapshot='PATH'", line
    )
    assert found is not None
    tiles = np.arange(N_ROWS) // 32
    dataset = dataset_of(large, **shared())
    n_read = 0
    for rank in range(8):
        part = dataset.plan.of(dataset.iterations.part(0, Partition(rank, 8, 0, 1)))
        n_read += len(np.unique(tiles[np.concatenate(list(part.io_batches()))]))
    assert float(found[1]) == pytest.approx(n_read / len(np.unique(tiles)), rel=0.1)


def test_ranks_that_read_tiles_alone_or_a_snapshot_are_not_worth_a_line(
    large: Store, log: Log, tmp_path: Any
) -> None:
    with large.query() as query:
        snapshot = Snapshot.create(tmp_path / "snapshot", query, progress=False)
    begin(dataset_of(large, **shared(shuffle_chunk_size=256, io_batch_size=256)))
    begin(dataset_of(large, **shared(ranks=(0, 1))))
    begin(ExperimentDataset(snapshot=snapshot, **shared(seed=1, io_batch_size=64)))
    assert [line for line in log() if "same tiles" in line] == []
