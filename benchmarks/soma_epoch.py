"""One epoch of `tiledbsoma_ml.ExperimentDataset`, measured. This package and its 0.1.0 run the same code."""

from __future__ import annotations

import dataclasses
import inspect
import json
import time
import urllib.request
from contextlib import ExitStack
from typing import Any

import numpy as np
import tiledbsoma as soma
from latency import COUNTS_PATH
from measure import Usage, measure_epoch
from numpy.typing import NDArray
from raw import axis_queries, context
from torch.utils.data import DataLoader

from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

OBS_COLUMN_NAMES = ("soma_joinid", "cell_type")
LABEL = "dataset_id"


def soma_epoch(task: dict[str, Any]) -> dict[str, Any]:
    """Measure the epoch of a dataset with `options`, loaded with `loader`, over the rows of `query`.

    With `epochs_before`, so many epochs are used up first. How well the rows are mixed follows from those
    that came. Which of them were shuffled together is left in `windows_file`.
    """
    if missing := missing_options(task["options"]):
        return {"status": "not available", "why": f"ExperimentDataset has no {', '.join(missing)} yet"}
    kernels_s = load_kernels(task)
    batches: list[NDArray[np.int64]] = []
    with ExitStack() as stack:
        loaders: list[DataLoader[Any]] = []
        if task["epochs_before"]:
            loaders.append(_open_loader(task, stack))
        for _ in range(task["epochs_before"]):
            for _ in loaders[0]:
                pass
        asked = requests(task)
        record: dict[str, Any] = measure_epoch(
            lambda: loaders[0] if loaders else _kept(loaders, _open_loader(task, stack)),
            X=lambda batch: batch[0],
            limit_s=task["limit_s"],
            on_batch=lambda batch: batches.append(batch[1]["soma_joinid"].to_numpy()),
        )
        record |= {name: n - asked[name] for name, n in requests(task).items()}
        record["first_s"] += kernels_s
        dataset: Any = loaders[0].dataset
        if task.get("fill"):
            record["fill_rows_per_s"] = _fill_rows_per_s(task["batch_size"], dataset.shape[1])
        record["shuffle_quality"] = _own_quality(dataset, task["loader"].get("num_workers", 0))
    if "snapshot" in task["options"]:
        snapshot = dataset.source.snapshot
        record["bytes_per_value"] = snapshot.nbytes / snapshot.nnz
    obs_joinids = dataset.query_ids.obs_joinids
    record["mixing"] = mixing(_labels(task), batches, obs_joinids)
    if not task["loader"].get("num_workers") and "snapshot" not in task["options"] and not task["store"]:
        order = np.concatenate(batches)
        np.savez(task["windows_file"], order=order, ends=window_ends(order, obs_joinids, _run_rows(dataset)))
    return record


def first_batch(task: dict[str, Any]) -> dict[str, Any]:
    """Measure the time to the first mini-batch, compiled kernels included, in the folder that caches them."""
    with ExitStack() as stack, Usage() as usage:
        next(iter(_open_loader(task, stack)))
        first_s = usage.seconds()
    return {"first_s": first_s, "n_batches": 1, **usage.record()}


def requests(task: dict[str, Any]) -> dict[str, int]:
    """Return how many requests the server of the data has had, and the bytes that it sent; {} for a disk."""
    if not task["store"]:
        return {}
    url = f"http://{task['store']['vfs.s3.endpoint_override']}{COUNTS_PATH}"
    with urllib.request.urlopen(url) as response:
        return json.load(response)


def load_kernels(task: dict[str, Any]) -> float:
    """Load the compiled kernels, as an import does; return how long that took."""
    if "snapshot" in task["options"]:
        snapshot = make_snapshot(task, task["options"]["snapshot"])
        start = time.perf_counter()
        X, _ = snapshot[[0]]
        snapshot.reader().fill_dense(snapshot.obs_joinids[:1], X.toarray())
        return time.perf_counter() - start
    start = time.perf_counter()
    try:
        from tiledbsoma_ml._soma.held_rows import preload_kernels
    except ImportError:  # 0.1.0 loads what it compiles when it is imported
        return 0.0
    preload_kernels().join()
    return time.perf_counter() - start


def make_snapshot(task: dict[str, Any], path: str) -> Any:
    """Return the snapshot of all rows at a path, made if it is not there; compressed if the task says so."""
    from tiledbsoma_ml import Snapshot

    with (
        soma.Experiment.open(task["uri"]) as experiment,
        experiment.axis_query("RNA", **axis_queries("all", experiment)) as query,
    ):
        options = {"compression": task["compression"]} if "compression" in task else {}
        names = (*OBS_COLUMN_NAMES, LABEL)
        return Snapshot.create(path, query, obs_column_names=names, progress=False, **options)


