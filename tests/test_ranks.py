"""Several processes that train together: real ones, with a collective in every step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import pytest

from ranks import run_ranks
from stores import Store

CASES = [
    {"n_rows": n_rows, "shuffle_scope": scope, "tail": tail}
    for n_rows, scope, tail in product((2, 7, 8, 101), ("partition", "global"), ("drop", "pad"))
]


def test_ranks_finish_an_epoch_together_whatever_the_number_of_rows(store: Store) -> None:
    script = f"tell([train(dataset_of(seed=1, **case)) for case in {CASES!r}])"
    first, second = run_ranks(script, store)
    for case, rows, others in zip(CASES, first, second, strict=True):
        assert len(rows) == len(others)
        n_rows = case["n_rows"]
        assert len({*rows, *others}) == (n_rows if case["tail"] == "pad" else n_rows // 2 * 2)


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
