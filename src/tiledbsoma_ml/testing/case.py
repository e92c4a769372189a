"""`Case`: rows of a source, with which its promises are checked."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import attrs
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._rows import Rows, concat_obs
from tiledbsoma_ml._source import Fields, Reader, Source

BUDGET = Budget(2**28)
"""Budget of memory for a source while it is checked."""

UNKNOWN_ROW = 2**62
"""A joinid that no row has."""

UNKNOWN_NAME = "a column that nobody has"


class BrokenPromiseError(AssertionError):
    """An error that says which promise a source or an order breaks."""


def require(condition: bool, promise: str, found: str) -> None:
    """Raise an error that names the promise and what was found, unless `condition` is true."""
    if not condition:
        raise BrokenPromiseError(f"{promise}, but {found}.")


@contextmanager
def keeping(promise: str) -> Iterator[None]:
    """Turn any error of a source into one that names the promise that it breaks."""
    try:
        yield
    except BrokenPromiseError:
        raise
    except Exception as err:
        raise BrokenPromiseError(f"{promise}, but it raised {type(err).__name__}: {err}") from err


@attrs.frozen(kw_only=True, eq=False)
class Read:
    """Rows that a reader returned, with `X` as a dense array."""

    obs_joinids: NDArrayJoinId
    X: NDArray[Any]
    obs: pd.DataFrame


@attrs.frozen(kw_only=True, eq=False)
class Case:
    """A source, and some of its rows as it returned them at first.

    Attributes:
        source: The source.
        make: Returns another source of the same rows; None if there is no way to make one but pickling.
        ids: Joinids of some rows, and of all columns.
        fields: The columns of `obs` to check, including "soma_joinid".
        X: `X` of these rows, dense.
        obs: `obs` of these rows.
        timeout_s: Longest time to wait for another thread.
    """

    source: Source
    make: Callable[[], Source] | None
    ids: QueryIDs
    fields: Fields
    X: NDArray[Any]
    obs: pd.DataFrame
    timeout_s: float

    def open(self, columns: slice | NDArray[np.int64] = slice(None), source: Source | None = None) -> Reader:
        """Return a reader of the rows, and of some columns."""
        ids = attrs.evolve(self.ids, var_joinids=self.ids.var_joinids[columns])
        return (source or self.source).open(ids, self.fields, BUDGET)

    def asked(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArrayJoinId:
        """Return the joinids of rows, as a read-only array."""
        joinids = self.ids.obs_joinids[np.asarray(rows, dtype=np.int64)]
        joinids.flags.writeable = False
        return joinids

    def orders(self) -> dict[str, NDArray[np.int64]]:
        """Return rows in several orders, by a description of each order."""
        n, rng = len(self.ids.obs_joinids), np.random.default_rng(0)
        return {
            "in the order of the query": np.arange(n),
            "backwards": np.arange(n)[::-1],
            "in random order": rng.permutation(n),
            "with repeats": np.append(rng.integers(0, n, 2 * n), [n - 1, n - 1, 0, 0]),
            "one alone": np.array([n // 2]),
        }

    def check_rows(
        self,
        reader: Reader,
        rows: NDArray[np.int64],
        what: str,
        columns: slice | NDArray[np.int64] = slice(None),
    ) -> None:
        """Read rows, and compare them with those of this case."""
        X = self.X[:, columns]
        found = read(reader.read(self.asked(rows)), n_vars=X.shape[1])
        self.compare(found, rows, what, X)

    def compare(self, found: Read, rows: NDArray[np.int64], what: str, X: NDArray[Any] | None = None) -> None:
        """Compare rows that were read with those of this case."""
        asked, X = self.asked(rows), self.X if X is None else X
        require(
            np.array_equal(found.obs_joinids, asked),
            "`read` must give exactly the rows asked for, in that order",
            f"rows {what}, {_some(asked)}, came as {_some(found.obs_joinids)}",
        )
        wrong = _first_difference(found.X, X[rows])
        joinid = "any" if wrong is None or wrong < 0 else asked[wrong]
        require(
            wrong is None,
            "`X` of a row must be the same however it is read",
            f"{what}, the row of joinid {joinid} came with another one",
        )
        same_frame(
            found.obs, self.obs.take(rows), f"`obs` of rows that are read {what} must be that of `Source.obs`"
        )


def read(pieces: Iterable[Rows[CSR_IO_Buffer]], n_vars: int) -> Read:
    """Check the pieces that a reader yields, and return their rows below each other."""
    taken = list(pieces)
    for piece in taken:
        check_piece(piece, n_vars)
    if not taken:
        return Read(obs_joinids=np.empty(0, np.int64), X=np.empty((0, n_vars)), obs=pd.DataFrame())
    return Read(
        obs_joinids=np.concatenate([piece.obs_joinids for piece in taken]),
        X=np.concatenate([dense(piece.X) for piece in taken]),
        obs=concat_obs([piece.obs for piece in taken]),
    )


def check_piece(piece: object, n_vars: int) -> None:
    """Raise an error unless a piece has the form that compiled loops rely on."""
    promise = "`read` must yield pieces of class Rows, whose X is a CSR_IO_Buffer"
    require(isinstance(piece, Rows), promise, f"one is a {type(piece).__name__}")
    assert isinstance(piece, Rows)
    require(isinstance(piece.X, CSR_IO_Buffer), promise, f"one has a {type(piece.X).__name__}")
    ids, X = piece.obs_joinids, piece.X
    require(ids.dtype == np.int64, "`obs_joinids` of a piece must be int64", f"they are {ids.dtype}")
    require(
        X.shape[1] == n_vars,
        "A piece must have the columns of X that were asked for",
        f"it has {X.shape[1]} in place of {n_vars}",
    )
    starts = np.asarray(X.indptr)
    ascend = starts[0] == 0 and (starts[1:] >= starts[:-1]).all() and starts[-1] == len(X.indices)
    require(
        bool(ascend), "`X.indptr` of a piece must ascend from 0 to the number of its values", "it does not"
    )
    largest = int(X.indices.max()) if len(X.indices) else -1
    require(
        largest < n_vars, "`X.indices` of a piece must be places of columns", f"one is {largest} of {n_vars}"
    )
    cells = np.repeat(np.arange(len(ids)), np.diff(starts)) * max(1, n_vars) + X.indices.astype(np.int64)
    n_repeats = len(cells) - len(np.unique(cells))
    require(not n_repeats, "`X` of a piece must have each coordinate once", f"{n_repeats} repeat")


def dense(X: CSR_IO_Buffer) -> NDArray[Any]:
    """Return rows as a dense array."""
    matrix = sparse.csr_matrix((X.data, X.indices.astype(np.int64), X.indptr), shape=X.shape)
    found: NDArray[Any] = matrix.toarray()
    return found


def same_array(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Return whether arrays have the same type and values; NaN equals NaN."""
    return _first_difference(found, expected) is None


