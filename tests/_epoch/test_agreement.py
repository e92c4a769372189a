from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ranks import run_ranks
from stores import Store
from tiledbsoma_ml import experiment_dataloader

DISAGREE = """
import attrs

def at(**place):
    dataset = dataset_of(40, seed=1)
    dataset.load_state_dict({**dataset.state_dict(), **place})
    return dataset

def of_layer(name):
    global locator
    locator = attrs.evolve(locator, layer_name=name)
    return dataset_of(20, seed=1)

def in_second_epoch_on_one():
    dataset = dataset_of(20, seed=1)
    train(dataset)
    dataset.set_epoch(1 + rank)
    return train(dataset)

cases = [
    lambda: train(dataset_of(20, seed=rank)),
    lambda: train(dataset_of(20 + rank, seed=1)),
    lambda: train(experiment_dataloader(dataset_of(20, seed=1, shuffle_chunk_size=2 * rank + 2))),
    lambda: train(experiment_dataloader(dataset_of(20, seed=1), num_workers=2 * rank)),
    in_second_epoch_on_one,
    lambda: train(at(n_yielded=rank, world_size=1 + rank)),  # rank 0 did not load a state
    lambda: train(of_layer("raw" if rank else "scaled")),
]
tell([found(case) for case in cases])
"""


def test_ranks_that_differ_are_told_before_the_first_mini_batch(make_store: Any) -> None:
    different = ["seed", "query", "shuffle_chunk_size", "workers", "epoch", "n_yielded", "layer"]
    values = ["0", "'.*'", "2", "1", "1", "0", "'scaled'"], ["1", "'.*'", "4", "2", "2", "1", "'raw'"]
    for found in run_ranks(DISAGREE, make_store(layer_name="raw", layers=("raw", "scaled"))):
        for name, of_0, of_1, message in zip(different, *values, found, strict=True):
            rule = f"ValueError: {name} must be the same on all ranks, but is {of_0} on rank 0 and {of_1} on"
            assert re.match(rule, message), message


ALONE = """
import datetime, tempfile
limit = datetime.timedelta(seconds=1)
group = torch.distributed.distributed_c10d._get_default_store()
group.set_timeout(limit)

def rows(**options):
    loader = experiment_dataloader(dataset_of(20, seed=1, shuffle_scope="global", **options))
    return sum(len(obs) for X, obs in loader)

def on(one, case):
    told = found(case) if rank == one else None
    group.set_timeout(datetime.timedelta(minutes=10))
    torch.distributed.barrier()
    group.set_timeout(limit)
    return told

told = [on(0, rows), on(1, rows), on(1, lambda: rows(ranks=(0, 1)))]
group.set_timeout(datetime.timedelta(minutes=10))
told += [rows(), group.num_keys()]
for _ in range(5):
    rows()
tell([*told, group.num_keys()])
"""


def test_a_rank_that_iterates_alone_is_told_for_whom_it_waited_and_how_it_reads_everything(
    store: Store,
) -> None:
    one, other = run_ranks(ALONE, store)
    for told, missing in [(one[0], 1), (other[1], 0)]:
        assert told.startswith(f"TimeoutError: rank {missing} must begin the epoch as the others do, but did")
        assert "within 1 s, the timeout of the process group; iterate on all ranks alike, or give" in told
        assert "ExperimentDataset(ranks=(0, 1))" in told
    assert other[2] == 20
    assert one[3] == other[3] == 10  # and go on together
    assert abs(one[4] - one[5]) <= 3  # what they told each other is cleared away


AGREE = """
import io
log = io.StringIO()
logging.basicConfig(level="INFO", stream=log)
dataset = dataset_of(40, shuffle_scope="global")
tell([train(dataset), train(dataset), dataset.state_dict()["seed"], log.getvalue()])
"""


def test_without_a_seed_all_ranks_use_the_one_that_the_first_drew(store: Store) -> None:
    first, second = run_ranks(AGREE, store)
    assert first[2] == second[2]
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(40))
    assert f"seed=None: all 2 ranks use seed={first[2]}, drawn by rank 0" in first[3]


def test_without_a_seed_and_without_a_group_one_shuffle_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = store.dataset(shuffle_scope="global")
    plain = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    for loader in (dataset, experiment_dataloader(dataset), plain):
        with pytest.raises(ValueError, match="seed=None must be a number where 2 ranks share one shuffle"):
            next(iter(loader))
    assert len(list(store.dataset(batch_size=100))) == 2  # parts need no common seed
    in_order = {"shuffle": False, "shuffle_scope": "global"}  # nor does what is not shuffled
    assert len(list(store.dataset(batch_size=100, **in_order))) == 2


def test_replaced_functions_tell_the_ranks_and_nothing_is_agreed_on_without_a_group(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for options in ({}, {"seed": 1}, {"seed": 1, "shuffle_scope": "global"}):
        loader = experiment_dataloader(store.dataset(range(40), shuffle=False, **options))
        assert [row for _, obs in loader for row in obs["soma_joinid"]] == list(range(20, 40))
