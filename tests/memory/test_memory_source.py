from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse

from stores import make_obs
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._source import Fields, RandomAccess
from tiledbsoma_ml.memory import MemorySource
from tiledbsoma_ml.memory.backed import _runs
from tiledbsoma_ml.testing import check_source

N_OBS, N_VARS = 90, 17
DTYPES = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
DTYPES += [np.float32, np.float64]
BUDGET = Budget(2**28)


def make_X(n_obs: int = N_OBS, n_vars: int = N_VARS, dtype: Any = np.float32) -> NDArray[Any]:
    """Return values that tell where they belong, and zeros; the last row and column are empty."""
    i, j = np.arange(n_obs)[:, None], np.arange(n_vars)[None, :]
    X = np.where((3 * i + 2 * j) % 5 < 2, n_vars * i + j + 1, 0).astype(dtype)
    X[-1:], X[:, -1:] = 0, 0
    return X


def make_table(n_obs: int = N_OBS) -> pd.DataFrame:
    obs = make_obs(np.arange(n_obs)).drop(columns="soma_joinid")
    return obs.set_index(pd.Index([f"cell{i}" for i in range(n_obs)], name="cell_id"))


def make_adata(X: Any) -> anndata.AnnData:
    obs = make_table(X.shape[0]).drop(columns=["taken_at", "maybe_text"])  # anndata cannot write them
    return anndata.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(X.shape[1])]))


@pytest.fixture(scope="session")
def backed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], anndata.AnnData]:
    """Return an AnnData of a matrix, which stays on disk."""

    def make(X: Any) -> anndata.AnnData:
        path = tmp_path_factory.mktemp("backed") / "cells.h5ad"
        make_adata(X).write_h5ad(path)
        return anndata.read_h5ad(path, backed="r")

    return make


KINDS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "csr_matrix": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "coo_array": sparse.coo_array,
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
}
BACKED: dict[str, Callable[[NDArray[Any]], Any]] = {
    "on disk, CSR": sparse.csr_matrix,
    "on disk, CSC": sparse.csc_matrix,
    "on disk, dense": np.ascontiguousarray,
}


@pytest.fixture(scope="module", params=[*KINDS, *BACKED])
def make_source(request: pytest.FixtureRequest, backed: Any) -> Callable[[], MemorySource]:
    """Return what makes a source of `make_X` and `make_table`, in one of all kinds."""
    kind, X = request.param, make_X()
    if kind in KINDS:
        return lambda: MemorySource(KINDS[kind](X), make_table())
    adata = backed(BACKED[kind](X))
    return lambda: MemorySource.from_anndata(adata)


def read(source: MemorySource, rows: Any, columns: Any, names: Any = ("soma_joinid",)) -> Any:
    """Return dense X and obs of rows by joinid, as `read` gives them."""
    ids = QueryIDs(obs_joinids=source.query_ids.obs_joinids, var_joinids=columns)
    reader = source.open(ids, Fields(obs_column_names=names), BUDGET)
    pieces = list(reader.read(np.asarray(rows, dtype=np.int64)))
    reader.close()
    X = [piece.X.slice_tonumpy(slice(None)) for piece in pieces]
    return np.concatenate(X), pd.concat([piece.obs for piece in pieces], ignore_index=True)


# Promises -------------------------------------------------------------------------------------------------


def test_every_kind_of_matrix_keeps_the_promises_of_a_source(make_source: Any) -> None:
    names = ["cell_id", "cell_type", "stage", "n_genes", "maybe_int", "maybe_bool"]
    check_source(make_source(), make=make_source, obs_column_names=names)


def test_every_kind_of_matrix_has_the_values_that_it_was_given(make_source: Any) -> None:
    source = make_source()
    rows, columns = source.query_ids.obs_joinids, source.query_ids.var_joinids
    X, obs = read(source, rows, columns, ["cell_id", "n_genes"])
    np.testing.assert_array_equal(X, make_X())
    assert X.dtype == np.float32
    expected = make_table()
    assert obs["cell_id"].tolist() == expected.index.tolist()
    assert obs["n_genes"].tolist() == expected["n_genes"].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["csr_matrix", "C"])
def test_values_keep_their_type(dtype: Any, kind: str) -> None:
    n_obs = 12 if np.dtype(dtype).itemsize == 1 else 30
    X = make_X(n_obs, 9, dtype)
    source = MemorySource(KINDS[kind](X), make_table(n_obs))
    found, _ = read(source, np.arange(n_obs), np.arange(9))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, X)
    reader = source.open(source.query_ids, Fields(obs_column_names=["n_genes"]), BUDGET)
    assert isinstance(reader, RandomAccess)
    out = np.ones((n_obs, 9), dtype)
    reader.fill_dense(np.arange(n_obs), out)
    np.testing.assert_array_equal(out, X)
    np.testing.assert_array_equal(reader.csr(np.arange(n_obs)).toarray(), X)
    assert reader.csr(np.arange(n_obs)).dtype == reader.dtype == dtype


