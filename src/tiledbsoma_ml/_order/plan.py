"""The plan of an epoch: in which order its rows come, what is read together, and who yields what.

A dataset has one `Plan`, and an epoch of it one `PartPlan` in each process that reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import attrs
import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId, seeded_rng
from tiledbsoma_ml._order.order import Chunked, Order, Stored, Tiled, chunk_starts, in_order, is_sorted
from tiledbsoma_ml._order.share import ALONE, Deal, ShuffleScope, Stage
from tiledbsoma_ml._order.sizes import (
    ENOUGH_ROWS,
    Layout,
    Size,
    Sizes,
    choose_sizes,
    predicted_mixing,
    window_borders,
)
from tiledbsoma_ml._order.windows import Windows, next_borders
from tiledbsoma_ml._query_ids import Partition, QueryIDs, Tail, rows_per_rank


@attrs.frozen(kw_only=True)
class EpochPart:
    """What one worker of one rank reads of an epoch.

    Attributes:
        ids: The whole query.
        place: The worker and its rank.
        seed: The seed of the shuffle.
        epoch: The number of the epoch.
        skip: How many of its mini-batches were yielded before.
        earlier: What was yielded before by other ranks or workers.
    """

    ids: QueryIDs
    place: Partition
    seed: int
    epoch: int
    skip: int = 0
    earlier: tuple[Stage, ...] = ()


@attrs.frozen(kw_only=True)
class Plan:
    """How the rows of a query are ordered, and put into windows that are read together.

    Attributes:
        shuffle_chunk_size: Neighbouring rows that stay together until they are read; None: all, in the order
            of the query.
        io_batch_size: Rows of a window.
        batch_size: Rows per mini-batch.
        permutes: Whether the rows of each window are permuted.
        mixing: The mixing that "auto" should reach, see `choose_sizes`.
        layout: How the layer is stored, and what a window may hold; needed where a size is "auto".
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
        """What the order of rows depends on, beside what the user gave: what "auto" is chosen from."""
        if self.layout is None:
            return []
        rows, tile = self.layout.window_rows, self.layout.row_tile
        return [tile, rows if tile > 1 or rows is None else min(rows, ENOUGH_ROWS), self.mixing]

    def of(self, part: EpochPart) -> PartPlan:
        """Return the plan of a part of an epoch; keep it for all that is asked about that part."""
        return PartPlan(plan=self, part=part)

    def n_mini_batches(self, part: EpochPart) -> int:
        """Return how many mini-batches a part has, with those that it skips."""
        return self.of(part).n_mini_batches

    def batches_of(self, part: EpochPart) -> Iterator[NDArrayJoinId]:
        """Yield the joinids of a part, as many at a time as are read together."""
        return self.of(part).batches()

    def padding_of(self, part: EpochPart) -> NDArrayJoinId:
        """Return the joinids of the rows of a part that another rank has as well."""
        return self.of(part).padding()

    def id_batches(self, ids: QueryIDs, *, seed: int, epoch: int) -> Iterator[NDArrayJoinId]:
        """Yield all joinids of an epoch that nobody shares, as many at a time as are read together."""
        whole = attrs.evolve(ids, partition=None)
        return self.batches_of(EpochPart(ids=whole, place=ALONE, seed=seed, epoch=epoch))

    def sizes(self, ids: QueryIDs, world_size: int = 1) -> Sizes:
        """Return what "auto" stands for, where so many ranks share the rows."""
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
            batch_size=self.batch_size,
            mixing=self.mixing,
            world_size=world_size,
        )


