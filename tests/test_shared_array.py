"""Memory that processes share: copies that stay one, and no size of /dev/shm that bounds them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from stores import N_OBS, Store, joinids_of, workers
from tiledbsoma_ml import QueryIDs, experiment_dataloader
from tiledbsoma_ml._epoch.shared_ids import SharedQueryIDs
from tiledbsoma_ml._shared_array import SharedArray


def n_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(params=["in memory", "on disk"])
def unlisted(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """With and without files in memory, as on macOS."""
    if request.param == "on disk":
        monkeypatch.delattr(os, "memfd_create", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (70_000,)])
@pytest.mark.usefixtures("unlisted")
def test_it_holds_what_it_was_made_of(shape: tuple[int, ...]) -> None:
    numbers = np.arange(np.prod(shape), dtype=np.int64).reshape(shape) * 3
    shared = SharedArray(numbers)
    np.testing.assert_array_equal(shared.numbers, numbers)
    copy = pickle.loads(pickle.dumps(shared))
    np.testing.assert_array_equal(copy.numbers, numbers)
    assert not np.shares_memory(copy.numbers, shared.numbers)


def add_one(shared: SharedArray, ids: SharedQueryIDs, answers: Connection) -> None:
    shared.numbers[1] += 1
    answers.send((shared.numbers.tolist(), ids.query_ids()))


def test_a_spawned_process_sees_the_same_numbers_and_is_seen_to_change_them() -> None:
    shared = SharedArray(np.array([4, 5]))
    ids = QueryIDs(obs_joinids=range(0, 2_000_000, 2), var_joinids=[7])
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=add_one, args=(shared, SharedQueryIDs.of(ids), theirs))
    child.start()
    numbers, seen = ours.recv()
    child.join()
    assert numbers == shared.numbers.tolist() == [4, 6]
    np.testing.assert_array_equal(seen.obs_joinids, ids.obs_joinids)
    assert seen.var_joinids.tolist() == [7]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
@pytest.mark.usefixtures("unlisted")
def test_nothing_stays_open() -> None:
    gc.collect()
    before = n_descriptors()
    for _ in range(3):
        SharedArray(np.arange(10))
    gc.collect()
    assert n_descriptors() == before


def test_a_full_dev_shm_bounds_neither_datasets_nor_their_workers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm)")  # what torch says

    monkeypatch.setattr(torch.Tensor, "share_memory_", fails)
    loader = experiment_dataloader(store.dataset(batch_size=100), **workers(1))
    assert len(joinids_of(loader)) == N_OBS
