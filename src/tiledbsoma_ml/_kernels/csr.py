"""Loops over rows in CSR."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._kernels.jit import jit


@jit
def count_rows(rows: NDArray[Any], counts: NDArray[np.int64]) -> None:
    """Do `counts[row] += 1` for every row in `rows`."""
    for k in range(len(rows)):
        counts[rows[k]] += 1


@jit
def place_rows(
    rows: NDArray[Any],
    cols: NDArray[Any],
    bits: NDArray[Any],
    free: NDArray[np.int64],
    indices: NDArray[Any],
    out_bits: NDArray[Any],
) -> None:
    """Write each entry to `free[row]`, the next free slot of its row, and increment `free[row]`."""
    for k in range(len(rows)):
        slot = free[rows[k]]
        free[rows[k]] = slot + 1
        indices[slot] = cols[k]
        out_bits[slot] = bits[k]


@jit
def fill_dense(
    indptr: NDArray[np.int64], indices: NDArray[Any], bits: NDArray[Any], out_bits: NDArray[Any]
) -> None:
    """Write CSR rows into the zeroed array `out_bits` of shape (n_rows, n_cols)."""
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            out_bits[row, indices[k]] = bits[k]


@jit
def sort_rows(indptr: NDArray[np.int64], indices: NDArray[Any], bits: NDArray[Any]) -> None:
    """Sort the entries of each row by column, in place; rows that are sorted already are only read."""
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        for k in range(start + 1, stop):
            if indices[k - 1] > indices[k]:
                order = np.argsort(indices[start:stop], kind="mergesort")
                indices[start:stop] = indices[start:stop][order]
                bits[start:stop] = bits[start:stop][order]
                break


@jit
def has_repeats(indptr: NDArray[np.int64], indices: NDArray[Any], n_cols: int) -> bool:
    """Return whether a row has a column twice; in sorted rows, only neighbouring entries are compared."""
    last_row = np.zeros(n_cols, dtype=np.uint8)  # number of the last row that had a column, from 1 to 255
    number = 0
    for row in range(len(indptr) - 1):
        cols = indices[indptr[row] : indptr[row + 1]]
        n_steps_back = 0
        for k in range(1, len(cols)):
            n_steps_back += cols[k - 1] >= cols[k]
        if not n_steps_back:
            continue
        number += 1
        if number == 256:
            last_row[:] = 0
            number = 1
        is_repeated, this_row = False, np.uint8(number)
        for k in range(len(cols)):
            is_repeated |= last_row[cols[k]] == this_row
            last_row[cols[k]] = this_row
        if is_repeated:
            return True
    return False
