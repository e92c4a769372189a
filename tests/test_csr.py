from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import sparse

from stores import DTYPES
from tiledbsoma_ml._csr import CSR_IO_Buffer, concat_toscipy, smallest_uint


class Coo(NamedTuple):
    """Entries with unique coordinates, in any order."""

    i: NDArray[np.int64]
    j: NDArray[np.int64]
    d: NDArray[Any]
    shape: tuple[int, int]

    def buffer(self) -> CSR_IO_Buffer:
        return CSR_IO_Buffer.from_ijd(self.i, self.j, self.d, self.shape)

    def scipy(self) -> sparse.csr_matrix:
        return sparse.csr_matrix((self.d, (self.i, self.j)), shape=self.shape)


@st.composite
def coos(draw: st.DrawFn, n_cols: int | None = None, dtypes: Any = DTYPES) -> Coo:
    """Draw entries of a small matrix: empty rows, no entries, no rows and no columns included."""
    shape = draw(st.integers(0, 7)), draw(st.integers(0, 7)) if n_cols is None else n_cols
    coordinates = st.integers(0, max(shape[0] * shape[1] - 1, 0))
    places = draw(st.lists(coordinates, unique=True, max_size=shape[0] * shape[1]))
    i, j = np.divmod(np.array(places, dtype=np.int64), max(shape[1], 1))
    return Coo(i, j, draw(hnp.arrays(draw(st.sampled_from(dtypes)), len(places))), shape)


slices = st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9))


def assert_canonical_and_equal(found: sparse.csr_matrix, expected: sparse.csr_matrix) -> None:
    """Assert that two matrices store the same entries, and that `found` has them sorted."""
    assert isinstance(found, sparse.csr_matrix)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    recomputed = sparse.csr_matrix((found.data, found.indices, found.indptr), shape=found.shape)
    assert recomputed.has_sorted_indices
    assert recomputed.has_canonical_format
    expected.sort_indices()
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def assert_same_arrays(found: CSR_IO_Buffer, expected: CSR_IO_Buffer) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.indices.dtype == expected.indices.dtype
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


# Building -------------------------------------------------------------------------------------------------


@given(coo=coos())
def test_entries_in_any_order_make_the_matrix_that_scipy_makes(coo: Coo) -> None:
    buffer = coo.buffer()
    dense = buffer.slice_tonumpy(slice(None))
    assert (dense.dtype, dense.shape) == (coo.d.dtype, coo.shape)
    np.testing.assert_array_equal(dense, coo.scipy().toarray())
    assert_canonical_and_equal(buffer.slice_toscipy(slice(None)), coo.scipy())


@given(coo=coos(), data=st.data())
def test_parts_make_the_same_matrix_as_their_entries_put_end_to_end(coo: Coo, data: st.DataObject) -> None:
    n = len(coo.d)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    bounds = list(zip([0, *cuts], [*cuts, n], strict=True))
    parts = [(coo.i[a:b], coo.j[a:b], coo.d[a:b]) for a, b in bounds]
    assert_same_arrays(CSR_IO_Buffer.from_ijd_parts(parts, coo.shape, coo.d.dtype), coo.buffer())


def test_no_parts_make_an_empty_matrix_of_the_type_asked_for() -> None:
    buffer = CSR_IO_Buffer.from_ijd_parts([], (3, 4), np.dtype(np.int8))
    np.testing.assert_array_equal(buffer.slice_tonumpy(slice(None)), np.zeros((3, 4), dtype=np.int8))
    assert (buffer.dtype, buffer.nnz) == (np.int8, 0)


@given(coo=coos())
def test_the_three_arrays_of_a_scipy_matrix_make_the_same_matrix(coo: Coo) -> None:
    expected = coo.scipy()
    buffer = CSR_IO_Buffer.from_pjd(expected.indptr, expected.indices, expected.data, expected.shape)
    assert (buffer.indptr.dtype, buffer.indices.dtype) == (np.int64, np.uint16)
    assert_canonical_and_equal(buffer.slice_toscipy(slice(None)), expected)


