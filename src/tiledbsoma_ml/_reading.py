"""How an epoch is read: what "auto" stands for, where rows wait, and how much memory that takes."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Generator, Sequence
from pathlib import Path

import attrs
import numpy as np
import tiledbsoma as soma

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import absolute_path
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._obs import ObsColumns, ObsTypes
from tiledbsoma_ml._order.plan import EpochPart, PartPlan, Plan
from tiledbsoma_ml._order.quality import ShuffleQuality, evenly_spaced, measure_quality
from tiledbsoma_ml._order.sizes import Layout, read_amplification
from tiledbsoma_ml._parts import Extents, Pages
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._read_ahead import read_ahead
from tiledbsoma_ml._reader import (
    SOMAReader,
    check_obs_column_names,
    measure_layout,
    row_tile,
)
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._window import Room, preload_kernels
from tiledbsoma_ml.x_locator import XLocator

logger = logging.getLogger("tiledbsoma_ml")

N_PARTS = 32
"""In how many parts the rows of a window are given out, and what they held is freed."""

MAX_PARTS = 200
"""The same for windows in files."""

EXTENTS_PER_PART = 16
"""A part of a window in a file is kept in so many stretches of it, of which the last one is not full."""

FILE_SHARE = 1 + 2 / EXTENTS_PER_PART
"""Bytes of a file for each byte of two windows: one that is filled, and one that is given out."""

EXPANSION = 5.0
"""Bytes of the parts of a window that are given out at once, for each byte of one of them while it waits."""

COSTLY = 3.0
"""Times that tiles are decoded in an epoch, from which on a line of the log says so."""


@attrs.frozen(kw_only=True)
class Reading:
    """How the rows of a query are read.

    Attributes:
        locator: Address of the layer.
        obs_column_names: Columns of `obs`.
        obs_types: Their types in the query.
        plan: What is read together.
        budget: Of memory.
        window_bytes: What windows may hold together.
        window_dir: Where windows are kept in a file; in memory if None.
        extent_bytes: Size of the stretches that it consists of.
        n_parts: In how many parts a window is given out.
    """

    locator: XLocator
    obs_column_names: Sequence[str]
    obs_types: ObsTypes = attrs.field(eq=False)
    plan: Plan
    budget: Budget
    window_bytes: int
    window_dir: Path | None
    extent_bytes: int
    n_parts: int

    @classmethod
    def choose(
        cls,
        locator: XLocator,
        ids: QueryIDs,
        plan: Plan,
        *,
        obs_column_names: Sequence[str],
        budget: Budget,
        window_dir: Path | None,
        window_budget: int | None,
        permutes_on_device: bool,
        is_dense: bool,
    ) -> Reading:
        """Return how to read the rows of a query within a budget.

        Args:
            locator: Address of the layer.
            ids: The query.
            plan: What is asked for; its `layout` is measured where a size is "auto".
            obs_column_names: Columns of `obs`.
            budget: Of memory.
            window_dir: Where to keep windows in files.
            window_budget: How many bytes these may take.
            permutes_on_device: Whether IO batches are to be permuted there, which takes them as a whole.
                Those that wait in a file come in parts, and so permuted, all the same.
            is_dense: Whether mini-batches are.

        Raises:
            ValueError: If the budget does not hold mini-batches and one tile.
        """
        preload_kernels()
        memory = budget.windows - (3 * plan.batch_size * len(ids.var_joinids) * 4 if is_dense else 0)
        if "auto" in (plan.io_batch_size, plan.shuffle_chunk_size):
            plan = attrs.evolve(plan, layout=_measured(locator, ids, budget))
        if window_dir is None or window_budget is None:
            n_parts, window_bytes, extent_bytes = 1 if permutes_on_device else N_PARTS, memory, 0
            plan = attrs.evolve(plan, window_bytes=int(memory / (1 + EXPANSION / N_PARTS)))
        else:
            part_bytes = max(1, memory // 5)
            largest = window_budget
            if plan.layout is not None:
                largest = min(window_budget, math.ceil(len(ids.obs_joinids) * plan.layout.bytes_per_row))
            n_parts = min(MAX_PARTS, max(N_PARTS, math.ceil(largest / part_bytes)))
            file_bytes = min(window_budget, n_parts * part_bytes)
            extent_bytes = _power_of_two(file_bytes // n_parts // EXTENTS_PER_PART)
            window_bytes = int(file_bytes / FILE_SHARE)
            permutes = plan.permutes or permutes_on_device
            plan = attrs.evolve(plan, window_bytes=window_bytes, permutes=permutes)
        if plan.io_batch_size == "auto":
            _check_budget(plan, len(ids.obs_joinids), budget, memory, window_budget, is_dense)
        return cls(
            locator=locator,
            obs_column_names=obs_column_names,
            obs_types=ObsTypes(locator, obs_column_names, ids.obs_joinids),
            plan=plan,
            budget=budget,
            window_bytes=window_bytes,
            window_dir=window_dir,
            extent_bytes=extent_bytes,
            n_parts=n_parts,
        )

    def room(self) -> Room:
        """Return the room that the windows of an epoch share."""
        return Room(self.window_bytes)

    def rows(
        self, planned: PartPlan, *, use_eager_fetch: bool, room: Room
    ) -> Generator[Rows[CSR_IO_Buffer], None, None]:
        """Yield the rows of a part of an epoch in its order, until the room is closed."""
        preload_kernels()
        with self.locator.open(self.budget) as (X, obs):
            reader = SOMAReader(
                X,
                obs,
                planned.ids.var_joinids,
                obs_column_names=self.obs_column_names,
                obs_joinids=planned.joinids(),
                obs_types=self.obs_types,
                n_parts=self.n_parts,
                use_eager_fetch=use_eager_fetch,
                room=room,
                store=Pages() if self.window_dir is None else Extents(self.window_dir, self.extent_bytes),
            )
            batches = planned.batches()
            yield from read_ahead(batches, reader, use_eager_fetch=use_eager_fetch, room=room)

    def quality(self, part: EpochPart, column: str, n_batches: int) -> ShuffleQuality:
        """Return how well the rows of an epoch are mixed, from the plan and one column of `obs` alone."""
        planned = attrs.evolve(self.plan, permutes=self.plan.shuffle_chunk_size is not None).of(part)
        joinids = planned.joinids()
        with self.locator.open(self.budget) as (X, obs):
            check_obs_column_names([column], obs)
            labels = ObsColumns.read(obs, [column], joinids).codes(column)
            tile = row_tile(X)
        chosen = evenly_spaced(planned.batches(), self.plan.batch_size, len(joinids), n_batches)
        return measure_quality(chosen, np.unique(joinids), labels, tile)

    @property
    def order_key(self) -> list[object]:
        """What the order of rows depends on beside what the user gave: what "auto" is chosen from."""
        plan = self.plan
        if plan.layout is None:
            return []
        return [plan.layout.row_tile, round(plan.layout.bytes_per_row, 3), plan.window_bytes, plan.mixing]

    def log(self, ids: QueryIDs) -> None:
        """Tell, at the level INFO, what "auto" stands for, or what other sizes cost where that is much."""
        plan = self.plan
        if (
            not len(ids.obs_joinids)
            or plan.shuffle_chunk_size is None
            or not logger.isEnabledFor(logging.INFO)
        ):
            return
        if plan.layout is not None:
            sizes = plan.sizes(ids)
            window_mib = sizes.window_rows * plan.layout.bytes_per_row / 2**20
            window = f"windows of {sizes.window_rows:,} rows ({window_mib:.0f} MiB)"
            if plan.shuffle_chunk_size == "auto":
                chose = f"runs of {sizes.run_length:,} rows in {window}"
                logger.info("%s: mixing %.2f of random is predicted", chose, sizes.mixing)
            else:
                logger.info("runs of %d rows in %s", plan.shuffle_chunk_size, window)
        elif isinstance(plan.shuffle_chunk_size, int) and isinstance(plan.io_batch_size, int):
            self._log_cost(plan.shuffle_chunk_size, plan.io_batch_size, len(ids.obs_joinids))

    def _log_cost(self, chunk: int, io_batch: int, n_rows: int) -> None:
        with self.locator.open(self.budget) as (X, _):
            if isinstance(X, soma.DenseNDArray):
                return
            tile = row_tile(X)
        times = read_amplification(chunk, io_batch, tile, n_rows)
        if times >= COSTLY:
            logger.info(
                "shuffle_chunk_size=%d and io_batch_size=%d read every row about %.0f times in an epoch, "
                "because it is stored in tiles of %d rows; shuffle_chunk_size='auto' and "
                "io_batch_size='auto' read less and mix as well",
                chunk,
                io_batch,
                times,
                tile,
            )


def _measured(locator: XLocator, ids: QueryIDs, budget: Budget) -> Layout:
    with locator.open(budget) as (X, obs):
        if isinstance(X, soma.DenseNDArray):
            raise ValueError(
                f"shuffle_chunk_size and io_batch_size must be numbers where X is dense, as layer "
                f"{locator.layer_name!r} is; leave them out."
            )
        reader = SOMAReader(
            X, obs, ids.var_joinids, obs_column_names=["soma_joinid"], obs_joinids=ids.obs_joinids
        )
        return measure_layout(reader, row_tile(X), ids.obs_joinids)


def _check_budget(
    plan: Plan, n_rows: int, budget: Budget, memory: int, window_budget: int | None, is_dense: bool
) -> None:
    assert plan.layout is not None
    n_held = min(plan.layout.row_tile, n_rows)
    tile_bytes = n_held * plan.layout.bytes_per_row
    tile = f"one tile of {n_held:,} rows"
    if window_budget is not None and window_budget < tile_bytes * FILE_SHARE:
        raise ValueError(
            f"window_budget={window_budget / 2**20:.0f} MiB must hold {tile}, "
            f"{math.ceil(tile_bytes * FILE_SHARE / 2**20)} MiB; raise it."
        )
    held = min(plan.window_bytes, memory)
    if held < tile_bytes:
        # Of a byte of budget, four fifths go to windows.
        needed = budget.total + (tile_bytes - held) * (1 + EXPANSION / N_PARTS) / 0.55
        batches = "three mini-batches and " if is_dense else ""
        way_out = (
            "raise it, or take a smaller batch_size or return_sparse_X=True." if is_dense else "raise it."
        )
        raise ValueError(
            f"memory_budget={budget.total / 2**20:.0f} MiB must hold {batches}{tile} beside buffers, "
            f"{math.ceil(needed / 2**20)} MiB; {way_out}"
        )


def _power_of_two(size: int) -> int:
    """Return the largest power of two up to `size`, within the sizes that are written well."""
    return 1 << min(max(size.bit_length() - 1, 14), 22)


def check_window_dir(window_dir: object, window_budget: int | None) -> Path | None:
    """Return the folder for windows, if one is asked for.

    Raises:
        ValueError: If it is no folder, has less space than the budget, or one comes without the other.
    """
    if window_dir is None:
        if window_budget is not None:
            raise ValueError("window_budget needs a folder on a local disk; add window_dir='/path'.")
        return None
    folder = absolute_path(str(window_dir))
    if not folder.is_dir():
        raise ValueError(
            f"window_dir={str(folder)!r} must be an existing folder; make it, or choose another."
        )
    if window_budget is None:
        raise ValueError(f"window_dir={str(folder)!r} needs a limit; add window_budget='64GiB'.")
    free = shutil.disk_usage(folder).free
    if free < window_budget:
        raise ValueError(
            f"window_budget={window_budget / 2**30:.1f} GiB must fit into window_dir={str(folder)!r}, where "
            f"{free / 2**30:.1f} GiB are free; lower it, or choose another folder."
        )
    return folder