matrices = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))


@given(shape=matrices, kind=st.sampled_from(list(KINDS)), data=st.data())
def test_rows_and_columns_are_those_of_scipy_and_pandas(
    shape: tuple[int, int, int], kind: str, data: Any
) -> None:
    n_obs, n_vars, seed = shape
    rng = np.random.default_rng(seed)
    X = rng.integers(-3, 4, (n_obs, n_vars)).astype(np.float32)
    X[X < 0] = 0
    obs_ids, var_ids = (rng.choice(100, n, replace=False) for n in (n_obs, n_vars))
    obs = pd.DataFrame({"n": rng.integers(0, 9, n_obs), "soma_joinid": obs_ids})
    source = MemorySource(KINDS[kind](X), obs, pd.DataFrame({"soma_joinid": var_ids}))
    rows = np.array(data.draw(st.lists(st.integers(0, n_obs - 1), min_size=1, max_size=20)))
    columns = np.array(data.draw(st.lists(st.integers(0, n_vars - 1), unique=True)), dtype=int)
    found, table = read(source, obs_ids[rows], var_ids[columns], ["soma_joinid", "n"])
    np.testing.assert_array_equal(found, X[rows][:, columns])
    expected = obs.iloc[rows].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, expected[["soma_joinid", "n"]])
    ids = QueryIDs(obs_joinids=obs_ids, var_joinids=var_ids[columns])
    reader: Any = source.open(ids, Fields(obs_column_names=["n"]), BUDGET)
    csr = reader.csr(obs_ids[rows])
    assert sparse.csr_matrix((csr.data, csr.indices, csr.indptr), shape=csr.shape).has_canonical_format
    np.testing.assert_array_equal(csr.toarray(), X[rows][:, columns])
    out = np.full((len(rows), len(columns)), np.nan, np.float32)
    reader.fill_dense(obs_ids[rows], out)
    np.testing.assert_array_equal(out, X[rows][:, columns])


@given(entries=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 9)), max_size=40))
def test_entries_in_any_order_are_sorted_and_added_up_without_a_change_to_the_matrix(
    entries: list[tuple[int, int, int]],
) -> None:
    i, j, d = np.array(entries, dtype=np.int64).reshape(-1, 3).T
    order = np.argsort(i, kind="stable")
    indptr = np.searchsorted(i[order], np.arange(6))
    X = sparse.csr_matrix((d[order].astype(np.int32), j[order].astype(np.int32), indptr), shape=(5, 6))
    before = [array.copy() for array in (X.data, X.indices, X.indptr)]
    found, _ = read(MemorySource(X, make_table(5)), np.arange(5), np.arange(6))
    expected = np.zeros((5, 6), dtype=np.int32)
    np.add.at(expected, (i, j), d)
    np.testing.assert_array_equal(found, expected)
    for array, copied in zip((X.data, X.indices, X.indptr), before, strict=True):
        np.testing.assert_array_equal(array, copied)


# Memory ---------------------------------------------------------------------------------------------------


def test_a_matrix_that_is_in_order_is_not_copied() -> None:
    X, dense = sparse.csr_matrix(make_X()), make_X()
    assert np.shares_memory(MemorySource(X, make_table())._X._values, X.data)
    assert np.shares_memory(MemorySource(X, make_table())._X._columns, X.indices)
    assert np.shares_memory(MemorySource(dense, make_table())._X._X, dense)


@pytest.mark.parametrize("kind", ["csr_matrix", "C", "Fortran"])
def test_nothing_that_is_handed_out_is_a_view(kind: str) -> None:
    X = KINDS[kind](make_X())
    source = MemorySource(X, make_table())
    ids = source.query_ids
    reader: Any = source.open(ids, Fields(obs_column_names=["n_genes"]), BUDGET)
    rows = ids.obs_joinids
    out = np.empty((N_OBS, N_VARS), np.float32)
    reader.fill_dense(rows, out)
    for piece in reader.read(rows):
        piece.X.data[...] = 0
    reader.csr(rows).data[...] = 0
    out[...] = -1
    whole = X.toarray() if sparse.issparse(X) else X
    np.testing.assert_array_equal(whole, make_X())