def _first_difference(found: NDArray[Any], expected: NDArray[Any]) -> int | None:
    """Return the first row that differs; -1 if the shape or type differs; None if nothing differs."""
    if found.shape != expected.shape or (len(found) and found.dtype != expected.dtype):
        return -1
    differs = (found != expected) & ~((found != found) & (expected != expected))
    rows = np.flatnonzero(differs.any(axis=tuple(range(1, differs.ndim))))
    return int(rows[0]) if len(rows) else None


def same_frame(found: pd.DataFrame, expected: pd.DataFrame, promise: str) -> None:
    """Raise an error unless tables have the same columns, types and values; the index does not matter."""
    require(isinstance(found, pd.DataFrame), promise, f"it is a {type(found).__name__}")
    try:
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))
    except AssertionError as err:
        raise BrokenPromiseError(f"{promise}, but {_in_a_line(err)}") from err


def check_fresh(frame: pd.DataFrame, promise: str) -> None:
    """Raise an error unless the index of a table counts from 0."""
    is_fresh = isinstance(frame, pd.DataFrame) and frame.index.equals(pd.RangeIndex(len(frame)))
    index = f"it is {getattr(frame, 'index', None)!r}"
    require(is_fresh, promise, index)


@contextmanager
def raising(promise: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise an error unless the code in this context raises an error of one of these kinds."""
    try:
        yield
    except kinds:
        return
    except Exception as err:
        raise BrokenPromiseError(f"{promise}, but it raised {type(err).__name__}: {err}") from err
    _complain(promise)


def _complain(promise: str) -> NoReturn:
    raise BrokenPromiseError(f"{promise}, but nothing was raised.")


def on_threads(tasks: Sequence[Callable[[], None]], timeout_s: float, promise: str) -> None:
    """Run tasks at once, each on its own thread, and raise the first error of a task."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        require(not thread.is_alive(), promise, f"a thread has not ended after {timeout_s:g} s")
    for err in errors:
        raise BrokenPromiseError(f"{promise}, but on a thread: {err}") from err


def overwrite(frame: pd.DataFrame) -> None:
    """Write into each column of a table, in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas warns that this may be a view, which is what is checked
        for k in range(frame.shape[1]):
            frame.iloc[[0], k] = frame.iloc[-1:, k].array


def _in_a_line(err: Exception) -> str:
    return " ".join(str(err).split())


def _some(values: NDArray[Any]) -> str:
    listed = ", ".join(map(str, values[:5].tolist()))
    return f"{listed}{' …' if len(values) > 5 else ''}"
