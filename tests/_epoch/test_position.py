from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epochs import TAILS, Place, at, dataset_of
from stores import Store
from tiledbsoma_ml import QueryIDs, Snapshot
from tiledbsoma_ml._order.plan import EpochPart, Plan
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import Partition

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* changes nothing here: "),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed is 5 there, not 6"),
        ({"batch_size": 4}, "batch_size is 8 there, not 4"),
        ({"n_rows": 90}, "query is '.*' there, not '.*'; n_obs is 311 there, not 90"),
        ({"io_batch_size": 48}, "io_batch_size is 24 there, not 48"),
        ({"shuffle_scope": "global"}, "shuffle_scope is 'partition' there, not 'global'"),
        ({"shuffle": False}, "shuffle is True there, not False"),
    ],
)
def test_a_state_of_another_dataset_is_refused_with_the_difference(
    whole: Snapshot, change: dict[str, Any], message: str
) -> None:
    state = dataset_of(whole).state_dict()
    with pytest.raises(ValueError, match=f"state must be of this dataset, but .*{message}"):
        dataset_of(whole, **change).load_state_dict(state)


def test_what_is_no_state_is_refused(whole: Snapshot) -> None:
    with pytest.raises(TypeError, match="must be what state_dict"):
        dataset_of(whole).load_state_dict({"epoch": 3})
    with pytest.raises(ValueError, match="state must have version 1, not 2"):
        dataset_of(whole).load_state_dict({**dataset_of(whole).state_dict(), "version": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_yielded": 40}, "n_yielded=40 in state must lie in 0 … 39;"),
        ({"n_yielded": 10**12}, "n_yielded=1000000000000 in state must lie in 0 … 39;"),
        ({"n_yielded": -1}, "n_yielded=-1 in state must lie in 0 … 39;"),
        ({"epoch": -1}, "epoch=-1 in state must lie in 0 …"),
        ({"epoch": 2**63}, "epoch=9223372036854775808 in state must lie in 0 …"),
        ({"world_size": 0}, "world_size=0 in state must lie in 1 …"),
        ({"world_size": 10**9}, "world_size=1000000000 in state must lie in 1 …"),
        ({"num_workers": 10**9}, "num_workers=1000000000 in state must lie in 0 …"),
        ({"num_workers": 2, "worker_id": 2}, "worker_id=2 in state must lie in 0 … 1;"),
        ({"num_workers": 2, "worker_id": 1, "n_yielded": 21}, "n_yielded=21 in state must lie in 0 … 20;"),
        ({"earlier": [[10**9, 1, 1]]}, "earlier=1000000000 in state must lie in 1 …"),
        ({"earlier": [[1, 1, 41]]}, "earlier=41 in state must lie in 0 … 39;"),
        ({"earlier": [[1, 1, 30]], "n_yielded": 10}, "n_yielded=10 in state must lie in 0 … 9;"),
    ],
)
def test_a_state_out_of_range_is_refused(whole: Snapshot, change: dict[str, Any], message: str) -> None:
    dataset = dataset_of(whole, shuffle_scope="global" if "earlier" in change else "partition")
    with pytest.raises(ValueError, match=f"^{message}.* load a state as it was saved, or start anew"):
        dataset.load_state_dict({**dataset.state_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_yielded": 1.5}, "n_yielded=1.5 in state must be an integer, not a float"),
        ({"world_size": None}, "world_size=None in state must be an integer"),
        ({"epoch": True}, "epoch=True in state must be an integer, not a bool"),
        ({"earlier": [[1, 1]]}, r"earlier=\[\[1, 1\]\] in state must be a list of three numbers each"),
        ({"seed": "five"}, "seed='five' must be an integer"),
    ],
)
def test_a_state_of_other_types_is_refused(whole: Snapshot, change: dict[str, Any], message: str) -> None:
    dataset = dataset_of(whole, seed=None if "seed" in change else 5)
    with pytest.raises(TypeError, match=f"^{message}"):
        dataset.load_state_dict({**dataset.state_dict(), **change})
    state = dataset.state_dict()
    del state["worker_id"]
    with pytest.raises(TypeError, match="but has no 'worker_id'; load that of this dataset"):
        dataset.load_state_dict(state)


