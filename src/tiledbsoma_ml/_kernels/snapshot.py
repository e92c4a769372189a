"""Compiled loops of snapshots, which copy rows from mapped files directly into the arrays that are returned.

Rows lie in many files, whose values have different types. The loops get the addresses of the maps, so that
one call serves rows of all files; the caller keeps the maps open. The loops check each index after copying
it. So no loop reads or writes outside of its arrays, whatever the files hold, also if they change meanwhile.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from tiledbsoma_ml._kernels.jit import jit, jit_inner

KINDS = {dtype: kind for kind, dtype in enumerate(["|u1", "<u2", "<u4", "|i1", "<i2", "<i4", "<f4"])}
"""Numbers of the types that stored values can have; `AS_GIVEN_OUT` stands for the type that is returned."""

AS_GIVEN_OUT = len(KINDS)

ROWS_AHEAD = 4
"""Number of rows by which memory is prefetched ahead. In random order, this doubles the speed."""


@intrinsic
def _at(_: Any, address: Any) -> Any:
    """Return an address as a pointer."""

    def make(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), make


@intrinsic
def _prefetch_line(_: Any, address: Any) -> Any:
    """Ask the processor for the cache line at an address, without waiting for it."""

    def make(__: Any, builder: Any, ___: Any, arguments: Any) -> None:
        pointer, int_32 = cgutils.voidptr_t, ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer, int_32, int_32, int_32]),
            "llvm.prefetch.p0i8",
        )
        to_read, keep, data = (ir.Constant(int_32, number) for number in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), to_read, keep, data])

    return types.void(address), make


@jit
def find_rows(
    joinids: NDArray[np.int64],
    sorted_joinids: NDArray[np.int64],
    first_rows: NDArray[np.int64],
    shift: int,
    rows: NDArray[np.int64],
) -> int:
    """Write the index of each joinid in `sorted_joinids`, or -1; return the number of missing joinids.

    `first_rows[b]` is the first row whose joinid is at least `sorted_joinids[0] + (b << shift)`.
    """
    n_missing = 0
    for k in range(len(joinids)):
        joinid, row = joinids[k], -1
        if len(sorted_joinids) and sorted_joinids[0] <= joinid <= sorted_joinids[-1]:
            bucket = (joinid - sorted_joinids[0]) >> shift
            if 0 <= bucket < len(first_rows) - 1:
                low, high = first_rows[bucket], first_rows[bucket + 1]
                while low < high:
                    middle = (low + high) >> 1
                    if sorted_joinids[middle] < joinid:
                        low = middle + 1
                    else:
                        high = middle
                if low < len(sorted_joinids) and sorted_joinids[low] == joinid:
                    row = low
        rows[k] = row
        n_missing += row < 0
    return n_missing


@jit
def first_descent(values: NDArray[np.int64], is_strict: bool) -> int:
    """Return the index of the first value that is below the one before it, or -1.

    With `is_strict`, a value that equals the one before it counts as well.
    """
    for k in range(1, len(values)):
        if values[k] < values[k - 1] or (is_strict and values[k] == values[k - 1]):
            return k
    return -1


@jit
def first_bad_row(indptr: NDArray[np.int64], indices: NDArray[Any], n_cols: int) -> int:
    """Return the first row with columns that do not exist or do not ascend, or -1."""
    for row in range(len(indptr) - 1):
        columns = indices[max(0, indptr[row]) : min(indptr[row + 1], len(indices))]
        is_wrong = False
        for k in range(1, len(columns)):
            is_wrong |= columns[k] <= columns[k - 1]
        if is_wrong or (len(columns) and np.int64(columns[-1]) >= n_cols):
            return row
    return -1


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
def locate_rows(
    rows: NDArray[np.int64],
    shard_borders: NDArray[np.int64],
    indptr_at: NDArray[np.int64],
    n_values: NDArray[np.int64],
    shards: NDArray[np.int32],
    begins: NDArray[np.int64],
    indptr: NDArray[np.int64],
) -> int:
    """Find the shard of each row, and its values there; write this to the last three arguments.

    Args:
        rows: The rows.
        shard_borders: First row of each shard, and the number of rows.
        indptr_at: Address of the row starts of each shard.
        n_values: Number of stored values of each shard.
        shards: The shard of each row.
        begins: Index of the first value of each row in its shard.
        indptr: Row starts of these rows, concatenated.

    Returns:
        The index in `rows` of the first one that does not exist, or whose values lie outside its shard; or
        -1.
    """
    indptr[0] = 0
    for k in range(len(rows)):
        if rows[k] < shard_borders[0] or rows[k] >= shard_borders[-1]:
            return k
        shard = np.searchsorted(shard_borders, rows[k], side="right") - 1
        row = rows[k] - shard_borders[shard]
        borders = numba.carray(_at(indptr_at[shard] + 8 * row), 2, np.int64)
        begin, end = borders[0], borders[1]
        if begin < 0 or end < begin or end > n_values[shard]:
            return k
        shards[k] = shard
        begins[k] = begin
        indptr[k + 1] = indptr[k] + end - begin
    return -1


@jit_inner
def _copy(address: int, kind: int, begin: int, out: NDArray[Any]) -> None:
    """Fill `out`, converting to its type, with the values of an array at an address, from `begin` on."""
    n = len(out)
    if kind == 0:
        u1 = numba.carray(_at(address + begin), n, np.uint8)
        for k in range(n):
            out[k] = u1[k]
    elif kind == 1:
        u2 = numba.carray(_at(address + 2 * begin), n, np.uint16)
        for k in range(n):
            out[k] = u2[k]
    elif kind == 2:
        u4 = numba.carray(_at(address + 4 * begin), n, np.uint32)
        for k in range(n):
            out[k] = u4[k]
    elif kind == 3:
        i1 = numba.carray(_at(address + begin), n, np.int8)
        for k in range(n):
            out[k] = i1[k]
    elif kind == 4:
        i2 = numba.carray(_at(address + 2 * begin), n, np.int16)
        for k in range(n):
            out[k] = i2[k]
    elif kind == 5:
        i4 = numba.carray(_at(address + 4 * begin), n, np.int32)
        for k in range(n):
            out[k] = i4[k]
    elif kind == 6:
        f4 = numba.carray(_at(address + 4 * begin), n, np.float32)
        for k in range(n):
            out[k] = f4[k]
    else:
        same = numba.carray(_at(address + out.itemsize * begin), n, out.dtype)
        for k in range(n):
            out[k] = same[k]


@jit_inner
def _prefetch(address: int, kind: int, itemsize: int, begin: int, n: int) -> None:
    """Ask the processor for `n` values of the array at an address, from index `begin` on."""
    if kind < AS_GIVEN_OUT:
        itemsize = 1 if kind in (0, 3) else 2 if kind in (1, 4) else 4
    for line in range(address + itemsize * begin, address + itemsize * (begin + n), 64):
        _prefetch_line(line)


@jit_inner
def _copy_columns(address: int, kind: int, begin: int, out: NDArray[Any]) -> int:
    """Do what `_copy` does, for columns, which are unsigned; return the largest, or -1 if `out` is empty."""
    n = len(out)
    if n == 0:
        return -1
    if kind == 1:
        u2 = numba.carray(_at(address + 2 * begin), n, np.uint16)
        largest_u2 = np.uint16(0)
        for k in range(n):
            column_u2 = u2[k]
            out[k] = column_u2
            largest_u2 = max(largest_u2, column_u2)
        return int(largest_u2)
    u4 = numba.carray(_at(address + 4 * begin), n, np.uint32)
    largest_u4 = np.uint32(0)
    for k in range(n):
        column_u4 = u4[k]
        out[k] = column_u4
        largest_u4 = max(largest_u4, column_u4)
    return int(largest_u4)


@jit
def gather_columns(
    shards: NDArray[np.int32],
    begins: NDArray[np.int64],
    indptr: NDArray[np.int64],
    addresses: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    n_cols: int,
    out: NDArray[Any],
) -> int:
    """Do what `gather_rows` does, for columns; return the first index of a row with one too large, or -1."""
    for k in range(len(shards)):
        if k + ROWS_AHEAD < len(shards):
            shard, begin = shards[k + ROWS_AHEAD], begins[k + ROWS_AHEAD]
            n = indptr[k + ROWS_AHEAD + 1] - indptr[k + ROWS_AHEAD]
            _prefetch(addresses[shard], kinds[shard], out.itemsize, begin, n)
        shard, row = shards[k], out[indptr[k] : indptr[k + 1]]
        if _copy_columns(addresses[shard], kinds[shard], begins[k], row) >= n_cols:
            return k
    return -1


@jit
def gather_rows(
    shards: NDArray[np.int32],
    begins: NDArray[np.int64],
    indptr: NDArray[np.int64],
    addresses: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    out: NDArray[Any],
) -> None:
    """Copy the values of rows from an array of their shards to `out`, one row after the other."""
    for k in range(len(shards)):
        if k + ROWS_AHEAD < len(shards):
            shard, begin = shards[k + ROWS_AHEAD], begins[k + ROWS_AHEAD]
            n = indptr[k + ROWS_AHEAD + 1] - indptr[k + ROWS_AHEAD]
            _prefetch(addresses[shard], kinds[shard], out.itemsize, begin, n)
        shard = shards[k]
        _copy(addresses[shard], kinds[shard], begins[k], out[indptr[k] : indptr[k + 1]])


@jit
def keep_columns(
    indptr: NDArray[np.int64], col_of: NDArray[np.int32], indices: NDArray[Any], bits: NDArray[Any]
) -> None:
    """Replace each column by `col_of[column]`, in place, and drop the entries for which that is -1.

    All columns are indices of `col_of`: `gather_columns` has checked them.
    """
    end, start = 0, indptr[0]
    for row in range(len(indptr) - 1):
        for k in range(start, indptr[row + 1]):
            col = col_of[indices[k]]
            if col >= 0:
                indices[end] = col
                bits[end] = bits[k]
                end += 1
        start = indptr[row + 1]
        indptr[row + 1] = end


@jit
def sort_rows_of_few(
    indptr: NDArray[np.int64], n_cols: int, indices: NDArray[Any], bits: NDArray[Any]
) -> None:
    """Sort the entries of each row by column, in place, by a pass over all columns; fast if there are few.

    All columns are below `n_cols`: `gather_columns` has checked them.
    """
    words = np.zeros((n_cols + 63) // 64, dtype=np.uint64)
    values = np.empty(n_cols, dtype=bits.dtype)
    one = np.uint64(1)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        for k in range(start, stop):
            col = np.int64(indices[k])
            words[col >> 6] |= one << np.uint64(col & 63)
            values[col] = bits[k]
        slot = start
        for w in range(len(words)):
            word = words[w]
            words[w] = 0
            while word:
                col = np.int64(64 * w + _n_trailing_zeros(word))
                indices[slot], bits[slot] = col, values[col]
                slot += 1
                word &= word - one


@jit_inner
def _n_trailing_zeros(word: int) -> int:
    """Return the index of the lowest bit that is set."""
    n, lowest = 0, word & (~word + np.uint64(1))
    for shift in (32, 16, 8, 4, 2, 1):
        if lowest >> np.uint64(shift):
            lowest >>= np.uint64(shift)
            n += shift
    return n


@jit
def fill_rows(
    shards: NDArray[np.int32],
    begins: NDArray[np.int64],
    indptr: NDArray[np.int64],
    indices_at: NDArray[np.int64],
    indices_kinds: NDArray[np.uint8],
    data_at: NDArray[np.int64],
    data_kinds: NDArray[np.uint8],
    col_of: NDArray[np.int32],
    indices: NDArray[Any],
    data: NDArray[Any],
    bits: NDArray[Any],
    out_bits: NDArray[Any],
) -> int:
    """Write rows into the dense `out_bits`, zeros included, each while it is in the cache.

    `indices` and `data` are at least as long as the longest row, and `bits` is a view of `data`. The value of
    a column goes to `col_of[column]`, unless that is -1. If `col_of` is empty, columns stay as they are.

    Returns:
        The index of the first row with a column that does not exist, or -1.
    """
    n_cols = len(col_of) if len(col_of) else out_bits.shape[1]
    for k in range(len(shards)):
        if k + ROWS_AHEAD < len(shards):
            shard, begin = shards[k + ROWS_AHEAD], begins[k + ROWS_AHEAD]
            n = indptr[k + ROWS_AHEAD + 1] - indptr[k + ROWS_AHEAD]
            _prefetch(indices_at[shard], indices_kinds[shard], indices.itemsize, begin, n)
            _prefetch(data_at[shard], data_kinds[shard], data.itemsize, begin, n)
        shard, n = shards[k], indptr[k + 1] - indptr[k]
        if _copy_columns(indices_at[shard], indices_kinds[shard], begins[k], indices[:n]) >= n_cols:
            return k
        _copy(data_at[shard], data_kinds[shard], begins[k], data[:n])
        row = out_bits[k]
        row[:] = 0
        if not len(col_of):
            for i in range(n):
                row[indices[i]] = bits[i]
        else:
            for i in range(n):
                col = col_of[indices[i]]
                if col >= 0:
                    row[col] = bits[i]
    return -1