@attrs.frozen(kw_only=True, eq=False, slots=False)
class PartPlan:
    """The plan of what one worker of one rank reads of an epoch; its order is computed once.

    In the scope "partition" the epoch has the rows of this worker alone, in the scope "global" all rows of
    the query. Beside that, only the rule differs where windows end.

    Attributes:
        plan: The plan of the dataset.
        part: The part that is planned.
    """

    plan: Plan
    part: EpochPart

    # Who yields what --------------------------------------------------------------------------------------

    @cached_property
    def ids(self) -> QueryIDs:
        """The rows of the epoch."""
        plan, part = self.plan, self.part
        return part.ids if plan.scope == "global" else part.ids.partitioned(part.place, plan.tail)

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
        """How many mini-batches the part has, with those that it skips."""
        return self._deal.n_mini_batches(self.part.place)

    @property
    def first_mini_batch(self) -> int:
        """How many mini-batches were made before those of the part, by the same draws."""
        return self._deal.mini_batches(self.part.place)[0] + self.part.skip

    @property
    def permutes(self) -> bool:
        """Whether the rows of windows come permuted, and not only on the device.

        A device permutes whole windows only, and of these the part may have a piece.
        """
        may_cut = self.plan.scope == "global" or self.part.skip > 0
        return self.plan.permutes or (self.plan.shuffle_chunk_size is not None and may_cut)

    # Rows -------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[NDArrayJoinId]:
        """Yield the joinids of the part, as many at a time as are read together."""
        return self._batches(self._deal.spans(self.part.place, self.part.skip))

    @cached_property
    def obs_joinids(self) -> NDArrayJoinId:
        """All joinids of the part, in any order; those that it skips may be among them."""
        deal, place = self._deal.own(self.part.place)
        if (place.world_size, place.n_workers) == (1, 1) and not deal.earlier:
            return self.ids.obs_joinids
        return _concatenated(self.batches())

    @property
    def var_joinids(self) -> NDArrayJoinId:
        """The columns of the query."""
        return self.ids.var_joinids

    def padding(self) -> NDArrayJoinId:
        """Return the joinids of rows that another rank has as well: those of the part, at least."""
        if self.plan.scope == "global":
            return _concatenated(self._batches(self._deal.padding(self.part.place)))
        start, _ = self.part.place.bounds(self._deal.n_rows, self.plan.tail)
        return self.ids.obs_joinids[max(0, self._deal.n_rows - start) :]

    def _batches(self, spans: list[tuple[int, int]]) -> Iterator[NDArrayJoinId]:
        return self._windows.batches(spans) if spans else iter(())

    # What is shuffled, and what is read together ----------------------------------------------------------

    @cached_property
    def order(self) -> Order:
        """The order of the epoch, before rows are permuted."""
        joinids, size = self.ids.obs_joinids, self.plan.shuffle_chunk_size
        rng = seeded_rng(self.part.seed, self.part.epoch)
        if size is None:
            return Stored(joinids=joinids, borders=self._tile_borders())
        if size == "auto":
            assert self.sizes is not None
            return Tiled.draw(in_order(joinids), self.sizes.run_length, rng)
        return Chunked.draw(joinids, size, rng)

    def _tile_borders(self) -> NDArrayJoinId:
        """Return after how many rows of the query a tile ends, where its rows are in order."""
        joinids = self.ids.obs_joinids
        if self.sizes is None or self.plan.scope == "global" or not is_sorted(joinids):
            return joinids[:0]
        return np.append(chunk_starts(joinids, self.sizes.run_length)[1:], len(joinids))

    @cached_property
    def sizes(self) -> Sizes | None:
        """What "auto" stands for; None where both sizes are numbers."""
        return self.plan.sizes(self.ids, self._world_size) if self.plan.is_auto else None

    @property
    def chunk_rows(self) -> int:
        """Rows of a shuffle chunk, or of a run of the layer from which a chunk is taken."""
        size = self.plan.shuffle_chunk_size
        if isinstance(size, int):
            return size
        assert self.sizes is not None
        return self.sizes.run_length

    @property
    def window_rows(self) -> int:
        """Rows of a window, but for the first ones, the last one, and the chunk in which it ends."""
        plan, sizes = self.plan, self.sizes
        if sizes is None:
            assert isinstance(plan.io_batch_size, int)
            return plan.io_batch_size if plan.scope == "partition" else self._whole(plan.io_batch_size)
        if plan.scope == "partition" and isinstance(plan.shuffle_chunk_size, int):
            return -(-sizes.window_rows // plan.shuffle_chunk_size) * plan.shuffle_chunk_size
        return sizes.window_rows

    @property
    def predicted_mixing(self) -> float:
        """See the function of this name."""
        n_rows = max(1, len(self.ids.obs_joinids) // self._world_size)
        if self.window_rows >= n_rows:
            return 1.0
        n_chunks = self.window_rows / min(self.chunk_rows, n_rows)
        return predicted_mixing(n_chunks, self.plan.batch_size)

    @property
    def _world_size(self) -> int:
        """The number of ranks among which windows are cut: those that began the epoch."""
        if self.part.earlier:
            return self.part.earlier[0].world_size
        return self._deal.own(self.part.place)[1].world_size

    @cached_property
    def _windows(self) -> Windows:
        deal, _ = self._deal.own(self.part.place)
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
        """Return after how many rows of a rank each window ends, but for the last one.

        In the scope "global" windows are whole mini-batches, so that none needs two windows. In the scope
        "partition" they are as they were in tiledbsoma-ml 0.1.0, and under "auto" no chunk needs two windows.
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

    def _whole(self, n_rows: int) -> int:
        """Return how many rows the mini-batches have that fit into so many rows; one at least."""
        return max(1, n_rows // self.plan.batch_size) * self.plan.batch_size


def _concatenated(batches: Iterator[NDArrayJoinId]) -> NDArrayJoinId:
    return np.concatenate([np.empty(0, dtype=np.int64), *batches])
