"""Broken promises about rows that are read are told."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import pytest
from scipy import sparse

from plain_source import (
    MUTANTS,
    N_OBS,
    TIMEOUT_S,
    Mutants,
    PlainReader,
    assert_is_told,
    build,
)
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._rows import Rows

mutants = Mutants()
of_source, of_reader = mutants.of_source, mutants.of_reader


def _reading(change: Callable[[Any, Rows[Any]], Any]) -> Any:
    """Return a method `read`, whose pieces are changed."""

    def read(self: Any, ids: Any) -> Iterator[Any]:
        for piece in PlainReader.read(self, ids):
            yield change(self, piece)

    return read


def _X(change: Callable[[CSR_IO_Buffer], CSR_IO_Buffer]) -> Any:
    return _reading(lambda self, rows: attrs.evolve(rows, X=change(rows.X)))


def _twice(X: CSR_IO_Buffer) -> CSR_IO_Buffer:
    return CSR_IO_Buffer(2 * X.indptr, np.repeat(X.indices, 2), np.repeat(X.data, 2), X.shape)


def _doubles_of_few(X: CSR_IO_Buffer) -> CSR_IO_Buffer:
    values = X.data.astype(np.float64) if len(X) == 1 else X.data
    return CSR_IO_Buffer(X.indptr, X.indices, values, X.shape)


def _read_sorted(self: Any, ids: Any) -> Iterator[Any]:
    return PlainReader.read(self, np.sort(ids))


def _read_once_each(self: Any, ids: Any) -> Iterator[Any]:
    return PlainReader.read(self, ids[np.sort(np.unique(ids, return_index=True)[1])])


def _read_by_place(self: Any, ids: Any) -> Iterator[Any]:
    obs = self.obs(ids)
    yield Rows.from_scipy(ids, self.X[np.arange(len(ids)) % N_OBS], obs)


def _read_obs_by_place(self: Any, ids: Any) -> Iterator[Any]:
    yield Rows.from_scipy(ids, self.csr(ids), self.obs(np.arange(len(ids)) % N_OBS))


def _read_something(self: Any, ids: Any) -> Iterator[Any]:
    return PlainReader.read(self, ids if len(ids) else np.array([0]))


of_reader("tuples", "must yield pieces of class Rows", read=_reading(lambda self, rows: (rows.X, rows.obs)))
of_reader(
    "SciPy matrices",
    "whose X is a CSR_IO_Buffer",
    read=lambda self, ids: iter(
        [
            type("Ids", (Rows,), {"__attrs_post_init__": lambda rows: None})(
                obs_joinids=ids, X=self.X[ids], obs=self.obs(ids)
            )
        ]
    ),
)
of_reader(
    "small joinids",
    "`obs_joinids` of a piece must be int64",
    read=_reading(lambda self, rows: attrs.evolve(rows, obs_joinids=rows.obs_joinids.astype(np.int32))),
)
of_reader(
    "a column more",
    "must have the columns of X that were asked for",
    read=_X(lambda X: CSR_IO_Buffer(X.indptr, X.indices, X.data, (len(X), X.shape[1] + 1))),
)
of_reader(
    "starts that do not start at 0",
    "`X.indptr` of a piece must ascend from 0",
    read=_X(lambda X: CSR_IO_Buffer(X.indptr + 1, X.indices, X.data, X.shape)),
)
of_reader(
    "columns beyond the last",
    "`X.indices` of a piece must be places of columns",
    read=_X(lambda X: CSR_IO_Buffer(X.indptr, X.indices + 1, X.data, X.shape)),
)
of_reader("entries that repeat", "must have each coordinate once", read=_X(_twice))
of_reader("a type by the rows", "The type of X must always be the same", read=_X(_doubles_of_few))
of_reader("rows that are sorted", "exactly the rows asked for, in that order", read=_read_sorted)
of_reader("rows without repeats", "exactly the rows asked for, in that order", read=_read_once_each)


def _tiled(**members: Any) -> dict[str, Any]:
    """Return the members of a `TiledReader`, some of them changed."""

    def read_some(self: Any, obs_joinids: np.ndarray) -> Any:
        return len(obs_joinids), self.read(obs_joinids)

    return {"row_tile": 4, "n_rows_held": lambda self: 1, "read_some": read_some, **members}


def _read_none(self: Any, obs_joinids: np.ndarray) -> Any:
    return 0, iter([])


def _read_last(self: Any, obs_joinids: np.ndarray) -> Any:
    return len(obs_joinids[1:]) or len(obs_joinids), self.read(
        obs_joinids[1:] if len(obs_joinids) > 1 else obs_joinids
    )


of_reader("no tile of a reader", "`row_tile` must be a number", **_tiled(row_tile=0))
of_reader("no memory", "`n_rows_held.*` must be a number of rows", **_tiled(n_rows_held=lambda self: 0.5))
of_reader(
    "some are none", "`read_some` must read the first rows, at least one", **_tiled(read_some=_read_none)
)
of_reader("some are the last", "by `read_some`", **_tiled(read_some=_read_last))
of_reader("X by place", "`X` of a row must be the same however it is read", read=_read_by_place)
of_reader("obs by place", "`obs` of rows that are read .* must be that of", read=_read_obs_by_place)
of_reader("something for nothing", "`read` of no rows must give none", read=_read_something)


def _open_sorted(self: Any, ids: Any, fields: Any, budget: Any) -> Any:
    return self.reader(self, np.sort(ids.var_joinids), fields.obs_column_names)


of_source("columns of X sorted", "`X` of a row must be the same however it is read", open=_open_sorted)


def _read_with_a_cursor(self: Any, ids: Any) -> Iterator[Any]:
    self.cursor = ids
    for start in range(0, len(ids), 16):
        piece = self.cursor[start : start + 16]
        yield Rows.from_scipy(piece, self.csr(piece), self.obs(piece))


of_reader("one cursor", "exactly the rows asked for, in that order", read=_read_with_a_cursor)

_shared = threading.Barrier(2)


def _read_where_others_read(self: Any, ids: Any) -> Iterator[Any]:
    """Read as if all readers had one cursor: wrong where two of them meet."""
    if threading.current_thread() is not threading.main_thread():
        _shared.wait(TIMEOUT_S)
        ids = np.sort(ids)
    return PlainReader.read(self, ids)


of_reader(
    "one cursor of all readers", "Two readers must be able to work at once", read=_read_where_others_read
)


# Memory


def _read_into_one_memory(self: Any, ids: Any) -> Iterator[Any]:
    for piece in PlainReader.read(self, ids):
        memory = self.__dict__.setdefault("memory", np.empty(10_000, np.float32))
        data = memory[: piece.X.nnz]
        data[:] = piece.X.data
        yield attrs.evolve(piece, X=CSR_IO_Buffer(piece.X.indptr, piece.X.indices, data, piece.X.shape))
        memory[: 2 * len(data)] = -1


def _read_views(self: Any, ids: Any) -> Iterator[Any]:
    for joinid in ids.tolist():
        span = slice(self.X.indptr[joinid], self.X.indptr[joinid + 1])
        starts = np.array([0, span.stop - span.start])
        X = CSR_IO_Buffer(starts, self.X.indices[span].astype(np.uint16), self.X.data[span], (1, self.n_vars))
        yield Rows(obs_joinids=np.array([joinid]), X=X, obs=self.obs([joinid]))


def _read_a_table_that_is_kept(self: Any, ids: Any) -> Iterator[Any]:
    tables = self.__dict__.setdefault("tables", {})
    yield Rows.from_scipy(ids, self.X[ids], tables.setdefault(ids.tobytes(), self.obs(ids)))


of_reader("one memory", "A piece that `read` has given out must stay as it is", read=_read_into_one_memory)
of_reader("views of X", "`X` of a row must be the same .* after pieces that were given out", read=_read_views)
of_reader(
    "a table kept", "after pieces that were given out before were written to", read=_read_a_table_that_is_kept
)


# Random access


def _unsorted(self: Any, ids: Any) -> Any:
    X = self.X[ids]
    columns = X.indices.copy()
    for row in range(len(ids)):
        columns[X.indptr[row] : X.indptr[row + 1]] = columns[X.indptr[row] : X.indptr[row + 1]][::-1]
    return sparse.csr_matrix((X.data, columns, X.indptr), shape=X.shape)


def _fill_entries(self: Any, ids: Any, out: Any) -> None:
    i, j = self.X[ids].nonzero()
    out[i, j] = self.X[ids].data


def _csr_with_a_lock_that_fails(self: Any, ids: Any) -> Any:
    if threading.current_thread() is not threading.main_thread():
        raise OSError("is used by another thread")
    return self.X[ids]


def _csr_that_is_kept(self: Any, ids: Any) -> Any:
    kept = self.__dict__.setdefault("kept", {})
    return kept.setdefault(ids.tobytes(), self.X[ids])


def _obs_of_reader_that_is_kept(self: Any, ids: Any) -> Any:
    kept = self.__dict__.setdefault("tables", {})
    return kept.setdefault(np.asarray(ids).tobytes(), PlainReader.obs(self, ids))


def _plainly(self: Any, ids: Any) -> Iterator[Any]:
    """Read without any of the methods that a mutant changes."""
    yield Rows.from_scipy(ids, self.X[ids], self.table.iloc[ids].reset_index(drop=True))


def of_access(name: str, sentence: str, **members: Any) -> None:
    of_reader(name, sentence, read=_plainly, **members)


def _init_with(**values: Any) -> Any:
    def init(self: Any, *args: Any) -> None:
        PlainReader.__init__(self, *args)
        self.__dict__.update(values)

    return init


of_access("n_vars of something else", "`n_vars` must be the number of columns", __init__=_init_with(n_vars=3))
of_access("another dtype", "`dtype` must be that of `read`", __init__=_init_with(dtype=np.dtype(np.float64)))
of_access("an array", "`csr` must return a csr_matrix", csr=lambda self, ids: sparse.csr_array(self.X[ids]))
of_access("entries not sorted", "`csr` must be canonical", csr=_unsorted)
of_access("csr sorted", "`csr` must give the X that `read` gives", csr=lambda self, ids: self.X[np.sort(ids)])
of_access("zeros not written", "`fill_dense` must write all of `out`", fill_dense=_fill_entries)
of_access(
    "access to obs sorted",
    "`obs` of a reader must be that of",
    obs=lambda self, ids: self.table.iloc[np.sort(ids)].reset_index(drop=True),
)
of_access(
    "access to obs by index",
    "`obs` of a reader must have a fresh",
    obs=lambda self, ids: self.table.iloc[ids],
)
of_access("csr for one thread", "must work on several threads at once", csr=_csr_with_a_lock_that_fails)
of_access("csr given away", "`csr` must give the X that `read` gives", csr=_csr_that_is_kept)
of_access("obs given away", "A result of `obs` of a reader must belong", obs=_obs_of_reader_that_is_kept)


@pytest.mark.parametrize("name", mutants.sentences)
def test_a_source_that_breaks_a_promise_about_rows_is_told_which(name: str) -> None:
    assert_is_told(name, mutants.sentences[name])


def test_mutants_are_pickled_as_what_they_are() -> None:
    assert type(pickle.loads(pickle.dumps(build("views of X")))) is MUTANTS["views of X"]
