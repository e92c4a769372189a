"""The sizes that "auto" stands for, and the prediction of mixing behind them.

The sizes depend only on the joinids, the layout of the layer, and the budget of memory. So all processes
choose the same sizes. The page `shuffle_viz` has the same formulas in TypeScript.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, TypeAlias

import attrs
import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._order.order import chunk_starts

Size: TypeAlias = int | Literal["auto"]
"""A number of rows, or "auto"."""

REFERENCE_CHUNKS = 1024
"""Number of chunks of a window with the default sizes (65,536 rows in chunks of 64).

"auto" mixes as well as such a window.
"""

TOLERANCE = 0.005
"""Difference in predicted mixing that does not matter: the prediction is accurate to about one hundredth."""

ENOUGH_ROWS = 65_536
"""Largest number of rows of a read if more rows would only delay the first mini-batch.

This is so if nothing is shuffled, and if each row can be read by itself, so that chunks are single rows.
"""


@attrs.frozen
class Layout:
    """The facts about the storage of a layer that "auto" needs.

    Attributes:
        row_tile: Number of neighbouring rows that are decoded together; 1 if each can be read by itself.
        bytes_per_row: Mean memory of a row of the query in a window.
        window_rows: Largest number of rows of a window; if None, the budget of memory decides.
    """

    row_tile: int
    bytes_per_row: float
    window_rows: int | None = None

    def __attrs_post_init__(self) -> None:
        if not self.row_tile >= 1:
            raise ValueError(f"row_tile={self.row_tile} must be at least 1; try 1.")
        if not 0 <= self.bytes_per_row < math.inf:
            raise ValueError(f"bytes_per_row={self.bytes_per_row} must be a number of at least 0; try 8.0.")


@attrs.frozen(kw_only=True)
class Sizes:
    """The sizes that "auto" stands for.

    Attributes:
        run_length: Length of a run of the layer. A chunk has the rows of the query in one run. A tile
            consists of whole runs.
        window_rows: Rows of a window, without the rest of the chunk at its end.
        first_window_rows: Rows of the first window, for which training waits. Each window after it is twice
            as large, up to `window_rows`.
        mixing: The predicted mixing; see `predicted_mixing`.
    """

    run_length: int
    window_rows: int
    first_window_rows: int
    mixing: float


def choose_sizes(
    sorted_joinids: NDArrayJoinId,
    *,
    layout: Layout,
    window_rows: int,
    batch_size: int,
    mixing: float | None,
    world_size: int,
) -> Sizes:
    """Return the longest runs, up to whole tiles, that reach a mixing, and the sizes of windows for them.

    Args:
        sorted_joinids: The joinids of the rows.
        layout: The layout of the layer.
        window_rows: Largest number of rows of a window.
        batch_size: Rows per mini-batch.
        mixing: The mixing to reach; if None, that of the default sizes.
        world_size: Number of ranks that share the rows.
    """
    window_rows = max(1, window_rows if layout.row_tile > 1 else min(window_rows, ENOUGH_ROWS))
    n_rows = math.ceil(len(sorted_joinids) / world_size)
    n_windows = max(1, math.ceil(n_rows / window_rows))
    rows = math.ceil(n_rows / n_windows)
    if n_windows == 1 or layout.row_tile == 1:
        return Sizes(run_length=layout.row_tile, window_rows=rows, first_window_rows=rows, mixing=1.0)
    target = predicted_mixing(REFERENCE_CHUNKS, batch_size) - TOLERANCE if mixing is None else mixing
    for run_length in _run_lengths(layout.row_tile):
        per_chunk = _rows_per_chunk(sorted_joinids, run_length)
        reached = predicted_mixing(rows / per_chunk, batch_size)
        if reached >= target:
            break
    first = rows
    while first > 4 * batch_size and predicted_mixing(first / 2 / per_chunk, batch_size) >= target:
        first //= 2
    return Sizes(run_length=run_length, window_rows=rows, first_window_rows=first, mixing=reached)


def window_borders(n_rows: int, sizes: Sizes) -> list[int]:
    """Return the number of rows up to the end of each window: windows grow at first, then all are equal."""
    borders, size = [0], sizes.first_window_rows
    while size < sizes.window_rows and borders[-1] + size < n_rows:
        borders.append(borders[-1] + size)
        size *= 2
    n_left = math.ceil((n_rows - borders[-1]) / sizes.window_rows)
    even = np.linspace(borders[-1], n_rows, n_left + 1).round().astype(int).tolist()
    return [*borders[1:], *even[1:]]


def predicted_mixing(n_chunks: float, batch_size: int) -> float:
    """Return the mean entropy of labels in a mini-batch as a share of that in a truly random mini-batch.

    The labels come from a model of the CELLxGENE Census: 900 datasets of log-normal size, stored one after
    the other, so that a chunk has one label. A mini-batch of `batch_size` rows from a window of `n_chunks`
    chunks is as diverse as one of `1 / (1 / n_chunks + 1 / batch_size)` rows from the whole query. If
    `batch_size` is below 16, the entropy of 16 neighbouring rows is returned, because few rows say little.
    """
    size = min(max(batch_size, 16), 4096)
    return max(0.0, float(_entropy(1 / (1 / n_chunks + 1 / size)) / _entropy(size)))


@lru_cache(maxsize=1024)
def _entropy(n_draws: float) -> float:
    """Return the expected entropy, in nats, of the labels of rows drawn at random from the model."""
    quantiles = (np.arange(900) + 0.5) / 900
    share = np.exp(1.5 * np.array([NormalDist().inv_cdf(q) for q in quantiles]))
    expected = n_draws * (share / share.sum())[:, np.newaxis]
    k = np.arange(1, 600)
    log_factorial = np.cumsum(np.log(k))
    poisson = np.exp(k * np.log(expected) - expected - log_factorial)
    return math.log(n_draws) - float((poisson * (k * np.log(k))).sum()) / n_draws


def _run_lengths(row_tile: int) -> Iterator[int]:
    """Yield the lengths that divide a tile evenly by powers of two, longest first."""
    length = row_tile
    yield length
    while length % 2 == 0:
        length //= 2
        yield length


def _rows_per_chunk(sorted_joinids: NDArrayJoinId, run_length: int) -> float:
    """Return the mean number of joinids per chunk, counted on samples if there are many joinids."""
    size, n_samples = 2**14, 64
    if len(sorted_joinids) <= size * n_samples:
        return len(sorted_joinids) / len(chunk_starts(sorted_joinids, run_length))
    begins = np.linspace(0, len(sorted_joinids) - size, n_samples).astype(int)
    n_chunks = sum(
        np.count_nonzero(np.diff(sorted_joinids[b : b + size] // run_length)) for b in begins.tolist()
    )
    return size * n_samples / max(1, n_chunks)
