"""`ReadSizes`: how many rows are read at once, and how often tiles are decoded then.

What is read at once need not be what is shuffled together. Chunks that are smaller than a tile share its
decoding with the other chunks of a read, so an epoch of few large reads decodes less than one of many small
ones. The order of the rows stays the same.
"""

from __future__ import annotations

import math
import sys

import attrs
import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId

WORTHWHILE = 0.9
"""Large reads are taken if they decode less than this share of what small reads decode."""

SLACK = 1.1
"""An IO batch that exceeds what memory is thought to hold by less than this factor is not cut."""

MORE_TO_WAIT_FOR = 2.0
"""The first read is a small one if a large one decodes this many times as many tiles."""


@attrs.frozen(kw_only=True)
class ReadSize:
    """The size of a read, which has whole IO batches, unless one has more than `most` rows.

    Attributes:
        n_rows: Number of rows from which on none are added.
        most: Largest number of rows.
    """

    n_rows: int
    most: int


IO_BATCH = ReadSize(n_rows=1, most=sys.maxsize)
"""The size of a read that is one IO batch."""


@attrs.frozen(kw_only=True)
class ReadSizes:
    """The sizes of the reads of a part of an epoch.

    Attributes:
        n_rows: Rows of the part.
        n_rows_of_epoch: Rows of the query, or of the share that is shuffled by itself.
        window_rows: Rows of an IO batch, the smallest read.
        chunk_rows: Mean number of rows of a chunk.
        tile_rows: Mean number of rows of the epoch in a tile.
        chunks_per_tile: Mean number of chunks that have rows of a tile.
        permutes: Whether the rows of a window are permuted.
    """

    n_rows: int
    n_rows_of_epoch: int
    window_rows: int
    chunk_rows: float
    tile_rows: float
    chunks_per_tile: float
    permutes: bool

    def choose(self, n_left: int, n_held: int) -> ReadSize:
        """Return the size of the next read.

        Args:
            n_left: Rows of the part that are not read yet.
            n_held: Rows that memory holds.
        """
        if self.window_rows <= n_held * SLACK:
            one = ReadSize(n_rows=1, most=int(n_held * SLACK))
            if self.n_times_decoded(n_held) > WORTHWHILE * self.n_times_decoded(self.window_rows):
                return one
            is_first = n_left == self.n_rows
            if is_first and self._n_touched(n_held) >= MORE_TO_WAIT_FOR * self._n_touched(self.window_rows):
                return one
        # Reads of equal sizes: a last one of few rows would decode as many tiles as a large one.
        return ReadSize(n_rows=math.ceil(n_left / math.ceil(n_left / n_held)), most=n_held)

    def predicted_amplification(self, n_held: int) -> float:
        """Return how often a tile is decoded in an epoch, where memory holds so many rows."""
        return min(map(self.n_times_decoded, (n_held, min(self.window_rows, n_held))))

    def n_times_decoded(self, read_rows: int) -> float:
        """Return how often a tile is decoded in an epoch of reads of so many rows; at least once."""
        n_reads = max(1, math.ceil(self.n_rows / read_rows))
        n_tiles_of_part = max(1.0, self.n_rows / self.tile_rows)
        return max(1.0, n_reads * self._n_touched(self.n_rows / n_reads) / n_tiles_of_part)

    def _n_touched(self, read_rows: float) -> float:
        """Return how many tiles a read of so many rows decodes.

        A read has each chunk with the same probability. It decodes a tile unless it has none of its chunks. A
        read that is smaller than a chunk has a piece of a chunk, so there are more pieces than chunks. A read
        that is smaller than a window has random rows of it.
        """
        if self.permutes and read_rows < self.window_rows < self.n_rows:
            n_touched = self._n_touched(self.window_rows)
            rows_per_tile = self.window_rows / n_touched
            return n_touched * (1.0 - math.pow(1.0 - read_rows / self.window_rows, rows_per_tile))
        n_rows = max(1, self.n_rows_of_epoch)
        share = min(1.0, read_rows / n_rows)
        more_pieces = max(0.0, 1 / max(1.0, read_rows) - 1 / max(1.0, self.chunk_rows))
        pieces_per_tile = self.chunks_per_tile + self.tile_rows * more_pieces
        return max(1.0, n_rows / self.tile_rows) * (1.0 - math.pow(1.0 - share, pieces_per_tile))


def tile_rows(joinids: NDArrayJoinId, row_tile: int) -> float:
    """Return the mean number of these neighbouring joinids in a tile, or in a run of the layer."""
    n_rows, n_starts, _ = _count_starts(joinids, row_tile, 1)
    return n_rows / max(1, n_starts)


def chunks_per_tile(joinids: NDArrayJoinId, row_tile: int, chunk_rows: int) -> float:
    """Return the mean number of chunks of `chunk_rows` neighbours that have joinids of a tile."""
    n_rows, n_starts, n_shared = _count_starts(joinids, row_tile, chunk_rows)
    return 1 + max(0.0, n_rows / chunk_rows - n_shared) / max(1, n_starts)


def _count_starts(joinids: NDArrayJoinId, row_tile: int, chunk_rows: int) -> tuple[int, int, int]:
    """Return a number of rows, and how many of them begin a tile, and how many both a tile and a chunk.

    If there are many rows, some are looked at.
    """
    size, n_samples = 2**14, 64
    n_rows = len(joinids)
    begins = [0]
    if n_rows > size * n_samples:
        begins = np.linspace(0, n_rows - size, n_samples).astype(int).tolist()
    else:
        size = n_rows
    n_starts = n_shared = 0
    for begin in begins:
        tile = joinids[max(0, begin - 1) : begin + size] // row_tile
        starts = np.flatnonzero(np.diff(tile)) + max(1, begin)
        n_starts += len(starts) + (begin == 0)
        n_shared += int((starts % chunk_rows == 0).sum()) + (begin == 0)
    return len(begins) * size, n_starts, n_shared
