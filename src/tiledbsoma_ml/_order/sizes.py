"""The sizes that "auto" stands for.

The sizes depend only on the joinids, the layout of the layer, the budget of memory, and in the scope "global"
the number of ranks. So all processes choose the same sizes. The page `shuffle_viz` has the same formulas in
TypeScript.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Literal, TypeAlias

import attrs
import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._order.mixing import Sharing, predicted_mixing
from tiledbsoma_ml._order.order import chunk_starts

Size: TypeAlias = int | Literal["auto"]
"""A number of rows, or "auto"."""

DEFAULT_CHUNK, DEFAULT_WINDOW = 64, 65_536
"""The default sizes, in rows; "auto" mixes as well as they do."""

CENSUS_ROWS = 20_000_000
"""Rows of a query that is far larger than a window; "auto" mixes as well as the default sizes mix it."""

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
        mixing: The predicted mixing of the windows of `window_rows`; see `predicted_mixing`.
    """

    run_length: int
    window_rows: int
    first_window_rows: int
    mixing: float


def choose_sizes(
    sorted_joinids: NDArrayJoinId, *, layout: Layout, window_rows: int, mixing: float | None, sharing: Sharing
) -> Sizes:
    """Return the longest runs, up to whole tiles, that reach a mixing, and the sizes of windows for them.

    In the scope "partition", the sizes of a part are those of a query that has its rows only, because no size
    mixes it with other parts.

    Args:
        sorted_joinids: The joinids of the rows that are shuffled together: those of the query or of a part.
        layout: The layout of the layer.
        window_rows: Largest number of rows of a window.
        mixing: The mixing to reach; if None, see `_mixing_of_defaults`.
        sharing: The whole query, and the ranks and workers that share it.
    """
    is_global = sharing.scope == "global"
    own = sharing if is_global else Sharing(n_rows=len(sorted_joinids), batch_size=sharing.batch_size)
    window_rows = max(1, window_rows if layout.row_tile > 1 else min(window_rows, ENOUGH_ROWS))
    n_rows = math.ceil(own.n_rows / (own.world_size if is_global else 1))
    n_windows = max(1, math.ceil(n_rows / window_rows))
    rows = first = math.ceil(n_rows / n_windows)
    predicted = partial(predicted_mixing, ends_with_chunk=not is_global)
    run_length, per_chunk = layout.row_tile, 1.0
    holds_all = n_windows == 1 and not (is_global and own.world_size > 1)
    if not holds_all and layout.row_tile > 1:
        target = _mixing_of_defaults(own) - TOLERANCE if mixing is None else mixing
        for run_length in _run_lengths(layout.row_tile):
            per_chunk = rows_per_chunk(sorted_joinids, run_length)
            if predicted(own, chunk_rows=per_chunk, window_rows=rows) >= target:
                break
        while (
            first > 4 * own.batch_size
            and predicted(own, chunk_rows=per_chunk, window_rows=first / 2) >= target
        ):
            first //= 2
    reached = predicted(sharing, chunk_rows=per_chunk, window_rows=rows)
    return Sizes(run_length=run_length, window_rows=rows, first_window_rows=first, mixing=reached)


def _mixing_of_defaults(sharing: Sharing) -> float:
    """Return the predicted mixing of the default sizes, but no more than they reach in large queries."""
    large = Sharing(n_rows=CENSUS_ROWS, batch_size=sharing.batch_size)
    return min(
        predicted_mixing(query, chunk_rows=DEFAULT_CHUNK, window_rows=DEFAULT_WINDOW)
        for query in (sharing, large)
    )


def window_borders(n_rows: int, sizes: Sizes) -> list[int]:
    """Return the number of rows up to the end of each window: windows grow at first, then all are equal."""
    borders, size = [0], sizes.first_window_rows
    while size < sizes.window_rows and borders[-1] + size < n_rows:
        borders.append(borders[-1] + size)
        size *= 2
    n_left = math.ceil((n_rows - borders[-1]) / sizes.window_rows)
    even = np.linspace(borders[-1], n_rows, n_left + 1).round().astype(int).tolist()
    return [*borders[1:], *even[1:]]


def _run_lengths(row_tile: int) -> Iterator[int]:
    """Yield the lengths that divide a tile evenly by powers of two, longest first."""
    length = row_tile
    yield length
    while length % 2 == 0:
        length //= 2
        yield length


def rows_per_chunk(sorted_joinids: NDArrayJoinId, run_length: int) -> float:
    """Return the mean number of joinids per chunk, counted on samples if there are many joinids."""
    size, n_samples = 2**14, 64
    if len(sorted_joinids) <= size * n_samples:
        return len(sorted_joinids) / len(chunk_starts(sorted_joinids, run_length))
    begins = np.linspace(0, len(sorted_joinids) - size, n_samples).astype(int)
    n_chunks = sum(
        np.count_nonzero(np.diff(sorted_joinids[b : b + size] // run_length)) for b in begins.tolist()
    )
    return size * n_samples / max(1, n_chunks)
