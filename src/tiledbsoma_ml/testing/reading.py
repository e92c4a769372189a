"""The promises of a `Reader`, and of one that has `RandomAccess`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._source import RandomAccess, Reader, TiledReader
from tiledbsoma_ml.testing.case import (
    Case,
    check_fresh,
    check_piece,
    dense,
    on_threads,
    overwrite,
    read,
    require,
    same_array,
    same_frame,
)


def rows_come_in_order(case: Case) -> None:
    """`read` must give exactly the rows asked for, in that order, repeats included."""
    for what, rows in case.orders().items():
        with closing(case.open()) as reader:
            case.check_rows(reader, rows, what)


def no_rows_are_read(case: Case) -> None:
    """`read` of no rows must give none."""
    with closing(case.open()) as reader:
        found = read(reader.read(case.asked([])), case.X.shape[1])
        n = len(found.obs_joinids)
        require(not n, "`read` of no rows must give none", f"it gave {n}")


def columns_come_in_order(case: Case) -> None:
    """`read` must give the columns that the reader was opened with, in that order."""
    n = case.X.shape[1]
    some = np.flatnonzero(np.arange(n) % 3 != 1)
    for columns in (np.arange(n)[::-1], some, np.random.default_rng(0).permutation(some), np.array([n - 1])):
        with closing(case.open(columns)) as reader:
            case.check_rows(reader, case.orders()["in random order"], f"by {len(columns)} columns", columns)
            if isinstance(reader, RandomAccess):
                _check_matrices(case, reader, case.orders()["with repeats"], columns)


def reads_follow_each_other(case: Case) -> None:
    """A reader must read batches one after the other, also one before those before are used up."""
    orders = list(case.orders().items())
    with closing(case.open()) as reader:
        for what, rows in orders:
            case.check_rows(reader, rows, f"{what}, by a reader that has read others")
        (first, rows), (second, others) = orders[1], orders[3]
        pieces, later = reader.read(case.asked(rows)), reader.read(case.asked(others))
        begun = [next(pieces)]
        what = f"{second}, while those before are used"
        case.compare(read(later, case.X.shape[1]), others, what)
        what = f"{first}, while others are read"
        case.compare(read([*begun, *pieces], case.X.shape[1]), rows, what)


def two_readers_work_at_once(case: Case) -> None:
    """Two readers must be able to work at once, on two threads."""

    def task(number: int) -> Callable[[], None]:
        def run() -> None:
            rng = np.random.default_rng(number)
            with closing(case.open()) as reader:
                for _ in range(4):
                    rows = rng.permutation(len(case.obs))
                    case.check_rows(reader, rows, "by one of two readers at once")

        return run

    promise = "Two readers must be able to work at once, on two threads"
    on_threads([task(0), task(1)], case.timeout_s, promise)


# The end --------------------------------------------------------------------------------------------------


def closes_twice(case: Case) -> None:
    """It must be possible to call `close` twice, and on a reader that was never used."""
    reader = case.open()
    reader.close()
    reader.close()


def close_ends_what_waits(case: Case) -> None:
    """`close` must end a `read` that waits on another thread, with an error or without."""
    reader, has_begun, is_closed = case.open(), threading.Event(), threading.Event()
    rows = case.asked(case.orders()["with repeats"])

    def use() -> None:
        try:
            while not is_closed.is_set():
                for _ in reader.read(rows):
                    has_begun.set()
        except Exception:
            if not is_closed.is_set():
                has_begun.set()
                raise

    def end() -> None:
        has_begun.wait(case.timeout_s)
        is_closed.set()
        reader.close()

    promise = "`close` must end a `read` that waits on another thread"
    on_threads([use, end], case.timeout_s, promise)


# Memory ---------------------------------------------------------------------------------------------------


def pieces_stay(case: Case) -> None:
    """A piece that `read` has given out must not change when other rows are read, or the reader is closed."""
    rows = case.orders()["in random order"]
    with closing(case.open()) as reader:
        taken, copies = [], []
        for piece in reader.read(case.asked(rows)):
            taken.append(piece)
            copies.append(deepcopy(piece))
        for others in case.orders().values():
            read(reader.read(case.asked(others)), case.X.shape[1])
    promise = "A piece that `read` has given out must stay as it is, whatever is read later"
    for piece, copied in zip(taken, copies, strict=True):
        same = same_array(dense(piece.X), dense(copied.X))
        same &= same_array(piece.obs_joinids, copied.obs_joinids)
        require(same, promise, "it changed")
        same_frame(piece.obs, copied.obs, promise)


def pieces_belong_to_the_caller(case: Case) -> None:
    """A piece that `read` gives out must belong to the caller: writing to it must not change the source."""
    rows = case.orders()["backwards"]
    with closing(case.open()) as reader:
        for piece in reader.read(case.asked(rows)):
            _overwrite_rows(piece)
        _read_again(case, reader)
    with closing(case.open()) as reader:
        _read_again(case, reader)


def _read_again(case: Case, reader: Reader) -> None:
    what = "after pieces that were given out before were written to"
    case.check_rows(reader, case.orders()["backwards"], what)


def _overwrite_rows(piece: Rows[Any]) -> None:
    for array in (piece.X.data, piece.X.indices, piece.X.indptr):
        if len(array) and array.flags.writeable:
            array[...] = array[::-1].copy()
            array[:1] = 0
    overwrite(piece.obs)


# Random access --------------------------------------------------------------------------------------------


def random_access_is_the_same(case: Case) -> None:
    """`csr`, `fill_dense` and `obs` of a reader must give what `read` gives."""
    with closing(case.open()) as reader:
        if not isinstance(reader, RandomAccess):
            return
        for rows in (*case.orders().values(), np.empty(0, np.int64)):
            _check_matrices(case, reader, rows)
            found = reader.obs(case.asked(rows))
            same_frame(found, case.obs.take(rows), "`obs` of a reader must be that of `Source.obs`")
            check_fresh(found, "`obs` of a reader must have a fresh index, which counts from 0")


def random_access_is_given_away(case: Case) -> None:
    """The results of `csr` and `obs` of a reader must belong to the caller."""
    with closing(case.open()) as reader:
        if not isinstance(reader, RandomAccess):
            return
        rows = case.orders()["in random order"]
        matrix, table = reader.csr(case.asked(rows)), reader.obs(case.asked(rows))
        before = matrix.toarray()
        _check_matrices(case, reader, case.orders()["with repeats"])
        same = same_array(matrix.toarray(), before)
        require(same, "A result of `csr` must stay as it is", "it changed")
        matrix.data[...] = 0
        overwrite(table)
        _check_matrices(case, reader, rows)
        promise = "A result of `obs` of a reader must belong to the caller"
        same_frame(reader.obs(case.asked(rows)), case.obs.take(rows), promise)


def random_access_works_at_once(case: Case) -> None:
    """`csr`, `fill_dense` and `obs` of one reader must work on several threads at once."""
    with closing(case.open()) as opened:
        reader = opened
        if not isinstance(reader, RandomAccess):
            return

        def task(number: int) -> Callable[[], None]:
            def run() -> None:
                rng = np.random.default_rng(number)
                for _ in range(8):
                    rows = rng.permutation(len(case.obs))
                    _check_matrices(case, reader, rows)
                    promise = "`obs` of a reader must be that of `Source.obs`"
                    same_frame(reader.obs(case.asked(rows)), case.obs.take(rows), promise)

            return run

        promise = "`csr`, `fill_dense` and `obs` must work on several threads at once"
        on_threads([task(number) for number in range(4)], case.timeout_s, promise)


def _check_matrices(
    case: Case,
    reader: RandomAccess,
    rows: NDArray[np.int64],
    columns: slice | NDArray[np.int64] = slice(None),
) -> None:
    """Compare `csr` and `fill_dense` with the rows of the case."""
    expected, asked = case.X[rows][:, columns], case.asked(rows)
    n, dtype = expected.shape[1], expected.dtype
    require(reader.n_vars == n, "`n_vars` must be the number of columns", f"it is {reader.n_vars} of {n}")
    require(reader.dtype == dtype, "`dtype` must be that of `read`", f"it is {reader.dtype}, not {dtype}")
    X = reader.csr(asked)
    kind = type(X).__name__
    require(isinstance(X, sparse.csr_matrix), "`csr` must return a csr_matrix", f"it is a {kind}")
    steps = np.diff(X.indices.astype(np.int64)) <= 0
    borders = X.indptr[1:-1]
    steps[borders[(borders > 0) & (borders < len(X.indices))] - 1] = False
    require(not steps.any(), "`csr` must be canonical: columns of a row ascend, each once", "they do not")
    require(same_array(X.toarray(), expected), "`csr` must give the X that `read` gives", "it differs")
    out = np.full(expected.shape, np.nan if reader.dtype.kind == "f" else 1, dtype=reader.dtype)
    reader.fill_dense(asked, out)
    promise = "`fill_dense` must write all of `out`, zeros included, as `read` gives it"
    require(same_array(out, expected), promise, "it differs")


def pieces_are_valid(case: Case) -> None:
    """Each piece must be valid, and the type of X must not depend on the rows."""
    with closing(case.open()) as reader:
        for rows in case.orders().values():
            for piece in reader.read(case.asked(rows)):
                check_piece(piece, case.X.shape[1])
                found = f"it is {piece.X.dtype} for {case.X.dtype}"
                require(piece.X.dtype == case.X.dtype, "The type of X must always be the same", found)


def tiled_reads_have_a_row(case: Case) -> None:
    """A `TiledReader` must say how many rows are decoded together, and how many are held."""
    with closing(case.open()) as reader:
        if not isinstance(reader, TiledReader):
            return
        for rows in case.orders().values():
            for name, n in (("row_tile", reader.row_tile), ("n_rows_held()", reader.n_rows_held())):
                is_number = isinstance(n, int) and n >= 1
                require(is_number, f"`{name}` must be a number of rows, at least 1", f"it is {n!r}")
            n_rows, pieces = reader.read_some(case.asked(rows))
            is_some = min(1, len(rows)) <= n_rows <= len(rows)
            require(is_some, "`read_some` must read the first rows, at least one", f"it read {n_rows!r}")
            case.compare(read(pieces, case.X.shape[1]), rows[:n_rows], "by `read_some`")


PROMISES: tuple[Callable[[Case], None], ...] = (
    pieces_are_valid,
    pieces_stay,
    rows_come_in_order,
    no_rows_are_read,
    columns_come_in_order,
    reads_follow_each_other,
    tiled_reads_have_a_row,
    two_readers_work_at_once,
    pieces_belong_to_the_caller,
    random_access_is_the_same,
    random_access_is_given_away,
    random_access_works_at_once,
    closes_twice,
    close_ends_what_waits,
)
