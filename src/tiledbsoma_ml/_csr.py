"""`CSR_IO_Buffer`: a small matrix in CSR, built from coordinates in any order and sliced by rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._common import NDArrayNumber
from tiledbsoma_ml._kernels.bits import as_bits


class CSR_IO_Buffer:
    """A matrix of sparse rows (CSR).

    Attributes:
        indptr: Where each row starts, int64, of shape (n_rows + 1,).
        indices: Columns, of shape (nnz,), in any order within a row: int32, which SciPy wants, or the
            smallest unsigned type that holds them.
        data: Values, of shape (nnz,).
        shape: (n_rows, n_cols).
        is_canonical: Whether the columns of each row are known to ascend, each once.
    """

    __slots__ = ("data", "indices", "indptr", "is_canonical", "shape")

    def __init__(
        self,
        indptr: NDArray[Any],
        indices: NDArray[Any],
        data: NDArrayNumber,
        shape: tuple[int, int],
        *,
        is_canonical: bool = False,
    ) -> None:
        assert len(indptr) == shape[0] + 1
        assert len(indices) == len(data)
        self.indptr = indptr
        self.indices = indices
        self.data = data
        self.shape = shape
        self.is_canonical = is_canonical

    @staticmethod
    def from_ijd(i: NDArray[Any], j: NDArray[Any], d: NDArrayNumber, shape: tuple[int, int]) -> CSR_IO_Buffer:
        """Return the matrix with value `d[k]` in row `i[k]` and column `j[k]`; coordinates must be unique."""
        if not len(i) == len(j) == len(d):
            raise ValueError(
                f"i, j and d must be equally long, but have {len(i)}, {len(j)} and {len(d)} values."
            )
        _check_within("i", i, shape[0], shape)
        _check_within("j", j, shape[1], shape)
        return CSR_IO_Buffer.from_ijd_parts([(i, j, d)], shape, np.asarray(d).dtype)

    @staticmethod
    def from_ijd_parts(
        parts: Sequence[tuple[NDArray[Any], NDArray[Any], NDArrayNumber]],
        shape: tuple[int, int],
        dtype: np.dtype[Any],
    ) -> CSR_IO_Buffer:
        """Return what `from_ijd` returns for the concatenated parts, without concatenating them."""
        from tiledbsoma_ml._kernels import csr as kernels

        counts = np.zeros(shape[0], dtype=np.int64)
        for i, _, _ in parts:
            kernels.count_rows(i, counts)
        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        indices = np.empty(indptr[-1], dtype=smallest_uint(shape[1]))
        data = np.empty(indptr[-1], dtype=dtype)
        free = indptr[:-1].copy()
        for i, j, d in parts:
            kernels.place_rows(i, j, as_bits(d), free, indices, as_bits(data))
        return CSR_IO_Buffer(indptr, indices, data, shape)

    @staticmethod
    def from_pjd(p: NDArray[Any], j: NDArray[Any], d: NDArrayNumber, shape: tuple[int, int]) -> CSR_IO_Buffer:
        """Return the matrix with row starts `p`, columns `j` and values `d`, the three arrays of SciPy."""
        if len(p) != shape[0] + 1 or p[0] != 0 or p[-1] != len(j) or (p[1:] < p[:-1]).any():
            raise ValueError(
                f"p must be {shape[0] + 1} row starts (shape={shape}), which ascend from 0 to the {len(j)} "
                "values of j; take the indptr of a csr_matrix."
            )
        if len(d) != len(j):
            raise ValueError(f"j and d must be equally long, but have {len(j)} and {len(d)} values.")
        _check_within("j", j, shape[1], shape)
        return CSR_IO_Buffer(p.astype(np.int64), j.astype(smallest_uint(shape[1])), d, shape)

    @staticmethod
    def merge(mtxs: Sequence[CSR_IO_Buffer]) -> CSR_IO_Buffer:
        """Return the sum of matrices of one shape and type that have no coordinate in common."""
        if not mtxs:
            raise ValueError("mtxs must hold at least one matrix, and is empty.")
        first = mtxs[0]
        if any(m.shape != first.shape or m.dtype != first.dtype for m in mtxs):
            raise ValueError(
                "mtxs must have one shape and dtype, but have "
                + ", ".join(f"{m.shape} {m.dtype}" for m in mtxs)
                + "; convert them first."
            )
        row_numbers = np.arange(first.shape[0], dtype=np.uint32)
        parts = [(np.repeat(row_numbers, np.diff(m.indptr)), m.indices, m.data) for m in mtxs]
        return CSR_IO_Buffer.from_ijd_parts(parts, first.shape, first.dtype)

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return len(self.data)

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.indptr.nbytes + self.indices.nbytes + self.data.nbytes

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.data.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def slice_tonumpy(self, row_index: slice) -> NDArrayNumber:
        """Return the rows of a slice (of step 1) as a new dense array of shape (n_rows, n_cols)."""
        start, stop = _bounds(row_index, len(self))
        out = np.zeros((stop - start, self.shape[1]), dtype=self.dtype)
        self.fill_dense(start, stop, out)
        return out

    def fill_dense(self, start: int, stop: int, out: NDArrayNumber) -> None:
        """Write the rows from `start` to `stop` into the zeroed array `out`."""
        from tiledbsoma_ml._kernels import csr as kernels

        kernels.fill_dense(self.indptr[start : stop + 1], self.indices, as_bits(self.data), as_bits(out))

    def slice_toscipy(self, row_index: slice) -> sparse.csr_matrix:
        """Return the rows of a slice (of step 1) as a canonical `csr_matrix`."""
        start, stop = _bounds(row_index, len(self))
        return concat_toscipy([self.slice(start, stop)])

    def slice(self, start: int, stop: int) -> CSR_IO_Buffer:
        """Return the rows from `start` to `stop`, without copying their values."""
        first, last = self.indptr[start], self.indptr[stop]
        indptr, shape = self.indptr[start : stop + 1] - first, (stop - start, self.shape[1])
        indices, data = self.indices[first:last], self.data[first:last]
        return CSR_IO_Buffer(indptr, indices, data, shape, is_canonical=self.is_canonical)

    def take(self, rows: NDArray[np.integer[Any]]) -> CSR_IO_Buffer:
        """Return the rows with these numbers, in this order; a number may repeat."""
        lengths = np.diff(self.indptr)[rows]
        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        entries = np.repeat(self.indptr[rows] - indptr[:-1], lengths) + np.arange(indptr[-1])
        return CSR_IO_Buffer(indptr, self.indices[entries], self.data[entries], (len(rows), self.shape[1]))

    @staticmethod
    def concat(parts: Sequence[CSR_IO_Buffer]) -> CSR_IO_Buffer:
        """Return the rows of one or more parts, below each other."""
        indptr, n_cols = _starts(parts), parts[0].shape[1]
        indices = np.concatenate([part.indices for part in parts])
        data = np.concatenate([part.data for part in parts])
        return CSR_IO_Buffer(indptr, indices, data, (len(indptr) - 1, n_cols))

    def narrowed(self) -> CSR_IO_Buffer:
        """Return this matrix with columns of the smallest unsigned type, which takes fewer bytes to send."""
        indices = self.indices.astype(smallest_uint(self.shape[1]), copy=False)
        return CSR_IO_Buffer(self.indptr, indices, self.data, self.shape, is_canonical=self.is_canonical)

    def sort_indices(self) -> Self:
        """Sort the entries of every row by column, in place, and return this matrix."""
        from tiledbsoma_ml._kernels import csr as kernels

        if not self.is_canonical:
            kernels.sort_rows(self.indptr, self.indices, as_bits(self.data))
        return self

    def with_repeats_added(self, dtype: np.dtype[Any]) -> CSR_IO_Buffer:
        """Return a matrix in which the values of a coordinate that repeats are added up, in `dtype`.

        Its rows are sorted by column. If no coordinate repeats, the matrix itself is returned, unchanged.
        """
        from tiledbsoma_ml._kernels import csr as kernels

        if not kernels.has_repeats(self.indptr, self.indices, self.shape[1]):
            return self
        rows = CSR_IO_Buffer(self.indptr, self.indices, self.data.astype(dtype), self.shape)
        rows.sort_indices()
        is_first = np.append(True, rows.indices[1:] != rows.indices[:-1])
        is_first[rows.indptr[:-1][np.diff(rows.indptr) > 0]] = True
        firsts = np.flatnonzero(is_first)
        data = np.add.reduceat(rows.data, firsts, dtype=dtype)
        indptr = np.searchsorted(firsts, rows.indptr)
        return CSR_IO_Buffer(indptr, rows.indices[firsts], data, self.shape)


def concat_toscipy(parts: Sequence[CSR_IO_Buffer]) -> sparse.csr_matrix:
    """Return the rows of the parts, below each other, as one canonical `csr_matrix`.

    It takes over the memory of a part that is alone and has columns of the type that SciPy wants.
    """
    indptr, n_cols = _starts(parts), parts[0].shape[1]
    index_type = np.dtype(np.int32 if max(n_cols, indptr[-1]) <= np.iinfo(np.int32).max else np.int64)
    if len(parts) == 1 and parts[0].indices.dtype == index_type:
        indices, data = _whole(parts[0].indices), _whole(parts[0].data)
    else:
        indices = np.concatenate([part.indices for part in parts], dtype=index_type, casting="unsafe")
        data = np.concatenate([part.data for part in parts])
    matrix = sparse.csr_matrix((data, indices, indptr.astype(index_type)), shape=(len(indptr) - 1, n_cols))
    if all(part.is_canonical for part in parts):
        matrix.has_sorted_indices = matrix.has_canonical_format = True
    else:
        matrix.sort_indices()
    return matrix


def _whole(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array on the same memory that SciPy takes over; it copies what is a small part of another."""
    return np.frombuffer(array.data, array.dtype) if len(array) else array


