"""What "auto" stands for, and how it is predicted: how well a window mixes, how often a tile is decoded.

The sizes are chosen from the joinids, from how a layer is stored (`Layout`) and from a budget of memory, so
that whoever has these chooses the same. The page `shuffle_viz` has the same formulas in TypeScript.
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
"""Chunks in a window of the documented defaults, 65,536 rows in chunks of 64: "auto" mixes no worse."""

TOLERANCE = 0.005
"""A smaller difference in predicted mixing says nothing: the prediction is right to about one hundredth."""

ENOUGH_ROWS = 65_536
"""Rows read together at most where more would only keep the first ones waiting.

That is where nothing is shuffled, and where every row can be read by itself, so that chunks are single rows.
"""


@attrs.frozen
class Layout:
    """How a layer is stored, as far as planning needs to know.

    Attributes:
        row_tile: Neighbouring rows that are decoded together; 1 where every row can be read by itself.
        bytes_per_row: Memory that a row of the query takes up while it waits in a window.
        window_rows: Rows that a window may hold; as many as the budget of memory holds if None.
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
    """What "auto" stands for.

    Attributes:
        run_length: Rows of the layer, wanted or not, from which a chunk is taken; tiles consist of whole
            runs.
        window_rows: Rows of a window, but for the chunk in which it ends.
        first_window_rows: Rows of the first window, for which training waits. Each window after it is twice
            as large, up to `window_rows`.
        mixing: See `predicted_mixing`.
    """

    run_length: int
    window_rows: int
    first_window_rows: int
    mixing: float


def choose_sizes(
    sorted_ids: NDArrayJoinId,
    *,
    layout: Layout,
    window_rows: int,
    batch_size: int,
    mixing: float | None,
    world_size: int,
) -> Sizes:
    """Return the longest runs, of whole tiles at most, that mix well enough, and windows for them.

    Args:
        sorted_ids: The rows.
        layout: How they are stored.
        window_rows: Number of rows that fit into a window.
        batch_size: Rows per mini-batch.
        mixing: The mixing that is well enough; if None, that of the documented defaults.
        world_size: Number of ranks that share the rows.
    """
    window_rows = max(1, window_rows if layout.row_tile > 1 else min(window_rows, ENOUGH_ROWS))
    n_rows = math.ceil(len(sorted_ids) / world_size)
    n_windows = max(1, math.ceil(n_rows / window_rows))
    rows = math.ceil(n_rows / n_windows)
    if n_windows == 1 or layout.row_tile == 1:
        return Sizes(run_length=layout.row_tile, window_rows=rows, first_window_rows=rows, mixing=1.0)
    target = predicted_mixing(REFERENCE_CHUNKS, batch_size) - TOLERANCE if mixing is None else mixing
    for run_length in _run_lengths(layout.row_tile):
        per_chunk = _rows_per_chunk(sorted_ids, run_length)
        reached = predicted_mixing(rows / per_chunk, batch_size)
        if reached >= target:
            break
    first = rows
    while first > 4 * batch_size and predicted_mixing(first / 2 / per_chunk, batch_size) >= target:
        first //= 2
    return Sizes(run_length=run_length, window_rows=rows, first_window_rows=first, mixing=reached)


def window_borders(n_rows: int, sizes: Sizes) -> list[int]:
    """Return after how many rows each window should end: growing ones first, then equal ones."""
    borders, size = [0], sizes.first_window_rows
    while size < sizes.window_rows and borders[-1] + size < n_rows:
        borders.append(borders[-1] + size)
        size *= 2
    n_left = math.ceil((n_rows - borders[-1]) / sizes.window_rows)
    even = np.linspace(borders[-1], n_rows, n_left + 1).round().astype(int).tolist()
    return [*borders[1:], *even[1:]]


def predicted_mixing(n_chunks: float, batch_size: int) -> float:
    """Return the mean entropy of labels in a mini-batch as a share of that in a truly random one.

    The labels are those of a model of the CELLxGENE Census: 900 datasets of log-normal size, stored one after
    the other, so that a chunk has one label. A mini-batch of `batch_size` rows drawn from a window of
    `n_chunks` chunks is as diverse as one of `1 / (1 / n_chunks + 1 / batch_size)` rows from everywhere.
    Few rows say little about that: 16 that follow each other are looked at where `batch_size` is smaller.
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


def read_amplification(chunk_rows: int, io_batch_rows: int, row_tile: int, n_rows: int) -> float:
    """Return how many times a tile is decoded in an epoch of shuffled chunks of neighbouring rows.

    Chunks of one IO batch that lie in one tile share its decoding.
    """
    n_tiles = max(1.0, n_rows / row_tile)
    n_io_batches = max(1.0, n_rows / io_batch_rows)
    chunks_per_io_batch = min(n_rows, io_batch_rows) / chunk_rows
    tiles_per_chunk = max(1.0, chunk_rows / row_tile)
    touched = n_tiles * -math.expm1(-chunks_per_io_batch * tiles_per_chunk / n_tiles)
    return max(1.0, n_io_batches * touched / n_tiles)


def _run_lengths(row_tile: int) -> Iterator[int]:
    """Yield what divides tiles evenly, longest first."""
    length = row_tile
    yield length
    while length % 2 == 0:
        length //= 2
        yield length


def _rows_per_chunk(sorted_ids: NDArrayJoinId, run_length: int) -> float:
    """Return the mean number of joinids in a chunk; of many joinids, samples are counted."""
    size, n_samples = 2**14, 64
    if len(sorted_ids) <= size * n_samples:
        return len(sorted_ids) / len(chunk_starts(sorted_ids, run_length))
    begins = np.linspace(0, len(sorted_ids) - size, n_samples).astype(int)
    n_chunks = sum(np.count_nonzero(np.diff(sorted_ids[b : b + size] // run_length)) for b in begins.tolist())
    return size * n_samples / max(1, n_chunks)
