"""Datasets of an experiment that is read in several windows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np

from matrix_source import unchanged
from stores import N_VARS, Store, joinids_of
from tiledbsoma_ml import ExperimentDataset, Fields, Layout, QueryIDs
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._order.plan import Plan
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.held_rows import ByteLimit
from tiledbsoma_ml._soma.reader import SOMAReader
from tiledbsoma_ml._soma.source import SOMASource

LONG = 1_000  # seconds; only a failure waits as long

AUTO = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
N_ROWS, TILE = 2000, 32

SMALL = 43_000
"""Bytes of windows that hold a few hundred rows of these tiny experiments."""


@attrs.frozen
class WindowsBudget(Budget):
    """A budget of which so many bytes are left for windows."""

    windows_bytes: int = 0

    @property
    def windows(self) -> int:
        return self.windows_bytes


class Windowed(SOMASource):
    """A query on an experiment that tells which windows it was read in.

    Its readers give each piece as `given` returns it.

    Args:
        store: The experiment.
        ids: The query.
        windows_bytes: Bytes of windows, whatever the budget; those of the budget if None.
        row_bytes: Bytes that a row is said to take up; a sample tells if None.
        rows_held: Rows of a read that memory is said to hold; if None, its bytes and those of a row tell.
        make_limit: Makes the limit of windows.
    """

    def __init__(
        self,
        store: Store,
        ids: QueryIDs,
        *,
        windows_bytes: int | None = None,
        row_bytes: int | None = None,
        rows_held: int | None = None,
        make_limit: Callable[[float], ByteLimit] = ByteLimit,
    ) -> None:
        super().__init__(store.locator, ids, make_limit=make_limit)
        self.windows_bytes, self.row_bytes, self.rows_held = windows_bytes, row_bytes, rows_held
        self.asked: list[np.ndarray] = []
        self.given: Callable[[Rows[Any]], Rows[Any]] = unchanged

    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        budget = self.changed(budget)
        layout = super().layout(ids, budget)
        if self.row_bytes is None:
            return layout
        n_rows = int(budget.share_of_windows().planned_bytes / self.row_bytes)
        return attrs.evolve(layout, bytes_per_row=self.row_bytes, window_rows=n_rows)

    def open(self, ids: Any, fields: Fields, budget: Budget) -> Any:
        budget = self.changed(budget)
        rows_held = self.rows_held
        if rows_held is None and self.row_bytes is not None:
            rows_held = max(1, budget.share_of_windows().planned_bytes // self.row_bytes)
        return Watched(super().open(ids, fields, budget), self, rows_held)

    def changed(self, budget: Budget) -> Budget:
        if self.windows_bytes is None:
            return budget
        return WindowsBudget(**attrs.asdict(budget, recurse=False), windows_bytes=self.windows_bytes)


class Watched:
    """A reader that keeps which rows are read together, of which memory holds `rows_held` unless None."""

    def __init__(self, reader: SOMAReader, source: Windowed, rows_held: int | None) -> None:
        self.reader, self.source, self.rows_held = reader, source, rows_held
        self.row_tile = reader.row_tile

    def n_rows_held(self) -> int:
        return self.rows_held or self.reader.n_rows_held()

    def read(self, obs_joinids: np.ndarray) -> Iterator[Rows[Any]]:
        self.source.asked.append(obs_joinids)
        return map(self.source.given, self.reader.read(obs_joinids))

    def read_some(self, obs_joinids: np.ndarray) -> tuple[int, Iterator[Rows[Any]]]:
        self.source.asked.append(obs_joinids)
        n_rows, pieces = self.reader.read_some(obs_joinids)
        self.source.asked[-1] = obs_joinids[:n_rows]
        return n_rows, map(self.source.given, pieces)

    def close(self) -> None:
        self.reader.close()


def dataset_of(
    store: Store,
    rows: Sequence[int] | np.ndarray = range(N_ROWS),
    var_joinids: Sequence[int] = range(N_VARS),
    *,
    windows_bytes: int | None = None,
    row_bytes: int | None = None,
    rows_held: int | None = None,
    make_limit: Callable[[float], ByteLimit] = ByteLimit,
    **options: Any,
) -> ExperimentDataset:
    """Return a dataset of a `Windowed` source: sparse, with sizes that are "auto" unless given."""
    ids = QueryIDs(obs_joinids=rows, var_joinids=var_joinids)
    source = Windowed(
        store,
        ids,
        windows_bytes=windows_bytes,
        row_bytes=row_bytes,
        rows_held=rows_held,
        make_limit=make_limit,
    )
    defaults = {"batch_size": 32, "seed": 1, "return_sparse_X": True, **AUTO}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* changes nothing here: ")
        return ExperimentDataset(source=source, **{**defaults, **options})


def plan(dataset: ExperimentDataset) -> Plan:
    """Return the plan, which says in the log what it costs when it is first asked for."""
    return dataset.plan


def window_lengths(dataset: ExperimentDataset) -> list[int]:
    """Return how many rows of an epoch are read together, window after window."""
    assert isinstance(dataset.source, Windowed)
    dataset.source.asked.clear()
    joinids_of(dataset)
    return [len(obs_joinids) for obs_joinids in dataset.source.asked]
