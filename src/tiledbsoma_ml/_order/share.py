"""Who yields which rows of an epoch: the ranks, their workers, and those who go on after a resume.

An epoch is a sequence of rows, and each worker has spans of it: this is arithmetic on numbers of rows, the
same for all orders, and no joinids are looked at. When training resumes with other ranks or workers, the rows
that nobody has yielded are dealt anew.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, TypeAlias

import attrs

from tiledbsoma_ml._query_ids import Partition, Tail, array_split_bounds, rows_per_rank

ShuffleScope: TypeAlias = Literal["partition", "global"]
"""The rows that chunks are shuffled among: those of one worker of one rank, or all of the query."""

Spans: TypeAlias = list[tuple[int, int]]
"""Rows of an epoch by their numbers, as (start, stop) of each stretch."""

ALONE = Partition(0, 1, 0, 1)
"""The place of a process that yields all rows."""


@attrs.frozen
class Stage:
    """A stretch of an epoch that is over: who took part, and how many mini-batches each rank yielded."""

    world_size: int
    n_workers: int
    n_yielded: int


@attrs.frozen(kw_only=True)
class Deal:
    """How the rows of an epoch are dealt.

    Attributes:
        n_rows: Rows of an epoch.
        batch_size: Rows per mini-batch.
        tail: See `Tail`.
        scope: See `ShuffleScope`. In the scope "partition" each worker has an epoch of its own rows.
        earlier: What was yielded of this epoch before, by other ranks or workers; only in the scope "global".
    """

    n_rows: int
    batch_size: int
    tail: Tail
    scope: ShuffleScope
    earlier: tuple[Stage, ...] = ()

    def own(self, place: Partition) -> tuple[Deal, Partition]:
        """Return the deal of the rows among which those of a worker are shuffled, and its place in that deal.

        In the scope "global" these are all rows. In the scope "partition" they are the rows that
        `Partition.bounds` gives the worker, and it is alone with them.
        """
        if self.scope == "global":
            return self, place
        start, stop = place.bounds(self.n_rows, self.tail)
        return attrs.evolve(self, n_rows=stop - start, scope="global", earlier=()), ALONE

    def n_mini_batches_of_rank(self, world_size: int, n_workers: int) -> int:
        """Return how many mini-batches each of so many ranks has, with so many workers."""
        if self.scope == "global":
            return math.ceil(self._n_of_rank(world_size) / self.batch_size)
        n_rows, n_larger = divmod(rows_per_rank(self.n_rows, world_size, self.tail), n_workers)
        larger, others = math.ceil((n_rows + 1) / self.batch_size), math.ceil(n_rows / self.batch_size)
        return n_larger * larger + (n_workers - n_larger) * others

    def n_mini_batches(self, place: Partition) -> int:
        """Return how many mini-batches one worker of one rank has."""
        start, stop = self.mini_batches(place)
        return stop - start

    def mini_batches(self, place: Partition) -> tuple[int, int]:
        """Return (start, stop) of a worker's mini-batches among those that are made by the same draws."""
        deal, place = self.own(place)
        total = deal.n_mini_batches_of_rank(place.world_size, place.n_workers)
        return array_split_bounds(total, place.n_workers, place.worker_id)

    def spans(self, place: Partition, skip: int = 0) -> Spans:
        """Return the rows of one worker of one rank, but for its first `skip` mini-batches.

        They are numbered as in the epoch of its `own` deal. Numbers from `n_rows` on stand for the first rows
        again: those that "pad" repeats.
        """
        start, stop = self.mini_batches(place)
        deal, place = self.own(place)
        mine = deal._of_rank(place, 0, deal._n_of_rank(place.world_size))
        return _cut(mine, (start + skip) * self.batch_size, stop * self.batch_size)

    def padding(self, place: Partition) -> Spans:
        """Return the rows of a rank that another rank has as well; in the scope "global"."""
        assert self.scope == "global"
        size = self._n_of_rank(place.world_size)
        n_real = min(max(_length(self._left) - place.rank * size, 0), size)
        return self._of_rank(place, n_real, size) if self.tail == "pad" else []

    def _n_of_rank(self, world_size: int) -> int:
        return rows_per_rank(_length(self._left), world_size, self.tail)

    def _of_rank(self, place: Partition, begin: int, end: int) -> Spans:
        """Return a rank's rows, from `begin` to `end` of them."""
        left, size = self._left, self._n_of_rank(place.world_size)
        if self.tail == "drop":
            start, _ = array_split_bounds(_length(left), place.world_size, place.rank)
            return _cut(left, start + begin, start + end)
        total = size * place.world_size
        repeated = left * math.ceil(total / max(1, _length(left))) if self.earlier else [(0, total)]
        return _cut(repeated, place.rank * size + begin, place.rank * size + end)

    @property
    def _left(self) -> Spans:
        """What was not yielded in the earlier stages, in the order of the epoch."""
        return _left_of(self)

    def _yielded(self, stage: Stage) -> Spans:
        spans: Spans = []
        for rank in range(stage.world_size):
            for worker in range(min(stage.n_workers, stage.n_yielded)):  # the others did not have a turn
                place = Partition(rank, stage.world_size, worker, stage.n_workers)
                n_rows = n_yielded_by(worker, stage.n_workers, stage.n_yielded) * self.batch_size
                spans += _cut(self.spans(place), 0, n_rows)
        return spans


@lru_cache(maxsize=128)
def _left_of(deal: Deal) -> Spans:
    """Return what the earlier stages of a deal left: kept, because everything else is computed from it."""
    if not deal.earlier:
        return [(0, deal.n_rows)]
    *before, last = deal.earlier
    then = attrs.evolve(deal, earlier=tuple(before))
    return _without(_left_of(then), then._yielded(last))


def n_yielded_by(worker_id: int, n_workers: int, n_yielded: int) -> int:
    """Return how many of the first mini-batches of a rank come from one of its workers: they take turns."""
    return max(0, -((worker_id - n_yielded) // n_workers))


def _length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def _cut(spans: Spans, begin: int, end: int) -> Spans:
    """Return the rows from the `begin`-th to the `end`-th of spans, or to the last."""
    found, n_before = [], 0
    for start, stop in spans:
        first, last = max(start, start + begin - n_before), min(stop, start + end - n_before)
        if first < last:
            found.append((first, last))
        n_before += stop - start
    return found


def _without(spans: Spans, others: Spans) -> Spans:
    """Return the rows of ascending spans that are not in the others."""
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
