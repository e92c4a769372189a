"""What the log says of an order when the first epoch begins: sizes, mixing, tiles that are read again."""

from __future__ import annotations

import logging

from tiledbsoma_ml._order.plan import PartPlan
from tiledbsoma_ml._source import Source

logger = logging.getLogger("tiledbsoma_ml")

SEVERAL = 1.5
"""Times that ranks and workers decode tiles together, from which on a line of the log says so."""


def is_log_read() -> bool:
    """Return whether anybody reads what `log_order` says."""
    return logger.isEnabledFor(logging.INFO)


def log_order(planned: PartPlan, source: Source) -> None:
    """Tell, at the level INFO, how the rows of a query are mixed, and what it costs that ranks share them.

    Args:
        planned: The plan of a worker, which knows how many ranks and workers there are.
        source: The source of the rows.
    """
    sharing = planned.sharing
    if planned.plan.shuffle_chunk_size is None or not sharing.n_rows:
        return
    _log_sizes(planned)
    n_readers = sharing.world_size * sharing.n_workers
    if sharing.n_parts > 1:
        logger.info(
            "shuffle_scope='partition' shuffles each of the %d parts of ranks and workers by itself, of the "
            "same rows in every epoch: mixing %.2f of random is predicted; 'global' shuffles the whole query "
            "and deals it anew each time",
            n_readers,
            planned.predicted_mixing(),
        )
    elif n_readers > 1 and source.row_tile > 1:
        _log_shared_tiles(planned, n_readers, source.row_tile)


def _log_sizes(planned: PartPlan) -> None:
    """Tell what "auto" stands for."""
    plan, sizes = planned.plan, planned.sizes
    if plan.layout is None or sizes is None:
        return
    window_mib = sizes.window_rows * plan.layout.bytes_per_row / 2**20
    window = f"windows of {sizes.window_rows:,} rows ({window_mib:.0f} MiB)"
    if plan.shuffle_chunk_size == "auto":
        chose = f"runs of {sizes.run_length:,} rows in {window}"
        logger.info("%s: mixing %.2f of random is predicted", chose, sizes.mixing)
    else:
        logger.info("runs of %d rows in %s", plan.shuffle_chunk_size, window)


def _log_shared_tiles(planned: PartPlan, n_readers: int, row_tile: int) -> None:
    """Tell how often tiles are decoded because several ranks and workers need rows of them."""
    read_sizes = planned.read_sizes(row_tile)
    times = read_sizes.n_times_decoded(read_sizes.n_rows)
    if times >= SEVERAL:
        logger.info(
            "the %d ranks and workers need rows of the same tiles, so that every row is read at least %.1f "
            "times in an epoch; snapshot='PATH' reads none twice, if it is not compressed",
            n_readers,
            times,
        )
