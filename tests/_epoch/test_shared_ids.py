from __future__ import annotations

from multiprocessing.connection import Connection

import numpy as np
import pytest

from stores import fork_server
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._epoch.shared_ids import SharedQueryIDs
from tiledbsoma_ml._query_ids import Partition

PART = Partition(rank=1, world_size=2, worker_id=0, n_workers=3)


@pytest.mark.parametrize("partition", [None, PART])
def test_shared_joinids_are_those_that_were_shared_and_cannot_be_written_to(
    partition: Partition | None,
) -> None:
    ids = QueryIDs(obs_joinids=[7, 3, 2**40], var_joinids=[5], partition=partition)
    shared = SharedQueryIDs.of(ids).query_ids()
    assert shared == ids
    assert not np.shares_memory(shared.obs_joinids, ids.obs_joinids)
    with pytest.raises(ValueError, match="read-only"):
        shared.obs_joinids[0] = 1


def test_copies_are_views_of_the_shared_memory() -> None:
    shared = SharedQueryIDs.of(QueryIDs(obs_joinids=range(9), var_joinids=range(2)))
    one, other = shared.query_ids(), shared.query_ids()
    assert np.shares_memory(one.obs_joinids, other.obs_joinids)
    assert np.shares_memory(one.var_joinids, other.var_joinids)


def send_back(shared: SharedQueryIDs, pipe: Connection) -> None:
    ids = shared.query_ids()
    pipe.send((ids.obs_joinids.tolist(), ids.var_joinids.tolist(), ids.partition))


def test_a_process_that_gets_a_pickled_copy_has_the_same_joinids() -> None:
    shared = SharedQueryIDs.of(QueryIDs(obs_joinids=[7, 3], var_joinids=[], partition=PART))
    context = fork_server()
    here, there = context.Pipe()
    process = context.Process(target=send_back, args=(shared, there))
    process.start()
    assert here.recv() == ([7, 3], [], PART)
    process.join()
