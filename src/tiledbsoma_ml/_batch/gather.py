"""Rows that lie in arrays in memory, mapped or not: from there straight into what is handed out."""

from __future__ import annotations

from typing import Any, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._common import NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer, smallest_uint
from tiledbsoma_ml._kernels.bits import as_bits

KEPT_BYTES = 2**26
"""So much memory of rows that nobody holds any longer is kept for later ones, unless told otherwise."""

_NO_PLACES = np.empty(0, dtype=np.int32)


@attrs.frozen(eq=False)
class Found:
    """Rows that were found: number, shard and beginning there of each, and their starts put end to end."""

    rows: NDArray[np.int64]
    shards: NDArray[np.int32]
    begins: NDArray[np.int64]
    indptr: NDArray[np.int64]


class Shards(Protocol):
    """A sparse matrix in several pieces by rows; whoever has this keeps its arrays where they are.

    Attributes:
        dtype: Type of the values, as they are given out.
        indices_dtype: Type of the columns.
        n_vars: Number of columns.
        indices_at: Address of the columns of each shard.
        indices_kinds: Their types, as the compiled loops number them.
        data_at: Address of the values of each shard.
        data_kinds: Their types, as the compiled loops number them.
    """

    dtype: np.dtype[Any]
    indices_dtype: np.dtype[Any]
    n_vars: int
    indices_at: NDArray[np.int64]
    indices_kinds: NDArray[np.uint8]
    data_at: NDArray[np.int64]
    data_kinds: NDArray[np.uint8]

    def locate(self, rows: NDArray[np.int64]) -> Found:
        """Return where rows are, of which each is one."""

    def check_columns(self, found: Found, wrong: int) -> None:
        """Raise a ValueError if a loop has found a row with a column that does not exist; -1 is none."""


class ShardColumns:
    """Some columns of a matrix, in one order; may be used by several threads at once.

    Args:
        shards: The matrix.
        places: The place of each column among those that are given out, -1 if it has none; None if all stay
            as they are.
        n_vars: Number of columns that are given out.
        kept_bytes: So much memory of rows that nobody holds any longer is kept for later ones.

    Attributes:
        n_vars: Number of columns that are given out.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        places: NDArray[np.int32] | None,
        n_vars: int,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._shards = shards
        self._places = places
        self._is_ascending = places is None or bool((np.diff(places[places >= 0]) > 0).all())
        self.n_vars = n_vars
        self._pool = Pool(kept_bytes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self._shards.dtype

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that nobody holds and that is kept for later."""
        return self._pool.kept_bytes

    def buffer(self, rows: NDArray[np.int64]) -> CSR_IO_Buffer:
        """Return rows, by their numbers, in that order."""
        indptr, indices, data = self._gather(self._shards.locate(rows), self._shards.indices_dtype)
        indices = indices.astype(smallest_uint(self.n_vars), copy=False)
        return CSR_IO_Buffer(indptr, indices, data, (len(rows), self.n_vars))

    def csr(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return rows as a canonical `csr_matrix`."""
        from tiledbsoma_ml._kernels import snapshot as kernels

        found = self._shards.locate(rows)
        index_type = np.dtype(np.int32 if found.indptr[-1] <= np.iinfo(np.int32).max else np.int64)
        indptr, indices, data = self._gather(found, index_type)
        if not self._is_ascending:
            kernels.sort_rows_of_few(indptr, self.n_vars, unsigned(indices), as_bits(data))
        matrix = sparse.csr_matrix(
            (data, indices, indptr.astype(index_type, copy=False)), shape=(len(rows), self.n_vars)
        )
        matrix.has_sorted_indices = matrix.has_canonical_format = True
        return matrix

    def fill_dense(self, rows: NDArray[np.int64], out: NDArrayNumber) -> None:
        """Write rows into `out`, of shape (n_rows, n_vars), zeros included."""
        from tiledbsoma_ml._kernels import snapshot as kernels

        assert out.shape == (len(rows), self.n_vars)
        assert out.dtype == self.dtype
        shards, found = self._shards, self._shards.locate(rows)
        longest = int(np.diff(found.indptr).max(initial=0))
        indices, data = np.empty(longest, shards.indices_dtype), np.empty(longest, shards.dtype)
        wrong = kernels.fill_rows(
            found.shards,
            found.begins,
            found.indptr,
            shards.indices_at,
            shards.indices_kinds,
            shards.data_at,
            shards.data_kinds,
            _NO_PLACES if self._places is None else self._places,
            unsigned(indices),
            unsigned(data),
            as_bits(data),
            as_bits(out),
        )
        shards.check_columns(found, wrong)

    def _gather(
        self, found: Found, indices_dtype: np.dtype[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArrayNumber]:
        """Return rows put end to end, their columns mapped to their places."""
        from tiledbsoma_ml._kernels import snapshot as kernels

        indptr, n = found.indptr, int(found.indptr[-1])
        indices, data = self._pool.empty(n, indices_dtype), self._pool.empty(n, self.dtype)
        where, shards = (found.shards, found.begins, indptr), self._shards
        columns = shards.indices_at, shards.indices_kinds, shards.n_vars
        shards.check_columns(found, kernels.gather_columns(*where, *columns, unsigned(indices)))
        kernels.gather_rows(*where, shards.data_at, shards.data_kinds, unsigned(data))
        if self._places is not None:
            kernels.keep_columns(indptr, self._places, unsigned(indices), as_bits(data))
            indices, data = indices[: indptr[-1]], data[: indptr[-1]]
        return indptr, indices, data


def unsigned(values: NDArray[Any]) -> NDArray[Any]:
    """Return a view of integers or booleans as unsigned ones, which are filled by the same compiled loop."""
    return values if values.dtype.kind == "f" else values.view(f"u{values.dtype.itemsize}")
