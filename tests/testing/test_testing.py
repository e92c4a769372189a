"""`check_source` and `check_order` let pass what keeps its promises, and name the one that is broken."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._common import check_names
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._order.order import Chunked, Stored, Tiled
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import Partition, check_among
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._source import Source
from tiledbsoma_ml.testing import check_order, check_source

N_OBS, N_VARS = 100, 7
NAMES = ("kind", "n")
TIMEOUT_S = 60.0

# A source that keeps its promises, to be broken ------------------------------------------------------------


def make_X() -> sparse.csr_matrix:
    i, j = np.arange(N_OBS)[:, None], np.arange(N_VARS)[None, :]
    return sparse.csr_matrix(np.where((i + j) % 3, N_VARS * i + j + 1, 0).astype(np.float32))


class PlainReader:
    def __init__(self, source: Any, columns: Any, names: Any) -> None:
        self.X, self.table = source.X[:, columns], source.table[list(names)]
        self.X.sort_indices()
        self.n_vars, self.dtype = self.X.shape[1], self.X.dtype

    def read(self, ids: Any) -> Iterator[Any]:
        for start in range(0, len(ids), 16):
            piece = ids[start : start + 16]
            yield Rows.from_scipy(piece, self.csr(piece), self.obs(piece))

    def csr(self, ids: Any) -> Any:
        return self.X[ids]

    def fill_dense(self, ids: Any, out: Any) -> None:
        out[...] = self.X[ids].toarray()

    def obs(self, ids: Any) -> Any:
        return self.table.iloc[ids].reset_index(drop=True)

    def close(self) -> None: ...


class Plain(Source):
    reader: Any = PlainReader
    name = "plain"
    contents: Any = None

    def __init__(self) -> None:
        self.X = make_X()
        n = np.arange(N_OBS)
        kinds = pd.Categorical.from_codes(n % 2, categories=["a", "b", "c"])
        self.table = pd.DataFrame({"kind": kinds, "n": n, "soma_joinid": n})
        self.symbols = pd.DataFrame({"soma_joinid": np.arange(N_VARS), "symbol": list("abcdefg")})
        self.query_ids = QueryIDs(obs_joinids=n, var_joinids=np.arange(N_VARS))

    @property
    def content(self) -> Any:
        return {"X": "some"} if self.contents is None else self.contents

    def obs(self, obs_joinids: Any, column_names: Any) -> Any:
        check_among("obs_joinids", obs_joinids, self.query_ids.obs_joinids)
        names = check_names("column_names", column_names, self.table.columns, of="a column of obs")
        return self.table.iloc[obs_joinids][list(names)].reset_index(drop=True)

    def var(self, var_joinids: Any, column_names: Any = None) -> Any:
        names = self.symbols.columns if column_names is None else column_names
        names = check_names("column_names", names, self.symbols.columns, of="a column of var")
        return self.symbols.iloc[var_joinids][list(names)].reset_index(drop=True)

    def layout(self, ids: Any, budget: Any) -> Any:
        return Layout(row_tile=1, bytes_per_row=50.0)

    def open(self, ids: Any, fields: Any, budget: Any) -> Any:
        return self.reader(self, ids.var_joinids, fields.obs_column_names)

    def __reduce__(self) -> Any:
        return build, (self.name,)


class Streaming(PlainReader):
    """A reader that has no random access, as `csr` is none."""

    csr = None  # type: ignore[assignment]

    def read(self, ids: Any) -> Iterator[Any]:
        yield Rows.from_scipy(ids, self.X[ids], self.obs(ids))


def test_a_source_that_keeps_its_promises_passes() -> None:
    check_source(Plain(), make=Plain, obs_column_names=NAMES)
    check_source(build("streaming"), obs_column_names=NAMES)
    check_source(Plain())


def test_a_source_that_is_too_small_to_tell_is_refused() -> None:
    small = Plain()
    small.query_ids = QueryIDs(obs_joinids=[0], var_joinids=[0, 1])
    with pytest.raises(ValueError, match="two rows and two columns at least"):
        check_source(small)


# Sources that break one promise each ----------------------------------------------------------------------

MUTANTS: dict[str, type[Plain]] = {"plain": Plain}
SENTENCES: dict[str, str] = {}


def build(name: str) -> Any:
    return MUTANTS[name]()


def of_source(name: str, sentence: str, **members: Any) -> None:
    SENTENCES[name] = sentence
    MUTANTS[name] = type(name, (Plain,), {"name": name, **members})


def of_reader(name: str, sentence: str, *, base: Any = PlainReader, **members: Any) -> None:
    of_source(name, sentence, reader=type(name, (base,), members))


of_source("streaming", "", reader=type("reader", (Streaming,), {}))
del SENTENCES["streaming"]


def _counting(self: Any) -> int:
    self.count = getattr(self, "count", 0) + 1
    return int(self.count)


def _raising(*_: Any, **__: Any) -> Any:
    raise OSError("no luck")


def _part(self: Any) -> QueryIDs:
    part = Partition(rank=0, world_size=1, worker_id=0, n_workers=1)
    return QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(N_VARS), partition=part)


def _shuffled_ids(self: Any) -> QueryIDs:
    shuffled = np.random.default_rng(_counting(self)).permutation(N_OBS)
    return QueryIDs(obs_joinids=shuffled, var_joinids=range(N_VARS))


def _settable(get: Callable[[Any], Any]) -> property:
    return property(get, lambda self, value: None)


of_source("no ids", "must be QueryIDs, but it is a list", query_ids=_settable(lambda self: [1]))
of_source("a part", "must be all rows, but it is the part", query_ids=_settable(_part))
of_source("ids that change", "`query_ids` must stay as it is", query_ids=_settable(_shuffled_ids))
of_source("numbers as content", "`content` must name texts by texts", contents={"X": 3})
of_source("no content", "`content` must name texts by texts", contents="some")
of_source(
    "content that changes",
    "`content` must stay as it is",
    content=property(lambda self: {"X": str(_counting(self))}),
)


def _prepare_once(self: Any) -> None:
    if _counting(self) > 2:
        raise OSError("is there already")


def _prepare_anew(self: Any) -> None:
    self.contents = {"X": str(_counting(self))}


of_source("prepare once", "`prepare` must be there to be called again", prepare=_prepare_once)
of_source("prepare another", "`prepare` must not change what the source is of", prepare=_prepare_anew)


def _layout(**values: Any) -> Any:
    return lambda self, ids, budget: Layout(**{"row_tile": 1, "bytes_per_row": 1.0, **values})


of_source("no layout", "`layout` must be a Layout", layout=lambda self, ids, budget: (1, 2.0))
of_source(
    "a layout that changes",
    "`layout` must stay as it is",
    layout=lambda self, ids, budget: Layout(1, _counting(self)),
)
of_source("another tile", "`row_tile` must be that of the layout", layout=_layout(row_tile=4))
of_source("no tile", "`row_tile` must be at least 1", row_tile=0)
of_source("rows without size", "must be a size, but it is 0", layout=_layout(bytes_per_row=0))
of_source("no window", "`window_rows` of the layout must be at least 1", layout=_layout(window_rows=0))

of_source("takes any column", "`check` must tell a column", check=lambda self, ids, fields: None)
of_source("takes nothing", "`check` must take what is there", check=_raising)


def _check_columns(self: Any, ids: Any, fields: Any) -> None:
    self.obs(ids.obs_joinids[:0], fields.obs_column_names)


def _read_clipped(self: Any, ids: Any) -> Iterator[Any]:
    return PlainReader.read(self, np.minimum(ids, N_OBS - 1))


of_source(
    "takes any row",
    "`check` or `read` must tell a row that is not there",
    check=_check_columns,
    reader=type("reader", (PlainReader,), {"read": _read_clipped}),
)


# obs and var


def _obs(change: Callable[[Any, Any, pd.DataFrame], Any]) -> Any:
    """Return a method `obs` of a source, whose table is changed."""

    def obs(self: Any, obs_joinids: Any, column_names: Any) -> Any:
        return change(self, obs_joinids, Plain.obs(self, obs_joinids, column_names))

    return obs


def _sorted_columns(self: Any, obs_joinids: Any, column_names: Any) -> Any:
    found = Plain.obs(self, obs_joinids, column_names)
    return found[sorted(found.columns)]


def _used_categories(self: Any, ids: Any, table: pd.DataFrame) -> pd.DataFrame:
    if "kind" not in table:
        return table
    return table.assign(kind=table["kind"].cat.remove_unused_categories())


def _obs_that_is_kept(self: Any, obs_joinids: Any, column_names: Any) -> Any:
    kept = self.__dict__.setdefault("kept", {})
    key = np.asarray(obs_joinids).tobytes(), *column_names
    return kept.setdefault(key, Plain.obs(self, obs_joinids, column_names))


def _obs_with_key_error(self: Any, obs_joinids: Any, column_names: Any) -> Any:
    return self.table.iloc[np.minimum(obs_joinids, N_OBS)][list(column_names)].reset_index(drop=True)


def _obs_of_any_row(self: Any, obs_joinids: Any, column_names: Any) -> Any:
    return Plain.obs(self, np.minimum(obs_joinids, N_OBS - 1), column_names)


def _reordered(self: Any, ids: Any, table: pd.DataFrame) -> pd.DataFrame:
    return table.iloc[np.argsort(ids, kind="stable")].reset_index(drop=True)


of_source("columns sorted", "`obs` must have the columns asked for, in that order", obs=_sorted_columns)
of_source("rows sorted", "`obs` must have the rows asked for, in that order", obs=_obs(_reordered))
of_source(
    "joinids as index",
    "`obs` must have a fresh index",
    obs=_obs(lambda self, ids, table: table.set_index(pd.Index(ids))),
)
of_source(
    "another value each time",
    "`obs` of a row must always be the same",
    obs=_obs(lambda self, ids, table: table.assign(n=_counting(self)) if "n" in table else table),
)
of_source("types by the rows", "must have the same types, whatever rows", obs=_obs(_used_categories))
of_source("a table given away", "What `obs` returns must belong to the caller", obs=_obs_that_is_kept)
of_source(
    "a KeyError",
    "`obs` must tell a column that is not there with a ValueError, but it raised KeyError",
    obs=_obs_with_key_error,
    check=lambda self, ids, fields: Plain().check(ids, fields),
)
of_source("any row", "`obs` must tell a row that is not there", obs=_obs_of_any_row)


def _var(self: Any, var_joinids: Any, column_names: Any = None) -> Any:
    found = Plain.var(self, var_joinids, column_names)
    return found.iloc[np.argsort(var_joinids)].reset_index(drop=True)


def _var_with_key_error(self: Any, var_joinids: Any, column_names: Any = None) -> Any:
    names = list(self.symbols.columns) if column_names is None else list(column_names)
    return self.symbols.iloc[var_joinids][names].reset_index(drop=True)


def _var_that_is_kept(self: Any, var_joinids: Any, column_names: Any = None) -> Any:
    whole = column_names is None and np.array_equal(var_joinids, np.arange(N_VARS))
    return self.symbols if whole else Plain.var(self, var_joinids, column_names)


def _var_with_index(self: Any, var_joinids: Any, column_names: Any = None) -> Any:
    return Plain.var(self, var_joinids, column_names).set_index(pd.Index(var_joinids))


of_source("var sorted", "`var` must have the columns of X asked for, in that order", var=_var)
of_source("var with a KeyError", "`var` must tell a name that is not there", var=_var_with_key_error)
of_source("var given away", "What `var` returns must belong to the caller", var=_var_that_is_kept)
of_source("var with joinids as index", "`var` must have a fresh index", var=_var_with_index)
of_source(
    "var without joinids",
    "`var` must have a column soma_joinid",
    var=lambda self, ids, names=None: self.symbols.iloc[ids][["symbol"]].reset_index(drop=True),
)


# Copies


def _no_longer_the_same(self: Any, state: Any) -> None:
    self.__init__()
    self.__dict__.update(state)


def _copied(**state: Any) -> Any:
    return lambda self: (build, (self.name,), state)


def _with_state(name: str, sentence: str, **state: Any) -> None:
    of_source(name, sentence, __reduce__=_copied(**state), __setstate__=_no_longer_the_same)


def _kept_layout(self: Any, ids: Any, budget: Any) -> Any:
    return Layout(1, self.__dict__.get("size", 1.0))


_with_state(
    "another content when pickled", "pickled copy of the source must have the same `content`", contents={}
)
_with_state(
    "other rows when pickled",
    "pickled copy of the source must have the same `query_ids`",
    query_ids=QueryIDs(obs_joinids=[0, 1], var_joinids=[0, 1]),
)
_with_state("another X when pickled", "`X` of a row must be the same however it is read", X=2 * make_X())
of_source(
    "another layout when pickled",
    "pickled copy of the source must have the same `layout`",
    layout=_kept_layout,
    __reduce__=_copied(size=2.0),
    __setstate__=_no_longer_the_same,
)
of_source("not picklable", "A pickled copy must be of the same content", __reduce__=_raising)


def test_another_source_of_the_same_rows_must_be_the_same() -> None:
    for name in ("another content", "another layout"):
        other = build(f"{name} when pickled")
        other.__dict__.update({"contents": {}} if name == "another content" else {"size": 2.0})
        with pytest.raises(AssertionError, match=f"Another source .* must have the same `{name[8:]}`"):
            check_source(Plain(), make=lambda other=other: other, obs_column_names=NAMES)


# Reading


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


of_reader("one memory", "What `read` has given out must stay as it is", read=_read_into_one_memory)
of_reader("views of X", "`X` of a row must be the same .* after what was given out", read=_read_views)
of_reader("a table kept", "after what was given out before was written to", read=_read_a_table_that_is_kept)


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
of_access("obs given away", "What `obs` of a reader gives out must belong", obs=_obs_of_reader_that_is_kept)


# The end


def _close_once(self: Any) -> None:
    if _counting(self) > 1:
        raise OSError("is closed")


def _read_for_ever(self: Any, ids: Any) -> Iterator[Any]:
    yield from PlainReader.read(self, ids)
    if threading.current_thread() is not threading.main_thread() and len(ids) > N_OBS:
        threading.Event().wait()


of_reader("close once", "`close` must be there to be called again", close=_close_once)
of_reader("waits for ever", "`close` must end what waits", read=_read_for_ever)


@pytest.mark.parametrize("name", SENTENCES)
def test_a_source_that_breaks_a_promise_is_told_which(name: str) -> None:
    timeout_s = 3 if name == "waits for ever" else TIMEOUT_S
    with pytest.raises(AssertionError) as told:
        check_source(build(name), obs_column_names=NAMES, timeout_s=timeout_s)
    assert re.search(SENTENCES[name], str(told.value)), str(told.value)
    assert ", but " in str(told.value)


def test_mutants_are_pickled_as_what_they_are() -> None:
    assert type(pickle.loads(pickle.dumps(build("views of X")))) is MUTANTS["views of X"]


# Orders ---------------------------------------------------------------------------------------------------

IDS = np.arange(0, 200, 2)


@pytest.mark.parametrize(
    "order",
    [
        Stored(joinids=IDS),
        Chunked.draw(IDS, 7, np.random.default_rng(0)),
        Tiled.draw(IDS, 16, np.random.default_rng(0)),
        Stored(joinids=IDS[:0]),
    ],
)
def test_the_orders_of_this_package_keep_their_promises(order: Any) -> None:
    check_order(order, IDS)


class AnyOrder:
    """An order whose members can be replaced."""

    def __init__(self, **members: Any) -> None:
        self.members = {"n_rows": 100, "borders": (), "rows": lambda start, stop: IDS[start:stop].copy()}
        self.members |= members

    def __getattr__(self, name: str) -> Any:
        member = self.members[name]
        return member() if callable(member) and name != "rows" else member


def _changing(values: Any) -> Any:
    found = iter(values)
    return lambda: next(found)


@pytest.mark.parametrize(
    ("sentence", "members"),
    [
        ("`n_rows` must be a number of rows", {"n_rows": 3.0}),
        ("must be n_rows joinids, int64", {"n_rows": 101}),
        ("must be n_rows joinids, int64", {"rows": lambda start, stop: IDS[start:stop].tolist()}),
        ("`rows` must be rows of the query", {"rows": lambda start, stop: IDS[start:stop] + 1}),
        ("must be that stretch", {"rows": lambda start, stop: np.roll(IDS, start)[start:stop]}),
        (
            "must be that stretch",
            {"rows": lambda start, stop: np.random.default_rng().permutation(IDS)[start:stop]},
        ),
        ("must belong to the caller|must be that stretch", {"rows": lambda start, stop: KEPT[start:stop]}),
        ("`borders` must ascend", {"borders": [50, 50, 100]}),
        ("`borders` must be numbers of rows", {"borders": [0.5, 100]}),
        ("The last of `borders` must be `n_rows`", {"borders": [50, 99]}),
        ("`borders` must stay as they are", {"borders": _changing([[10, 100], [20, 100]])}),
        ("`n_rows` must stay as it is", {"n_rows": _changing([100, 101, 101])}),
    ],
)
def test_an_order_that_breaks_a_promise_is_told_which(sentence: str, members: Any) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_order(AnyOrder(**members), IDS)


KEPT = IDS.copy()
