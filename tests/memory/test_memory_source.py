from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from memory_cells import (
    BACKED,
    BUDGET,
    DTYPES,
    KINDS,
    N_OBS,
    N_VARS,
    joinids,
    make_adata,
    make_table,
    make_X,
    read,
)
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._source import Fields, RandomAccess
from tiledbsoma_ml.memory import MemorySource
from tiledbsoma_ml.testing import check_source


@pytest.fixture(scope="module", params=[*KINDS, *BACKED])
def make_source(request: pytest.FixtureRequest, backed: Any) -> Callable[[], MemorySource]:
    """Return what makes a source of `make_X` and `make_table`, in one of all kinds."""
    kind, X = request.param, make_X()
    if kind in KINDS:
        return lambda: MemorySource(KINDS[kind](X), make_table())
    adata = backed(BACKED[kind](X))
    return lambda: MemorySource.from_anndata(adata)


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


# What is refused ------------------------------------------------------------------------------------------


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