def _fill_rows_per_s(n_rows: int, n_cols: int) -> float:
    """Return how fast NumPy fills one dense mini-batch, again and again in the same memory."""
    X = np.zeros((n_rows, n_cols), dtype=np.float32)
    start = time.perf_counter()
    for _ in range(50):
        X.fill(1)
    return 50 * n_rows / (time.perf_counter() - start)


def missing_options(options: dict[str, Any]) -> list[str]:
    """Return the options that the installed `ExperimentDataset` does not know. "auto" came with a budget."""
    wanted = {*options, "memory_budget"} if "auto" in options.values() else set(options)
    return sorted(wanted - set(inspect.signature(ExperimentDataset).parameters))


def _open_loader(task: dict[str, Any], stack: ExitStack) -> DataLoader[Any]:
    experiment = stack.enter_context(soma.Experiment.open(task["uri"], context=context(task)))
    axes = axis_queries(task["query"], experiment)
    with experiment.axis_query("RNA", **axes) as query:
        dataset = ExperimentDataset(
            query,
            layer_name="raw",
            obs_column_names=list(OBS_COLUMN_NAMES),
            batch_size=task["batch_size"],
            seed=0,
            **task["options"],
        )
    return experiment_dataloader(dataset, **task["loader"])


def _kept(loaders: list[DataLoader[Any]], loader: DataLoader[Any]) -> DataLoader[Any]:
    loaders.append(loader)
    return loader


# What is looked at afterwards ------------------------------------------------------------------------------


def _run_rows(dataset: ExperimentDataset) -> int:
    """Return rows that lie in one window if one of them does: those of a chunk, or of a run within tiles."""
    chunk = getattr(dataset, "shuffle_chunk_size", 64)  # 0.1.0 does not tell; no case of it has less
    if chunk != "auto":
        return min(64, int(chunk))
    return min(64, int(dataset.plan.sizes(dataset.query_ids).run_length))


def window_ends(order: NDArray[np.int64], obs_joinids: NDArray[np.int64], run_rows: int) -> NDArray[np.int64]:
    """Return where shuffle windows end: rows of an epoch, in their order, that were shuffled together.

    A run of neighbouring rows lies in one window. So a window ends where all runs that began have ended.
    """
    runs = np.searchsorted(obs_joinids, order) // run_rows
    places = np.arange(len(order))
    last = np.zeros(runs.max() + 1, dtype=np.int64)
    np.maximum.at(last, runs, places)
    return np.flatnonzero(np.maximum.accumulate(last[runs]) == places) + 1


def mixing(
    labels: NDArray[np.int64], batches: list[NDArray[np.int64]], obs_joinids: NDArray[np.int64]
) -> float | None:
    """Return the mean entropy of the labels within a mini-batch, as a share of that of a random one."""
    size = len(batches[0])
    rng = np.random.default_rng(0)
    random = np.mean([_entropy(labels[rng.choice(obs_joinids, size, replace=False)]) for _ in range(100)])
    full = [batch for batch in batches if len(batch) == size]
    return float(np.mean([_entropy(labels[batch]) for batch in full]) / random) if random else None


def _entropy(labels: NDArray[np.int64]) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log(share)).sum())


def _labels(task: dict[str, Any]) -> NDArray[np.int64]:
    with soma.Experiment.open(task["uri"], context=context(task)) as experiment:
        obs = experiment.obs.read(column_names=["soma_joinid", LABEL]).concat().to_pandas()
    return obs.sort_values("soma_joinid")[LABEL].cat.codes.to_numpy(np.int64)


def _own_quality(dataset: ExperimentDataset, num_workers: int) -> dict[str, Any] | None:
    """Return what the dataset itself says about its mixing, where it can."""
    if not hasattr(dataset, "shuffle_quality"):
        return None
    quality = dataset.shuffle_quality(LABEL, n_batches=100, num_workers=num_workers)
    if hasattr(quality, "_asdict"):
        return quality._asdict()
    if dataclasses.is_dataclass(quality):
        return dataclasses.asdict(quality)
    slots = getattr(type(quality), "__attrs_attrs__", None)
    return {a.name: getattr(quality, a.name) for a in slots} if slots else {"value": str(quality)}
