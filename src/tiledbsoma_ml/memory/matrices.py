"""Matrices in memory, whose rows are copied in any order directly into the arrays that are returned."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._batch.gather import LocatedRows, ShardArrays, ShardColumns
from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer

PIECE_ROWS, PIECE_BYTES = 4096, 2**24
"""Largest number of rows of a piece, and largest number of its bytes if the matrix is dense."""

HASHED_BYTES = 2**26
"""Number of bytes of a dense matrix that are hashed at once."""


class ChosenColumns(Protocol):
    """Columns of a matrix, in one order; several threads may use this at once.

    The rows that are asked for must exist. The caller may write to the rows that are returned.
    """

    @property
    def n_vars(self) -> int:
        """Number of columns."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""

    def buffer(self, rows: NDArray[np.int64]) -> CSR_IO_Buffer:
        """Return these rows, in this order."""

    def csr(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return these rows, in this order, as a canonical `csr_matrix`."""

    def fill_dense(self, rows: NDArray[np.int64], out: NDArrayNumber) -> None:
        """Write these rows into `out`, zeros included."""


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Raise a TypeError unless SciPy and NumPy both support values of this type."""
    if not (dtype.kind in "biu" or (dtype.kind == "f" and dtype.itemsize in (4, 8))):
        raise TypeError(
            f"X must hold booleans, integers, float32 or float64, not {dtype}; try X.astype('float32')."
        )


class InMemoryMatrix(ABC):
    """A matrix in memory: each of its rows can be read by itself.

    Attributes:
        shape: Number of rows and columns.
        dtype: Type of the values.
        row_tile: Number of neighbouring rows that are read together: 1.
        piece_rows: Number of rows of a piece.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    row_tile = 1
    piece_rows: int

    @abstractmethod
    def choose(self, columns: NDArray[np.int64]) -> ChosenColumns:
        """Return these columns, in this order."""

    @abstractmethod
    def content(self) -> Mapping[str, str]:
        """Return a digest of the matrix, by the name "X"."""

    def n_bytes(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> int:
        """Return the size of these rows and columns as sparse rows."""
        return self.choose(columns).buffer(rows).nbytes

    def window_rows(self, budget: Budget, bytes_per_row: float) -> None:
        """Return None: rows of a window need no memory, so the budget does not limit their number."""
        return


# Sparse ---------------------------------------------------------------------------------------------------


class SparseMatrix(InMemoryMatrix):
    """A sparse matrix by rows, which shares the arrays of `X` if these are in CSR and sorted by column.

    Args:
        X: A sparse matrix of any format.

    Raises:
        TypeError: If its values are of another type.
        ValueError: If it does not have two dimensions, or its arrays contradict each other.
    """

    piece_rows = PIECE_ROWS

    def __init__(self, X: Any) -> None:
        if len(X.shape) != 2:
            raise ValueError(
                f"X must have two dimensions, not the shape {X.shape}; try X.reshape(n_rows, -1)."
            )
        check_dtype(X.dtype)
        self.shape: tuple[int, int] = (int(X.shape[0]), int(X.shape[1]))
        self.dtype = X.dtype.newbyteorder("=")
        rows = X if X.format == "csr" else X.tocsr()
        if not self._take_over(rows.indptr, rows.indices, rows.data):
            ordered = sparse.csr_matrix((rows.data, rows.indices, rows.indptr), shape=self.shape, copy=True)
            ordered.sum_duplicates()
            is_ordered = self._take_over(ordered.indptr, ordered.indices, ordered.data)
            assert is_ordered

    def _take_over(self, indptr: NDArray[Any], indices: NDArray[Any], data: NDArrayNumber) -> bool:
        """Use the arrays of a matrix, and return whether the columns of each row ascend."""
        from tiledbsoma_ml._kernels.snapshot import first_bad_row

        starts = indptr.astype(np.int64)  # a copy, because row starts must not change any more
        self.nnz = int(starts[-1])
        has_rows = len(starts) == self.shape[0] + 1 and starts[0] == 0 and (starts[1:] >= starts[:-1]).all()
        if not has_rows or self.nnz > min(len(indices), len(data)):
            raise ValueError(
                "X must have an indptr that ascends from 0 to the number of its values; see X.check_format()."
            )
        columns = indices[: self.nnz]
        if self.nnz and (columns.min() < 0 or columns.max() >= self.shape[1]):
            raise ValueError(
                f"X must have columns within 0 … {self.shape[1] - 1}, and has others; see X.check_format()."
            )
        columns = np.ascontiguousarray(columns if columns.dtype.itemsize == 4 else columns.astype(np.uint32))
        self._starts, self._columns = starts, columns.view(np.uint32)
        self._values = np.ascontiguousarray(data[: self.nnz], dtype=self.dtype)
        return first_bad_row(starts, self._columns, self.shape[1]) < 0

    def content(self) -> Mapping[str, str]:
        """Return a digest of the entries, by the name "X"."""
        found = hashlib.blake2b(repr((self.shape, self.dtype.str)).encode(), digest_size=16)
        for array in (self._starts, self._columns, self._values):
            found.update(array.view(np.uint8).data)
        return {"X": found.hexdigest()}

    def choose(self, columns: NDArray[np.int64]) -> ShardColumns:
        """Return these columns, in this order."""
        return ShardColumns(_OneShard(self._starts, self._columns, self._values, self.shape[1]), columns)


class _OneShard:
    """The arrays of a matrix in memory as `Shards` of one shard."""

    def __init__(
        self, starts: NDArray[np.int64], columns: NDArray[np.uint32], values: NDArrayNumber, n: int
    ) -> None:
        self.dtype, self.indices_dtype, self.n_vars = values.dtype, columns.dtype, n
        self._starts = starts
        self._arrays = ShardArrays([columns], [values], values.dtype)

    def locate(self, rows: NDArray[np.int64], pool: Pool) -> LocatedRows:
        """Return the places of rows, which must exist."""
        begins = self._starts[rows]
        indptr = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(self._starts[rows + 1] - begins, out=indptr[1:])
        return LocatedRows(rows, np.zeros(len(rows), dtype=np.int32), begins, indptr, self._arrays)

    def check_columns(self, located: LocatedRows, wrong: int) -> None:
        """Raise a ValueError if the row with the index `wrong` has a column that does not exist."""
        if wrong >= 0:
            raise ValueError(
                f"X must stay as it is while it is read, but row {located.rows[wrong]:,} was changed; give "
                "the source a copy."
            )


# Dense ----------------------------------------------------------------------------------------------------


class DenseMatrix(InMemoryMatrix):
    """A dense matrix.

    Args:
        X: An array. It is copied only if its byte order is not that of this machine.

    Raises:
        TypeError: If values are masked, or of another type.
        ValueError: If it does not have two dimensions.
    """

    def __init__(self, X: NDArrayNumber) -> None:
        if X.ndim != 2:
            raise ValueError(
                f"X must have two dimensions, not the shape {X.shape}; try X.reshape(n_rows, -1)."
            )
        if np.ma.is_masked(X):
            raise TypeError("X must have every value, but some are masked; try X.filled(0).")
        check_dtype(X.dtype)
        self.shape: tuple[int, int] = (int(X.shape[0]), int(X.shape[1]))
        self.dtype = X.dtype.newbyteorder("=")
        self._X = np.asarray(X, dtype=self.dtype)
        self.piece_rows = min(PIECE_ROWS, max(1, PIECE_BYTES // max(1, self.shape[1] * self.dtype.itemsize)))

    def content(self) -> Mapping[str, str]:
        """Return a digest of the values, by the name "X"."""
        found = hashlib.blake2b(repr((self.shape, self.dtype.str)).encode(), digest_size=16)
        step = max(1, HASHED_BYTES // max(1, self.shape[1] * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            found.update(np.ascontiguousarray(self._X[start : start + step]).view(np.uint8).data)
        return {"X": found.hexdigest()}

    def choose(self, columns: NDArray[np.int64]) -> DenseColumns:
        """Return these columns, in this order."""
        return DenseColumns(self._X, columns)


class DenseColumns:
    """Columns of a dense matrix; see `ChosenColumns`."""

    def __init__(self, X: NDArrayNumber, columns: NDArray[np.int64]) -> None:
        self.n_vars, self.dtype = len(columns), X.dtype
        self._X = X
        self._columns = None if np.array_equal(columns, np.arange(X.shape[1])) else columns

    def buffer(self, rows: NDArray[np.int64]) -> CSR_IO_Buffer:
        """Return these rows, in this order."""
        X = self.csr(rows)
        return CSR_IO_Buffer.from_pjd(X.indptr, X.indices, X.data, X.shape)

    def csr(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return these rows, in this order, as a canonical `csr_matrix`."""
        dense = np.empty((len(rows), self.n_vars), dtype=self.dtype)
        self.fill_dense(rows, dense)
        return sparse.csr_matrix(dense)

    def fill_dense(self, rows: NDArray[np.int64], out: NDArrayNumber) -> None:
        """Write these rows into `out`, zeros included."""
        assert (out.shape, out.dtype) == ((len(rows), self.n_vars), self.dtype)
        if not (self._X.flags.c_contiguous and self._X.flags.aligned):  # np.take would copy all of it
            out[...] = self._X[rows] if self._columns is None else self._X[rows[:, None], self._columns]
        elif self._columns is None:
            np.take(self._X, rows, axis=0, out=out, mode="clip")  # with "raise" it would write to a copy
        else:
            np.take(self._X.take(rows, axis=0), self._columns, axis=1, out=out, mode="clip")
