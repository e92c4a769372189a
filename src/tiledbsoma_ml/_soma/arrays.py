"""Arrays of an experiment: which coordinates to ask them for, and where it is that one cannot be read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId


def ranges(
    sorted_ids: NDArrayJoinId, starts: NDArray[np.int64], at_most: float = math.inf
) -> slice | NDArrayJoinId:
    """Return the ids from the first to the last of each run, as a slice if these touch.

    Args:
        sorted_ids: The ids.
        starts: The places in them where runs start.
        at_most: Number of ids above which, without a slice, `sorted_ids` alone are returned.
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


@contextmanager
def telling_where(
    array: soma.SparseNDArray | soma.DenseNDArray | soma.DataFrame, sorted_ids: NDArrayJoinId
) -> Iterator[None]:
    """Tell with an error of TileDB in which rows of which array it happened: TileDB itself does not."""
    try:
        yield
    except (soma.SOMAError, RuntimeError) as err:
        reason = str(err).strip().rstrip(".")
        rows = f"rows {sorted_ids[0]} to {sorted_ids[-1]}" if len(sorted_ids) else "no rows"
        raise soma.SOMAError(
            f"{rows} of {array.uri!r} must be readable, but: {reason}; try "
            "again if the storage could not be reached, else a file is damaged: restore it, or write the "
            "array anew."
        ) from err
