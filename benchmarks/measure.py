"""What a process takes to deliver mini-batches. The standard library alone, since every peer runs it."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")
_SAMPLE_S = 0.02
_LINES = {"VmHWM:": "peak", "VmRSS:": "rss", "RssAnon:": "anon"}


def request() -> dict[str, Any]:
    """Return what the harness asks this process to run."""
    return json.loads(sys.argv[1])


def answer_with(function: Callable[[dict[str, Any]], dict[str, Any]], task: dict[str, Any]) -> None:
    """Answer with what a function returns, or with why it failed."""
    try:
        answer({"status": "ok", **function(task)})
    except Exception as err:
        traceback.print_exc()
        answer({"status": "failed", "why": f"{type(err).__name__}: {err}".splitlines()[0]})


def answer(record: dict[str, Any]) -> None:
    """Give a record to the harness, which reads the last line that a process prints."""
    print(json.dumps(record), flush=True)


def measure_epoch(
    open_batches: Callable[[], Iterable[Any]],
    *,
    X: Callable[[Any], Any] = lambda batch: batch,
    limit_s: float = float("inf"),
    on_batch: Callable[[Any], None] = lambda batch: None,
) -> dict[str, float]:
    """Return what it takes to open data and to use up one epoch of mini-batches, which are thrown away.

    Call it after all imports: time and memory are counted from here. An epoch that takes longer than
    `limit_s` is left there. `X` returns the matrix of a mini-batch; "nnz" is counted if it is sparse.
    """
    rows = n_batches = 0
    nnz: int | None = 0
    with Usage() as usage:
        for batch in open_batches():
            if not n_batches:
                first_s = usage.seconds()
            matrix = X(batch)
            rows, n_batches = rows + matrix.shape[0], n_batches + 1
            stored = _stored_values(matrix)
            nnz = None if nnz is None or stored is None else nnz + stored
            on_batch(batch)
            if usage.seconds() > limit_s:
                break
        seconds = usage.seconds()
    if not n_batches:
        raise ValueError("no mini-batch came")
    record = {"rows": rows, "n_batches": n_batches, "seconds": seconds, "first_s": first_s, **usage.record()}
    return record if nnz is None else {**record, "nnz": nnz}


def _stored_values(matrix: Any) -> int | None:
    """Return the number of values of a sparse matrix of SciPy or torch; None if it is dense."""
    if str(getattr(matrix, "layout", "")).startswith("torch.sparse"):
        return int(matrix._nnz())
    return int(matrix.nnz) if hasattr(matrix, "nnz") else None


class Usage:
    """Memory and CPU of this process and its children, above what this process held before.

    Peak memory of this process is the kernel's own (`VmHWM`, set back at the start). Children, and anonymous
    memory apart from mapped files, are sampled every 20 ms; for a child too, only what is above the memory
    that this process held before counts, since it has imported the same.
    """

    def __enter__(self) -> Usage:
        gc.collect()
        self._exact = _reset_peak()
        self._before = _status("self")
        self._peak_children = self._peak_anon = self._peak_rss = 0
        self._children_cpu: dict[int, float] = {}
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample_until_stopped, daemon=True)
        self._sampler.start()
        self._cpu, self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self._cpu = time.process_time() - self._cpu
        self._stop.set()
        self._sampler.join()
        self._sample()
        peak = _status("self")["peak"] if self._exact else self._peak_rss
        self._peak = peak - self._before["rss"]

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def record(self) -> dict[str, float]:
        """Return the measurements, when all is done."""
        return {
            "peak_mib": (self._peak + self._peak_children) / 2**20,
            "peak_anon_mib": self._peak_anon / 2**20,
            "cpu_s": self._cpu + sum(self._children_cpu.values()),
        }

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        now, children, anon = _status("self"), 0, 0
        for pid in child_pids():
            try:
                child = _status(pid)
                self._children_cpu[pid] = _cpu_s(pid)
            except (OSError, IndexError):
                continue  # it has just ended
            children += max(0, child.get("rss", 0) - self._before["rss"])
            anon += max(0, child.get("anon", 0) - self._before["anon"])
        self._peak_rss = max(self._peak_rss, now["rss"])
        self._peak_children = max(self._peak_children, children)
        self._peak_anon = max(self._peak_anon, now["anon"] - self._before["anon"] + anon)


def child_pids(pid: int | str = "self") -> list[int]:
    """Return the processes that descend from one."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += map(int, task.read_text().split())
        except OSError:
            continue
    return children + [grandchild for child in children for grandchild in child_pids(child)]


def anonymous_bytes() -> int:
    """Return the memory of this process that is its own: neither files nor shared."""
    return _status("self")["anon"]


def _status(pid: int | str) -> dict[str, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {_LINES[words[0]]: int(words[1]) * 1024 for words in lines if words and words[0] in _LINES}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