@given(coo=coos(), n_matrices=st.integers(1, 3), data=st.data())
def test_merged_matrices_are_their_sum(coo: Coo, n_matrices: int, data: st.DataObject) -> None:
    owner = data.draw(hnp.arrays(np.int64, len(coo.d), elements=st.integers(0, n_matrices - 1)))
    parts = [
        Coo(coo.i[owner == k], coo.j[owner == k], coo.d[owner == k], coo.shape) for k in range(n_matrices)
    ]
    merged = CSR_IO_Buffer.merge([part.buffer() for part in parts])
    assert_canonical_and_equal(merged.slice_toscipy(slice(None)), coo.scipy())


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 4), np.float32), ((3, 3), np.float32), ((2, 3), np.float64)]
)
def test_matrices_of_other_shape_or_type_are_not_merged(shape: tuple[int, int], dtype: Any) -> None:
    mtxs = [
        CSR_IO_Buffer.from_ijd_parts([], (2, 3), np.dtype(np.float32)),
        CSR_IO_Buffer.from_ijd_parts([], shape, np.dtype(dtype)),
    ]
    with pytest.raises(ValueError, match=r"mtxs must have one shape and dtype, but have ") as caught:
        CSR_IO_Buffer.merge(mtxs)
    assert f"(2, 3) float32, {shape} {np.dtype(dtype)}" in str(caught.value)


def test_what_makes_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="mtxs must hold at least one matrix, and is empty"):
        CSR_IO_Buffer.merge([])
    i, d = np.zeros(2, np.uint32), np.ones(2, np.float32)
    with pytest.raises(ValueError, match="i, j and d must be equally long, but have 1, 2 and 2 values"):
        CSR_IO_Buffer.from_ijd(i[:1], i, d, (1, 1))


@pytest.mark.parametrize("wrong", [-1, 3, 10**7, 65_537])
def test_coordinates_beyond_the_matrix_are_refused_before_anything_is_written_there(wrong: int) -> None:
    right, other, d = np.array([0, 1]), np.array([0, wrong]), np.ones(2, np.float32)
    rule = rf"must lie in 0 … 2 \(shape=\(3, 3\)\), but {wrong} does not"
    with pytest.raises(ValueError, match=f"i {rule}"):
        CSR_IO_Buffer.from_ijd(other, right, d, (3, 3))
    with pytest.raises(ValueError, match=f"j {rule}"):
        CSR_IO_Buffer.from_ijd(right, other, d, (3, 3))
    with pytest.raises(ValueError, match=f"j {rule}"):
        CSR_IO_Buffer.from_pjd(np.array([0, 1, 2, 2]), other, d, (3, 3))


@pytest.mark.parametrize("starts", [[0, 1, 2], [1, 1, 2, 2], [0, 1, 2, 3], [0, 2, 1, 2], [0, -1, 2, 2]])
def test_row_starts_that_do_not_lead_through_the_values_are_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"p must be 4 row starts .* which ascend from 0 to the 2 values"):
        CSR_IO_Buffer.from_pjd(np.array(starts), np.array([0, 1]), np.ones(2, np.float32), (3, 3))


# Slicing --------------------------------------------------------------------------------------------------


