"""Who gets which rows of an epoch where chunks are shuffled over the whole query first, also after a resume.

An epoch is a sequence of rows, and whoever takes part has spans of it: arithmetic on places, no rows are
looked at. When training resumes with other ranks or workers, what is left of the sequence is dealt anew.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, TypeAlias

import attrs

from tiledbsoma_ml._query_ids import Partition, Tail, array_split_bounds, rows_per_rank

ShuffleScope: TypeAlias = Literal["partition", "global"]
"""Among which rows chunks are shuffled: those of one worker of one rank, or all of the query."""

Spans: TypeAlias = list[tuple[int, int]]
"""Places in the sequence of an epoch, as (start, stop) of neighbouring ones."""


@attrs.frozen
class Stage:
    """A stretch of an epoch that is over: who took part, and how many mini-batches each rank yielded."""

    world_size: int
    n_workers: int
    n_yielded: int


@attrs.frozen
class Deal:
    """How the rows of an epoch are dealt.

    Args:
        n_rows: Rows of the query.
        batch_size: Rows per mini-batch.
        tail: What becomes of rows that do not divide by the number of ranks.
        earlier: What was yielded before, by others.
    """

    n_rows: int
    batch_size: int
    tail: Tail
    earlier: tuple[Stage, ...] = ()

    def n_mini_batches_of_rank(self, world_size: int) -> int:
        """Return how many mini-batches each of so many ranks has."""
        return math.ceil(self._n_of_rank(world_size) / self.batch_size)

    def n_mini_batches(self, place: Partition) -> int:
        """Return how many mini-batches one worker of one rank has."""
        start, stop = self.mini_batches(place)
        return stop - start

    def mini_batches(self, place: Partition) -> tuple[int, int]:
        """Return (start, stop) of a worker's mini-batches among those of its rank."""
        total = self.n_mini_batches_of_rank(place.world_size)
        return array_split_bounds(total, place.n_workers, place.worker_id)

    def spans(self, place: Partition, skip: int = 0) -> Spans:
        """Return the rows of one worker of one rank, but for its first `skip` mini-batches.

        Places from `n_rows` on stand for the first rows again: those that "pad" repeats.
        """
        start, stop = self.mini_batches(place)
        mine = self._of_rank(place, 0, self._n_of_rank(place.world_size))
        return _cut(mine, (start + skip) * self.batch_size, stop * self.batch_size)

    def padding(self, place: Partition) -> Spans:
        """Return the rows of a rank that another rank has as well."""
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
    """Return the places from the `begin`-th to the `end`-th of spans, or to the last."""
    found, n_before = [], 0
    for start, stop in spans:
        first, last = max(start, start + begin - n_before), min(stop, start + end - n_before)
        if first < last:
            found.append((first, last))
        n_before += stop - start
    return found


def _without(spans: Spans, others: Spans) -> Spans:
    """Return what is left of ascending spans when others are taken away."""
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