def _bounds(row_index: slice, n_rows: int) -> tuple[int, int]:
    """Return the start and stop of the rows of a slice."""
    if not isinstance(row_index, slice):
        raise TypeError(f"row_index={row_index!r} must be a slice; try slice(0, 1).")
    start, stop, step = row_index.indices(n_rows)
    if step != 1:
        raise ValueError(f"row_index={row_index} must have a step of 1; slice without a step.")
    return start, max(start, stop)


def _starts(parts: Sequence[CSR_IO_Buffer]) -> NDArray[np.int64]:
    """Return the row starts of the parts below each other."""
    lengths = [np.zeros(1, dtype=np.int64), *(np.diff(part.indptr) for part in parts)]
    return np.cumsum(np.concatenate(lengths))


def _check_within(name: str, numbers: NDArray[Any], n: int, shape: tuple[int, int]) -> None:
    """Raise a ValueError unless numbers lie in 0 … n - 1: the compiled loops use them as indices."""
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= n):
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise ValueError(f"{name} must lie in 0 … {n - 1} (shape={shape}), but {wrong} does not.")


def smallest_uint(n: int) -> np.dtype[Any]:
    """Return the smallest of uint16, uint32 and uint64 that holds the indices 0 … n - 1."""
    return next(np.dtype(t) for t in (np.uint16, np.uint32, np.uint64) if n - 1 <= np.iinfo(t).max)
