"""Processes of one group, with a collective in every step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import attrs

from stores import Store

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
