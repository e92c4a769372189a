"""Helpers for reading arrays of an experiment: coordinates, conversion, and errors that name the rows."""

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
    sorted_joinids: NDArrayJoinId, starts: NDArray[np.int64], at_most: float = math.inf
) -> slice | NDArrayJoinId:
    """Return all joinids from the first to the last of each run; a slice if they have no gaps.

    Args:
        sorted_joinids: The joinids of the runs, with gaps within a run.
        starts: Index of the first joinid of each run.
        at_most: Largest number of joinids to return; if there are more, `sorted_joinids` are returned.
    """
    firsts, lasts = sorted_joinids[starts], sorted_joinids[np.append(starts[1:], len(sorted_joinids)) - 1]
    lengths = lasts - firsts + 1
    total = int(lengths.sum())
    if total == lasts[-1] - firsts[0] + 1:
        return slice(int(firsts[0]), int(lasts[-1]))
    if total > at_most:
        return sorted_joinids
    offset: NDArrayJoinId = np.repeat(firsts - (np.cumsum(lengths) - lengths), lengths)
    return np.arange(total) + offset


def to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a column as one array of NumPy, without a copy if it has one chunk."""
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # this always copies
    array: NDArray[Any] = chunk.to_numpy(zero_copy_only=False)
    return array


@contextmanager
def naming_rows(
    array: soma.SparseNDArray | soma.DenseNDArray | soma.DataFrame, sorted_joinids: NDArrayJoinId
) -> Iterator[None]:
    """Raise errors of TileDB anew with the array and the rows that were read: TileDB does not name them."""
    try:
        yield
    except (soma.SOMAError, RuntimeError) as err:
        reason = str(err).strip().rstrip(".")
        rows = f"rows {sorted_joinids[0]} to {sorted_joinids[-1]}" if len(sorted_joinids) else "no rows"
        raise soma.SOMAError(
            f"{rows} of {array.uri!r} must be readable, but: {reason}; try "
            "again if the storage could not be reached, else a file is damaged: restore it, or write the "
            "array anew."
        ) from err