def test_a_state_holds_plain_values_whatever_types_the_options_had(store: Store, tmp_path: Path) -> None:
    sizes = {"batch_size": np.int32(8), "io_batch_size": "auto", "shuffle_chunk_size": np.int64(4)}
    dataset = store.dataset(seed=np.uint16(5), **sizes)
    torch.save(dataset.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == json.loads(json.dumps(dataset.state_dict()))
    dataset.load_state_dict(state)


def test_in_partition_scope_another_world_size_is_refused(whole: Snapshot) -> None:
    with at(Place(0, 2, 0, 0)):
        dataset = dataset_of(whole)
        next(iter(dataset))
        state = dataset.state_dict()
    resumed = dataset_of(whole)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="state must be of 1 ranks with 1 workers, but is of 2 with 1"):
        next(iter(resumed))


layouts = st.tuples(st.integers(1, 4), st.integers(1, 3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layouts=st.lists(layouts, min_size=2, max_size=3),
    n_yielded=st.lists(st.integers(0, 4), min_size=2, max_size=2),
    n_rows=st.integers(4, 120),
    batch_size=st.integers(1, 9),
    tail=st.sampled_from(TAILS),
    chunk=st.sampled_from([1, 3, "auto", None]),
    io_batch_size=st.integers(1, 50),
    epoch=st.integers(0, 3),
)
def test_with_other_ranks_and_workers_no_row_of_the_epoch_is_lost_or_repeated(
    layouts: list[tuple[int, int]],
    n_yielded: list[int],
    n_rows: int,
    batch_size: int,
    tail: Any,
    chunk: Any,
    io_batch_size: int,
    epoch: int,
) -> None:
    from tiledbsoma_ml._epoch.position import Position

    ids = QueryIDs(obs_joinids=np.arange(n_rows) * 3, var_joinids=[0])
    plan = Plan(
        shuffle_chunk_size=chunk,
        io_batch_size=io_batch_size,
        batch_size=batch_size,
        permutes=chunk is not None,
        layout=Layout(16, 10.0) if chunk == "auto" else None,
        scope="global",
        tail=tail,
    )
    position, rows = Position(epoch=epoch), []
    for k, (world_size, n_workers) in enumerate(layouts):
        is_last = k == len(layouts) - 1
        n_now = 10**6 if is_last else n_yielded[k]
        lengths = []
        for rank in range(world_size):
            of_workers = []
            for worker in range(n_workers):
                place = Partition(rank, world_size, worker, n_workers)
                part = EpochPart(ids=ids, partition=place, seed=3, epoch=epoch, earlier=position.stages)
                found = np.concatenate([np.empty(0, np.int64), *plan.of(part).io_batches()])
                batches = [found[b : b + batch_size].tolist() for b in range(0, len(found), batch_size)]
                assert len(batches) == plan.of(part).n_mini_batches
                padding = set() if is_last is False else set(plan.of(part).padding().tolist())
                of_workers.append([[row for row in batch if row not in padding] for batch in batches])
            taken: list[list[int]] = []
            while any(of_workers):
                taken += [mine.pop(0) for mine in of_workers if mine]
            rows += [row for batch in taken[:n_now] for row in batch]
            lengths.append(len(taken))
        assert len(set(lengths)) == 1
        done = min(n_now, lengths[0])
        position = Position(
            epoch=epoch,
            world_size=world_size,
            num_workers=n_workers,
            n_yielded=done,
            earlier=position.stages,
        )
    if tail == "drop":
        assert len(set(rows)) == len(rows)
        assert n_rows - len(rows) < layouts[-1][0]
    assert set(rows) <= set(ids.obs_joinids.tolist())
    if tail == "pad":
        assert set(rows) == set(ids.obs_joinids.tolist())
