"""How many rows are read at once: as many as memory holds, where that decodes less."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

from tiledbsoma_ml._order.plan import PartPlan
from tiledbsoma_ml._order.reads import ReadSize
from tiledbsoma_ml._source import TiledReader

logger = logging.getLogger("tiledbsoma_ml")

COSTLY = 3.0
"""Times that tiles are decoded in an epoch, from which on a line of the log says so."""


def next_read_size(planned: PartPlan, reader: TiledReader) -> Callable[[int], ReadSize]:
    """Return a function that returns the size of the next read.

    Its argument is the number of rows of the part that were read. The size follows what memory holds, which
    the reader knows better after each read.
    """
    sizes = planned.read_sizes(reader.row_tile)

    def next_size(n_read: int) -> ReadSize:
        n_held = reader.n_rows_held()
        if not n_read and planned.permutes and planned.sizes is None:
            times = round(sizes.predicted_amplification(n_held))
            tell_costly(planned.chunk_rows, sizes.window_rows, times, reader.row_tile, n_held)
        return sizes.choose(sizes.n_rows - n_read, n_held)

    return next_size


@cache
def tell_costly(chunk_rows: int, window_rows: int, times: int, row_tile: int, n_held: int) -> None:
    """Tell, at the level INFO, that sizes decode tiles many times; once in a process for the same numbers."""
    if times >= COSTLY:
        logger.info(
            "shuffle_chunk_size=%d and io_batch_size=%d read every row about %d times in an epoch, because "
            "it is stored in tiles of %d rows, and memory_budget holds %d rows; shuffle_chunk_size='auto' "
            "and io_batch_size='auto' read less and mix as well, and a larger memory_budget reads less",
            chunk_rows,
            window_rows,
            times,
            row_tile,
            n_held,
        )
