"""`Mapped`: the files of a snapshot, each of which is mapped and checked when it is first needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiledbsoma_ml._batch.gather import ShardColumns, Shards
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_names
from tiledbsoma_ml._soma.obs import ObsTable, with_missing
from tiledbsoma_ml.snapshot.check import checked_column, read_frame, read_obs_joinids, read_var_joinids
from tiledbsoma_ml.snapshot.compressed import CompressedLayer
from tiledbsoma_ml.snapshot.files import File, map_file
from tiledbsoma_ml.snapshot.format import Layer, Manifest
from tiledbsoma_ml.snapshot.layer import MappedLayer
from tiledbsoma_ml.snapshot.reader import RowIndex, SnapshotReader, Tiling


class Mapped:
    """The mapped files of a snapshot.

    Args:
        folder: The folder of the snapshot.
        manifest: The manifest, which was checked.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._layers: dict[str, Shards] = {}
        self._frames: dict[str, pa.Table] = {}
        self._columns: dict[tuple[str, str], pa.Array] = {}

    def name(self, kind: str) -> str:
        """Return the name of this kind of thing in the snapshot, for messages."""
        return f"a {kind} in the snapshot {str(self._folder)!r}"

    def reader(
        self,
        layer: Layer,
        obs_joinids: NDArrayJoinId | None,
        var_joinids: NDArrayJoinId | None,
        obs_column_names: Sequence[str],
        *,
        nullable: Collection[str] | None,
        pool_bytes: int,
    ) -> SnapshotReader:
        """Return a reader of a layer; see `Snapshot.reader`."""
        rows = None if obs_joinids is None else self.index.find(obs_joinids)
        columns = self.obs_columns(obs_column_names)
        obs = ObsTable(columns, with_missing(columns, rows) if nullable is None else nullable)
        X = ShardColumns(self._layer(layer), self._columns_of(var_joinids), pool_bytes=pool_bytes)
        return SnapshotReader(X, self.index, obs, self.tiling(layer))

    def tiling(self, layer: Layer) -> Tiling | None:
        """Return how rows of a layer are decoded; None if it is not compressed."""
        if layer.compression is None:
            return None
        n_joinids = max(1, self.index.span // max(1, self._manifest.content.n_obs))
        return Tiling(row_tile=layer.block_rows * n_joinids, row_bytes=layer.held_row_bytes)

    # Rows and columns -------------------------------------------------------------------------------------

    @cached_property
    def obs_joinids(self) -> NDArrayJoinId:
        """Joinids of the rows, read-only."""
        return read_obs_joinids(self._folder, self._manifest)

    @cached_property
    def var_joinids(self) -> NDArrayJoinId:
        """Joinids of the columns, read-only."""
        return read_var_joinids(self._folder, self._manifest)

    @cached_property
    def index(self) -> RowIndex:
        """The index that finds the row of a joinid; with several segments, row numbers replace joinids."""
        content = self._manifest.content
        joinids = self.obs_joinids if len(content.sources) == 1 else None
        return RowIndex(joinids, content.n_obs, self._folder)

    def _columns_of(self, var_joinids: NDArrayJoinId | None) -> NDArray[np.int64] | None:
        """Return the stored column of each joinid; None for all columns.

        Raises:
            ValueError: If no column has one of `var_joinids`.
        """
        stored = self.var_joinids
        if var_joinids is None or np.array_equal(var_joinids, stored):
            return None
        order = np.argsort(stored)
        found = np.searchsorted(stored, var_joinids, sorter=order).clip(max=max(0, len(stored) - 1))
        columns: NDArray[np.int64] = order[found] if len(stored) else np.empty(0, dtype=np.int64)
        if not np.array_equal(stored[columns], var_joinids):
            missing = np.setdiff1d(var_joinids, stored)
            raise ValueError(
                f"var_joinids must be columns of the snapshot {str(self._folder)!r}, but {len(missing):,} of "
                f"{len(var_joinids):,} are not, {missing[0]} for instance: it was made from another query; "
                "make a snapshot of this query at another path."
            )
        return columns

    # X and obsm -------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer) -> Shards:
        if layer.name not in self._layers:
            kind = MappedLayer if layer.compression is None else CompressedLayer
            self._layers[layer.name] = kind(self._folder, layer, self._manifest.content.n_vars)
        return self._layers[layer.name]

    def obsm(self) -> dict[str, NDArrayNumber]:
        """Return the arrays of `obsm`, read-only, by name."""
        n_obs = self._manifest.content.n_obs
        return {
            item.name: map_file(self._folder, item.values, item.dtype).reshape(n_obs, item.n_cols)
            for item in self._manifest.obsm
        }

    # Frames -----------------------------------------------------------------------------------------------

    def obs(self) -> ObsTable:
        """Return all columns of `obs`."""
        columns = self.obs_columns(self._manifest.content.stored_obs_names)
        return ObsTable(columns, with_missing(columns))

    def var(self) -> ObsTable:
        """Return all columns of `var`."""
        columns = {name: self._column("var", name) for name in self._frame("var").column_names}
        return ObsTable(columns, with_missing(columns))

    def obs_columns(self, names: Sequence[str]) -> dict[str, pa.Array]:
        """Return columns of `obs`; "soma_joinid" can always be asked for.

        Raises:
            ValueError: If a column does not exist.
        """
        self.check_columns(names)
        stored = [name for name in names if name in self._manifest.content.stored_obs_names]
        columns = {name: self._column("obs", name) for name in stored}
        if "soma_joinid" not in columns:
            columns["soma_joinid"] = pa.array(self.obs_joinids)
        return {name: columns[name] for name in names}

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise a ValueError or TypeError unless these are different columns of `obs`."""
        known = dict.fromkeys([*self._manifest.content.stored_obs_names, "soma_joinid"])
        check_names("obs_column_names", names, known, of=self.name("column of obs"))

    def _frame(self, name: str) -> pa.Table:
        if name not in self._frames:
            file, n_rows = self._frame_file(name)
            self._frames[name] = read_frame(self._folder, file, n_rows)
        return self._frames[name]

    def _column(self, frame: str, name: str) -> pa.Array:
        if (frame, name) not in self._columns:
            file, _ = self._frame_file(frame)
            self._columns[frame, name] = checked_column(self._folder, file, self._frame(frame), name)
        return self._columns[frame, name]

    def _frame_file(self, name: str) -> tuple[File, int]:
        manifest, content = self._manifest, self._manifest.content
        return (manifest.obs, content.n_obs) if name == "obs" else (manifest.var, content.n_vars)
