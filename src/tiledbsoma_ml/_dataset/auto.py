"""What "auto" stands for with a source and a budget: found out, and checked."""

from __future__ import annotations

import math
import threading
from typing import Any

import attrs

from tiledbsoma_ml._budget import FILE_SHARE, LEAST_SHARE, Budget
from tiledbsoma_ml._order.plan import Plan
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._source import Source


class LazyPlan:
    """The plan of a dataset and of all parts of it: found out once, when it is first asked for.

    Args:
        asked: The plan, as far as it is known without the source.
        source: Where rows come from.
        ids: The rows that "auto" is chosen for: those of the whole, whichever part asks first.
        budget: The memory that reading may take.
    """

    def __init__(self, asked: Plan, source: Source, ids: QueryIDs, budget: Budget) -> None:
        self._asked, self._budget = asked, budget
        self._source: Source | None = source
        self._ids: QueryIDs | None = ids
        self._plan: Plan | None = None
        self._lock = threading.Lock()

    @property
    def is_known(self) -> bool:
        """Whether it was found out, or nothing is to be found out."""
        return self._plan is not None or not self._asked.is_auto

    def get(self) -> Plan:
        """Return the plan; a snapshot that it depends on is made."""
        with self._lock:  # parts share it, on several threads perhaps
            if self._plan is None:
                plan = self._asked
                if self._ids is not None and self._source is not None:
                    plan = with_layout(plan, self._source, self._ids, self._budget)
                self._plan, self._ids, self._source = plan, None, None
            return self._plan

    def __getstate__(self) -> dict[str, Any]:
        not_needed = {"_ids": None, "_source": None} if self.is_known else {}
        return self.__dict__ | not_needed | {"_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()


def with_layout(plan: Plan, source: Source, ids: QueryIDs, budget: Budget) -> Plan:
    """Return the plan with the layout of a source, where a size is "auto".

    Raises:
        ValueError: If the budget does not hold mini-batches and one tile.
    """
    if not plan.is_auto:
        return plan
    layout = held_layout(source, ids, budget)
    if plan.io_batch_size == "auto":
        _check_holds_a_tile(layout, len(ids.obs_joinids), budget)
    return attrs.evolve(plan, layout=layout)


def held_layout(source: Source, ids: QueryIDs, budget: Budget) -> Layout:
    """Return the layout of a source, with the number of rows that the budget holds."""
    layout = source.layout(ids, budget)
    if layout.window_rows is not None:
        return layout
    return attrs.evolve(layout, window_rows=max(0, int(budget.windows / max(1.0, layout.bytes_per_row))))


def _check_holds_a_tile(layout: Layout, n_rows: int, budget: Budget) -> None:
    assert layout.window_rows is not None
    n_held = min(layout.row_tile, n_rows)
    if layout.window_rows >= n_held:
        return
    tile = f"one tile of {n_held:,} rows"
    in_file = math.ceil(n_held * layout.bytes_per_row * FILE_SHARE)
    if budget.window_dir is not None and budget.window_budget < in_file:
        raise ValueError(
            f"window_budget={budget.window_budget / 2**20:.0f} MiB must hold {tile}, "
            f"{math.ceil(in_file / 2**20)} MiB; raise it."
        )
    lacking = (n_held - layout.window_rows) * layout.bytes_per_row
    needed = math.ceil((budget.total + lacking / LEAST_SHARE) / 2**20)
    is_dense = budget.mini_batch_bytes > 0
    batches = "three mini-batches and " if is_dense else ""
    way_out = "raise it, or take a smaller batch_size or return_sparse_X=True." if is_dense else "raise it."
    raise ValueError(
        f"memory_budget={budget.total / 2**20:.0f} MiB must hold {batches}{tile} beside buffers, "
        f"{needed} MiB; {way_out}"
    )