def test_a_matrix_that_is_changed_meanwhile_is_told() -> None:
    X = sparse.csr_matrix(make_X())
    source = MemorySource(X, make_table())
    reader: Any = source.open(source.query_ids, Fields(obs_column_names=["n_genes"]), BUDGET)
    X.indices[...] = 2**31 - 1
    for use in (
        lambda: list(reader.read(np.arange(3))),
        lambda: reader.csr(np.arange(3)),
        lambda: reader.fill_dense(np.arange(3), np.empty((3, N_VARS), np.float32)),
    ):
        with pytest.raises(ValueError, match="must stay as it is"):
            use()


def test_many_rows_come_in_pieces() -> None:
    source = MemorySource(sparse.csr_matrix(np.eye(10_000, 3)), make_table(10_000))
    reader = source.open(source.query_ids, Fields(obs_column_names=["n_genes"]), BUDGET)
    sizes = [len(piece) for piece in reader.read(source.query_ids.obs_joinids)]
    assert len(sizes) > 1
    assert sum(sizes) == 10_000


# obs and var ----------------------------------------------------------------------------------------------


def test_columns_of_obs_keep_types_and_categories() -> None:
    source = MemorySource(make_X(), make_table())
    rows = np.array([5, 2, 5])
    names = make_table().columns.tolist()
    expected = make_table().iloc[rows].reset_index(drop=True)
    pd.testing.assert_frame_equal(source.obs(rows, names), expected)
    assert source.obs(rows, ["cell_type"])["cell_type"].cat.categories.tolist()[-1] == "unseen"


@pytest.mark.parametrize(("name", "known"), [("cell_id", "cell_id"), (None, "index"), ("n_genes", "")])
def test_the_index_is_a_column_under_its_name(name: str | None, known: str) -> None:
    obs = make_table()
    obs.index.name = name
    source = MemorySource(make_X(), obs)
    if known:
        assert source.obs(np.array([3, 1]), [known])[known].tolist() == ["cell3", "cell1"]
    else:  # a column has that name
        assert source.obs(np.array([3, 1]), ["n_genes"])["n_genes"].tolist() == [3, 1]


def test_joinids_are_those_of_obs_and_var_or_count_from_0() -> None:
    obs, ids = make_table(), np.arange(N_OBS)[::-1] * 3
    obs["soma_joinid"] = pd.array(ids, dtype="Int64")
    var = pd.DataFrame({"symbol": [f"s{j}" for j in range(N_VARS)]}, index=np.arange(N_VARS) + 7)
    var.index.name = "soma_joinid"
    source = MemorySource(make_X(), obs, var)
    assert source.query_ids == QueryIDs(obs_joinids=ids, var_joinids=np.arange(N_VARS) + 7)
    X, table = read(source, [3, 0], [8], ["n_genes", "soma_joinid"])
    assert table["n_genes"].tolist() == [N_OBS - 2, N_OBS - 1]
    assert table["soma_joinid"].dtype == np.int64
    np.testing.assert_array_equal(X, make_X()[[N_OBS - 2, N_OBS - 1]][:, [1]])
    found = source.var(np.array([9, 8]))
    assert found.columns.tolist() == ["soma_joinid", "symbol"]
    assert found["symbol"].tolist() == ["s2", "s1"]
    plain = MemorySource(make_X(), make_table())
    assert plain.query_ids == QueryIDs(obs_joinids=np.arange(N_OBS), var_joinids=np.arange(N_VARS))
    assert plain.var(np.array([4])).columns.tolist() == ["soma_joinid"]


def test_what_is_added_to_obs_later_is_not_seen() -> None:
    obs = make_table()
    source = MemorySource(make_X(), obs)
    obs["later"] = 1
    with pytest.raises(ValueError, match="must be a column of obs"):
        source.obs(np.array([0]), ["later"])


# AnnData --------------------------------------------------------------------------------------------------


def test_a_layer_of_an_anndata_is_taken_by_name() -> None:
    adata = make_adata(make_X())
    adata.layers["double"] = sparse.csr_matrix(2 * make_X())
    X, obs = read(MemorySource.from_anndata(adata, layer="double"), [4, 2], [3, 0], ["cell_id", "n_genes"])
    np.testing.assert_array_equal(X, 2 * make_X()[[4, 2]][:, [3, 0]])
    assert obs["cell_id"].tolist() == ["cell4", "cell2"]


