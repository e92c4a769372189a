"""Several processes that train together: real ones, with a collective in every step."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stores import Store
from tiledbsoma_ml import experiment_dataloader

PREAMBLE = """
import json, logging, os, sys
import numpy as np, torch
from tiledbsoma_ml import ExperimentDataset, QueryIDs, XLocator, experiment_dataloader

rank, locator = int(os.environ["RANK"]), XLocator(**json.loads(sys.argv[1]))

def dataset_of(n_rows, **options):
    ids = QueryIDs(obs_joinids=np.arange(n_rows), var_joinids=np.arange(4))
    return ExperimentDataset(x_locator=locator, query_ids=ids, batch_size=4, **options)

def train(loader):
    rows, steps = [], torch.zeros(1)
    for X, obs in loader:
        torch.distributed.all_reduce(steps.add_(1))  # hangs if another rank has fewer
        rows += obs["soma_joinid"].tolist()
    return rows

def found(case):
    try:
        return case()
    except Exception as err:
        return f"{type(err).__name__}: {err}"
"""


def run_ranks(script: str, store: Store, world_size: int = 2) -> list[Any]:
    """Run a script as so many processes of one group; return what each printed last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "torch.distributed.init_process_group('gloo')\n"
    code = PREAMBLE + start + script
    processes = []
    for rank in range(world_size):
        ranks = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in ranks.items()}
        command = [sys.executable, "-c", code, json.dumps(attrs.asdict(store.locator))]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size
    return [json.loads(output.splitlines()[-1]) for output in outputs]


CASES = [
    {"n_rows": n_rows, "shuffle_scope": scope, "tail": tail}
    for n_rows, scope, tail in product((2, 7, 8, 101), ("partition", "global"), ("drop", "pad"))
]


def test_ranks_finish_an_epoch_together_whatever_the_number_of_rows(store: Store) -> None:
    script = f"print(json.dumps([train(dataset_of(seed=1, **case)) for case in {CASES!r}]))"
    first, second = run_ranks(script, store)
    for case, rows, others in zip(CASES, first, second, strict=True):
        assert len(rows) == len(others)
        n_rows = case["n_rows"]
        assert len({*rows, *others}) == (n_rows if case["tail"] == "pad" else n_rows // 2 * 2)


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
print(json.dumps([found(case) for case in cases]))
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
print(json.dumps([*told, group.num_keys()]))
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
print(json.dumps([train(dataset), train(dataset), dataset.state_dict()["seed"], log.getvalue()]))
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


@pytest.mark.parametrize(("ranks", "expected"), [((0, 1), range(40)), ((2, 4), range(20, 30))])
def test_ranks_that_are_given_are_those_that_count(
    store: Store, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, int], expected: range
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = store.dataset(range(40), shuffle=False, ranks=ranks)
    assert [row for _, obs in dataset for row in obs["soma_joinid"]] == list(expected)
    with pytest.raises(ValueError, match="seed=None must be a number where 4 ranks share one shuffle"):
        next(iter(store.dataset(shuffle_scope="global", ranks=(2, 4))))


@pytest.mark.parametrize(
    ("ranks", "error", "message"),
    [
        ((1, 1), ValueError, r"ranks=\(1, 1\) must be a rank below the number of ranks; try \(0, 1\)"),
        (1, TypeError, r"ranks=1 must be two integers, the rank and the number of ranks"),
        ((0.0, 1), TypeError, r"ranks=0.0 must be an integer of at least 0"),
        ((0, 0), ValueError, r"ranks=0 must be a positive integer"),
    ],
)
def test_ranks_must_be_a_rank_and_a_number_of_ranks(
    store: Store, ranks: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        store.dataset(ranks=ranks)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, 3),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a batch script, not started by srun
    ],
)
def test_tasks_of_srun_are_ranks(
    store: Store, monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], expected: int | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rows = [row for _, obs in store.dataset(range(40), shuffle=False) for row in obs["soma_joinid"]]
    assert rows == (list(range(40)) if expected is None else list(range(30, 40)))


def test_parts_are_told_once_what_one_shuffle_would_give(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level("INFO", logger="tiledbsoma_ml"):
        dataset = store.dataset(seed=1)
        next(iter(dataset))
        next(iter(dataset))
        next(iter(store.dataset(seed=1, shuffle_scope="global")))
    told = [message for message in caplog.messages if "shuffle_scope='partition' shuffles each" in message]
    assert len(told) == 1
    assert "of the 2 parts" in told[0]


INTERRUPTED = """
from tiledbsoma_ml import ExperimentDataset, QueryIDs, XLocator, experiment_dataloader
import json, numpy as np, sys

if __name__ == "__main__":
    ids = QueryIDs(obs_joinids=np.arange(300), var_joinids=np.arange(4))
    dataset = ExperimentDataset(x_locator=XLocator(**json.loads(sys.argv[1])), query_ids=ids)
    loader = experiment_dataloader(dataset, num_workers=int(sys.argv[2]))
    while True:
        for _ in loader:
            print("yielded", flush=True)
"""


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def members(group: int) -> Iterator[int]:
    """Yield the processes of a group that are still there."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            yield int(path.parent.name)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_ctrl_c_in_the_middle_of_an_epoch_leaves_nothing_behind(
    store: Store, tmp_path: Path, n_workers: int
) -> None:
    script = tmp_path / "train.py"
    script.write_text(INTERRUPTED)
    before = shared_memory()
    arguments = [json.dumps(attrs.asdict(store.locator)), str(n_workers)]
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline() == b"yielded\n"
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode in (-signal.SIGINT, 130, 1)
    for _ in range(3_000):
        if not list(members(process.pid)):
            break
        time.sleep(0.1)
    assert list(members(process.pid)) == []
    assert {name for name in shared_memory() - before if name.startswith("torch_")} == set()


def test_a_plan_of_many_ranks_and_workers_over_many_rows_is_that_of_its_part() -> None:
    from tiledbsoma_ml import QueryIDs
    from tiledbsoma_ml._order.plan import EpochPart, Plan
    from tiledbsoma_ml._query_ids import Partition

    ids = QueryIDs(obs_joinids=np.arange(200_000), var_joinids=[0])
    plan = Plan(shuffle_chunk_size=64, io_batch_size=2048, batch_size=128, permutes=True, scope="global")
    places = [Partition(rank, 64, worker, 8) for rank, worker in product(range(64), range(8))]
    parts = [EpochPart(ids=ids, place=place, seed=1, epoch=2) for place in places]
    rows = np.concatenate([row for part in parts for row in plan.batches_of(part)])
    assert len(rows) == len(np.unique(rows)) == 200_000
