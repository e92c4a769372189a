"""The compiled loops: they release the GIL, are cached on disk, and may run in several threads at once.

Values are moved as unsigned integers of their own width (`as_bits`), so that one compiled loop serves every
type of that width. Imported on first use, because importing numba takes time.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


def as_bits(values: NDArray[Any]) -> NDArray[Any]:
    """Return a view of `values` as unsigned integers of the same width."""
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))


@_jit
def count_rows(rows: NDArray[Any], counts: NDArray[np.int64]) -> None:
    """Do `counts[row] += 1` for every row in `rows`."""
    for k in range(len(rows)):
        counts[rows[k]] += 1


@_jit
def place_rows(
    rows: NDArray[Any],
    cols: NDArray[Any],
    bits: NDArray[Any],
    free: NDArray[np.int64],
    indices: NDArray[Any],
    out_bits: NDArray[Any],
) -> None:
    """Put each entry at `free[row]`, the next free place of its row, and move that place on by one."""
    for k in range(len(rows)):
        place = free[rows[k]]
        free[rows[k]] = place + 1
        indices[place] = cols[k]
        out_bits[place] = bits[k]


@_jit
def locate(
    dim_0: NDArray[np.int64],
    dim_1: NDArray[np.int64],
    bits: NDArray[Any],
    sorted_ids: NDArray[np.int64],
    row_of: NDArray[np.int64],
    col_of: NDArray[np.int64],
    rows: NDArray[Any],
    cols: NDArray[Any],
    out_bits: NDArray[Any],
) -> int:
    """Translate joinids into places, dropping columns that are not wanted; return how many entries stay.

    Equals, for every entry: `row_of[searchsorted(sorted_ids, dim_0)]` and `col_of[dim_1]`, kept if the
    latter is not negative. Entries of a row come in runs, so a row is looked up once per run.
    """
    n_kept = 0
    joinid, row = np.int64(-1), np.int64(-1)
    for k in range(len(dim_0)):
        if dim_0[k] != joinid:
            joinid = dim_0[k]
            row = row_of[np.searchsorted(sorted_ids, joinid)]
        col = col_of[dim_1[k]]
        if col >= 0:
            rows[n_kept] = row
            cols[n_kept] = col
            out_bits[n_kept] = bits[k]
            n_kept += 1
    return n_kept


@_jit
def fill_dense(
    indptr: NDArray[np.int64], indices: NDArray[Any], bits: NDArray[Any], out_bits: NDArray[Any]
) -> None:
    """Write CSR rows into the zeroed array `out_bits` of shape (n_rows, n_cols)."""
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            out_bits[row, indices[k]] = bits[k]


@_jit
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