def test_a_part_of_an_anndata_has_the_rows_of_the_part() -> None:
    adata = make_adata(sparse.csr_matrix(make_X()))[10:20, ::2]
    source = MemorySource.from_anndata(adata)
    X, obs = read(pickle.loads(pickle.dumps(source)), np.arange(10), np.arange(9), ["n_genes"])
    np.testing.assert_array_equal(X, make_X()[10:20, ::2])
    assert obs["n_genes"].tolist() == list(range(10, 20))


def test_content_tells_what_differs() -> None:
    X, obs = make_X(), make_table()
    content = MemorySource(sparse.csr_matrix(X), obs).content
    assert MemorySource(sparse.csc_matrix(X), obs.copy()).content == content
    X[0, 0] += 1
    assert MemorySource(sparse.csr_matrix(X), obs).content["X"] != content["X"]
    renamed = obs.assign(stage=obs["stage"].cat.add_categories(["third"]))
    assert MemorySource(X, renamed).content["obs"] != content["obs"]
    dense = MemorySource(X, obs).content["X"]
    X[0, 0] -= 1
    assert MemorySource(X, obs).content["X"] != dense


def test_what_is_on_disk_is_read_where_it_is_and_known_by_its_address_and_date(backed: Any) -> None:
    adata = backed(sparse.csr_matrix(make_X()))
    source = MemorySource.from_anndata(adata)
    adata.file.close()
    copied = pickle.loads(pickle.dumps(source))
    X, _ = read(copied, [7, 1, 7], [2, 1])
    np.testing.assert_array_equal(X, make_X()[[7, 1, 7]][:, [2, 1]])
    assert str(adata.filename) in source.content["X"]
    with h5py.File(adata.filename, "r+") as file:
        file["X/data"][:] = 5
    assert copied.content == source.content
    with pytest.raises(ValueError, match="must stay as it is, but has changed"):
        read(copied, [7], [2])
    changed = MemorySource.from_anndata(anndata.read_h5ad(adata.filename, backed="r"))
    assert changed.content != source.content


def test_rows_on_disk_are_told_of_in_tiles_and_rows_in_memory_are_not(backed: Any) -> None:
    X = make_X()
    ids = MemorySource(X, make_table()).query_ids
    for kind in (sparse.csr_matrix, np.asarray):
        assert MemorySource(kind(X), make_table()).layout(ids, BUDGET).row_tile == 1
        layout = MemorySource.from_anndata(backed(kind(X))).layout(ids, BUDGET)
        assert layout.row_tile == 64  # the power of two next to all 90 rows, which take less than a MiB
        assert 48 < layout.bytes_per_row < 48 + N_VARS * 6


def test_requests_have_all_rows_and_no_large_gaps() -> None:
    rows = np.array([1, 2, 3, 500, 501, 100_000, 100_001, 100_002])
    runs = list(_runs(rows, np.full(len(rows), 1000)))
    assert runs == [(1, 3), (500, 501), (100_000, 100_002)]
    assert list(_runs(rows, np.full(len(rows), 1))) == [(1, 100_002)]
    large = list(_runs(np.arange(100), np.full(100, 2**21)))
    assert max(last - first + 1 for first, last in large) == 8
    assert [row for first, last in large for row in range(first, last + 1)] == list(range(100))


def test_a_damaged_file_is_told(backed: Any) -> None:
    adata = backed(sparse.csr_matrix(make_X()))
    adata.file.close()
    with h5py.File(adata.filename, "r+") as file:
        file["X/indptr"][5] = 10**6
    source = MemorySource.from_anndata(anndata.read_h5ad(adata.filename, backed="r"))
    with pytest.raises(ValueError, match="must have an indptr that ascends"):
        read(source, [0], [0])


# What is refused ------------------------------------------------------------------------------------------


def joinids(frame: pd.DataFrame, values: Any) -> pd.DataFrame:
    return frame.assign(soma_joinid=values)


