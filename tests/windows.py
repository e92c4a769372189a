"""Datasets of an experiment that is read in several windows."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import numpy as np

from stores import Store, joinids_of
from tiledbsoma_ml import ExperimentDataset
from tiledbsoma_ml._order.plan import Plan
from tiledbsoma_ml._soma.reader import SOMAReader
from tiledbsoma_ml._soma.window import Window

LONG = 1_000  # seconds; only a failure waits as long

AUTO = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
N_ROWS, TILE = 2000, 32


def dataset_of(store: Store, rows: Any = range(N_ROWS), **options: Any) -> ExperimentDataset:
    return store.dataset(rows, **{"batch_size": 32, "seed": 1, "return_sparse_X": True, **AUTO, **options})


def plan(dataset: ExperimentDataset) -> Plan:
    """Return the plan, which says in the log what it costs when it is first asked for."""
    return dataset.plan


def window_lengths(dataset: ExperimentDataset) -> list[int]:
    """Return how many rows are read together, window after window."""
    plan(dataset)  # which reads a sample
    lengths = []
    read_window = SOMAReader.read_window

    def spy(self: SOMAReader, obs_joinids: np.ndarray) -> Window:
        lengths.append(len(obs_joinids))
        return read_window(self, obs_joinids)

    with mock.patch.object(SOMAReader, "read_window", spy):
        joinids_of(dataset)
    return lengths


def eager_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "EagerIterator" in thread.name}
