"""Matrices in memory, whose rows are given out in any order, straight into what is handed out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._batch.gather import Found, ShardColumns
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer

PIECE_ROWS, PIECE_BYTES = 4096, 2**24
"""Rows are read in pieces of so many, or of so many bytes where they are dense."""

HASHED_BYTES = 2**26
"""So much of a dense matrix is hashed at once."""


class ChosenColumns(Protocol):
    """Some columns of a matrix, in one order; may be used by several threads at once.

    Rows are asked for by their numbers, which exist. What is given out belongs to whoever asked.
    """

    @property
    def n_vars(self) -> int:
        """Number of columns."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""

    def buffer(self, rows: NDArray[np.int64]) -> CSR_IO_Buffer:
        """Return rows."""

    def csr(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return rows as a canonical matrix."""

    def fill_dense(self, rows: NDArray[np.int64], out: NDArrayNumber) -> None:
        """Write rows into `out`, zeros included."""


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Raise a TypeError unless SciPy and NumPy both have loops for values of a type."""
    if not (dtype.kind in "biu" or (dtype.kind == "f" and dtype.itemsize in (4, 8))):
        raise TypeError(
            f"X must hold booleans, integers, float32 or float64, not {dtype}; try X.astype('float32')."
        )


# Sparse ---------------------------------------------------------------------------------------------------


class SparseMatrix:
    """A sparse matrix by rows. Its arrays are those of `X` where these are in order and as they must be.

    Args:
        X: A sparse matrix of any format.

    Raises:
        TypeError: If its values are of another type.
        ValueError: If it has not two dimensions, or its arrays contradict each other.
    """

    row_tile, piece_rows = 1, PIECE_ROWS

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
        """Keep arrays of a matrix and return whether the columns of each row ascend."""
        from tiledbsoma_ml._kernels.snapshot import first_bad_row

        starts = indptr.astype(np.int64)  # a copy: where a row starts must not change any more
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

    def window_rows(self, budget: Budget, bytes_per_row: float) -> None:
        """Return how many rows may wait together: none needs to."""
        return

    def n_bytes(self, rows: NDArray[np.int64], numbers: NDArray[np.int64]) -> int:
        """Return the size of some rows of some columns, without zeros."""
        return self.choose(numbers).buffer(rows).nbytes

    def content(self) -> Mapping[str, str]:
        """Return a digest of the values and where they are."""
        found = hashlib.blake2b(repr((self.shape, self.dtype.str)).encode(), digest_size=16)
        for array in (self._starts, self._columns, self._values):
            found.update(array.view(np.uint8).data)
        return {"X": found.hexdigest()}

    def choose(self, numbers: NDArray[np.int64]) -> ShardColumns:
        """Return the columns with these numbers, in this order."""
        shard = _OneShard(self._starts, self._columns, self._values, self.shape[1])
        return ShardColumns(shard, places=_places(numbers, self.shape[1]), n_vars=len(numbers))


class _OneShard:
    """A matrix in memory as the compiled loops take it: see `Shards`."""

    def __init__(
        self, starts: NDArray[np.int64], columns: NDArray[np.uint32], values: NDArrayNumber, n: int
    ) -> None:
        from tiledbsoma_ml._kernels.snapshot import AS_GIVEN_OUT, KINDS

        self.dtype, self.indices_dtype, self.n_vars = values.dtype, columns.dtype, n
        self._starts = starts
        self._arrays = columns, values  # which the addresses below are of
        self.indices_at, self.data_at = (np.array([array.ctypes.data]) for array in self._arrays)
        self.indices_kinds = np.array([KINDS[columns.dtype.str]], dtype=np.uint8)
        self.data_kinds = np.array([AS_GIVEN_OUT], dtype=np.uint8)

    def locate(self, rows: NDArray[np.int64]) -> Found:
        """Return where rows are, of which each is one."""
        begins = self._starts[rows]
        indptr = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(self._starts[rows + 1] - begins, out=indptr[1:])
        return Found(rows, np.zeros(len(rows), dtype=np.int32), begins, indptr)

    def check_columns(self, found: Found, wrong: int) -> None:
        """Raise a ValueError if a loop has found a row with a column that does not exist."""
        if wrong >= 0:
            raise ValueError(
                f"X must stay as it is while it is read, but row {found.rows[wrong]:,} was changed; give the "
                "source a copy."
            )


def _places(numbers: NDArray[np.int64], n_stored: int) -> NDArray[np.int32] | None:
    """Return where each stored column goes, -1 if nowhere; None if all stay where they are."""
    if np.array_equal(numbers, np.arange(n_stored)):
        return None
    places = np.full(n_stored, -1, dtype=np.int32)
    places[numbers] = np.arange(len(numbers), dtype=np.int32)
    return places


# Dense ----------------------------------------------------------------------------------------------------


class DenseMatrix:
    """A dense matrix.

    Args:
        X: An array; itself if its values are in the order of bytes of this machine.

    Raises:
        TypeError: If some of it is masked, or its values are of another type.
        ValueError: If it has not two dimensions.
    """

    row_tile = 1

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

    def window_rows(self, budget: Budget, bytes_per_row: float) -> None:
        """Return how many rows may wait together: none needs to."""
        return

    def n_bytes(self, rows: NDArray[np.int64], numbers: NDArray[np.int64]) -> int:
        """Return the size of some rows of some columns, without zeros."""
        return self.choose(numbers).buffer(rows).nbytes

    def content(self) -> Mapping[str, str]:
        """Return a digest of the values."""
        found = hashlib.blake2b(repr((self.shape, self.dtype.str)).encode(), digest_size=16)
        step = max(1, HASHED_BYTES // max(1, self.shape[1] * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            found.update(np.ascontiguousarray(self._X[start : start + step]).view(np.uint8).data)
        return {"X": found.hexdigest()}

    def choose(self, numbers: NDArray[np.int64]) -> DenseColumns:
        """Return the columns with these numbers, in this order."""
        return DenseColumns(self._X, numbers)


class DenseColumns:
    """Some columns of a dense matrix: see `ChosenColumns`."""

    def __init__(self, X: NDArrayNumber, numbers: NDArray[np.int64]) -> None:
        self.n_vars, self.dtype = len(numbers), X.dtype
        self._X = X
        self._numbers = None if np.array_equal(numbers, np.arange(X.shape[1])) else numbers

    def buffer(self, rows: NDArray[np.int64]) -> CSR_IO_Buffer:
        """Return rows."""
        X = self.csr(rows)
        return CSR_IO_Buffer.from_pjd(X.indptr, X.indices, X.data, X.shape)

    def csr(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return rows as a canonical matrix."""
        dense = np.empty((len(rows), self.n_vars), dtype=self.dtype)
        self.fill_dense(rows, dense)
        return sparse.csr_matrix(dense)

    def fill_dense(self, rows: NDArray[np.int64], out: NDArrayNumber) -> None:
        """Write rows into `out`."""
        assert (out.shape, out.dtype) == ((len(rows), self.n_vars), self.dtype)
        if not (self._X.flags.c_contiguous and self._X.flags.aligned):  # np.take would copy all of it
            out[...] = self._X[rows] if self._numbers is None else self._X[rows[:, None], self._numbers]
        elif self._numbers is None:
            np.take(self._X, rows, axis=0, out=out, mode="clip")  # with "raise" it would write to a copy
        else:
            np.take(self._X.take(rows, axis=0), self._numbers, axis=1, out=out, mode="clip")
