"""The loop that writes entries of a layer into pages, as runs: entries of one row that follow each other.

A page is memory at an address, with runs from its start on. A run has two uint32: its row, and four times
the number of its entries plus its code. Then come its columns, and its values, which start at a multiple of
their size; the next run starts at a multiple of 8 bytes. The code tells the type of the values: 0, 1 and 2
stand for uint8, uint16 and uint32, and `AS_IN_LAYER` for the type of the layer. A run has the smallest type
that holds its values exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._kernels.jit import jit, jit_inner
from tiledbsoma_ml._kernels.pointer import load, pointer, store

Int: TypeAlias = Any
"""A number, in compiled loops always an int64."""

AS_IN_LAYER = 3

DONE, OUT_OF_BOUNDS = -1, -2
"""Results of `hold_entries` that are not the number of a piece."""

MANY = 256
"""Number of entries for which the rest of a page is used: runs are not cut into smaller parts than this."""

MIN_PAGE_BYTES = 64

HEADER_BYTES = 8


class Entries(NamedTuple):
    """Entries of a layer.

    Attributes:
        dim_0: Joinid of the row of each entry.
        keys: Key of the column of each entry.
        values: Value of each entry.
        bits: The same memory, as unsigned integers.
    """

    dim_0: NDArray[np.int64]
    keys: NDArray[np.int64]
    values: NDArray[Any]
    bits: NDArray[Any]


class Wanted(NamedTuple):
    """The rows and columns that are wanted.

    Attributes:
        joinids: Joinids of the rows, in ascending order, each once.
        firsts: Index in `order` of the first row of each joinid, and the length of `order`.
        order: The rows, in the order of their joinids.
        borders: First row of each piece, and the number of rows; pieces have almost the same size.
        first_key: Key of the first column in `col_of`.
        col_of: The column of each key; -1 if it is not wanted.
        n_in_order: Length of `col_of` if it is 0, 1, 2 and so on; else 0.
        col_bytes: Size of a column in a page, 2 or 4.
    """

    joinids: NDArray[np.int64]
    firsts: NDArray[np.int32]
    order: NDArray[np.int32]
    borders: NDArray[np.int32]
    first_key: Int
    col_of: NDArray[np.int32]
    n_in_order: Int
    col_bytes: Int


class Filling(NamedTuple):
    """What has been written.

    Attributes:
        counts: Number of entries of each row; the rows that it lacks are ignored.
        pages: Address of the page of each piece.
        ends: Number of bytes of these pages that are used.
        page_bytes: Size of a page, a multiple of 8, at least `MIN_PAGE_BYTES`.
        codes: Largest code of each piece.
        kept: Memory for values, as unsigned integers.
        done: What of the entries is done; zeros before the first call.
    """

    counts: NDArray[np.int32]
    pages: NDArray[np.int64]
    ends: NDArray[np.int64]
    page_bytes: Int
    codes: NDArray[np.uint8]
    kept: NDArray[Any]
    done: NDArray[np.int64]


@jit
def hold_entries(entries: Entries, wanted: Wanted, filling: Filling) -> Int:
    """Write the entries that are wanted to the pages of their pieces, until a page is full.

    Returns:
        The piece that needs an empty page; then call this again. `DONE` at the end, or `OUT_OF_BOUNDS` if the
        arrays do not fit together.
    """
    dim_0, keys, bits, itemsize = entries.dim_0, entries.keys, entries.bits, entries.bits.itemsize
    joinids, firsts, order, borders = wanted.joinids, wanted.firsts, wanted.order, wanted.borders
    counts, pages, ends, codes, done = (
        filling.counts,
        filling.pages,
        filling.ends,
        filling.codes,
        filling.done,
    )
    n, n_rows, n_pieces = len(dim_0), len(counts), len(pages)
    if len(keys) != n or len(bits) != n or len(firsts) != len(joinids) + 1 or len(borders) != n_pieces + 1:
        return OUT_OF_BOUNDS
    if len(ends) != n_pieces or len(codes) != n_pieces or filling.page_bytes < MIN_PAGE_BYTES:
        return OUT_OF_BOUNDS
    col_of = wanted.col_of
    columns = wanted.first_key, np.int64(col_of.ctypes.data), len(col_of), wanted.n_in_order, wanted.col_bytes
    keys_at, bits_at = np.int64(keys.ctypes.data), np.int64(bits.ctypes.data)
    kept, n_kept, page_bytes = np.int64(filling.kept.ctypes.data), len(filling.kept), filling.page_bytes
    start, number, nth, begin = done[0], done[1], done[2], done[3]
    while start < n and len(joinids):
        stop = _end_of_run(dim_0, start)
        number = _find(joinids, number, dim_0[start])
        first = np.int64(firsts[number])
        n_repeats = firsts[number + 1] - first if joinids[number] == dim_0[start] else 0
        while nth < n_repeats:
            row = np.int64(order[first + nth]) if 0 <= first < len(order) - nth else -1
            if not 0 <= row < len(order):
                return OUT_OF_BOUNDS
            if row >= n_rows:  # a row of a piece that was dropped
                nth, begin = nth + 1, 0
                continue
            piece = _piece_of(borders, row * n_pieces // n_rows, row)
            if borders[piece] > row:
                return OUT_OF_BOUNDS
            if begin < start:
                begin = start
            while begin < stop:
                place = pages[piece], ends[piece], page_bytes, kept, n_kept
                given = keys_at + 8 * begin, bits_at + itemsize * begin, stop - begin, itemsize
                n_read, n_held, code, end = _hold_run(
                    given, entries.values.dtype, bits.dtype, columns, row - borders[piece], place
                )
                if not n_read:
                    done[0], done[1], done[2], done[3] = start, number, nth, begin
                    return piece
                counts[row] += n_held
                ends[piece] = end
                if code > codes[piece]:
                    codes[piece] = code
                begin += n_read
            nth, begin = nth + 1, 0
        start, nth = stop, 0
    return DONE


@jit_inner
def _end_of_run(dim_0: NDArray[np.int64], start: Int) -> Int:
    """Return the index after the entries of one row that begin at `start`."""
    joinid, stop = dim_0[start], start + 1
    while stop + 8 <= len(dim_0):
        difference = np.int64(0)
        for k in range(8):
            difference |= dim_0[stop + k] ^ joinid
        if difference:
            break
        stop += 8
    while stop < len(dim_0) and dim_0[stop] == joinid:
        stop += 1
    return stop


@jit_inner
def _find(joinids: NDArray[np.int64], number: Int, joinid: Int) -> Int:
    """Return the index of a joinid, most often `number` or the next one; any index if it is not there."""
    if joinids[number] == joinid:
        return number
    if number + 1 < len(joinids) and joinids[number + 1] == joinid:
        return number + 1
    low, high = 0, len(joinids) - 1
    while low < high:
        middle = (low + high) >> 1
        if joinids[middle] < joinid:
            low = middle + 1
        else:
            high = middle
    return low


@jit_inner
def _piece_of(borders: NDArray[np.int32], near: Int, row: Int) -> Int:
    """Return the piece of a row, which is `near` or one beside it."""
    if near + 2 < len(borders) and borders[near + 1] <= row:
        return near + 1
    return near - 1 if near and borders[near] > row else near


@jit_inner
def _hold_run(
    given: tuple[Int, Int, Int, Int],
    dtype: Any,
    bits_dtype: Any,
    columns: tuple[Int, Int, Int, Int, Int],
    row: Int,
    place: tuple[Int, Int, Int, Int, Int],
) -> tuple[Int, Int, Int, Int]:
    """Write entries of one row to a page, as many as fit.

    Args:
        given: Addresses of the keys and of the values; the number of entries; the size of a value.
        dtype: Type of the values.
        bits_dtype: Type of their bits.
        columns: `first_key`; address and length of `col_of`; `n_in_order`; `col_bytes`.
        row: The row, counted from the first one of the piece.
        place: Address, end and size of the page; address and length of `kept`.

    Returns:
        The number of entries that were read, 0 if the page is full; the number of those that are wanted; the
        code of their values; and the new end of the page.
    """
    keys, values, n, itemsize = given
    first_key, col_of, n_keys, n_in_order, col_bytes = columns
    page, end, page_bytes, kept, n_kept = place
    to, code = page + end + HEADER_BYTES, 0 if itemsize > 1 else AS_IN_LAYER
    while True:
        size = itemsize if code == AS_IN_LAYER else 1 << code
        n_fitting = (page_bytes - end - HEADER_BYTES - size + 1) // (col_bytes + size)
        if n_fitting < 1 or (end and n_fitting < MANY and n_fitting < n):
            return 0, 0, 0, end
        n_read, n_held, source = n if n < n_fitting else n_fitting, 0, values
        if n_in_order and _copy_columns(keys, n_read, first_key, n_in_order, col_bytes, to):
            n_held = n_read
        else:
            source, room = kept, n_fitting if n_fitting < n_kept else n_kept
            n_read, n_held = _keep_wanted(
                keys, values, n, bits_dtype, first_key, col_of, n_keys, col_bytes, to, kept, room
            )
        values_at = (to + n_held * col_bytes + size - 1) & -size
        if _copy_values(source, n_held, dtype, bits_dtype, itemsize, code, values_at):
            break
        code += 1
        if 1 << code >= itemsize:
            code = AS_IN_LAYER
    if n_held:
        header = pointer(page + end, np.uint32)
        store(header, 0, row)
        store(header, 1, n_held << 2 | code)
        end = ((values_at + n_held * size + 7) & -8) - page
    return n_read, n_held, code if n_held else 0, end


@jit_inner
def _copy_columns(at: Int, n: Int, first_key: Int, n_cols: Int, col_bytes: Int, to: Int) -> bool:
    """Write the columns of keys to an address; return whether these are from 0 to `n_cols`."""
    keys, signs = pointer(at, np.int64), np.int64(0)
    if col_bytes == 2:
        u2 = pointer(to, np.uint16)
        for k in range(n):
            column = load(keys, k) - first_key
            signs |= column | (n_cols - 1 - column)
            store(u2, k, column)
    else:
        u4 = pointer(to, np.uint32)
        for k in range(n):
            column = load(keys, k) - first_key
            signs |= column | (n_cols - 1 - column)
            store(u4, k, column)
    return bool(signs >= 0)


@jit_inner
def _keep_wanted(
    keys_at: Int,
    bits_at: Int,
    n: Int,
    bits_dtype: Any,
    first_key: Int,
    col_of_at: Int,
    n_keys: Int,
    col_bytes: Int,
    to: Int,
    kept_at: Int,
    room: Int,
) -> tuple[Int, Int]:
    """Write the columns of wanted entries to an address, and their values to another one.

    Returns:
        The number of entries that were read, and the number of those that are wanted, at most `room`.
    """
    keys, bits, col_of = (
        pointer(keys_at, np.int64),
        pointer(bits_at, bits_dtype),
        pointer(col_of_at, np.int32),
    )
    u2, u4, kept = pointer(to, np.uint16), pointer(to, np.uint32), pointer(kept_at, bits_dtype)
    n_read, n_held = 0, 0
    while n_read < n and n_held < room:
        key, column = load(keys, n_read) - first_key, np.int32(-1)
        if 0 <= key < n_keys:
            column = load(col_of, key)
        if col_bytes == 2:
            store(u2, n_held, column)
        else:
            store(u4, n_held, column)
        store(kept, n_held, load(bits, n_read))
        n_held += 1 if column >= 0 else 0
        n_read += 1
    return n_read, n_held


@jit_inner
def _copy_values(at: Int, n: Int, dtype: Any, bits_dtype: Any, itemsize: Int, code: Int, to: Int) -> bool:
    """Write values to an address, in the type of the code; return whether it holds them exactly."""
    values, bits = pointer(at, dtype), pointer(at, bits_dtype)
    if code == AS_IN_LAYER:
        same = pointer(to, bits_dtype)
        for k in range(n):
            store(same, k, load(bits, k))
        return True
    all_bits, is_wrong = bits_dtype.type(0), False
    u1, u2, u4 = pointer(to, np.uint8), pointer(to, np.uint16), pointer(to, np.uint32)
    if code == 0:
        for k in range(n):
            value = load(values, k)
            count = np.int32(value if 0 <= value <= 255 else 0)
            store(u1, k, count)
            all_bits |= load(bits, k)
            is_wrong |= value != dtype.type(count)
    elif code == 1:
        for k in range(n):
            value = load(values, k)
            count = np.int32(value if 0 <= value <= 65_535 else 0)
            store(u2, k, count)
            all_bits |= load(bits, k)
            is_wrong |= value != dtype.type(count)
    else:
        for k in range(n):
            value = load(values, k)
            long = np.int64(value if 0 <= value <= 4_294_967_295 else 0)
            store(u4, k, long)
            all_bits |= load(bits, k)
            is_wrong |= value != dtype.type(long)
    sign = all_bits >> (8 * itemsize - 1)  # of a negative zero, for instance
    return bool(not is_wrong and sign == 0)
