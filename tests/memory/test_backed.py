from __future__ import annotations

import pickle
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from memory_cells import BUDGET, N_VARS, make_table, make_X, read
from tiledbsoma_ml.memory import MemorySource
from tiledbsoma_ml.memory.backed import _runs

# AnnData --------------------------------------------------------------------------------------------------


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


def test_a_file_that_may_change_is_refused(backed: Any) -> None:
    adata = backed(make_X())
    adata.file.close()
    with (
        h5py.File(adata.filename, "r+") as file,
        pytest.raises(ValueError, match="open for reading only, mode 'r' and not 'r\\+'"),
    ):
        MemorySource(file["X"], make_table())
