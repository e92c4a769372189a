"""Row orders and splits equal those of tiledbsoma-ml 0.1.0.

They are pinned because runs that were published with 0.1.0 must be repeatable: the same query, options and
seed must train on the same cells in the same order (shuffled, epoch 0) and hold out the same cells. The
records were made with 0.1.0 itself; `golden/orders_0_1_0.json` says with which versions of its dependencies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from stores import N_OBS, Store, joinids_of, workers
from tiledbsoma_ml import QueryIDs, experiment_dataloader
from tiledbsoma_ml._common import seeded_rng
from tiledbsoma_ml._io_batch_iterable import id_batches
from tiledbsoma_ml._order.plan import Plan
from tiledbsoma_ml._query_ids import Partition

Record: TypeAlias = dict[str, Any]

RECORDS = json.loads((Path(__file__).parent / "golden" / "orders_0_1_0.json").read_text())


def ids_of(record: Record) -> QueryIDs:
    return QueryIDs(obs_joinids=np.arange(record["n"]) * record.get("step", 1), var_joinids=[0])


def assert_recorded(found: np.ndarray, recorded: list[int] | Record) -> None:
    """Assert that joinids are the recorded ones: a list, or length, both ends and hash of a long one."""
    if isinstance(recorded, list):
        assert found.tolist() == recorded
    else:
        assert len(found) == recorded["n_rows"]
        assert found[: len(recorded["head"])].tolist() == recorded["head"]
        assert found[-len(recorded["tail"]) :].tolist() == recorded["tail"]
        assert hashlib.sha256(found.astype("<i8").tobytes()).hexdigest() == recorded["sha256"]


def recorded_order(record: Record) -> list[int] | Record:
    return record.get("order", record)


def name(record: Record) -> str:
    return "-".join(f"{key}={value}" for key, value in record.items() if not isinstance(value, list | str))


# Splits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS["splits"], ids=lambda r: f"{r['method']}-{r['fracs']}-{name(r)}")
def test_the_parts_of_a_split_are_those_of_0_1_0(record: Record) -> None:
    parts = ids_of(record).random_split(*record["fracs"], seed=record["seed"], method=record["method"])
    for part, recorded in zip(parts, record["parts"], strict=True):
        assert_recorded(part.obs_joinids, recorded)


# Orders ---------------------------------------------------------------------------------------------------


def planned_mini_batches(record: Record, worker: int) -> list[list[int]]:
    """Return the joinids that one worker yields, `batch_size` at a time."""
    place = Partition(record["rank"], record["world_size"], worker, max(record["num_workers"], 1))
    size, seed = record["shuffle_chunk_size"], record["seed"]
    plan = Plan(shuffle_chunk_size=size, io_batch_size=record["io_batch_size"], batch_size=1, permutes=True)
    ids = ids_of(record).partitioned(place)
    batches = [batch.tolist() for batch in plan.id_batches(ids, seed=seed, epoch=0)]
    of_chunks = id_batches(ids.shuffle_chunks(size, seed), record["io_batch_size"], seeded_rng(seed))
    assert [batch.tolist() for batch in of_chunks] == batches
    order = [joinid for batch in batches for joinid in batch]
    return [order[k : k + record["batch_size"]] for k in range(0, len(order), record["batch_size"])]


@pytest.mark.parametrize("record", RECORDS["cases"], ids=name)
def test_the_order_that_is_planned_is_that_of_0_1_0(record: Record) -> None:
    of_workers = [planned_mini_batches(record, worker) for worker in range(max(record["num_workers"], 1))]
    in_turn = chain.from_iterable(zip_longest(*of_workers, fillvalue=[]))
    assert_recorded(np.array(list(chain.from_iterable(in_turn)), dtype=np.int64), recorded_order(record))


# From here on with a real experiment, and only some of the cases.


def find(**wanted: int) -> Record:
    """Return the first recorded case with these values."""
    return next(record for record in RECORDS["cases"] if wanted.items() <= record.items())


END_TO_END = [
    find(n=100, world_size=1, num_workers=0, shuffle_chunk_size=4),
    find(n=100, world_size=1, num_workers=0, io_batch_size=65536),
    find(n=101, world_size=2, rank=1, num_workers=0),
    find(n=7, world_size=3, rank=2),
    find(n=335, step=3, shuffle_chunk_size=8),
]


def loaded_order(store: Store, record: Record, load: Callable[..., Any], **options: Any) -> np.ndarray:
    dataset = store.dataset(
        ids_of(record).obs_joinids,
        batch_size=record["batch_size"],
        io_batch_size=record["io_batch_size"],
        shuffle_chunk_size=record["shuffle_chunk_size"],
        seed=record["seed"],
    )
    return joinids_of(load(dataset, **options))


@pytest.fixture(scope="module")
def large_store(make_store: Callable[..., Store]) -> Store:
    return make_store(obs_joinids=range(1003))


@pytest.mark.parametrize("record", END_TO_END, ids=name)
def test_a_dataset_yields_the_rows_of_an_experiment_in_the_order_of_0_1_0(
    store: Store, large_store: Store, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    monkeypatch.setenv("RANK", str(record["rank"]))
    monkeypatch.setenv("WORLD_SIZE", str(record["world_size"]))
    fits = record["n"] * record["step"] <= N_OBS
    assert_recorded(loaded_order(store if fits else large_store, record, iter), recorded_order(record))


def test_a_dataloader_with_workers_yields_the_rows_of_an_experiment_in_the_order_of_0_1_0(
    store: Store,
) -> None:
    record = find(n=100, num_workers=2)
    found = loaded_order(store, record, experiment_dataloader, **workers(2))
    assert_recorded(found, recorded_order(record))
