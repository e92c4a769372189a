"""Compiled loops of compressed snapshots: bits of columns and values are put apart, and together again.

Bits of the same significance are alike in a block, so that they compress well if they follow each other in a
*plane*: of columns, bytes; of values, most of which are small, four bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._kernels.jit import jit


@jit
def split_columns(starts: NDArray[np.int64], columns: NDArray[Any], planes: NDArray[np.uint8]) -> None:
    """Write the bytes of the differences of columns to `planes`: the lowest of all first, then the second.

    The first column of a row stays as it is. Rows have the entries `starts[row]` to `starts[row + 1] - 1`.
    """
    n = len(columns)
    differences = columns.copy()
    for row in range(len(starts) - 1):
        for k in range(starts[row] + 1, starts[row + 1]):
            differences[k] = np.uint64(columns[k]) - np.uint64(columns[k - 1])
    for byte in range(columns.itemsize):
        plane, shift = planes[byte * n : (byte + 1) * n], np.uint64(8 * byte)
        for k in range(n):
            plane[k] = (np.uint64(differences[k]) >> shift) & np.uint64(255)


@jit
def join_columns(
    planes: NDArray[np.uint8], starts: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Write the columns of some rows to `out`, one row after the other: the opposite of `split_columns`.

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
        column = np.uint64(0)
        for k in range(len(entries)):
            column += np.uint64(entries[k])
            entries[k] = column
        at += stop - start


@jit
def split_values(bits: NDArray[Any], planes: NDArray[np.uint8]) -> None:
    """Write the lowest four bits of all values to `planes`, two to a byte, then the next four, and so on.

    The first of two values has the lower bits of the byte. If the last value is alone, zeros are beside it.
    """
    n, half = len(bits), (len(bits) + 1) // 2
    for place in range(2 * bits.itemsize):
        shift, plane = np.uint64(4 * place), planes[place * half : (place + 1) * half]
        for pair in range(half):
            low = (np.uint64(bits[2 * pair]) >> shift) & np.uint64(15)
            high = np.uint64(0)
            if 2 * pair + 1 < n:
                high = (np.uint64(bits[2 * pair + 1]) >> shift) & np.uint64(15)
            plane[pair] = low | high << np.uint64(4)


@jit
def join_values(planes: NDArray[np.uint8], pairs: NDArray[Any]) -> None:
    """Write all values of a block to `pairs`, two to an unsigned integer: the opposite of `split_values`.

    An integer is written at once, so that the compiler makes several of them at a time.
    """
    half, width = len(pairs), np.uint64(4 * pairs.itemsize)
    for pair in range(half):
        both = np.uint64(planes[pair])
        pairs[pair] = (both & np.uint64(15)) | (both >> np.uint64(4)) << width
    for place in range(1, pairs.itemsize):
        shift, plane = np.uint64(4 * place), planes[place * half : (place + 1) * half]
        any_bits = np.uint8(0)
        for pair in range(half):
            any_bits |= plane[pair]
        if any_bits == 0:
            continue
        for pair in range(half):
            both = np.uint64(plane[pair])
            pairs[pair] |= ((both & np.uint64(15)) | (both >> np.uint64(4)) << width) << shift


@jit
def take_rows(
    bits: NDArray[Any], starts: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Write the values of some rows to `out`, one row after the other; see `join_columns`."""
    at = 0
    for row in rows:
        start, stop = starts[row], starts[row + 1]
        entries, values = out[at : at + stop - start], bits[start:stop]
        for k in range(len(entries)):
            entries[k] = values[k]
        at += stop - start
