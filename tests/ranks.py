"""Processes of one group, with a collective in every step."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from stores import Store, fork_server
from tiledbsoma_ml import XLocator

PREAMBLE = """
import logging, os
import numpy as np, torch
from tiledbsoma_ml import ExperimentDataset, QueryIDs, experiment_dataloader

rank = int(os.environ["RANK"])

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

torch.distributed.init_process_group("gloo")
"""


def run_ranks(script: str, store: Store, world_size: int = 2) -> list[Any]:
    """Run a script as so many processes of one group; return what each told by calling `tell`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world_size):
        ranks = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in ranks.items()}
        here, there = fork_server().Pipe()
        process = fork_server().Process(target=_run, args=(script, store.locator, environment, there))
        process.start()
        there.close()
        started.append((process, here))
    told = [here.recv() for _, here in started]
    for process, here in reversed(started):
        here.send("end")
        process.join()
    assert [process.exitcode for process, _ in started] == [0] * world_size
    return told


def _run(script: str, locator: XLocator, environment: Mapping[str, str], pipe: Connection) -> None:
    os.environ.update(environment)
    exec(PREAMBLE + script, {"locator": locator, "tell": pipe.send})
    pipe.recv()  # rank 0 has the store of the group, and stays until no rank needs it
