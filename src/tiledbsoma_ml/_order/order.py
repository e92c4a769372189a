"""`Order`: the rows of an epoch, in the order in which they come; and the orders of shuffled chunks.

Windows, ranks, workers and resuming are no concern of an order; `windows` and `share` treat all orders alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId

Borders: TypeAlias = Sequence[int] | NDArray[np.int64]
"""Ascending numbers of rows."""

BLOCK = 2**18
"""An order is computed for so many rows at a time, because there may be 100 million."""


class Order(Protocol):
    """The rows of an epoch, in an order from which any stretch can be taken.

    A new order, or a sampler, is a class with these three members. An object of it is made for each epoch, of
    joinids and of the epoch's generator (`seeded_rng`), and does not change afterwards.
    """

    @property
    def n_rows(self) -> int:
        """Number of rows of an epoch; a joinid may come more than once."""

    @property
    def borders(self) -> Borders:
        """After how many rows a window should end, so that it does not cut what is read at once.

        The last one is `n_rows`. Without any, a window may end everywhere.
        """

    def rows(self, start: int, stop: int) -> NDArrayJoinId:
        """Return the joinids of the rows from `start` to `stop`, where 0 ≤ start ≤ stop ≤ `n_rows`."""


@attrs.frozen(kw_only=True, eq=False)
class Stored:
    """The order of the query.

    Attributes:
        joinids: The rows of the query.
        borders: See `Order`.
    """

    joinids: NDArrayJoinId
    borders: Borders = ()

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.joinids)

    def rows(self, start: int, stop: int) -> NDArrayJoinId:
        """Return the joinids of the rows from `start` to `stop`."""
        return self.joinids[start:stop].copy()


@attrs.frozen(kw_only=True, eq=False)
class Chunked:
    """Chunks of one size, shuffled: those of tiledbsoma-ml 0.1.0. The last of the query may be shorter.

    Attributes:
        joinids: The rows of the query.
        size: Rows of a chunk.
        shuffled: The numbers of the chunks, shuffled.
        n_before_end: How many rows come before the end of the last chunk of the query.
        borders: A window may cut a chunk.
    """

    joinids: NDArrayJoinId
    size: int
    shuffled: NDArray[np.int64]
    n_before_end: int
    borders: Borders = ()

    @classmethod
    def draw(cls, joinids: NDArrayJoinId, size: int, rng: np.random.Generator) -> Chunked:
        """Return the chunks of a query, shuffled by the next draw of a generator."""
        n_chunks = -(-len(joinids) // size)
        shuffled = rng.permutation(n_chunks)
        n_chunks_before_end = int(np.flatnonzero(shuffled == n_chunks - 1).max(initial=-1)) + 1
        n_before_end = n_chunks_before_end * size - (n_chunks * size - len(joinids))
        return cls(joinids=joinids, size=size, shuffled=shuffled, n_before_end=n_before_end)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.joinids)

    def rows(self, start: int, stop: int) -> NDArrayJoinId:
        """Return the joinids of the rows from `start` to `stop`."""
        return _taken(self.joinids, self._indices, start, stop)

    def _indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return which rows of the query these are; behind the shorter chunk, as if it were not shorter."""
        of_equal_chunks = np.arange(start, stop)
        n_lacking = len(self.shuffled) * self.size - len(self.joinids)
        of_equal_chunks[max(0, self.n_before_end - start) :] += n_lacking
        chunk = of_equal_chunks // self.size
        found: NDArray[np.int64] = (self.shuffled[chunk] - chunk) * self.size + of_equal_chunks
        return found


@attrs.frozen(kw_only=True, eq=False)
class Tiled:
    """Chunks that lie within the tiles of the layer as it is stored, shuffled: "auto".

    Attributes:
        joinids: The rows of the query, sorted.
        borders: After how many rows each chunk ends.
        offsets: What to add to the number of a row, for its index in `joinids`; one for each chunk.
    """

    joinids: NDArrayJoinId
    borders: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def draw(cls, sorted_ids: NDArrayJoinId, run_length: int, rng: np.random.Generator) -> Tiled:
        """Return the rows of each run of the layer, shuffled by the next draw of a generator."""
        starts = chunk_starts(sorted_ids, run_length)
        lengths = np.diff(starts, append=len(sorted_ids))
        shuffled = rng.permutation(len(starts))
        ends = np.cumsum(lengths[shuffled])
        return cls(joinids=sorted_ids, borders=ends, offsets=starts[shuffled] - (ends - lengths[shuffled]))

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.joinids)

    def rows(self, start: int, stop: int) -> NDArrayJoinId:
        """Return the joinids of the rows from `start` to `stop`."""
        return _taken(self.joinids, self._indices, start, stop)

    def _indices(self, start: int, stop: int) -> NDArray[np.int64]:
        first, last = np.searchsorted(self.borders, [start, stop - 1], side="right").tolist()
        of_each = np.diff(np.minimum(self.borders[first : last + 1], stop), prepend=start)
        found: NDArray[np.int64] = np.arange(start, stop) + np.repeat(self.offsets[first : last + 1], of_each)
        return found


def _taken(
    joinids: NDArrayJoinId, indices: Callable[[int, int], NDArray[np.int64]], start: int, stop: int
) -> NDArrayJoinId:
    """Return `joinids[indices(start, stop)]`, a block at a time."""
    found = np.empty(stop - start, dtype=np.int64)
    for begin in range(start, stop, BLOCK):
        end = min(begin + BLOCK, stop)
        found[begin - start : end - start] = joinids[indices(begin, end)]
    return found


def chunk_starts(sorted_ids: NDArrayJoinId, run_length: int) -> NDArray[np.int64]:
    """Return the index of the first joinid of each chunk: of each run of so many rows that has any.

    A block of joinids at a time is looked at, because there may be 100 million.
    """
    starts, block = [], 2**20
    for begin in range(0, len(sorted_ids), block):
        run = sorted_ids[max(0, begin - 1) : begin + block] // run_length
        found = np.flatnonzero(run[1:] != run[:-1]) + max(0, begin - 1) + 1
        starts.append(found if begin else np.append(0, found))
    return np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)


def in_order(joinids: NDArrayJoinId) -> NDArrayJoinId:
    """Return joinids sorted: themselves if they are."""
    return joinids if is_sorted(joinids) else np.sort(joinids)


def is_sorted(joinids: NDArrayJoinId) -> bool:
    """Return whether joinids ascend; one may come more than once."""
    return bool((joinids[1:] >= joinids[:-1]).all())
