"""The Protocol `Order`, and its three implementations: stored order, shuffled chunks, and shuffled tiles.

An order knows nothing of windows, ranks, workers and resuming: `windows` and `share` treat all orders alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId

Borders: TypeAlias = Sequence[int] | NDArray[np.int64]
"""Numbers of rows, in ascending order."""

STEP_ROWS = 2**18
"""Number of rows for which an order is computed at once, because there may be 100 million rows."""


class Order(Protocol):
    """The order of the rows of an epoch, which can return any span of them.

    A new order, or a sampler, is a class with these three members. For each epoch, a new object is made from
    the joinids and the generator of the epoch (`seeded_rng`). It never changes.
    """

    @property
    def n_rows(self) -> int:
        """Number of rows of an epoch: as many as there are joinids.

        A joinid may come several times, and another one not at all.
        """

    @property
    def borders(self) -> Borders:
        """Numbers of rows after which a window should end, so that it does not cut a tile or chunk.

        The last one is `n_rows`. If there are none, a window may end after any row.
        """

    def rows(self, start: int, stop: int) -> NDArrayJoinId:
        """Return the joinids of the rows from `start` to `stop`, where 0 ≤ start ≤ stop ≤ `n_rows`."""


@attrs.frozen(kw_only=True, eq=False)
class Stored:
    """The order in which the query has its rows.

    Attributes:
        joinids: Joinids of the rows of the query.
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
    """An order of shuffled chunks of one size, as in tiledbsoma-ml 0.1.0.

    The last chunk of the query may be shorter than the others.

    Attributes:
        joinids: Joinids of the rows of the query.
        size: Rows per chunk.
        shuffled: The numbers of the chunks, in shuffled order.
        n_before_end: Number of rows up to the end of the last chunk of the query, in shuffled order.
        borders: None, because a window may cut a chunk.
    """

    joinids: NDArrayJoinId
    size: int
    shuffled: NDArray[np.int64]
    n_before_end: int
    borders: Borders = ()

    @classmethod
    def draw(cls, joinids: NDArrayJoinId, size: int, rng: np.random.Generator) -> Chunked:
        """Return the chunks of a query in an order that is drawn from a generator."""
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
        """Return the indices in `joinids` of the rows from `start` to `stop`."""
        # Rows behind the shorter chunk are numbered as if that chunk had as many rows as the others.
        rows = np.arange(start, stop)
        n_lacking = len(self.shuffled) * self.size - len(self.joinids)
        rows[max(0, self.n_before_end - start) :] += n_lacking
        chunk = rows // self.size
        indices: NDArray[np.int64] = (self.shuffled[chunk] - chunk) * self.size + rows
        return indices


@attrs.frozen(kw_only=True, eq=False)
class Tiled:
    """An order of shuffled chunks that lie within the tiles of the stored layer; "auto" uses it.

    Attributes:
        joinids: Joinids of the rows of the query, sorted.
        borders: Number of rows up to the end of each chunk, in shuffled order.
        offsets: For each chunk, the index in `joinids` of a row minus the number of the row in this order.
    """

    joinids: NDArrayJoinId
    borders: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def draw(cls, sorted_joinids: NDArrayJoinId, run_length: int, rng: np.random.Generator) -> Tiled:
        """Return the chunks of a query (see `chunk_starts`) in an order that is drawn from a generator."""
        starts = chunk_starts(sorted_joinids, run_length)
        lengths = np.diff(starts, append=len(sorted_joinids))
        shuffled = rng.permutation(len(starts))
        ends = np.cumsum(lengths[shuffled])
        return cls(
            joinids=sorted_joinids, borders=ends, offsets=starts[shuffled] - (ends - lengths[shuffled])
        )

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.joinids)

    def rows(self, start: int, stop: int) -> NDArrayJoinId:
        """Return the joinids of the rows from `start` to `stop`."""
        return _taken(self.joinids, self._indices, start, stop)

    def _indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the indices in `joinids` of the rows from `start` to `stop`."""
        first, last = np.searchsorted(self.borders, [start, stop - 1], side="right").tolist()
        lengths = np.diff(np.minimum(self.borders[first : last + 1], stop), prepend=start)
        indices: NDArray[np.int64] = np.arange(start, stop)
        return indices + np.repeat(self.offsets[first : last + 1], lengths)


def _taken(
    joinids: NDArrayJoinId, indices: Callable[[int, int], NDArray[np.int64]], start: int, stop: int
) -> NDArrayJoinId:
    """Return `joinids[indices(start, stop)]`, computed in steps, which need little memory."""
    found = np.empty(stop - start, dtype=np.int64)
    for begin in range(start, stop, STEP_ROWS):
        end = min(begin + STEP_ROWS, stop)
        found[begin - start : end - start] = joinids[indices(begin, end)]
    return found


def chunk_starts(sorted_joinids: NDArrayJoinId, run_length: int) -> NDArray[np.int64]:
    """Return the index of the first joinid of each chunk.

    A chunk has the joinids of one run of the layer: of `run_length` neighbouring rows, wanted or not. The
    starts are computed in steps, which need little memory, because there may be 100 million joinids.
    """
    starts, step = [], 2**20
    for begin in range(0, len(sorted_joinids), step):
        run = sorted_joinids[max(0, begin - 1) : begin + step] // run_length
        found = np.flatnonzero(run[1:] != run[:-1]) + max(0, begin - 1) + 1
        starts.append(found if begin else np.append(0, found))
    return np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)


def in_order(joinids: NDArrayJoinId) -> NDArrayJoinId:
    """Return sorted joinids; the same array if it is sorted already."""
    return joinids if is_sorted(joinids) else np.sort(joinids)


def is_sorted(joinids: NDArrayJoinId) -> bool:
    """Return whether joinids are in ascending order; they may repeat."""
    return bool((joinids[1:] >= joinids[:-1]).all())
