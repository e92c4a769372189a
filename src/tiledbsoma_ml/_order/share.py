"""`Deal`: the division of the rows of an epoch among ranks and workers, also after a resume.

An epoch is a sequence of rows, and each worker yields spans of it. All of this is arithmetic on row numbers,
which is the same for all orders and does not look at joinids. When training resumes with other ranks or
workers, the rows that no worker has yielded are divided anew.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, TypeAlias

import attrs

from tiledbsoma_ml._query_ids import Partition, Tail, array_split_bounds, rows_per_rank

ShuffleScope: TypeAlias = Literal["partition", "global"]
"""The rows that are shuffled together: those of one worker of one rank, or all rows of the query."""

Spans: TypeAlias = list[tuple[int, int]]
"""Rows of an epoch, as the start and stop of spans of row numbers."""

ALONE = Partition(0, 1, 0, 1)
"""The partition of a process that yields all rows."""


@attrs.frozen
class Stage:
    """A stage of an epoch that ended before a resume with other ranks or workers.

    Attributes:
        world_size: Number of ranks.
        n_workers: Number of workers of each rank.
        n_yielded: Number of mini-batches that each rank yielded.
    """

    world_size: int
    n_workers: int
    n_yielded: int


@attrs.frozen(kw_only=True)
class Deal:
    """The division of the rows of an epoch among ranks and workers.

    Attributes:
        n_rows: Number of rows of the epoch.
        batch_size: Rows per mini-batch.
        tail: See `Tail`.
        scope: See `ShuffleScope`. In the scope "partition", each worker has an epoch of its own rows.
        earlier: The earlier stages of the epoch; only in the scope "global".
    """

    n_rows: int
    batch_size: int
    tail: Tail
    scope: ShuffleScope
    earlier: tuple[Stage, ...] = ()

    def own(self, partition: Partition) -> tuple[Deal, Partition]:
        """Return the deal of the rows that are shuffled with those of a worker, and its partition there.

        In the scope "global", these are all rows. In the scope "partition", they are the rows that
        `Partition.bounds` gives to the worker, and the worker yields all of them.
        """
        if self.scope == "global":
            return self, partition
        start, stop = partition.bounds(self.n_rows, self.tail)
        return attrs.evolve(self, n_rows=stop - start, scope="global", earlier=()), ALONE

    def n_mini_batches_of_rank(self, world_size: int, n_workers: int) -> int:
        """Return the number of mini-batches of each rank, with these numbers of ranks and workers."""
        if self.scope == "global":
            return math.ceil(self._n_of_rank(world_size) / self.batch_size)
        n_rows, n_larger = divmod(rows_per_rank(self.n_rows, world_size, self.tail), n_workers)
        larger, others = math.ceil((n_rows + 1) / self.batch_size), math.ceil(n_rows / self.batch_size)
        return n_larger * larger + (n_workers - n_larger) * others

    def n_mini_batches(self, partition: Partition) -> int:
        """Return the number of mini-batches of one worker of one rank."""
        start, stop = self.mini_batches(partition)
        return stop - start

    def mini_batches(self, partition: Partition) -> tuple[int, int]:
        """Return (start, stop) of a worker's mini-batches among those that one sequence of draws makes."""
        deal, within = self.own(partition)
        total = deal.n_mini_batches_of_rank(within.world_size, within.n_workers)
        return array_split_bounds(total, within.n_workers, within.worker_id)

    def spans(self, partition: Partition, skip: int = 0) -> Spans:
        """Return the rows of one worker of one rank, without its first `skip` mini-batches.

        Rows are numbered as in its `own` deal. Numbers from `n_rows` on stand for the first rows again, which
        the tail "pad" repeats.
        """
        start, stop = self.mini_batches(partition)
        deal, within = self.own(partition)
        mine = deal._of_rank(within, 0, deal._n_of_rank(within.world_size))
        return _cut(mine, (start + skip) * self.batch_size, stop * self.batch_size)

    def padding(self, partition: Partition) -> Spans:
        """Return the rows of a rank that another rank yields as well; only for the scope "global"."""
        assert self.scope == "global"
        size = self._n_of_rank(partition.world_size)
        n_real = min(max(_length(self._left) - partition.rank * size, 0), size)
        return self._of_rank(partition, n_real, size) if self.tail == "pad" else []

    def _n_of_rank(self, world_size: int) -> int:
        return rows_per_rank(_length(self._left), world_size, self.tail)

    def _of_rank(self, partition: Partition, begin: int, end: int) -> Spans:
        """Return the rows of a rank, from its row `begin` to its row `end`."""
        left, size = self._left, self._n_of_rank(partition.world_size)
        if self.tail == "drop":
            start, _ = array_split_bounds(_length(left), partition.world_size, partition.rank)
            return _cut(left, start + begin, start + end)
        total = size * partition.world_size
        repeated = left * math.ceil(total / max(1, _length(left))) if self.earlier else [(0, total)]
        return _cut(repeated, partition.rank * size + begin, partition.rank * size + end)

    @property
    def _left(self) -> Spans:
        """The rows that the earlier stages did not yield, in the order of the epoch."""
        return _left_of(self)

    def _yielded(self, stage: Stage) -> Spans:
        spans: Spans = []
        for rank in range(stage.world_size):
            for worker in range(min(stage.n_workers, stage.n_yielded)):  # the others yielded nothing
                partition = Partition(rank, stage.world_size, worker, stage.n_workers)
                n_rows = n_yielded_by(worker, stage.n_workers, stage.n_yielded) * self.batch_size
                spans += _cut(self.spans(partition), 0, n_rows)
        return spans


@lru_cache(maxsize=128)
def _left_of(deal: Deal) -> Spans:
    """Return the rows that the earlier stages of a deal left; cached, because all else depends on it."""
    if not deal.earlier:
        return [(0, deal.n_rows)]
    *before, last = deal.earlier
    then = attrs.evolve(deal, earlier=tuple(before))
    return _without(_left_of(then), then._yielded(last))


def n_yielded_by(worker_id: int, n_workers: int, n_yielded: int) -> int:
    """Return how many of the first `n_yielded` mini-batches of a rank a worker made; workers take turns."""
    return max(0, -((worker_id - n_yielded) // n_workers))


def _length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def _cut(spans: Spans, begin: int, end: int) -> Spans:
    """Return the rows of spans from the `begin`-th to the `end`-th one, or to the last one."""
    found, n_before = [], 0
    for start, stop in spans:
        first, last = max(start, start + begin - n_before), min(stop, start + end - n_before)
        if first < last:
            found.append((first, last))
        n_before += stop - start
    return found


def _without(spans: Spans, others: Spans) -> Spans:
    """Return the rows of ascending spans that are not in `others`."""
    left, others, first = [], sorted(others), 0
    for start, stop in spans:
        while first < len(others) and others[first][1] <= start:
            first += 1
        for taken, until in others[first:]:
            if stop <= taken:
                break
            if start < taken:
                left.append((start, taken))
            start = max(start, until)
        if start < stop:
            left.append((start, stop))
    return left
