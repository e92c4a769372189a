"""`ShardColumns`: copies rows of a matrix in memory, mapped or not, directly into the arrays it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._common import NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._kernels.bits import as_bits

POOL_BYTES = 2**26
"""Memory of earlier rows that is kept for later ones, by default."""

_UNCHANGED = np.empty(0, dtype=np.int32)


class ShardArrays:
    """The columns and values of shards, and their addresses, which are valid as long as this exists.

    Args:
        indices: The columns of each shard.
        data: The values of each shard, in a type that holds them exactly.
        dtype: Type of the values that are returned.

    Attributes:
        indices_at: Address of the columns of each shard.
        indices_kinds: Their types, as the compiled loops number them.
        data_at: Address of the values of each shard.
        data_kinds: Their types, as the compiled loops number them.
    """

    def __init__(
        self, indices: Sequence[NDArray[Any]], data: Sequence[NDArray[Any]], dtype: np.dtype[Any]
    ) -> None:
        from tiledbsoma_ml._kernels.snapshot import AS_GIVEN_OUT, KINDS

        def kind_of(array: NDArray[Any]) -> int:
            return AS_GIVEN_OUT if array.dtype == dtype else KINDS[array.dtype.str]

        self._arrays = indices, data
        self.indices_at = np.array([array.ctypes.data for array in indices], dtype=np.int64)
        self.indices_kinds = np.array([KINDS[array.dtype.str] for array in indices], dtype=np.uint8)
        self.data_at = np.array([array.ctypes.data for array in data], dtype=np.int64)
        self.data_kinds = np.array([kind_of(array) for array in data], dtype=np.uint8)


@attrs.frozen(eq=False)
class LocatedRows:
    """Rows with their place in the shards.

    Attributes:
        rows: The rows.
        shards: The shard of each row.
        begins: Index of the first value of each row in its shard.
        indptr: Row starts of these rows, concatenated.
        arrays: The columns and values of the shards.
    """

    rows: NDArray[np.int64]
    shards: NDArray[np.int32]
    begins: NDArray[np.int64]
    indptr: NDArray[np.int64]
    arrays: ShardArrays

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def slice(self, start: int, stop: int) -> LocatedRows:
        """Return consecutive rows of these."""
        indptr = self.indptr[start : stop + 1]
        return LocatedRows(
            self.rows[start:stop],
            self.shards[start:stop],
            self.begins[start:stop],
            indptr - indptr[0],
            self.arrays,
        )


class Shards(Protocol):
    """A sparse matrix in shards, each of consecutive rows.

    Attributes:
        dtype: Type of the values that are returned.
        indices_dtype: Type of the columns.
        n_vars: Number of columns.
    """

    dtype: np.dtype[Any]
    indices_dtype: np.dtype[Any]
    n_vars: int

    def locate(self, rows: NDArray[np.int64], pool: Pool) -> LocatedRows:
        """Return the places of rows, which must exist; what is decoded for this is in memory of a pool."""

    def check_columns(self, located: LocatedRows, wrong: int) -> None:
        """Raise a ValueError if the row with the index `wrong` has a column that does not exist.

        `wrong` is -1 if there is no such row.
        """


class ShardColumns:
    """Columns of a matrix, in one order; several threads may use this at once.

    Args:
        shards: The matrix.
        columns: The columns, in the order in which they are returned; all if None.
        pool_bytes: Memory of earlier rows that is kept for later ones.

    Attributes:
        n_vars: Number of these columns.
    """

    def __init__(
        self, shards: Shards, columns: NDArray[np.int64] | None, *, pool_bytes: int = POOL_BYTES
    ) -> None:
        if columns is not None and np.array_equal(columns, np.arange(shards.n_vars)):
            columns = None
        self._shards = shards
        self._col_of = _UNCHANGED if columns is None else _numbers_among(columns, shards.n_vars)
        self._is_ascending = columns is None or bool((np.diff(columns) > 0).all())
        self.n_vars = shards.n_vars if columns is None else len(columns)
        self._pool = Pool(pool_bytes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self._shards.dtype

    @property
    def free_bytes(self) -> int:
        """Bytes of memory that are kept for later rows."""
        return self._pool.free_bytes

    def locate(self, rows: NDArray[np.int64]) -> LocatedRows:
        """Return the places of rows, which must exist, for `piece`."""
        return self._shards.locate(rows, self._pool)

    def buffer(self, rows: NDArray[np.int64]) -> CSR_IO_Buffer:
        """Return these rows, in this order."""
        arrays = self._gather(self.locate(rows), self._shards.indices_dtype)
        return CSR_IO_Buffer(*arrays, (len(rows), self.n_vars)).narrowed()

    def piece(self, located: LocatedRows) -> CSR_IO_Buffer:
        """Return rows that were located, in this order, with columns of the type that mini-batches have."""
        fits = self._shards.n_vars <= np.iinfo(np.int32).max
        arrays = self._gather(located, np.dtype(np.int32) if fits else self._shards.indices_dtype)
        return CSR_IO_Buffer(*arrays, (len(located), self.n_vars))

    def csr(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return these rows, in this order, as a canonical `csr_matrix`."""
        from tiledbsoma_ml._kernels import snapshot as kernels

        located = self.locate(rows)
        index_type = np.dtype(np.int32 if located.indptr[-1] <= np.iinfo(np.int32).max else np.int64)
        indptr, indices, data = self._gather(located, index_type)
        if not self._is_ascending:
            kernels.sort_rows_of_few(indptr, self.n_vars, unsigned(indices), as_bits(data))
        matrix = sparse.csr_matrix(
            (data, indices, indptr.astype(index_type, copy=False)), shape=(len(rows), self.n_vars)
        )
        matrix.has_sorted_indices = matrix.has_canonical_format = True
        return matrix

    def fill_dense(self, rows: NDArray[np.int64], out: NDArrayNumber) -> None:
        """Write these rows into `out`, of shape (n_rows, n_vars), zeros included."""
        from tiledbsoma_ml._kernels import snapshot as kernels

        assert out.shape == (len(rows), self.n_vars)
        assert out.dtype == self.dtype
        shards, located = self._shards, self.locate(rows)
        arrays = located.arrays
        longest = int(np.diff(located.indptr).max(initial=0))
        indices, data = np.empty(longest, shards.indices_dtype), np.empty(longest, shards.dtype)
        wrong = kernels.fill_rows(
            located.shards,
            located.begins,
            located.indptr,
            arrays.indices_at,
            arrays.indices_kinds,
            arrays.data_at,
            arrays.data_kinds,
            self._col_of,
            unsigned(indices),
            unsigned(data),
            as_bits(data),
            as_bits(out),
        )
        shards.check_columns(located, wrong)

    def _gather(
        self, located: LocatedRows, indices_dtype: np.dtype[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArrayNumber]:
        """Return row starts, columns and values of rows; columns are numbered as they are returned."""
        from tiledbsoma_ml._kernels import snapshot as kernels

        indptr, n = located.indptr, int(located.indptr[-1])
        indices, data = self._pool.empty(n, indices_dtype), self._pool.empty(n, self.dtype)
        rows, arrays, shards = (located.shards, located.begins, indptr), located.arrays, self._shards
        columns = arrays.indices_at, arrays.indices_kinds, shards.n_vars
        shards.check_columns(located, kernels.gather_columns(*rows, *columns, unsigned(indices)))
        kernels.gather_rows(*rows, arrays.data_at, arrays.data_kinds, unsigned(data))
        if len(self._col_of):
            kernels.keep_columns(indptr, self._col_of, unsigned(indices), as_bits(data))
            indices, data = indices[: indptr[-1]], data[: indptr[-1]]
        return indptr, indices, data


def unsigned(values: NDArray[Any]) -> NDArray[Any]:
    """Return a view of integers or booleans as unsigned integers, so that one compiled loop fills both."""
    return values if values.dtype.kind == "f" else values.view(f"u{values.dtype.itemsize}")


def _numbers_among(columns: NDArray[np.int64], n_stored: int) -> NDArray[np.int32]:
    """Return the number of each stored column among `columns`; -1 for one that is not there."""
    col_of = np.full(n_stored, -1, dtype=np.int32)
    col_of[columns] = np.arange(len(columns), dtype=np.int32)
    return col_of
