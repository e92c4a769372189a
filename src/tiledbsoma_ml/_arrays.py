"""Arrays of an experiment: which coordinates to ask them for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId


def ranges(
    sorted_ids: NDArrayJoinId, starts: NDArray[np.int64], at_most: float = math.inf
) -> slice | NDArrayJoinId:
    """Return the ids from the first to the last of each run, as a slice if these touch.

    Args:
        sorted_ids: The ids.
        starts: Where runs start in them.
        at_most: Where there would be more, and no slice, the ids alone are returned.
    """
    firsts, lasts = sorted_ids[starts], sorted_ids[np.append(starts[1:], len(sorted_ids)) - 1]
    lengths = lasts - firsts + 1
    total = int(lengths.sum())
    if total == lasts[-1] - firsts[0] + 1:
        return slice(int(firsts[0]), int(lasts[-1]))
    if total > at_most:
        return sorted_ids
    offset: NDArrayJoinId = np.repeat(firsts - (np.cumsum(lengths) - lengths), lengths)
    return np.arange(total) + offset


def to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a column as one array, without a copy if it is one."""
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which always copies
    array: NDArray[Any] = whole.to_numpy(zero_copy_only=False)
    return array
