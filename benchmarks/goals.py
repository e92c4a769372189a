"""What is aimed at: figures that follow from the table, all of them ratios or differences within one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cases import TUNED

Results = Mapping[str, Mapping[str, Any]]
"""Records of the cases that were measured, by name: medians over the repetitions."""


@dataclass(frozen=True)
class Goal:
    """A figure, and the least or most that it should be."""

    what: str
    figure: Callable[[Results], float]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    def assess(self, results: Results) -> dict[str, Any]:
        """Return the goal as a row: its figure, and whether it is "met" or "missed"; or "not measured"."""
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        row = {"what": self.what, "goal": f"{bound} {self.unit}".strip()}
        try:
            figure = self.figure(results)
        except (KeyError, TypeError, ValueError):
            return {**row, "figure": None, "verdict": "not measured"}
        met = figure >= self.at_least if self.at_least is not None else figure <= self.at_most
        return {**row, "figure": figure, "verdict": "met" if met else "missed"}


def assess_goals(results: Results) -> list[dict[str, Any]]:
    """Return all goals as rows."""
    return [goal.assess(results) for goal in GOALS]


def _faster(case: str, than: str) -> Callable[[Results], float]:
    return lambda results: results[case]["rows_per_s"] / results[than]["rows_per_s"]


def _of_scan(case: str) -> Callable[[Results], float]:
    return lambda results: results[case]["of_scan"]


def _field(case: str, name: str) -> Callable[[Results], float]:
    return lambda results: float(results[case][name])


def _beyond(name: str, case: str, other: str) -> Callable[[Results], float]:
    """Return how much larger a figure is in one case than in another."""
    return lambda results: results[case][name] - results[other][name]


def _within_budget(case: str, budget_mib: int) -> Goal:
    what = f"peak memory above the imports, {case}"
    return Goal(what, _field(case, "peak_mib"), at_most=budget_mib, unit="MiB")


_OLD = "0.1.0 default, sparse"

GOALS = (
    Goal("auto, sparse, against 0.1.0 with its defaults", _faster("auto, sparse", _OLD), at_least=8),
    Goal("auto, sparse, against the tuned scan", _of_scan("auto, sparse"), at_least=0.65),
    Goal(
        "auto, sparse, CPU beyond the tuned scan's",
        _beyond("cpu_ns_per_nnz", "auto, sparse", TUNED),
        at_most=9,
        unit="ns per non-zero",
    ),
    Goal("defaults, sparse, against the tuned scan", _of_scan("default, sparse"), at_least=0.55),
    Goal("defaults, sparse, against 0.1.0", _faster("default, sparse", _OLD), at_least=12),
    Goal(
        "defaults in 256 MiB with a window on disk, against the tuned scan",
        _of_scan("default 256MiB, window on disk"),
        at_least=0.4,
    ),
    Goal(
        "chunk 2048, sparse, against 0.1.0 with the same",
        _faster("chunk 2048, sparse", "0.1.0 chunk 2048, sparse"),
        at_least=2,
    ),
    Goal(
        "chunk 2048, dense, against 0.1.0 with the same",
        _faster("chunk 2048, dense", "0.1.0 chunk 2048, dense"),
        at_least=3,
    ),
    Goal(
        "auto, 10 % scattered, against a raw read of their tiles",
        _of_scan("auto, 10 % scattered"),
        at_least=0.6,
    ),
    Goal(
        "chunk 64, training layout, against the tuned scan of that layout",
        _of_scan("chunk 64, training layout"),
        at_least=0.6,
    ),
    Goal(
        "peak memory above the imports, defaults, against 0.1.0",
        lambda results: results["default, sparse"]["peak_mib"] / results[_OLD]["peak_mib"],
        at_most=0.35,
    ),
    Goal(
        "auto 256MiB, against a raw read of the same runs",
        lambda results: results["auto 256MiB"]["reread_s"] / results["auto 256MiB"]["seconds"],
        at_least=0.7,
    ),
    Goal(
        "auto 256MiB with a window on disk, against the tuned scan",
        _of_scan("auto 256MiB, window on disk"),
        at_least=0.4,
    ),
    _within_budget("auto 256MiB", 256),
    _within_budget("auto 512MiB", 512),
    _within_budget("auto 1GiB", 1024),
    _within_budget("auto 2GiB", 2048),
    Goal(
        "anonymous memory above the imports, auto 256MiB, window on disk",
        _field("auto 256MiB, window on disk", "peak_anon_mib"),
        at_most=256,
        unit="MiB",
    ),
    Goal(
        "first mini-batch, defaults, beyond a raw read of the 65,536 rows shuffled with it",
        lambda results: results["default, sparse"]["first_s"] - results["default, sparse"]["first_raw_s"],
        at_most=1.5,
        unit="s",
    ),
    Goal(
        "first mini-batch, defaults, cold kernels beyond warm ones",
        _beyond("first_s", "first mini-batch, defaults, cold kernels", "first mini-batch, defaults"),
        at_most=4,
        unit="s",
    ),
    Goal(
        "S3, 50 ms later each request, against no delay",
        _faster("S3 50 ms, auto, second epoch", "S3 0 ms, auto, second epoch"),
        at_least=0.6,
    ),
    Goal("plan 100M ids", _field("plan 100M ids, chunk 64", "seconds"), at_most=1.5, unit="s"),
    Goal(
        "plan 100M ids, memory beside them",
        _field("plan 100M ids, chunk 64", "peak_mib"),
        at_most=1000,
        unit="MB",
    ),
    Goal(
        "memory of a worker for 100M ids (800 MB)",
        _field("start 2 workers, 100M ids", "worker_mib"),
        at_most=80,
        unit="MiB",
    ),
    Goal(
        "snapshot, chunk 64, sparse, against 0.1.0 on SOMA",
        _faster("snapshot, chunk 64, sparse", _OLD),
        at_least=80,
    ),
    Goal(
        "snapshot, single rows, against chunk 64",
        _faster("snapshot, single rows, sparse", "snapshot, chunk 64, sparse"),
        at_least=0.8,
    ),
    Goal(
        "snapshot, dense, against filling such arrays with NumPy",
        lambda results: (
            results["snapshot, single rows, dense"]["rows_per_s"]
            / results["snapshot, single rows, dense"]["fill_rows_per_s"]
        ),
        at_least=0.5,
    ),
    Goal("creation of a snapshot, against the tuned scan", _of_scan("snapshot, creation"), at_least=0.5),
    Goal(
        "creation and first epoch, against the first epoch of 0.1.0",
        lambda results: (
            results[_OLD]["seconds"]
            / (results["snapshot, creation"]["seconds"] + results["snapshot, chunk 64, sparse"]["seconds"])
        ),
        at_least=5,
    ),
    Goal(
        "size of a snapshot", _field("snapshot, creation", "bytes_per_value"), at_most=4.2, unit="bytes/value"
    ),
    Goal(
        "size of a compressed snapshot",
        _field("snapshot, zstd, chunk 64, sparse", "bytes_per_value"),
        at_most=2.3,
        unit="bytes/value",
    ),
    Goal(
        "anonymous memory above the imports, snapshot, sparse",
        _field("snapshot, single rows, sparse", "peak_anon_mib"),
        at_most=300,
        unit="MiB",
    ),
    Goal(
        "scVI batches, snapshot, dense, against AnnDataLoader in memory",
        _faster("scVI batches, snapshot, dense", "scvi-tools AnnDataLoader, dense"),
        at_least=3,
    ),
    Goal(
        "scVI batches, snapshot, sparse, second epoch, against AnnDataLoader in memory",
        _faster(
            "scVI batches, snapshot, sparse, second epoch",
            "scvi-tools AnnDataLoader, sparse, second epoch",
        ),
        at_least=1.5,
    ),
    Goal(
        "scVI batches, SOMA, against TileDBDataModule on 0.1.0",
        _faster("scVI batches, SOMA, dense", "scvi-tools TileDBDataModule, 0.1.0"),
        at_least=5,
    ),
    Goal(
        "predicted against drawn mixing, 1 to 16 ranks, 0 to 4 workers, both scopes",
        _field("predicted mixing, ranks and workers", "worst"),
        at_most=0.03,
        unit="of random",
    ),
    Goal("mixing of datasets, auto 2GiB", _field("auto 2GiB", "mixing"), at_least=0.95, unit="of random"),
)
