"""What TileDB itself takes to read rows, in a process of its own that loads nothing else."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import tiledbsoma as soma
from measure import Usage, answer_with, request
from numpy.typing import NDArray

N_GENES = 2_000
FAST_CONFIG = {"soma.init_buffer_bytes": 16 * 2**20, "sm.mem.total_budget": 512 * 2**20}
"""With more memory TileDB decodes gigabytes ahead of their use, and is slower for the pages it needs."""


def axis_queries(name: str, experiment: soma.Experiment) -> dict[str, soma.AxisQuery]:
    """Return the rows and columns of "all", "scattered" and "contiguous" (10 % of the rows) or "genes"."""
    n_rows, n_genes = experiment.ms["RNA"].X["raw"].shape
    if name == "scattered":
        return {"obs_query": soma.AxisQuery(value_filter="percentile < 10")}
    if name == "contiguous":
        start = n_rows * 2 // 5
        return {"obs_query": soma.AxisQuery(coords=(slice(start, start + n_rows // 10 - 1),))}
    if name == "genes":
        genes = np.random.default_rng(0).choice(n_genes, min(N_GENES, n_genes // 10), replace=False)
        return {"var_query": soma.AxisQuery(coords=(np.sort(genes),))}
    return {}


def scan(task: dict[str, Any]) -> dict[str, Any]:
    """Read the rows of a query; with `tiles`, the whole tiles of rows that they lie in."""
    with soma.Experiment.open(task["uri"], context=context(task)) as experiment:
        with experiment.axis_query("RNA", **axis_queries(task["query"], experiment)) as query:
            ids = query.obs_joinids().to_numpy()
        n_all = experiment.obs.count
    rows = ids
    if task["tiles"]:
        tiles = np.unique(ids // task["tile_rows"])[:, None]
        rows = (tiles * task["tile_rows"] + np.arange(task["tile_rows"])).ravel()
        rows = rows[rows < n_all]
    if task.get("keep"):  # as this package does; see its `keep_freed_memory`
        np.empty(2**25 - 2**16, dtype=np.uint8)
    with Usage() as usage:
        (seconds,), nnz = _read(task, [rows], task.get("config", FAST_CONFIG))
    return {"rows": len(ids), "nnz": nnz, "seconds": seconds, **usage.record()}


def windows(task: dict[str, Any]) -> dict[str, Any]:
    """Read the rows of shuffle windows, one window after the other: the first alone, or with `reread` all."""
    saved = np.load(task["windows_file"])
    parts = np.split(saved["order"], saved["ends"][:-1])
    seconds, _ = _read(task, parts if task["reread"] else parts[:1], FAST_CONFIG)
    record = {"first_raw_s": seconds[0], "window_rows": len(parts[0])}
    return {**record, "reread_s": seconds[-1]} if task["reread"] else record


def context(task: dict[str, Any], config: dict[str, Any] | None = None) -> soma.SOMATileDBContext | None:
    """Return TileDB's settings: those that reach the data, and further ones. None if there are none."""
    settings = {**task["store"], **(config or {})}
    return soma.SOMATileDBContext(tiledb_config=settings) if settings else None


def _read(
    task: dict[str, Any], parts: list[NDArray[np.int64]], config: dict[str, Any]
) -> tuple[list[float], int]:
    """Read rows of X as Arrow tables; return the seconds after each part, and the number of values."""
    coords = [(_as_coords(np.sort(part)),) for part in parts]
    start, seconds, nnz = perf_counter(), [], 0
    with soma.open(f"{task['uri']}/ms/RNA/X/raw", context=context(task, config)) as X:
        for coord in coords:
            for table in X.read(coord).tables():
                nnz += len(table)
            seconds.append(perf_counter() - start)
    return seconds, nnz


def _as_coords(sorted_ids: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    first, last = int(sorted_ids[0]), int(sorted_ids[-1])
    return slice(first, last) if last - first == len(sorted_ids) - 1 else sorted_ids


if __name__ == "__main__":
    task = request()
    answer_with({"scan": scan, "windows": windows}[task["kind"]], task)
