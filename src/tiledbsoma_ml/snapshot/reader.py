"""`SnapshotReader`: copies rows of memory-mapped files directly into the arrays that it returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._batch.gather import LocatedRows, ShardColumns
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._query_ids import check_joinids
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.obs import ObsTable
from tiledbsoma_ml.snapshot.check import check_starts
from tiledbsoma_ml.snapshot.files import damaged, map_file
from tiledbsoma_ml.snapshot.format import Layer, Shard

READ_ROWS = 4096
"""Number of rows of a piece."""


class SnapshotReader:
    """A reader of rows of a snapshot; several threads may use it at once.

    Args:
        X: The columns of a layer to return.
        index: The row of each joinid.
        obs: The columns of `obs` to return.
    """

    def __init__(self, X: ShardColumns, index: RowIndex, obs: ObsTable) -> None:
        self._X = X
        self._index = index
        self._obs = obs

    @property
    def n_vars(self) -> int:
        """Number of columns of `X`."""
        return self._X.n_vars

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values of `X`."""
        return self._X.dtype

    @property
    def free_bytes(self) -> int:
        """Bytes of memory that are kept for later rows."""
        return self._X.free_bytes

    @property
    def nullable(self) -> frozenset[str]:
        """Columns of `obs` that have nullable types of pandas."""
        return self._obs.nullable

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat.

        Returns:
            Pieces that together are these rows, in exactly this order.
        """
        for start in range(0, len(obs_joinids), READ_ROWS):
            yield self.rows(obs_joinids[start : start + READ_ROWS])

    def close(self) -> None:
        """Do nothing: the files stay mapped as long as an object uses them."""

    def rows(self, obs_joinids: NDArrayJoinId) -> Rows[CSR_IO_Buffer]:
        """Return the rows of `obs_joinids`, in this order; they may repeat.

        Raises:
            ValueError: If a row is not in the snapshot.
        """
        rows = self._index.find(obs_joinids)
        return Rows(obs_joinids=obs_joinids, X=self._X.buffer(rows), obs=self._obs.take(rows))

    def csr(self, obs_joinids: NDArrayJoinId) -> sparse.csr_matrix:
        """Return `X` of the rows of `obs_joinids`, in this order, as a canonical `csr_matrix`."""
        return self._X.csr(self._index.find(obs_joinids))

    def fill_dense(self, obs_joinids: NDArrayJoinId, out: NDArrayNumber) -> None:
        """Write `X` of the rows of `obs_joinids` into `out`, of shape (n_rows, n_vars), zeros included."""
        self._X.fill_dense(self._index.find(obs_joinids), out)

    def obs(self, obs_joinids: NDArrayJoinId) -> pd.DataFrame:
        """Return `obs` of the rows of `obs_joinids`, in this order, with a fresh index."""
        return self._obs.take(self._index.find(obs_joinids))


# Rows of X ------------------------------------------------------------------------------------------------


class MappedLayer:
    """The mapped files of a layer; see `Shards`.

    Args:
        folder: Folder of the snapshot.
        layer: The layer, from a manifest that was checked.
        n_vars: Number of columns.
    """

    def __init__(self, folder: Path, layer: Layer, n_vars: int) -> None:
        from tiledbsoma_ml._kernels.snapshot import AS_GIVEN_OUT, KINDS

        self.dtype = np.dtype(layer.dtype)
        self.indices_dtype = np.dtype(layer.indices_dtype)
        self.nnz, self.n_vars = layer.nnz, n_vars
        self._folder, self._shards = folder, layer.shards
        self._maps = [
            (
                map_file(folder, shard.indptr, "<i8"),
                map_file(folder, shard.indices, layer.indices_dtype),
                map_file(folder, shard.data, shard.data_dtype),
            )
            for shard in layer.shards
        ]
        self._borders = np.array([0, *(shard.row_stop for shard in layer.shards)], dtype=np.int64)
        self._n_values = np.array([shard.nnz for shard in layer.shards], dtype=np.int64)
        self._is_unchecked = np.ones(len(layer.shards), dtype=np.bool_)
        at = [[array.ctypes.data for array in maps] for maps in self._maps]
        self._indptr_at, self.indices_at, self.data_at = np.array(at, dtype=np.int64).reshape(-1, 3).T.copy()
        self.indices_kinds = np.full(len(layer.shards), KINDS[layer.indices_dtype], dtype=np.uint8)
        kinds = [KINDS.get(shard.data_dtype, AS_GIVEN_OUT) for shard in layer.shards]
        self.data_kinds = np.array(kinds, dtype=np.uint8)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self._borders[-1])

    def locate(self, rows: NDArray[np.int64]) -> LocatedRows:
        """Return the places of rows, which must exist.

        Raises:
            ValueError: If row starts of a file cannot be right.
        """
        from tiledbsoma_ml._kernels import snapshot as kernels

        n = len(rows)
        located = LocatedRows(rows, np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n + 1, np.int64))
        shards = self._borders, self._indptr_at, self._n_values
        wrong = kernels.locate_rows(rows, *shards, located.shards, located.begins, located.indptr)
        if wrong >= 0:
            shard = self._shards[int(np.searchsorted(self._borders, rows[wrong], side="right")) - 1]
            self._check_starts(shard)
            raise damaged(self._folder, shard.indptr, f"must say where row {rows[wrong]:,} is, but does not")
        if self._is_unchecked.any():
            for number in np.unique(located.shards[self._is_unchecked[located.shards]]).tolist():
                self._check_starts(self._shards[number])
                self._is_unchecked[number] = False
        return located

    def check_columns(self, located: LocatedRows, wrong: int) -> None:
        """Raise a ValueError if the row with the index `wrong` has a column that does not exist."""
        if wrong >= 0:
            shard, row = self._shards[located.shards[wrong]], located.rows[wrong]
            rule = f"must hold columns below {self.n_vars:,}, but row {row:,} has others"
            raise damaged(self._folder, shard.indices, rule)

    def _check_starts(self, shard: Shard) -> None:
        starts, _, _ = self._maps[self._shards.index(shard)]
        check_starts(self._folder, shard, starts)


class RowIndex:
    """An index that finds the row of a joinid.

    Args:
        joinids: Joinids of the rows, ascending and unique; None if row numbers are used in place of joinids.
        n_rows: Number of rows.
        path: Path of the snapshot, for messages.
    """

    def __init__(self, joinids: NDArrayJoinId | None, n_rows: int, path: Path) -> None:
        self._path = path
        self._joinids = np.empty(0, dtype=np.int64) if joinids is None else joinids
        self._n_rows = n_rows
        self._first = 0 if joinids is None or not n_rows else int(joinids[0])
        span = n_rows if joinids is None or not n_rows else int(joinids[-1]) - self._first + 1
        self._is_range = span == n_rows
        if joinids is not None and not self._is_range:
            self._shift = max(0, (8 * span // n_rows).bit_length() - 1)
            starts = self._first + (np.arange((span - 1 >> self._shift) + 2) << self._shift)
            self._first_rows = np.searchsorted(joinids, starts)

    def find(self, joinids: NDArrayJoinId) -> NDArray[np.int64]:
        """Return the row of each joinid.

        Raises:
            ValueError: If no row has one of them.
        """
        if not isinstance(joinids, np.ndarray) or joinids.dtype != np.int64:
            joinids = check_joinids("obs_joinids", joinids)
        if self._is_range:
            rows = joinids - self._first
            if len(rows) and (rows.min() < 0 or rows.max() >= self._n_rows):
                self._complain(joinids, (rows < 0) | (rows >= self._n_rows))
            return rows
        from tiledbsoma_ml._kernels import snapshot as kernels

        rows = np.empty(len(joinids), dtype=np.int64)
        if kernels.find_rows(joinids, self._joinids, self._first_rows, self._shift, rows):
            self._complain(joinids, rows < 0)
        return rows

    def _complain(self, joinids: NDArrayJoinId, is_missing: NDArray[np.bool_]) -> None:
        raise ValueError(
            f"obs_joinids must be rows of the snapshot {str(self._path)!r}, but {is_missing.sum():,} of "
            f"{len(joinids):,} are not, {joinids[is_missing][0]} for instance: it was made from another "
            "query; make a snapshot of this query at another path."
        )
