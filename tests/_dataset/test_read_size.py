"""How much is read at once: as memory holds, whatever is shuffled together."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest

from stores import Store, joinids_of, workers
from tiledbsoma_ml import ExperimentDataset, experiment_dataloader
from tiledbsoma_ml._dataset import read_size
from tiledbsoma_ml._soma.held_rows import ByteLimit, HeldRows
from windows import AUTO, N_ROWS, SMALL, dataset_of, window_lengths

SMALL_CHUNKS: dict[str, Any] = {"shuffle_chunk_size": 2, "io_batch_size": 64}


def test_where_memory_holds_the_query_it_is_read_at_once_in_io_batches_of_any_size(large: Store) -> None:
    at_once = window_lengths(dataset_of(large, shuffle_chunk_size=8, io_batch_size=512))
    assert at_once == [N_ROWS], "an IO batch alone decodes nearly as many tiles"
    assert window_lengths(dataset_of(large, **SMALL_CHUNKS)) == [64, N_ROWS - 64], "training waits for few"
    by_itself = window_lengths(dataset_of(large, shuffle_chunk_size=32, io_batch_size=64))
    assert max(by_itself) == 64, "chunks of whole tiles decode nothing twice"


ON_A_DEVICE = {"device": "cpu", "shuffle_mode": "gpu", "return_sparse_X": False}


@pytest.mark.parametrize("scope", ["partition", "global"])
@pytest.mark.parametrize("options", [{"return_sparse_X": False}, ON_A_DEVICE])
@pytest.mark.parametrize("rows_held", [1000, 70, 30])
def test_rows_come_in_the_same_order_however_many_are_read_at_once(
    large: Store, options: dict[str, Any], scope: str, rows_held: int
) -> None:
    def epoch(rows_held: int) -> tuple[list[int], np.ndarray]:
        dataset = dataset_of(large, rows_held=rows_held, shuffle_scope=scope, **SMALL_CHUNKS, **options)
        mini_batches = list(dataset)
        return joinids_of(mini_batches), np.concatenate([np.asarray(X) for X, _ in mini_batches])

    joinids, X = epoch(64)  # each IO batch by itself
    found = epoch(rows_held)
    assert list(found[0]) == list(joinids)
    np.testing.assert_array_equal(found[1], X)


@pytest.mark.parametrize("options", [SMALL_CHUNKS, {"shuffle": False, "io_batch_size": 64}])
def test_no_read_has_more_rows_than_memory_holds(large: Store, options: dict[str, Any]) -> None:
    n_held = 500
    dataset = dataset_of(large, rows_held=n_held, **options)
    lengths = window_lengths(dataset)
    assert sum(lengths) == N_ROWS
    assert max(lengths) <= 1.1 * n_held
    assert window_lengths(dataset_of(large, range(100), rows_held=1, **SMALL_CHUNKS)) == [1] * 100


def test_the_size_of_rows_is_measured_where_the_part_is_read_and_then_followed(large: Store) -> None:
    dataset = dataset_of(large, windows_bytes=SMALL, **SMALL_CHUNKS)
    first, second, *others = window_lengths(dataset)
    assert first == 64
    assert 64 < second < N_ROWS / 2
    assert max(others) < 1.3 * second
    train, _ = dataset_of(large, shuffle_scope="global", **SMALL_CHUNKS).random_split(0.5, 0.5, seed=0)
    assert window_lengths(train) == [64, N_ROWS // 2 - 64]


class PeakLimit(ByteLimit):
    """Knows the largest number of bytes that were held at one time."""

    peak = 0

    def take(self, rows: HeldRows, n_bytes: int, *, may_exceed: bool = True) -> bool:
        is_taken = super().take(rows, n_bytes, may_exceed=may_exceed)
        self.peak = max(self.peak, self.n_held())
        return is_taken


@pytest.mark.parametrize("options", [SMALL_CHUNKS, {"shuffle": False, "io_batch_size": 2048}, AUTO])
@pytest.mark.parametrize("eager", [False, True])
def test_rows_that_weigh_more_than_was_thought_are_read_later_in_the_same_order(
    large: Store, options: dict[str, Any], eager: bool
) -> None:
    limits = list[PeakLimit]()

    def make_limit(n_bytes: float) -> ByteLimit:
        limits.append(PeakLimit(n_bytes))
        return limits[-1]

    def dataset(**changes: Any) -> ExperimentDataset:
        return dataset_of(large, windows_bytes=SMALL, use_eager_fetch=eager, **options, **changes)

    found = joinids_of(dataset(row_bytes=1, make_limit=make_limit))
    assert 0 < limits[0].peak <= SMALL
    roomy = dataset_of(large, row_bytes=1, **options)  # whose limit is that of the whole budget
    assert list(found) == list(joinids_of(roomy))


def test_workers_read_as_much_at_once(large: Store) -> None:
    dataset = dataset_of(large, shuffle_scope="global", **SMALL_CHUNKS)
    loader = experiment_dataloader(dataset, **workers(2))
    np.testing.assert_array_equal(np.sort(joinids_of(loader)), np.sort(joinids_of(dataset)))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    read_size.tell_costly.cache_clear()
    caplog.set_level(logging.INFO, logger="tiledbsoma_ml")
    return caplog


def test_the_log_says_once_how_much_costly_sizes_read_and_what_to_write_instead(
    large: Store, log: pytest.LogCaptureFixture
) -> None:
    dataset = dataset_of(large, windows_bytes=SMALL, row_bytes=1000, **SMALL_CHUNKS)
    for _ in range(2):
        joinids_of(dataset)
    [line] = log.messages
    assert re.fullmatch(
        r"shuffle_chunk_size=2 and io_batch_size=64 read every row about \d+ times in an epoch, because it "
        r"is stored in tiles of 32 rows, and memory_budget holds \d+ rows; shuffle_chunk_size='auto' and "
        r"io_batch_size='auto' read less and mix as well, and a larger memory_budget reads less",
        line,
    )


def test_sizes_that_are_cheap_are_not_worth_a_line(large: Store, log: pytest.LogCaptureFixture) -> None:
    of_mini_batches = {"shuffle_mode": "gpu_minibatch", "device": "cpu"}
    for options in (
        {"shuffle_chunk_size": 64, "io_batch_size": 65_536},  # the defaults: an IO batch holds the query
        SMALL_CHUNKS,  # memory holds the query
        {"shuffle_chunk_size": 32, "io_batch_size": 64},
        {"shuffle": False, **SMALL_CHUNKS},
        {**of_mini_batches, **SMALL_CHUNKS},
    ):
        joinids_of(dataset_of(large, **options))
        assert log.messages == []
