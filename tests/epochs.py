"""Epochs of a snapshot, of all ranks and workers in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from stores import N_OBS
from tiledbsoma_ml import ExperimentDataset, QueryIDs, Snapshot, experiment_dataloader
from tiledbsoma_ml._query_ids import Partition

SCOPES, TAILS = ("partition", "global"), ("drop", "pad")


def dataset_of(snapshot: Snapshot, n_rows: int = N_OBS, **options: Any) -> ExperimentDataset:
    ids = QueryIDs(obs_joinids=np.arange(n_rows), var_joinids=np.arange(5))
    options = {"seed": 5, "batch_size": 8, "shuffle_chunk_size": 3, "io_batch_size": 24, **options}
    return ExperimentDataset(snapshot=snapshot, query_ids=ids, **options)


class Place(NamedTuple):
    """A worker of a rank, as `Partition` has it; without workers `n_workers` is 0."""

    rank: int
    world_size: int
    worker_id: int
    n_workers: int


@contextmanager
def at(place: Place | Partition) -> Iterator[None]:
    """Be a worker of a rank."""
    ranks = {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size)}
    info = SimpleNamespace(id=place.worker_id, num_workers=place.n_workers) if place.n_workers else None
    with (
        mock.patch.dict("os.environ", ranks),
        mock.patch.object(torch.utils.data, "get_worker_info", return_value=info),
    ):
        yield


def batches_of(dataset: Any) -> list[list[int]]:
    return [obs["soma_joinid"].tolist() for _, obs in dataset]


def epoch_of_rank(dataset: ExperimentDataset, rank: int, world_size: int, n_workers: int) -> list[list[int]]:
    """Return the mini-batches of a rank, in the order in which a `DataLoader` takes them from workers."""
    of_workers = []
    for worker in range(n_workers or 1):
        with at(Place(rank, world_size, worker, n_workers)):
            of_workers.append(batches_of(copy.deepcopy(dataset)))
    taken = []
    while any(of_workers):
        taken += [mine.pop(0) for mine in of_workers if mine]
    return taken


def loader_of(snapshot: Snapshot, n_workers: int, **options: Any) -> Any:
    kept = {"multiprocessing_context": "fork", "persistent_workers": True} if n_workers else {}
    return experiment_dataloader(dataset_of(snapshot, 130, **options), num_workers=n_workers, **kept)


def place_of(stateful: Any) -> tuple[int, int]:
    state = stateful.state_dict()
    return state["epoch"], state["n_yielded"]
