"""The loop that reads pages of held rows, and places their entries as rows in CSR."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._kernels.hold import AS_IN_LAYER, HEADER_BYTES, Int
from tiledbsoma_ml._kernels.jit import jit, jit_inner
from tiledbsoma_ml._kernels.pointer import load, pointer, store

WRONG, IN_ANY_ORDER, ASCENDING = range(3)
"""Results of `place_runs`."""


@jit
def place_runs(
    page: Int,
    n_bytes: Int,
    col_bytes: Int,
    n_cols: Int,
    indptr: NDArray[np.int64],
    free: NDArray[np.int64],
    indices: NDArray[Any],
    data: NDArray[Any],
    bits: NDArray[Any],
) -> Int:
    """Write each run of a page to `free[row]`, the next free slot of its row, which grows.

    Args:
        page: Address of the page.
        n_bytes: Number of bytes that are used of it.
        col_bytes: Size of a column in the page, 2 or 4.
        n_cols: Number of columns.
        indptr: The first slot of each row, and the slot after the last row.
        free: The next free slot of each row.
        indices: Column in each slot.
        data: Value in each slot.
        bits: The same memory, as unsigned integers.

    Returns:
        `ASCENDING` if the columns of each row ascend, also after those that were written before, else
        `IN_ANY_ORDER`. `WRONG` if a run does not fit into its row, or has a column that does not exist; what
        the page has from there on is not written, or only in the slots of its row.
    """
    at, n_slots, itemsize, result = 0, min(len(indices), len(data)), bits.itemsize, ASCENDING
    indices_at, data_at = np.int64(indices.ctypes.data), np.int64(data.ctypes.data)
    while at + HEADER_BYTES <= n_bytes:
        header = pointer(page + at, np.uint32)
        row, second = np.int64(load(header, 0)), np.int64(load(header, 1))
        n, code, cols_at = second >> 2, second & 3, page + at + HEADER_BYTES
        size = itemsize if code == AS_IN_LAYER else 1 << code
        values_at = (cols_at + n * col_bytes + size - 1) & -size
        at = ((values_at + n * size + 7) & -8) - page
        if at > n_bytes or row >= len(free) or row + 1 >= len(indptr):
            return WRONG
        slot = free[row]
        if slot < 0 or slot + n > indptr[row + 1] or slot + n > n_slots:
            return WRONG
        free[row] = slot + n
        to = indices_at + indices.itemsize * slot
        largest, is_ascending = _place_columns(cols_at, col_bytes, n, to, indices.dtype)
        if largest >= n_cols:
            return WRONG
        if not is_ascending or (n and slot > indptr[row] and indices[slot - 1] >= indices[slot]):
            result = IN_ANY_ORDER
        _place_values(values_at, code, n, data_at + data.itemsize * slot, data.dtype, bits.dtype)
    return result if at == n_bytes else WRONG


@jit_inner
def _place_columns(at: Int, col_bytes: Int, n: Int, to: Int, dtype: Any) -> tuple[Int, bool]:
    """Copy columns from an address to another one; return the largest, and whether they ascend."""
    indices, u2, u4 = pointer(to, dtype), pointer(at, np.uint16), pointer(at, np.uint32)
    has_descent, largest = False, np.int64(-1)
    if col_bytes == 2:
        for k in range(n):
            store(indices, k, load(u2, k))
        for k in range(1, n):
            has_descent |= load(u2, k) <= load(u2, k - 1)
    else:
        for k in range(n):
            store(indices, k, load(u4, k))
        for k in range(1, n):
            has_descent |= load(u4, k) <= load(u4, k - 1)
    for k in range(0 if has_descent else max(0, n - 1), n):
        column = np.int64(load(u2, k)) if col_bytes == 2 else np.int64(load(u4, k))
        largest = max(largest, column)
    return largest, not has_descent


@jit_inner
def _place_values(at: Int, code: Int, n: Int, to: Int, dtype: Any, bits_dtype: Any) -> None:
    """Copy values, whose type is that of the code, from an address to another one."""
    data, bits, same = pointer(to, dtype), pointer(to, bits_dtype), pointer(at, bits_dtype)
    u1, u2, u4 = pointer(at, np.uint8), pointer(at, np.uint16), pointer(at, np.uint32)
    if code == 0:
        for k in range(n):
            store(data, k, load(u1, k))
    elif code == 1:
        for k in range(n):
            store(data, k, load(u2, k))
    elif code == 2:
        for k in range(n):
            store(data, k, load(u4, k))
    else:
        for k in range(n):
            store(bits, k, load(same, k))
