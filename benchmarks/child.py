"""One measurement of this package, in a process of its own, which `run.py` starts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tiledbsoma as soma
from cases import AUTO
from measure import Usage, anonymous_bytes, answer_with, request
from soma_epoch import LABEL, first_batch, make_snapshot, missing_options, soma_epoch

from tiledbsoma_ml import ExperimentDataset, QueryIDs, XLocator, experiment_dataloader
from tiledbsoma_ml._query_ids import Partition

_PLAN_IO_BATCH = 65_536


def plan(task: dict[str, Any]) -> dict[str, Any]:
    """Plan an epoch from the joinids alone: partition, chunks, the ids of the first IO batch."""
    ids = QueryIDs(obs_joinids=np.arange(task["n_ids"]), var_joinids=np.arange(20_000))
    with Usage() as usage:
        part = ids.partitioned(Partition(0, 1, 0, 1))
        chunks = part.shuffle_chunks(task["chunk"], seed=0, epoch=0)
        first = np.concatenate(chunks[: _PLAN_IO_BATCH // task["chunk"]])
        first = first[np.random.default_rng(0).permutation(len(first))]
        seconds = usage.seconds()
    assert len(first) == _PLAN_IO_BATCH
    return {"rows": task["n_ids"], "seconds": seconds, **usage.record()}


def start_workers(task: dict[str, Any]) -> dict[str, Any]:
    """Start two workers on many ids and on few: what more of anonymous memory a worker then has, and time."""
    with soma.Experiment.open(task["uri"]) as experiment:
        locator = XLocator.create(experiment, "RNA", "raw")
    few, many = _start_on(locator, 1_000), _start_on(locator, task["n_ids"])
    return {
        "rows": task["n_ids"],
        "seconds": many["seconds"],
        "first_s": many["seconds"] - few["seconds"],
        "worker_mib": (many["bytes"] - few["bytes"]) / 2**20,
    }


def _start_on(locator: XLocator, n_ids: int) -> dict[str, float]:
    ids = QueryIDs(obs_joinids=np.arange(n_ids), var_joinids=np.arange(10))
    loader = experiment_dataloader(_Probe(x_locator=locator, query_ids=ids, seed=0), num_workers=2)
    with Usage() as usage:
        answers = list(loader)
        seconds = usage.seconds()
    assert sum(n for _, n in answers) == n_ids
    return {"seconds": seconds, "bytes": max(held for held, _ in answers)}


class _Probe(ExperimentDataset):
    """A dataset whose only item tells how much memory its worker has, and how many ids are its own."""

    def __iter__(self) -> Iterator[Any]:
        own = self.query_ids.partitioned().obs_joinids
        own.sum()
        yield anonymous_bytes(), len(own)


def scvi(task: dict[str, Any]) -> dict[str, Any]:
    """Measure batches for scVI, where Lightning is installed."""
    try:
        from scvi_epoch import scvi_epoch
    except ImportError as err:
        return {"status": "not installed", "why": str(err)}
    return scvi_epoch(task)


def create_snapshot(task: dict[str, Any]) -> dict[str, Any]:
    """Make a snapshot of all rows."""
    with Usage() as usage:
        snapshot = make_snapshot(task, f"{task['scratch']}/new.snapshot")
        seconds = usage.seconds()
    record = {"rows": len(snapshot), "nnz": snapshot.nnz, "seconds": seconds, **usage.record()}
    return {**record, "bytes_per_value": snapshot.nbytes / snapshot.nnz}


def predictions(task: dict[str, Any]) -> dict[str, Any]:
    """Compare the mixing that datasets predict with that of the orders that they draw, for rank 0 of many."""
    compared = []
    scopes, sizes = ("partition", "global"), ({}, {**AUTO, "memory_budget": "256MiB"})
    with (
        soma.Experiment.open(task["uri"]) as experiment,
        experiment.axis_query("RNA") as query,
        Usage() as usage,
    ):
        for n_ranks, scope, options in itertools.product((1, 4, 16), scopes, sizes):
            os.environ |= {"RANK": "0", "WORLD_SIZE": str(n_ranks)}
            dataset = ExperimentDataset(
                query, layer_name="raw", batch_size=task["batch_size"], seed=0, shuffle_scope=scope, **options
            )
            for n_workers in (0, 2, 4):
                try:
                    quality = dataset.shuffle_quality(LABEL, n_batches=64, num_workers=n_workers)
                except TypeError as err:
                    return {"status": "not available", "why": str(err)}
                compared.append((quality.predicted_mixing, quality.mixing))
        seconds = usage.seconds()
    worst = max(abs(predicted - drawn) for predicted, drawn in compared)
    return {"seconds": seconds, "worst": worst, "n_compared": len(compared), **usage.record()}


def keep_snapshot(task: dict[str, Any]) -> dict[str, Any]:
    """Make the snapshot that other cases read, if it is not there."""
    make_snapshot(task, task["options"]["snapshot"])
    return {}


def warm(task: dict[str, Any]) -> dict[str, Any]:
    """Compile the kernels of this package, if that has not been done."""
    for options in task["variants"]:
        if not missing_options(options):
            soma_epoch({**task, "options": options})
    return {}


if __name__ == "__main__":
    functions = {
        "epoch": soma_epoch,
        "first_batch": first_batch,
        "predictions": predictions,
        "plan": plan,
        "start_workers": start_workers,
        "create_snapshot": create_snapshot,
        "make_snapshot": keep_snapshot,
        "scvi": scvi,
        "warm": warm,
    }
    task = request()
    answer_with(functions[task["kind"]], task)
