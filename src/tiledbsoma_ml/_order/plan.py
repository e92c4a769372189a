"""`Plan` and `PartPlan`: the order of an epoch, its IO batches, and the ranks and workers that yield rows.

A dataset has one `Plan`. In each epoch, each process that reads has one `PartPlan`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import attrs
import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId, seeded_rng
from tiledbsoma_ml._order.mixing import Batches, Labels, Sharing, predicted_mixing
from tiledbsoma_ml._order.order import Chunked, Order, Stored, Tiled, chunk_starts, in_order, is_sorted
from tiledbsoma_ml._order.reads import ReadSizes, chunks_per_tile, tile_rows
from tiledbsoma_ml._order.share import ALONE, Deal, ShuffleScope, Spans, Stage
from tiledbsoma_ml._order.sizes import (
    ENOUGH_ROWS,
    Layout,
    Size,
    Sizes,
    choose_sizes,
    rows_per_chunk,
    window_borders,
)
from tiledbsoma_ml._order.windows import Windows, next_borders
from tiledbsoma_ml._query_ids import Partition, QueryIDs, Tail, rows_per_rank


@attrs.frozen(kw_only=True)
class EpochPart:
    """The part of an epoch that one worker of one rank reads.

    Attributes:
        ids: The whole query.
        partition: The worker and its rank.
        seed: The seed of the shuffle.
        epoch: The number of the epoch.
        skip: Number of its mini-batches that were yielded before a resume.
        earlier: The stages of the epoch before a resume with other ranks or workers.
    """

    ids: QueryIDs
    partition: Partition
    seed: int
    epoch: int
    skip: int = 0
    earlier: tuple[Stage, ...] = ()


@attrs.frozen(kw_only=True)
class Plan:
    """The rules by which the rows of a query are ordered and divided into windows.

    Attributes:
        shuffle_chunk_size: Rows per shuffle chunk; None for the order of the query, without a shuffle.
        io_batch_size: Rows of a window.
        batch_size: Rows per mini-batch.
        permutes: Whether the rows of each window are permuted.
        mixing: The mixing that "auto" should reach; see `choose_sizes`.
        layout: The layout of the layer; needed if a size is "auto".
        scope: See `ShuffleScope`.
        tail: See `Tail`.
    """

    shuffle_chunk_size: Size | None
    io_batch_size: Size
    batch_size: int
    permutes: bool
    mixing: float | None = None
    layout: Layout | None = None
    scope: ShuffleScope = "partition"
    tail: Tail = "drop"

    @property
    def is_auto(self) -> bool:
        """Whether a size is "auto", so that `layout` is needed."""
        return "auto" in (self.shuffle_chunk_size, self.io_batch_size)

    @property
    def order_key(self) -> list[object]:
        """The values that the order of rows depends on beside the options: those that "auto" is chosen by."""
        if self.layout is None:
            return []
        rows, tile = self.layout.window_rows, self.layout.row_tile
        return [tile, rows if tile > 1 or rows is None else min(rows, ENOUGH_ROWS), self.mixing]

    def of(self, part: EpochPart) -> PartPlan:
        """Return the plan of a part of an epoch; keep it, because it computes its order once."""
        return PartPlan(plan=self, part=part)

    def id_batches(self, ids: QueryIDs, *, seed: int, epoch: int) -> Iterator[NDArrayJoinId]:
        """Yield the joinids of an epoch that one process reads alone, one IO batch at a time."""
        query = attrs.evolve(ids, partition=None)
        return self.of(EpochPart(ids=query, partition=ALONE, seed=seed, epoch=epoch)).io_batches()

    def sizes(self, ids: QueryIDs, sharing: Sharing | None = None) -> Sizes:
        """Return the sizes that "auto" stands for.

        Args:
            ids: The rows that are shuffled together.
            sharing: The ranks and workers that share the query; if None, one process has all rows.
        """
        assert self.layout is not None
        window_rows = self.io_batch_size
        if window_rows == "auto":
            assert self.layout.window_rows is not None
            window_rows = self.layout.window_rows
        if self.shuffle_chunk_size is None:
            rows = max(1, min(window_rows, ENOUGH_ROWS))
            row_tile = self.layout.row_tile
            return Sizes(run_length=row_tile, window_rows=rows, first_window_rows=rows, mixing=0.0)
        return choose_sizes(
            in_order(ids.obs_joinids),
            layout=self.layout,
            window_rows=window_rows,
            mixing=self.mixing,
            sharing=sharing or Sharing(n_rows=len(ids.obs_joinids), batch_size=self.batch_size),
        )


@attrs.frozen(kw_only=True, eq=False, slots=False)
class PartPlan:
    """The plan of a part of an epoch, which computes its order once.

    In the scope "partition", the epoch has only the rows of this worker; in the scope "global", it has all
    rows of the query. Otherwise the two scopes differ only in the rows after which windows end.

    Attributes:
        plan: The plan of the dataset.
        part: The part of the epoch.
    """

    plan: Plan
    part: EpochPart

    # Mini-batches -----------------------------------------------------------------------------------------

    @cached_property
    def ids(self) -> QueryIDs:
        """Joinids of the rows of the epoch."""
        plan, part = self.plan, self.part
        return part.ids if plan.scope == "global" else part.ids.partitioned(part.partition, plan.tail)

    @cached_property
    def _deal(self) -> Deal:
        return Deal(
            n_rows=len(self.part.ids.obs_joinids),
            batch_size=self.plan.batch_size,
            tail=self.plan.tail,
            scope=self.plan.scope,
            earlier=self.part.earlier,
        )

    @property
    def n_mini_batches(self) -> int:
        """Number of mini-batches of the part, including those that it skips."""
        return self._deal.n_mini_batches(self.part.partition)

    @property
    def first_mini_batch(self) -> int:
        """Number of mini-batches that the same sequence of draws makes before those that the part yields."""
        return self._deal.mini_batches(self.part.partition)[0] + self.part.skip

    @property
    def permutes(self) -> bool:
        """Whether rows are permuted here, also where a device would permute them.

        A device can only permute complete windows, but a part may have incomplete windows.
        """
        may_cut = self.plan.scope == "global" or self.part.skip > 0
        return self.plan.permutes or (self.plan.shuffle_chunk_size is not None and may_cut)

    # Rows -------------------------------------------------------------------------------------------------

    def io_batches(self) -> Iterator[NDArrayJoinId]:
        """Yield the joinids of the part, one IO batch at a time."""
        return self._io_batches(self._spans)

    @property
    def _spans(self) -> Spans:
        return self._deal.spans(self.part.partition, self.part.skip)

    def read_sizes(self, row_tile: int) -> ReadSizes:
        """Return the sizes of reads of a layer that decodes `row_tile` neighbouring rows together."""
        joinids, size = self.ids.obs_joinids, self.plan.shuffle_chunk_size
        rows = tile_rows(joinids, row_tile)
        if size == "auto":
            chunk_rows = tile_rows(joinids, self.chunk_rows)
            per_tile = max(1.0, rows / chunk_rows)
        else:
            chunk_rows = len(joinids) if size is None else size
            per_tile = chunks_per_tile(joinids, row_tile, max(1, chunk_rows))
        return ReadSizes(
            n_rows=sum(stop - start for start, stop in self._spans),
            n_rows_of_epoch=len(joinids),
            window_rows=self.window_rows,
            chunk_rows=chunk_rows,
            tile_rows=rows,
            chunks_per_tile=per_tile,
            permutes=self.permutes,
        )

    @cached_property
    def obs_joinids(self) -> NDArrayJoinId:
        """All joinids of the part, in any order, perhaps with those that it skips."""
        deal, partition = self._deal.own(self.part.partition)
        if (partition.world_size, partition.n_workers) == (1, 1) and not deal.earlier:
            return self.ids.obs_joinids
        return _concatenated(self.io_batches())

    @property
    def var_joinids(self) -> NDArrayJoinId:
        """Joinids of the columns of the query."""
        return self.ids.var_joinids

    def padding(self) -> NDArrayJoinId:
        """Return the joinids of rows that another rank yields as well: at least those of the part."""
        if self.plan.scope == "global":
            return _concatenated(self._io_batches(self._deal.padding(self.part.partition)))
        start, _ = self.part.partition.bounds(self._deal.n_rows, self.plan.tail)
        return self.ids.obs_joinids[max(0, self._deal.n_rows - start) :]

    def _io_batches(self, spans: list[tuple[int, int]]) -> Iterator[NDArrayJoinId]:
        return self._windows.io_batches(spans) if spans else iter(())

    # Order and windows ------------------------------------------------------------------------------------

    @cached_property
    def order(self) -> Order:
        """The order of the epoch, before rows are permuted.

        Raises:
            ValueError: If it has another number of rows than the joinids, by which rows are divided.
        """
        order, n_rows = self.draw_order(), len(self.ids.obs_joinids)
        if order.n_rows != n_rows:
            raise ValueError(
                f"n_rows={order.n_rows} of {type(order).__name__} must be the number of joinids, {n_rows}; "
                "repeat joinids, or leave some out."
            )
        return order

    def draw_order(self) -> Order:
        """Return a new object of the order of the epoch; a new order is chosen here."""
        joinids, size = self.ids.obs_joinids, self.plan.shuffle_chunk_size
        rng = seeded_rng(self.part.seed, self.part.epoch)
        if size is None:
            return Stored(joinids=joinids, borders=self._tile_borders())
        if size == "auto":
            assert self.sizes is not None
            return Tiled.draw(in_order(joinids), self.sizes.run_length, rng)
        return Chunked.draw(joinids, size, rng)

    def _tile_borders(self) -> NDArrayJoinId:
        """Return the numbers of rows after which a tile ends, if the rows are in the order of the layer."""
        joinids = self.ids.obs_joinids
        if self.sizes is None or self.plan.scope == "global" or not is_sorted(joinids):
            return joinids[:0]
        return np.append(chunk_starts(joinids, self.sizes.run_length)[1:], len(joinids))

    @cached_property
    def sizes(self) -> Sizes | None:
        """The sizes that "auto" stands for; None if no size is "auto"."""
        return self.plan.sizes(self.ids, self.sharing) if self.plan.is_auto else None

    @property
    def chunk_rows(self) -> int:
        """Rows per shuffle chunk; with "auto", rows of the run of the layer that has the rows of a chunk."""
        size = self.plan.shuffle_chunk_size
        if isinstance(size, int):
            return size
        assert self.sizes is not None
        return self.sizes.run_length

    @property
    def window_rows(self) -> int:
        """Rows of a window. The first and last ones may be smaller, and a chunk at the end is not cut."""
        plan, sizes = self.plan, self.sizes
        if sizes is None:
            assert isinstance(plan.io_batch_size, int)
            if plan.scope == "partition":
                return plan.io_batch_size
            return max(1, plan.io_batch_size // plan.batch_size) * plan.batch_size  # whole mini-batches
        if plan.scope == "partition" and isinstance(plan.shuffle_chunk_size, int):
            return -(-sizes.window_rows // plan.shuffle_chunk_size) * plan.shuffle_chunk_size
        return sizes.window_rows

    def predicted_mixing(self, labels: Labels | None = None, batches: Batches = "mean") -> float:
        """Return the predicted mixing of the mini-batches of an epoch.

        Args:
            labels: The labels of the rows of the whole query; see the function `predicted_mixing`.
            batches: See `Batches`.
        """
        size, scope = self.plan.shuffle_chunk_size, self.plan.scope
        if size is None:  # a mini-batch has neighbouring rows
            chunk_rows, n_windows = float(self.plan.batch_size), {self.plan.batch_size: 1}
        else:
            chunk_rows, n_windows = self._mean_chunk_rows, self._n_windows_by_rows
        predicted = partial(
            predicted_mixing,
            self.sharing,
            chunk_rows=chunk_rows,
            labels=labels,
            batches=batches,
            ends_with_chunk=size is None or (size == "auto" and scope == "partition"),
        )
        weights = {rows: n * rows for rows, n in n_windows.items() if n * rows}
        mixing = sum(n * predicted(window_rows=rows) for rows, n in weights.items())
        return mixing / sum(weights.values()) if weights else 1.0

    @property
    def _mean_chunk_rows(self) -> float:
        """Mean number of rows of the query in a chunk."""
        if self.plan.shuffle_chunk_size != "auto":
            return self.chunk_rows
        return rows_per_chunk(in_order(self.ids.obs_joinids), self.chunk_rows)

    @property
    def _n_windows_by_rows(self) -> dict[int, int]:
        """The number of windows of a rank or part for each number of rows, before they end with chunks."""
        n_rows = math.ceil(len(self.ids.obs_joinids) / self._world_size)
        if self.sizes is None:
            return {self.window_rows: n_rows // self.window_rows, n_rows % self.window_rows: 1}
        return Counter(np.diff(window_borders(n_rows, self.sizes), prepend=0).tolist())

    @cached_property
    def sharing(self) -> Sharing:
        """The ranks and workers that share the query: those that began the epoch."""
        earlier, partition = self.part.earlier, self.part.partition
        return Sharing(
            n_rows=len(self.part.ids.obs_joinids),
            batch_size=self.plan.batch_size,
            scope=self.plan.scope,
            world_size=earlier[0].world_size if earlier else partition.world_size,
            n_workers=partition.n_workers,
        )

    @property
    def _world_size(self) -> int:
        """Number of ranks among which the rows that are shuffled together are divided."""
        return self.sharing.world_size if self.plan.scope == "global" else 1

    @cached_property
    def _windows(self) -> Windows:
        deal, _ = self._deal.own(self.part.partition)
        n_rows, world_size, tail = deal.n_rows, self._world_size, self.plan.tail
        n_rows_of_rank = rows_per_rank(n_rows, world_size, tail)
        return Windows(
            order=self.order,
            starts=[Partition(rank, world_size, 0, 1).bounds(n_rows, tail)[0] for rank in range(world_size)],
            n_rows_of_rank=n_rows_of_rank,
            borders=self._borders(n_rows_of_rank),
            make_rng=partial(seeded_rng, self.part.seed, self.part.epoch) if self.permutes else None,
        )

    def _borders(self, n_rows: int) -> Sequence[int]:
        """Return the number of rows of a rank up to the end of each window except the last one.

        In the scope "global", a window consists of whole mini-batches, so no mini-batch needs two windows. In
        the scope "partition", windows are those of tiledbsoma-ml 0.1.0; with "auto", no chunk needs two.
        """
        is_global = self.plan.scope == "global"
        if self.sizes is None or not (is_global or len(self.order.borders)):
            return range(self.window_rows, n_rows, self.window_rows)
        borders = window_borders(n_rows, self.sizes)
        if is_global:
            borders = [-(-border // self.plan.batch_size) * self.plan.batch_size for border in borders]
        else:
            borders = next_borders(self.order.borders, borders)
        return sorted({border for border in borders if border < n_rows})


def _concatenated(io_batches: Iterator[NDArrayJoinId]) -> NDArrayJoinId:
    return np.concatenate([np.empty(0, dtype=np.int64), *io_batches])
