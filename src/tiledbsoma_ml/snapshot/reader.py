"""`SnapshotReader`: copies rows of a layer directly into the arrays that it returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._batch.gather import ShardColumns
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._order.reads import SLACK
from tiledbsoma_ml._query_ids import check_joinids
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.obs import ObsTable

HELD_BYTES = 2**28
"""Memory of rows that are decoded at once, by default."""

READ_ROWS = 4096
"""Largest number of rows of a piece."""

PIECES_HELD = 8
"""Least number of pieces in which rows that were decoded at once are given out."""


@attrs.frozen(kw_only=True)
class Tiling:
    """The rows of a compressed layer that are decoded together.

    Attributes:
        row_tile: Number of neighbouring joinids whose rows are in one block, about.
        row_bytes: Mean memory of a row that was decoded.
    """

    row_tile: int
    row_bytes: float

    def n_rows_in(self, n_bytes: int) -> int:
        """Return how many rows so much memory holds, at least 1."""
        return max(1, int(n_bytes / self.row_bytes))


class SnapshotReader:
    """A reader of rows of a snapshot; several threads may use it at once.

    Args:
        X: The columns of a layer to return.
        index: The row of each joinid.
        obs: The columns of `obs` to return.
        tiling: How rows are decoded; None if they are not compressed.
    """

    def __init__(self, X: ShardColumns, index: RowIndex, obs: ObsTable, tiling: Tiling | None) -> None:
        self._X = X
        self._index = index
        self._obs = obs
        self._tiling = tiling

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
        tiling = self._tiling
        return self.read_at_once(obs_joinids, READ_ROWS if tiling is None else tiling.n_rows_in(HELD_BYTES))

    def read_at_once(self, obs_joinids: NDArrayJoinId, n_rows: int) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read rows as `read` does, of which so many are decoded at once, and given out in pieces."""
        n_held = len(obs_joinids) if len(obs_joinids) <= n_rows * SLACK else n_rows
        piece_rows = READ_ROWS if self._tiling is None else min(READ_ROWS, max(1, n_rows // PIECES_HELD))
        for first in range(0, len(obs_joinids), max(1, n_held)):
            joinids = obs_joinids[first : first + n_held]
            rows = self._index.find(joinids)
            located = self._X.locate(rows)
            for start in range(0, len(rows), piece_rows):
                stop = min(start + piece_rows, len(rows))
                X, obs = self._X.piece(located.slice(start, stop)), self._obs.take(rows[start:stop])
                yield Rows(obs_joinids=joinids[start:stop], X=X, obs=obs)

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


class TiledSnapshotReader:
    """A reader of compressed rows for an epoch, which is asked for many rows at once; see `TiledReader`.

    Args:
        reader: The reader of these rows.
        tiling: How they are decoded.
        held_bytes: Memory of the rows that are decoded at once.
    """

    def __init__(self, reader: SnapshotReader, tiling: Tiling, held_bytes: int) -> None:
        self._reader = reader
        self._n_rows_held = tiling.n_rows_in(held_bytes)
        self.row_tile = tiling.row_tile

    def n_rows_held(self) -> int:
        """Return how many rows the next read may have, so that each block of it is decoded once."""
        return self._n_rows_held

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat, in exactly this order."""
        return self._reader.read_at_once(obs_joinids, self._n_rows_held)

    def read_some(self, obs_joinids: NDArrayJoinId) -> tuple[int, Iterator[Rows[CSR_IO_Buffer]]]:
        """Read all these rows, of which no more are decoded at once than memory holds."""
        return len(obs_joinids), self.read(obs_joinids)

    def close(self) -> None:
        """Do nothing: the files stay mapped as long as an object uses them."""


# Rows by joinid -------------------------------------------------------------------------------------------


class RowIndex:
    """An index that finds the row of a joinid.

    Args:
        joinids: Joinids of the rows, ascending and unique; None if row numbers are used in place of joinids.
        n_rows: Number of rows.
        path: Path of the snapshot, for messages.

    Attributes:
        span: The number of joinids from the first one to the last one.
    """

    def __init__(self, joinids: NDArrayJoinId | None, n_rows: int, path: Path) -> None:
        self._path = path
        self._joinids = np.empty(0, dtype=np.int64) if joinids is None else joinids
        self._n_rows = n_rows
        self._first = 0 if joinids is None or not n_rows else int(joinids[0])
        self.span = span = n_rows if joinids is None or not n_rows else int(joinids[-1]) - self._first + 1
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
