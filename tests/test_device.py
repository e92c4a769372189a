from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from devices import cuda
from stores import DTYPES
from tiledbsoma_ml import _device
from tiledbsoma_ml._device import DeviceRows


@pytest.fixture(scope="module", params=["cpu", cuda])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def matrices(dtype: Any, n_rows: int | None = None, n_cols: int | None = None) -> st.SearchStrategy[Any]:
    """Dense matrices with many zeros, whole rows of them included; also without rows or columns."""
    shape = st.tuples(
        st.integers(0, 8) if n_rows is None else st.just(n_rows),
        st.integers(0, 7) if n_cols is None else st.just(n_cols),
    )
    return hnp.arrays(
        dtype, shape, elements=hnp.from_dtype(np.dtype(dtype)), fill=st.just(np.dtype(dtype).type(0))
    )


def put(matrix: np.ndarray, device: torch.device, index_type: Any = np.uint16) -> DeviceRows:
    csr = sparse.csr_matrix(matrix)
    return DeviceRows.put(
        csr.indptr.astype(np.int64), csr.indices.astype(index_type), csr.data, matrix.shape[1], device
    )


def assert_rows(rows: DeviceRows, expected: np.ndarray, device: torch.device) -> None:
    """Assert that `rows`, made dense and made sparse, are those of `expected`, types and places included."""
    assert len(rows) == len(expected)
    dense = rows.to_dense()
    assert (dense.device.type, dense.layout) == (device.type, torch.strided)
    assert dense.cpu().numpy().dtype == expected.dtype
    np.testing.assert_array_equal(dense.cpu().numpy(), expected)

    compressed, csr = rows.to_sparse(), sparse.csr_matrix(expected)
    assert (compressed.device.type, compressed.layout) == (device.type, torch.sparse_csr)
    assert tuple(compressed.shape) == expected.shape
    assert compressed.crow_indices().dtype == compressed.col_indices().dtype == torch.int64
    assert compressed.values().cpu().numpy().dtype == expected.dtype
    np.testing.assert_array_equal(compressed.crow_indices().cpu(), csr.indptr)
    np.testing.assert_array_equal(compressed.col_indices().cpu(), csr.indices)
    np.testing.assert_array_equal(compressed.values().cpu().numpy(), csr.data)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=25)
def test_rows_that_were_put_come_back_with_their_values_and_their_type(
    device: torch.device, dtype: Any, data: st.DataObject
) -> None:
    matrix = data.draw(matrices(dtype))
    assert_rows(put(matrix, device), matrix, device)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=25)
def test_rows_are_taken_in_the_order_of_their_numbers_repeats_included(
    device: torch.device, dtype: Any, data: st.DataObject
) -> None:
    matrix = data.draw(matrices(dtype))
    numbers = st.lists(st.integers(0, len(matrix) - 1), max_size=12) if len(matrix) else st.just([])
    rows = np.array(data.draw(numbers), dtype=np.int64)
    assert_rows(put(matrix, device).take(rows), matrix[rows], device)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=25)
def test_parts_are_put_below_each_other(device: torch.device, dtype: Any, data: st.DataObject) -> None:
    n_cols = data.draw(st.integers(0, 5))
    parts = data.draw(st.lists(matrices(dtype, n_cols=n_cols), min_size=1, max_size=4))
    whole = DeviceRows.concat([put(part, device) for part in parts])
    assert_rows(whole, np.concatenate(parts), device)


@given(matrix=matrices(np.uint16, n_rows=6), seed=st.integers(0, 9))
@settings(max_examples=25)
def test_rows_can_be_taken_of_what_was_taken_and_put_together(
    device: torch.device, matrix: np.ndarray, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(6)
    rows = put(matrix, device)
    joined = DeviceRows.concat([rows.take(np.arange(2, 5)), rows.take(np.arange(0, 3))])
    assert_rows(joined.take(order), matrix[[2, 3, 4, 0, 1, 2]][order], device)


@pytest.mark.parametrize("index_type", [np.uint16, np.uint32, np.uint64, np.int32, np.int64])
def test_columns_may_come_in_any_index_type(device: torch.device, index_type: Any) -> None:
    matrix = np.array([[0, 5, 0], [7, 0, 9]], dtype=np.float32)
    assert_rows(put(matrix, device, index_type), matrix, device)


def test_entries_of_a_row_may_come_in_any_order_where_it_is_made_dense(device: torch.device) -> None:
    indptr, indices = np.array([0, 3, 4]), np.array([4, 0, 2, 1], dtype=np.uint16)
    rows = DeviceRows.put(indptr, indices, np.array([1.0, 2.0, 3.0, 4.0]), 5, device)
    np.testing.assert_array_equal(rows.to_dense().cpu(), [[2, 0, 3, 0, 1], [0, 4, 0, 0, 0]])


def test_columns_beyond_65536_are_held(device: torch.device) -> None:
    indptr, indices = np.array([0, 2]), np.array([65535, 69999], dtype=np.uint32)
    rows = DeviceRows.put(indptr, indices, np.array([1, 2], dtype=np.int16), 70_000, device)
    dense = rows.to_dense()
    assert dense.cpu()[0, [65535, 69999]].tolist() == [1, 2]
    assert torch.count_nonzero(dense) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_changing_a_dense_tensor_changes_neither_the_rows_nor_another_tensor(
    device: torch.device, dtype: Any
) -> None:
    matrix = np.eye(3, dtype=dtype)
    rows = put(matrix, device)
    changed, other = rows.to_dense(), rows.to_dense()
    changed.fill_(0)
    np.testing.assert_array_equal(other.cpu().numpy(), matrix)
    assert_rows(rows, matrix, device)


def test_changing_rows_that_were_taken_leaves_those_they_were_taken_from(device: torch.device) -> None:
    matrix = np.eye(4, dtype=np.float32)
    rows = put(matrix, device)
    rows.take(np.arange(1, 3)).to_sparse().values().fill_(-1)
    assert_rows(rows, matrix, device)


def test_the_module_imports_nothing_of_tiledbsoma() -> None:
    tree = ast.parse(Path(_device.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in imports if isinstance(node, ast.ImportFrom)]
    assert "torch" in names
    assert {name.partition(".")[0] for name in names} <= {
        "__future__",
        "attrs",
        "collections",
        "functools",
        "numpy",
        "torch",
        "typing",
        "warnings",
    }
