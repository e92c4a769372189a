from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from memory_cells import BUDGET, KINDS, N_OBS, N_VARS, broken, make_table, make_X, read
from tiledbsoma_ml._source import Fields
from tiledbsoma_ml.memory import MemorySource

# Promises -------------------------------------------------------------------------------------------------


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


# What is refused ------------------------------------------------------------------------------------------


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
