"""Loops of windows, which turn entries of a matrix into runs, and runs into rows in CSR."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._kernels.jit import jit


@jit
def find_runs(
    dim_0: NDArray[np.int64],
    sorted_joinids: NDArray[np.int64],
    rows: NDArray[np.int32],
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
) -> int:
    """Find runs: entries of one row that follow each other; return the number of runs found.

    Only runs with a joinid in `sorted_joinids` count. The index of the joinid there, and the start and stop
    of the run, are written to the last three arguments, which must be as long as `dim_0`.
    """
    n_runs, k, row = 0, 0, 0
    while k < len(dim_0) and len(sorted_joinids):
        joinid, start = dim_0[k], k
        while k < len(dim_0) and dim_0[k] == joinid:
            k += 1
        if row + 1 < len(sorted_joinids) and sorted_joinids[row + 1] == joinid:
            row += 1
        elif sorted_joinids[row] != joinid:
            row = min(np.searchsorted(sorted_joinids, joinid), len(sorted_joinids) - 1)
        if sorted_joinids[row] == joinid:
            rows[n_runs], starts[n_runs], stops[n_runs] = row, start, k
            n_runs += 1
    return n_runs


@jit
def count_wanted(
    dim_1: NDArray[np.int64],
    first: int,
    col_of: NDArray[np.int32],
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    lengths: NDArray[np.int32],
) -> None:
    """Count the entries of each run whose column is wanted.

    `col_of` has the number in `X` of the columns from `first` on, and -1 for those that are not wanted.
    Columns outside of it are not wanted.
    """
    n_cols = np.uint64(len(col_of))
    for r in range(len(starts)):
        n_wanted = 0
        for k in range(starts[r], stops[r]):
            number = np.uint64(dim_1[k] - first)  # huge for a column before the first
            if number < n_cols:
                n_wanted += col_of[number] >= 0
        lengths[r] = n_wanted


@jit
def count_nonzeros(
    block: NDArray[Any], lines: NDArray[np.int32], col_of: NDArray[np.int32], lengths: NDArray[np.int32]
) -> None:
    """Count the entries of each of these lines of a dense block that are not zero and in a wanted column."""
    for r in range(len(lines)):
        n_wanted = 0
        for k in range(len(col_of)):
            n_wanted += (block[lines[r], k] != 0) & (col_of[k] >= 0)
        lengths[r] = n_wanted


@jit
def copy_nonzeros(
    block: NDArray[Any],
    lines: NDArray[np.int32],
    col_of: NDArray[np.int32],
    begins: NDArray[np.int64],
    cols_out: NDArray[Any],
    values_out: NDArray[Any],
) -> None:
    """Copy the entries that `count_nonzeros` counts to the last two arguments, each line from `begins` on."""
    for r in range(len(lines)):
        slot = begins[r]
        for k in range(len(col_of)):
            value = block[lines[r], k]
            if value != 0 and col_of[k] >= 0:
                cols_out[slot] = col_of[k]
                values_out[slot] = value
                slot += 1


@jit
def are_counts(values: NDArray[Any], bits: NDArray[Any]) -> bool:
    """Return whether floating-point numbers are whole, and none is negative, a negative zero or NaN."""
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
    cols_out: NDArray[Any],
    values_out: NDArray[Any],
) -> None:
    """Copy the entries that `count_wanted` counts to the last two arguments, each run from `begins` on."""
    n_cols = np.uint64(len(col_of))
    for r in range(len(starts)):
        slot = begins[r]
        for k in range(starts[r], stops[r]):
            number = np.uint64(dim_1[k] - first)
            if number < n_cols:
                col = col_of[number]
                if col >= 0:
                    cols_out[slot] = col
                    values_out[slot] = values[k]
                    slot += 1


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
    """Write each run to `free[row]`, the next free slot of its row, and add its length to `free[row]`."""
    start = 0
    for r in range(len(rows)):
        slot, n = free[rows[r]], lengths[r]
        free[rows[r]] = slot + n
        indices[slot : slot + n] = cols[start : start + n]
        data[slot : slot + n] = values[start : start + n]
        start += n