@given(coo=coos(), rows=slices)
def test_a_slice_holds_the_rows_that_a_slice_of_the_dense_matrix_holds(coo: Coo, rows: slice) -> None:
    dense = coo.buffer().slice_tonumpy(rows)
    expected = coo.scipy().toarray()[rows]
    assert (dense.dtype, dense.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(dense, expected)
    assert_canonical_and_equal(coo.buffer().slice_toscipy(rows), coo.scipy()[rows])


@pytest.mark.parametrize("rows", [slice(None, None, 2), slice(4, 0, -1)])
@pytest.mark.parametrize("method", ["slice_tonumpy", "slice_toscipy"])
def test_a_slice_with_a_step_is_refused(method: str, rows: slice) -> None:
    buffer = CSR_IO_Buffer.from_ijd_parts([], (5, 2), np.dtype(np.float32))
    with pytest.raises(ValueError, match=r"must have a step of 1; slice without a step") as caught:
        getattr(buffer, method)(rows)
    assert f"row_index={rows}" in str(caught.value)


@pytest.mark.parametrize("method", ["slice_tonumpy", "slice_toscipy"])
def test_the_number_of_a_row_is_no_slice(method: str) -> None:
    buffer = CSR_IO_Buffer.from_ijd_parts([], (5, 2), np.dtype(np.float32))
    with pytest.raises(TypeError, match=r"row_index=3 must be a slice; try slice\(0, 1\)"):
        getattr(buffer, method)(3)


def test_a_dense_slice_is_a_new_array() -> None:
    buffer = CSR_IO_Buffer.from_ijd(np.array([0, 1]), np.array([1, 0]), np.array([3.0, 4.0]), (2, 2))
    buffer.slice_tonumpy(slice(None))[:] = 7
    np.testing.assert_array_equal(buffer.slice_tonumpy(slice(None)), [[0, 3], [4, 0]])


@given(coos=st.lists(coos(n_cols=5, dtypes=[np.float32]), min_size=1, max_size=3), rows=st.data())
def test_pieces_of_matrices_are_put_below_each_other(coos: list[Coo], rows: st.DataObject) -> None:
    pieces, expected = [], []
    for coo in coos:
        start, stop = sorted(rows.draw(st.lists(st.integers(0, coo.shape[0]), min_size=2, max_size=2)))
        pieces.append(coo.buffer().slice(start, stop))
        expected.append(coo.scipy()[start:stop])
    whole = sparse.vstack(expected, format="csr")
    assert_canonical_and_equal(concat_toscipy(pieces), whole)
    assert_canonical_and_equal(CSR_IO_Buffer.concat(pieces).slice_toscipy(slice(None)), whole)


@given(coo=coos(), bounds=st.data())
def test_a_slice_has_its_rows_and_shares_their_values(coo: Coo, bounds: st.DataObject) -> None:
    start, stop = sorted(bounds.draw(st.lists(st.integers(0, coo.shape[0]), min_size=2, max_size=2)))
    whole = coo.buffer()
    found = whole.slice(start, stop)
    assert (found.shape, found.dtype) == ((stop - start, coo.shape[1]), coo.d.dtype)
    np.testing.assert_array_equal(found.slice_tonumpy(slice(None)), coo.scipy().toarray()[start:stop])
    assert not found.nnz or np.shares_memory(found.data, whole.data)


@given(coo=coos(), bounds=st.data())
def test_fill_dense_writes_the_rows_from_start_to_stop_and_nothing_else(
    coo: Coo, bounds: st.DataObject
) -> None:
    start, stop = sorted(bounds.draw(st.lists(st.integers(0, coo.shape[0]), min_size=2, max_size=2)))
    out = np.zeros((stop - start + 2, coo.shape[1]), dtype=coo.d.dtype)
    coo.buffer().fill_dense(start, stop, out[1:-1])
    np.testing.assert_array_equal(out[1:-1], coo.scipy().toarray()[start:stop])
    assert not out[[0, -1]].any()


# Rows and entries -----------------------------------------------------------------------------------------


@given(coo=coos(), data=st.data())
def test_rows_are_taken_in_any_order_and_may_repeat(coo: Coo, data: st.DataObject) -> None:
    numbers = st.lists(st.integers(0, max(coo.shape[0] - 1, 0)), max_size=10 if coo.shape[0] else 0)
    rows = np.array(data.draw(numbers), dtype=np.int64)
    taken = coo.buffer().take(rows)
    assert (taken.shape, taken.dtype) == ((len(rows), coo.shape[1]), coo.d.dtype)
    np.testing.assert_array_equal(taken.slice_tonumpy(slice(None)), coo.scipy().toarray()[rows])


@given(coo=coos())
def test_sorting_the_entries_of_each_row_leaves_the_matrix_as_it_is(coo: Coo) -> None:
    buffer = coo.buffer()
    assert buffer.sort_indices() is buffer
    expected = coo.scipy()
    expected.sort_indices()
    np.testing.assert_array_equal(buffer.indptr, expected.indptr)
    np.testing.assert_array_equal(buffer.indices, expected.indices)
    np.testing.assert_array_equal(buffer.data, expected.data)


@given(coo=coos())
def test_a_matrix_tells_its_length_type_number_of_entries_and_bytes(coo: Coo) -> None:
    buffer, n = coo.buffer(), len(coo.d)
    assert (len(buffer), buffer.shape, buffer.nnz) == (coo.shape[0], coo.shape, n)
    assert buffer.dtype == coo.d.dtype
    assert buffer.nbytes == 8 * (coo.shape[0] + 1) + 2 * n + coo.d.itemsize * n


@pytest.mark.parametrize(("n_cols", "index_type"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_last_column_fits_the_smallest_index_type(n_cols: int, index_type: Any) -> None:
    i, j, d = np.array([1, 1, 0]), np.array([n_cols - 1, 0, n_cols - 2]), np.array([1, 2, 3], dtype=np.int32)
    built = CSR_IO_Buffer.from_ijd(i, j, d, (2, n_cols))
    expected = sparse.csr_matrix((d, (i, j)), shape=(2, n_cols))
    converted = CSR_IO_Buffer.from_pjd(expected.indptr, expected.indices, expected.data, expected.shape)
    for buffer in (built, converted, CSR_IO_Buffer.merge([built])):
        assert buffer.indices.dtype == index_type
        np.testing.assert_array_equal(buffer.slice_tonumpy(slice(None)), expected.toarray())
        assert_canonical_and_equal(buffer.slice_toscipy(slice(None)), expected)


@pytest.mark.parametrize(
    ("n", "index_type"),
    [
        (0, np.uint16),
        (1, np.uint16),
        (2**16, np.uint16),
        (2**16 + 1, np.uint32),
        (2**32, np.uint32),
        (2**32 + 1, np.uint64),
        (2**64, np.uint64),
    ],
)
def test_the_index_type_is_the_smallest_that_holds_the_last_index(n: int, index_type: Any) -> None:
    assert smallest_uint(n) == index_type


@given(coo=coos(), again=st.lists(st.integers(0, 48), max_size=9))
def test_values_of_a_coordinate_that_repeats_are_added_up_as_scipy_does(coo: Coo, again: list[int]) -> None:
    entries = np.append(np.arange(len(coo.i)), [k for k in again if k < len(coo.i)]).astype(int)
    repeated = Coo(coo.i[entries], coo.j[entries], coo.d[entries], coo.shape)
    found = repeated.buffer().with_repeats_added(coo.d.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_canonical_and_equal(found.slice_toscipy(slice(None)), repeated.scipy())


def test_what_is_added_up_may_need_a_wider_type_than_what_is_added() -> None:
    narrow = np.array([1, 200, 100], dtype=np.uint8)
    buffer = CSR_IO_Buffer.from_ijd(np.array([0, 1, 1]), np.array([0, 2, 2]), narrow, (3, 3))
    found = buffer.with_repeats_added(np.dtype(np.float32))
    assert found.slice_tonumpy(slice(None)).tolist() == [[1, 0, 0], [0, 0, 300], [0, 0, 0]]


def test_without_repeats_nothing_is_copied() -> None:
    buffer = CSR_IO_Buffer.from_ijd(np.array([0, 0]), np.array([2, 1]), np.array([1, 2]), (1, 3))
    assert buffer.with_repeats_added(np.dtype(np.int64)) is buffer


def test_a_part_that_is_alone_and_has_columns_for_scipy_is_not_copied() -> None:
    columns, values = np.array([4, 0, 2], dtype=np.int32), np.array([1.0, 2.0, 3.0], dtype=np.float32)
    part = CSR_IO_Buffer(np.array([0, 2, 3, 3]), columns, values, (3, 5))
    found = concat_toscipy([part])
    assert np.shares_memory(found.data, values)
    assert np.shares_memory(found.indices, columns)
    np.testing.assert_array_equal(found.toarray(), [[2, 0, 0, 0, 1], [0, 0, 3, 0, 0], np.zeros(5)])
    assert found.has_canonical_format
    last = concat_toscipy([part.slice(1, 3)])  # SciPy itself would copy so small a part
    assert np.shares_memory(last.data, values)
    np.testing.assert_array_equal(last.toarray(), [[0, 0, 3, 0, 0], np.zeros(5)])
    assert concat_toscipy([part.slice(2, 3)]).nnz == 0


def test_rows_are_sorted_unless_all_parts_are_known_to_be() -> None:
    def part(columns: list[int], is_canonical: bool) -> CSR_IO_Buffer:
        arrays = np.array([0, 2]), np.array(columns, dtype=np.uint16), np.array([1.0, 2.0])
        return CSR_IO_Buffer(*arrays, (1, 5), is_canonical=is_canonical)

    found = concat_toscipy([part([0, 4], True), part([3, 2], False)])
    assert found.indices.tolist() == [0, 4, 2, 3]
    assert found.data.tolist() == [1.0, 2.0, 2.0, 1.0]
    assert concat_toscipy([part([0, 4], True).slice(0, 1).narrowed()]).has_canonical_format


def test_narrowed_columns_are_the_same() -> None:
    part = CSR_IO_Buffer(np.array([0, 2]), np.array([4, 0], dtype=np.int32), np.ones(2), (1, 5))
    assert part.narrowed().indices.dtype == np.uint16
    assert part.narrowed().indices.tolist() == [4, 0]
