"""`MappedLayer`: a layer whose files are mapped, and `RowStarts`, which finds rows in its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._batch.gather import LocatedRows, ShardArrays
from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml.snapshot.check import check_starts
from tiledbsoma_ml.snapshot.files import damaged, map_file
from tiledbsoma_ml.snapshot.format import Layer


class RowStarts:
    """The mapped row starts of all shards of a layer.

    Args:
        folder: Folder of the snapshot.
        layer: The layer, from a manifest that was checked.
        n_vars: Number of columns.

    Attributes:
        borders: First row of each shard, and the number of rows.
        maps: The row starts of each shard.
    """

    def __init__(self, folder: Path, layer: Layer, n_vars: int) -> None:
        self._folder, self._shards, self._n_vars = folder, layer.shards, n_vars
        self.maps = [map_file(folder, shard.indptr, "<i8") for shard in layer.shards]
        self.borders = np.array([0, *(shard.row_stop for shard in layer.shards)], dtype=np.int64)
        self._n_values = np.array([shard.nnz for shard in layer.shards], dtype=np.int64)
        self._is_unchecked = np.ones(len(layer.shards), dtype=np.bool_)
        self._addresses = np.array([starts.ctypes.data for starts in self.maps], dtype=np.int64)

    def find(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Return the shard of each row, its first entry there, and row starts of these rows, concatenated.

        Raises:
            ValueError: If row starts of a file cannot be right.
        """
        from tiledbsoma_ml._kernels import snapshot as kernels

        n = len(rows)
        shards, begins, indptr = np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n + 1, np.int64)
        wrong = kernels.locate_rows(
            rows, self.borders, self._addresses, self._n_values, shards, begins, indptr
        )
        if wrong >= 0:
            number = self._number_of(rows[wrong])
            self._check(number)
            rule = f"must say where row {rows[wrong]:,} is, but does not"
            raise damaged(self._folder, self._shards[number].indptr, rule)
        if self._is_unchecked.any():
            for number in np.unique(shards[self._is_unchecked[shards]]).tolist():
                self._check(number)
                self._is_unchecked[number] = False
        return shards, begins, indptr

    def check_columns(self, located: LocatedRows, wrong: int) -> None:
        """Raise a ValueError if the row with the index `wrong` has a column that does not exist."""
        if wrong >= 0:
            row = located.rows[wrong]
            rule = f"must hold columns below {self._n_vars:,}, but row {row:,} has others"
            raise damaged(self._folder, self._shards[self._number_of(row)].indices, rule)

    def _number_of(self, row: int) -> int:
        return int(np.searchsorted(self.borders, row, side="right")) - 1

    def _check(self, number: int) -> None:
        check_starts(self._folder, self._shards[number], self.maps[number])


class MappedLayer:
    """The mapped files of a layer; see `Shards`.

    Args:
        folder: Folder of the snapshot.
        layer: The layer, from a manifest that was checked.
        n_vars: Number of columns.
    """

    def __init__(self, folder: Path, layer: Layer, n_vars: int) -> None:
        self.dtype = np.dtype(layer.dtype)
        self.indices_dtype = np.dtype(layer.indices_dtype)
        self.n_vars = n_vars
        self._starts = RowStarts(folder, layer, n_vars)
        self._arrays = ShardArrays(
            [map_file(folder, shard.indices, layer.indices_dtype) for shard in layer.shards],
            [map_file(folder, shard.data, shard.data_dtype) for shard in layer.shards],
            self.dtype,
        )

    def locate(self, rows: NDArray[np.int64], pool: Pool) -> LocatedRows:
        """Return the places of rows, which must exist.

        Raises:
            ValueError: If row starts of a file cannot be right.
        """
        return LocatedRows(rows, *self._starts.find(rows), self._arrays)

    def check_columns(self, located: LocatedRows, wrong: int) -> None:
        """Raise a ValueError if the row with the index `wrong` has a column that does not exist."""
        self._starts.check_columns(located, wrong)
