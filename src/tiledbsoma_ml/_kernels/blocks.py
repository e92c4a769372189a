"""Compiled loops of compressed snapshots: the bytes of columns and values are put apart, and together again.

The lowest bytes of all entries of a block follow each other, then the second bytes, and so on: `planes`. Each
of these is alike in itself, so that it compresses well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._kernels.jit import jit


@jit
def split_rows(
    starts: NDArray[np.int64], values: NDArray[Any], are_columns: bool, planes: NDArray[np.uint8]
) -> None:
    """Write the bytes of unsigned integers to `planes`; of columns, the difference to the one before.

    The first column of a row stays as it is. Rows have the entries `starts[row]` to `starts[row + 1] - 1`.
    """
    n = len(values)
    for row in range(len(starts) - 1):
        before = np.uint64(0)
        for k in range(starts[row], starts[row + 1]):
            value = np.uint64(values[k])
            bits = value - before
            if are_columns:
                before = value
            for byte in range(values.itemsize):
                planes[byte * n + k] = (bits >> np.uint64(8 * byte)) & np.uint64(255)


@jit
def join_rows(
    planes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    rows: NDArray[np.int64],
    are_columns: bool,
    out: NDArray[Any],
) -> None:
    """Write the entries of some rows to `out`, one row after the other: the opposite of `split_rows`.

    The caller has checked that row starts ascend from 0 to the number of entries in `planes`, and that `out`
    has the length of these rows. Columns that are too large wrap around; whoever uses them checks them.
    """
    n = len(planes) // out.itemsize
    at = 0
    for row in rows:
        start, stop = starts[row], starts[row + 1]
        entries, lowest = out[at : at + stop - start], planes[start:stop]
        for k in range(len(entries)):
            entries[k] = lowest[k]
        for byte in range(1, out.itemsize):
            plane, shift = planes[byte * n + start : byte * n + stop], np.uint64(8 * byte)
            for k in range(len(entries)):
                entries[k] |= np.uint64(plane[k]) << shift
        if are_columns:
            for k in range(1, len(entries)):
                entries[k] += entries[k - 1]
        at += stop - start
