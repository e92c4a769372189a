"""Loops of a window: entries of a matrix → runs of rows, and runs → rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._kernels.jit import jit


@jit
def find_runs(
    dim_0: NDArray[np.int64],
    sorted_ids: NDArray[np.int64],
    rows: NDArray[np.int32],
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
) -> int:
    """Find where entries of one row follow each other; return the number of runs found.

    For each run of a joinid that is in `sorted_ids`, its place there and the run's first and last entry (plus
    one) are written to the last three arguments, which must be as long as `dim_0`.
    """
    n_runs, k, row = 0, 0, 0
    while k < len(dim_0) and len(sorted_ids):
        joinid, start = dim_0[k], k
        while k < len(dim_0) and dim_0[k] == joinid:
            k += 1
        if row + 1 < len(sorted_ids) and sorted_ids[row + 1] == joinid:
            row += 1
        elif sorted_ids[row] != joinid:
            row = min(np.searchsorted(sorted_ids, joinid), len(sorted_ids) - 1)
        if sorted_ids[row] == joinid:
            rows[n_runs], starts[n_runs], stops[n_runs] = row, start, k
            n_runs += 1
    return n_runs


@jit
def count_kept(
    dim_1: NDArray[np.int64],
    first: int,
    col_of: NDArray[np.int32],
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    lengths: NDArray[np.int32],
) -> None:
    """Count the entries of each run whose column is wanted: which is in `col_of`, and not negative there.

    `col_of` is about the columns from `first` on; there may be others.
    """
    n_cols = np.uint64(len(col_of))
    for r in range(len(starts)):
        n_kept = 0
        for k in range(starts[r], stops[r]):
            number = np.uint64(dim_1[k] - first)  # huge for a column before the first
            if number < n_cols:
                n_kept += col_of[number] >= 0
        lengths[r] = n_kept


@jit
def count_nonzeros(
    block: NDArray[Any], lines: NDArray[np.int32], col_of: NDArray[np.int32], lengths: NDArray[np.int32]
) -> None:
    """Count the entries of some lines of a dense block that are not zero and whose column is wanted."""
    for r in range(len(lines)):
        n_kept = 0
        for k in range(len(col_of)):
            n_kept += (block[lines[r], k] != 0) & (col_of[k] >= 0)
        lengths[r] = n_kept


@jit
def copy_nonzeros(
    block: NDArray[Any],
    lines: NDArray[np.int32],
    col_of: NDArray[np.int32],
    begins: NDArray[np.int64],
    cols: NDArray[Any],
    kept: NDArray[Any],
) -> None:
    """Copy the entries of each line that `count_nonzeros` counts to `cols` and `kept`, from `begins` on."""
    for r in range(len(lines)):
        place = begins[r]
        for k in range(len(col_of)):
            value = block[lines[r], k]
            if value != 0 and col_of[k] >= 0:
                cols[place] = col_of[k]
                kept[place] = value
                place += 1


@jit
def are_counts(values: NDArray[Any], bits: NDArray[Any]) -> bool:
    """Whether all of some floating-point numbers are whole, and none is negative, a negative zero or NaN."""
    all_bits = bits[0]
    n_fractions = 0
    for k in range(len(values)):
        all_bits |= bits[k]
        n_fractions += values[k] != np.floor(values[k])
    sign = all_bits >> np.uint64(bits.itemsize * 8 - 1)
    return n_fractions == 0 and sign == 0


@jit
def copy_runs(
    dim_1: NDArray[np.int64],
    values: NDArray[Any],
    first: int,
    col_of: NDArray[np.int32],
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    begins: NDArray[np.int64],
    cols: NDArray[Any],
    kept: NDArray[Any],
) -> None:
    """Copy the entries of each run that `count_kept` counts to `cols` and `kept`, from `begins` on."""
    n_cols = np.uint64(len(col_of))
    for r in range(len(starts)):
        place = begins[r]
        for k in range(starts[r], stops[r]):
            number = np.uint64(dim_1[k] - first)
            if number < n_cols:
                col = col_of[number]
                if col >= 0:
                    cols[place] = col
                    kept[place] = values[k]
                    place += 1


@jit
def add_lengths(rows: NDArray[np.int32], lengths: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
    """Add the length of each run to the count of its row."""
    for r in range(len(rows)):
        counts[rows[r]] += lengths[r]


@jit
def place_runs(
    rows: NDArray[np.int32],
    lengths: NDArray[np.int32],
    cols: NDArray[Any],
    values: NDArray[Any],
    free: NDArray[np.int64],
    indices: NDArray[Any],
    data: NDArray[Any],
) -> None:
    """Put each run at `free[row]`, the next free place of its row, and move that place on."""
    start = 0
    for r in range(len(rows)):
        place, n = free[rows[r]], lengths[r]
        free[rows[r]] = place + n
        indices[place : place + n] = cols[start : start + n]
        data[place : place + n] = values[start : start + n]
        start += n
