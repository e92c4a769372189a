"""`Windows`: divides an order into windows, and permutes the rows of each window."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._order.order import Borders, Order
from tiledbsoma_ml._order.share import Spans


@attrs.frozen(kw_only=True, eq=False)
class Windows:
    """The windows of an order, which divide the share of each rank; the rows of each window are permuted.

    A share can end before the next one starts. Rows between two shares, and rows behind the end of the order,
    are in no window and are not permuted. Behind the last row of the order, the first rows follow again.

    Attributes:
        order: The order, in which rows are not permuted yet.
        starts: The first row of the share of each rank.
        n_rows_of_rank: Number of rows of a share.
        borders: Number of rows of a share up to the end of each window except the last one, ascending.
        make_rng: Makes the generator of a share, from which one permutation is drawn for each window; None
            if rows are not permuted.
    """

    order: Order
    starts: Sequence[int]
    n_rows_of_rank: int
    borders: Sequence[int]
    make_rng: Callable[[], np.random.Generator] | None

    def io_batches(self, spans: Spans) -> Iterator[NDArrayJoinId]:
        """Yield the joinids of spans of an epoch, one IO batch at a time: the rows of one window in them."""
        permutations = None if self.make_rng is None else _Permutations(self, self.make_rng)
        for start, stop in spans:
            while start < stop:
                window = self._at(start)
                last = min(stop, window.stop)
                if permutations is None or window.number is None:
                    yield self._rows(start, last)
                else:
                    permutation = permutations.of(window.rank, window.number)
                    rows = self._rows(window.start, window.stop)
                    yield rows[permutation[start - window.start : last - window.start]]
                start = last

    def bounds(self, rank: int, number: int) -> tuple[int, int]:
        """Return (start, stop) of a window of a rank."""
        begin = self.borders[number - 1] if number else 0
        end = self.borders[number] if number < len(self.borders) else self.n_rows_of_rank
        return self.starts[rank] + begin, min(self.starts[rank] + end, self.order.n_rows)

    def _at(self, row: int) -> _Window:
        """Return the window in which a row lies."""
        rank = bisect_right(self.starts, row) - 1
        if row >= self.order.n_rows:
            return _Window(rank=rank, number=None, start=row, stop=sys.maxsize)
        if row - self.starts[rank] >= self.n_rows_of_rank:
            stop = self.starts[rank + 1] if rank + 1 < len(self.starts) else self.order.n_rows
            return _Window(rank=rank, number=None, start=row, stop=stop)
        number = bisect_right(self.borders, row - self.starts[rank])
        start, stop = self.bounds(rank, number)
        return _Window(rank=rank, number=number, start=start, stop=stop)

    def _rows(self, start: int, stop: int) -> NDArrayJoinId:
        """Return the joinids of rows of the order; behind the last row, the first rows follow again."""
        n_rows, found = self.order.n_rows, []
        while start < stop:
            begin = start % n_rows
            end = min(begin + stop - start, n_rows)
            found.append(self.order.rows(begin, end))
            start += end - begin
        return found[0] if len(found) == 1 else np.concatenate(found)


@attrs.frozen(kw_only=True)
class _Window:
    """A window, or rows that are in no window; for these `number` is None."""

    rank: int
    number: int | None
    start: int
    stop: int


class _Permutations:
    """The permutations of windows, which are drawn in sequence; fast if windows are asked for in sequence."""

    def __init__(self, windows: Windows, make_rng: Callable[[], np.random.Generator]) -> None:
        self._windows = windows
        self._make_rng = make_rng
        self._rank, self._n_drawn = -1, 0
        self._latest = np.empty(0, dtype=np.int64)

    def of(self, rank: int, number: int) -> NDArray[np.int64]:
        """Return the permutation of a window of a rank."""
        if rank != self._rank or number < self._n_drawn - 1:
            self._rank, self._n_drawn, self._rng = rank, 0, self._make_rng()
        while self._n_drawn <= number:
            start, stop = self._windows.bounds(rank, self._n_drawn)
            self._latest = self._rng.permutation(stop - start)
            self._n_drawn += 1
        return self._latest


def next_borders(borders: Borders, wanted: Sequence[int]) -> list[int]:
    """Return, for each wanted border, the first of `borders` that is not smaller."""
    found: list[int] = np.asarray(borders)[np.searchsorted(borders, wanted)].tolist()
    return found