@pytest.mark.parametrize(
    ("kind", "match", "make"),
    [
        (TypeError, "X must be a SciPy matrix", lambda: MemorySource([[1.0]], make_table(1))),
        (TypeError, "X must hold booleans", lambda: MemorySource(make_X(dtype=complex), make_table())),
        (TypeError, "X must hold booleans", lambda: MemorySource(make_X(dtype=np.float16), make_table())),
        (TypeError, "some are masked", lambda: MemorySource(np.ma.masked_equal(make_X(), 0), make_table())),
        (ValueError, "two dimensions", lambda: MemorySource(np.ones(3), make_table(3))),
        (ValueError, "90 rows of X, and has 89", lambda: MemorySource(make_X(), make_table(89))),
        (
            ValueError,
            "17 columns of X, and has 2",
            lambda: MemorySource(make_X(), make_table(), pd.DataFrame({"a": [1, 2]})),
        ),
        (TypeError, "obs must be a DataFrame", lambda: MemorySource(make_X(), {"a": [1]})),
        (
            ValueError,
            "must differ from each other, but 3 repeats",
            lambda: MemorySource(make_X(), joinids(make_table(), 3)),
        ),
        (TypeError, "must be integers", lambda: MemorySource(make_X(), joinids(make_table(), 0.5))),
        (TypeError, "lacks some", lambda: MemorySource(make_X(), joinids(make_table(), np.nan))),
        (
            ValueError,
            "must lie from 0",
            lambda: MemorySource(make_X(), joinids(make_table(), np.arange(N_OBS) - 1)),
        ),
        (
            ValueError,
            "obs must have each column once, but 'stage' repeats",
            lambda: MemorySource(make_X(), make_table().rename(columns={"n_genes": "stage"})),
        ),
        (TypeError, "adata must be an AnnData", lambda: MemorySource.from_anndata(make_X())),
        (
            ValueError,
            "layer='counts' must be a layer of adata",
            lambda: MemorySource.from_anndata(make_adata(make_X()), layer="counts"),
        ),
        (
            ValueError,
            "adata must have an X",
            lambda: MemorySource.from_anndata(anndata.AnnData(obs=make_table(3)[["n_genes"]])),
        ),
    ],
)
def test_what_is_no_source_is_told_in_a_sentence(kind: Any, match: str, make: Any) -> None:
    with pytest.raises(kind, match=re.escape(match)):
        make()


def broken(**arrays: Any) -> sparse.csr_matrix:
    X = sparse.csr_matrix(make_X())
    for name, values in arrays.items():
        setattr(X, name, values)
    return X


@pytest.mark.parametrize(
    "X",
    [
        broken(indices=np.full(sparse.csr_matrix(make_X()).nnz, N_VARS, dtype=np.int32)),
        broken(indices=np.full(sparse.csr_matrix(make_X()).nnz, -1, dtype=np.int32)),
        broken(indptr=sparse.csr_matrix(make_X()).indptr[::-1].copy()),
        broken(data=np.ones(3, np.float32)),
    ],
)
def test_a_matrix_whose_arrays_contradict_each_other_is_refused(X: Any) -> None:
    with pytest.raises(ValueError, match=r"see X.check_format\(\)"):
        MemorySource(X, make_table())


def test_a_file_that_may_change_is_refused(backed: Any) -> None:
    adata = backed(make_X())
    adata.file.close()
    with (
        h5py.File(adata.filename, "r+") as file,
        pytest.raises(ValueError, match="open for reading only, mode 'r' and not 'r\\+'"),
    ):
        MemorySource(file["X"], make_table())


def test_names_rows_and_columns_that_are_not_there_are_told() -> None:
    source = MemorySource(make_X(), make_table())
    ids, fields = source.query_ids, Fields(obs_column_names=["stage"])
    source.check(ids, fields)
    more = QueryIDs(obs_joinids=[0, N_OBS], var_joinids=[0])
    with pytest.raises(ValueError, match=f"obs_joinids must be rows of obs, but 1 of 2 are not, {N_OBS} for"):
        source.check(more, fields)
    wider = QueryIDs(obs_joinids=[0], var_joinids=[N_VARS])
    for call in (source.check, lambda ids, fields: source.open(ids, fields, BUDGET)):
        with pytest.raises(ValueError, match="var_joinids must be rows of var"):
            call(wider, fields)
    with pytest.raises(
        ValueError, match="obs_column_names='stag' must be a column of obs; did you mean 'stage'"
    ):
        source.check(ids, Fields(obs_column_names=["stag"]))
    with pytest.raises(TypeError, match="must be a list of names"):
        source.obs(ids.obs_joinids, "stage")


def test_a_source_of_no_rows_has_none() -> None:
    source = MemorySource(sparse.csr_matrix((0, 3)), make_table(0))
    reader: Any = source.open(source.query_ids, Fields(obs_column_names=["stage"]), BUDGET)
    assert list(reader.read(np.empty(0, np.int64))) == []
    assert reader.csr(np.empty(0, np.int64)).shape == (0, 3)
    assert source.layout(source.query_ids, BUDGET).row_tile == 1
    with pytest.raises(ValueError, match="1 of 1 are not"):
        source.obs(np.array([0]), ["stage"])


def test_the_repr_tells_what_it_has(tmp_path: Path) -> None:
    assert repr(MemorySource(make_X(), make_table())) == "<MemorySource: 90 rows by 17 columns of float32>"
