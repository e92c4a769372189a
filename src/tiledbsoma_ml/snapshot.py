"""`Snapshot`: a query on local disk, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._budget import Budget, parse_bytes
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, absolute_path, check_name
from tiledbsoma_ml._obs import ObsTable, with_missing
from tiledbsoma_ml._query_ids import QueryIDs, check_joinids, check_query
from tiledbsoma_ml._reader import check_obs_column_names
from tiledbsoma_ml._snapshot_build import SourceRows, create, source_of, warn_of_unknown
from tiledbsoma_ml._snapshot_check import (
    checked_column,
    read_frame,
    read_obs_joinids,
    read_var_joinids,
    verify,
)
from tiledbsoma_ml._snapshot_format import File, Layer, Manifest, arrays_of, map_file
from tiledbsoma_ml._snapshot_progress import Progress, ProgressCallback
from tiledbsoma_ml._snapshot_reader import KEPT_BYTES, MappedLayer, RowIndex, SnapshotReader
from tiledbsoma_ml.x_locator import XLocator


class Snapshot:
    """The rows and columns of a query in a folder on a local disk, memory-mapped: the same, much faster.

    ```python
    experiment = tiledbsoma.Experiment.open(uri, context=tiledbsoma_ml.context())
    with experiment, experiment.axis_query("RNA") as query:
        snapshot = Snapshot.create("lung.snapshot", query, obs_column_names=["cell_type"])
    X, obs = snapshot[[3, 5, 9]]
    ```

    Rows are in the order of their joinids, source after source. As a map-style dataset it gives a whole
    mini-batch at once: `DataLoader(snapshot, sampler=BatchSampler(sampler, 128, drop_last=False),
    batch_size=None)`. It is pickled as its path: every process maps the same files.

    Use `create` or `open`.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Manifest) -> None:
        self.path = absolute_path(path)
        self._manifest = manifest
        self._index: RowIndex | None = None
        self._layers: dict[str, MappedLayer] = {}
        self._frames: dict[str, pa.Table] = {}
        self._columns: dict[tuple[str, str], pa.Array] = {}
        self._whole: SnapshotReader | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        query: soma.ExperimentAxisQuery | Sequence[soma.ExperimentAxisQuery],
        *,
        layer_name: str | None = None,
        obs_column_names: Sequence[str] = ("soma_joinid",),
        layers: Sequence[str] = (),
        obsm: Sequence[str] = (),
        memory_budget: int | str = "2GiB",
        progress: bool | ProgressCallback = True,
    ) -> Snapshot:
        """Return the snapshot of a query at `path`, having made it if it is not there.

        It is made in a folder beside `path` that is renamed at the end, so that `path` holds a whole snapshot
        or none. After a kill, the next call continues where the last one ended. Of several processes that ask
        at once, one makes it and the others wait.

        Args:
            path: The folder of the snapshot, which is made if it is not there.
            query: Its experiment must be open. Of several queries, on the same columns, the rows follow each
                other, and `obs` has a column "soma_source" with the number of the query.
            layer_name: Layer of `X`, sparse or dense. If left out: "raw" if there is one, else the only one.
            obs_column_names: Columns of `obs` to keep. All columns of `var` are kept.
            layers: Further layers of `X` to keep.
            obsm: Arrays of `obsm` to keep.
            memory_budget: Bytes, or a string like "2GiB", for buffers and for what waits to be written.
            progress: Whether to show it on stderr; or a function, called with rows done, rows in all, rows
                per second and seconds left.

        Raises:
            TypeError: If something else than queries is given.
            ValueError: If a name does not exist, queries do not fit together, or there is something else at
                `path`, which is never overwritten.
            OSError: If the disk cannot be written to, or is too small.
        """
        queries = list(query) if isinstance(query, Sequence) and not isinstance(query, str) else [query]
        if not queries:
            raise ValueError("query=[] must hold at least one query; try experiment.axis_query('RNA').")
        for q in queries:
            check_query(q)
        parts = [
            (XLocator.create(q.experiment, q.measurement_name, layer_name), QueryIDs.create(q))
            for q in queries
        ]
        return cls.create_from(
            path,
            parts,
            obs_column_names=obs_column_names,
            layers=layers,
            obsm=obsm,
            memory_budget=memory_budget,
            progress=progress,
        )

    @classmethod
    def create_from(
        cls,
        path: str | os.PathLike[str],
        queries: Sequence[tuple[XLocator, QueryIDs]],
        *,
        obs_column_names: Sequence[str],
        layers: Sequence[str] = (),
        obsm: Sequence[str] = (),
        memory_budget: int | str = "2GiB",
        progress: bool | ProgressCallback = True,
    ) -> Snapshot:
        """Do what `create` does, for queries given as address and joinids."""
        whole = absolute_path(path)
        create(
            whole,
            [SourceRows.of(locator, ids) for locator, ids in queries],
            obs_column_names=obs_column_names,
            layers=layers,
            obsm=obsm,
            budget=Budget(parse_bytes("memory_budget", memory_budget), queries[0][0].is_remote),
            progress=Progress(progress, whole.name),
        )
        return cls.open(whole)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Return the snapshot at `path`; its manifest and the sizes of its files are read, but no data.

        Raises:
            ValueError: If there is none, it is of a newer format, or a file is missing, is a link, or has
                another size. Damage within files is told when they are read, or by `verify`.
        """
        whole = absolute_path(path)
        manifest = Manifest.read(whole)
        manifest.check_files(whole)
        return cls(whole, manifest)

    # What it holds ----------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self._manifest.content.n_obs, self._manifest.content.n_vars

    @property
    def nnz(self) -> int:
        """Stored values of the layer that is read if none is named."""
        return self._layer(None).nnz

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.nbytes for file in self._manifest.files)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values of the layer that is read if none is named."""
        return np.dtype(self._layer(None).dtype)

    @property
    def layer_name(self) -> str:
        """The layer that is read if none is named."""
        return self._manifest.layers[0].name

    @property
    def layer_names(self) -> tuple[str, ...]:
        """All layers of `X`."""
        return self._manifest.content.layer_names

    @property
    def obs_column_names(self) -> tuple[str, ...]:
        """Columns of `obs`."""
        names = self._manifest.content.obs_column_names
        return names if len(self._manifest.content.sources) == 1 else (*names, "soma_source")

    @property
    def fingerprint(self) -> str:
        """A digest of what it holds: of the experiment, the joinids, the names of layers and columns."""
        return self._manifest.content.fingerprint

    @cached_property
    def obs_joinids(self) -> NDArrayJoinId:
        """Joinids of the rows, read-only; those of several queries may repeat."""
        return read_obs_joinids(self.path, self._manifest)

    @cached_property
    def var_joinids(self) -> NDArrayJoinId:
        """Joinids of the columns, read-only."""
        return read_var_joinids(self.path, self._manifest)

    @cached_property
    def query_ids(self) -> QueryIDs:
        """What to ask a reader for: joinids; of several queries, in place of `obs_joinids` row numbers."""
        rows = np.arange(len(self)) if len(self._manifest.content.sources) > 1 else self.obs_joinids
        return QueryIDs(obs_joinids=rows, var_joinids=self.var_joinids)

    @property
    def obs(self) -> pd.DataFrame:
        """The columns of `obs`, of all rows."""
        columns = self._obs_columns(self.obs_column_names)
        return ObsTable(columns, with_missing(columns)).take(np.arange(len(self)))

    @property
    def var(self) -> pd.DataFrame:
        """All columns of `var`, of the columns of `X`."""
        table = self._frame("var")
        columns = {name: self._column("var", name) for name in table.column_names}
        return ObsTable(columns, with_missing(columns)).take(np.arange(self.shape[1]))

    @property
    def obsm(self) -> dict[str, NDArrayNumber]:
        """The arrays of `obsm`, read-only, by name."""
        return {
            item.name: map_file(self.path, item.values, item.dtype).reshape(len(self), item.n_cols)
            for item in self._manifest.obsm
        }

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __repr__(self) -> str:
        n_rows, n_cols = self.shape
        return (
            f"<Snapshot {str(self.path)!r}: {n_rows:,} by {n_cols:,}, {self.nnz:,} non-zeros, "
            f"{self.nbytes / 2**20:,.0f} MiB>"
        )

    # Rows -------------------------------------------------------------------------------------------------

    def __getitem__(self, rows: Any) -> tuple[sparse.csr_matrix, pd.DataFrame]:
        """Return `X` and `obs` of a row, a slice, a list of row numbers or a mask."""
        ids = self._row_ids(rows)
        reader = self._reader_of_all()
        return reader.csr(ids), reader.obs(ids)

    def reader(
        self,
        obs_joinids: NDArrayJoinId | None = None,
        var_joinids: NDArrayJoinId | None = None,
        obs_column_names: Sequence[str] | None = None,
        *,
        layer_name: str | None = None,
        nullable: Collection[str] | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> SnapshotReader:
        """Return what reads rows by joinid.

        Args:
            obs_joinids: The rows that will be asked for; all if None. See `query_ids`.
            var_joinids: Columns, in the order in which they are wanted; all as they are stored if None.
            obs_column_names: Columns of `obs`, in the order in which they are wanted; all if None.
            layer_name: Layer of `X`.
            nullable: Columns of integers or booleans that come as pandas' nullable types; those in which a
                value is missing in the rows of `obs_joinids` if None.
            kept_bytes: So much memory of rows that nobody holds any longer is kept for later ones.

        Raises:
            ValueError: If the snapshot does not hold one of them.
        """
        if obs_joinids is not None:
            obs_joinids = check_joinids("obs_joinids", obs_joinids)
        if var_joinids is not None:
            var_joinids = check_joinids("var_joinids", var_joinids, unique=True)
        layer = self._layer(layer_name)
        names = self.obs_column_names if obs_column_names is None else obs_column_names
        index = self._row_index()
        rows = None if obs_joinids is None else index.find(obs_joinids)
        columns = self._obs_columns(names)
        if nullable is None:
            nullable = with_missing(columns, rows)
        places, n_vars = self._places(var_joinids)
        if layer.name not in self._layers:
            self._layers[layer.name] = MappedLayer(self.path, layer, self.shape[1])
        return SnapshotReader(
            self._layers[layer.name],
            index,
            ObsTable(columns, nullable),
            places=places,
            n_vars=n_vars,
            kept_bytes=kept_bytes,
        )

    def check_holds(self, locator: XLocator, obs_column_names: Sequence[str]) -> None:
        """Raise a ValueError that says what differs, unless this was made from the layer at an address.

        `reader` checks the rows and columns.
        """
        if len(self._manifest.content.sources) > 1:
            raise ValueError(
                f"snapshot={str(self.path)!r} must be made from one query to be read as part of one, but it "
                "holds several; leave the query out."
            )
        check_name("layer_name", locator.layer_name, self.layer_names, of=self._a("layer"))
        self._check_columns(obs_column_names)
        [source] = self._manifest.content.sources
        asked = source_of(locator, [locator.layer_name])
        if differences := source.differences(asked):
            raise ValueError(
                f"snapshot={str(self.path)!r} must be made from the experiment that is queried, but "
                f"{'; '.join(differences)}; make a snapshot of this query at another path."
            )
        warn_of_unknown(self.path, source, asked, arrays_of([locator.layer_name]))

    def to_anndata(self, rows: Any = None) -> Any:
        """Return rows, all if None, as an `AnnData`, with further layers and `obsm`.

        Raises:
            ImportError: If anndata is not installed.
        """
        try:
            import anndata
        except ImportError as err:
            raise ImportError(
                "to_anndata needs anndata; run `pip install 'tiledbsoma-ml[cli]'` or `pip install anndata`."
            ) from err
        ids = self._row_ids(slice(None) if rows is None else rows)
        numbers = self._row_index().find(ids)
        X, obs = self[numbers]
        var = self.var
        obs.index, var.index = obs.index.astype(str), var.index.astype(str)
        layers = {name: self.reader(layer_name=name).csr(ids) for name in self.layer_names[1:]}
        obsm = {name: values[numbers] for name, values in self.obsm.items()}
        return anndata.AnnData(X=X, obs=obs, var=var, layers=layers, obsm=obsm)

    def verify(self) -> None:
        """Read every file, compare it with its checksum, and check that it holds what it must.

        Raises:
            ValueError: If a file is missing or was altered: it is named, with both checksums; or if it breaks
                a rule of the format, whatever its checksum.
        """
        verify(self.path, Manifest.read(self.path))

    # Parts ------------------------------------------------------------------------------------------------

    def _layer(self, name: str | None) -> Layer:
        if name is None:
            return self._manifest.layers[0]
        check_name("layer_name", name, self.layer_names, of=self._a("layer"))
        return next(layer for layer in self._manifest.layers if layer.name == name)

    def _row_index(self) -> RowIndex:
        if self._index is None:
            is_one = len(self._manifest.content.sources) == 1
            self._index = RowIndex(self.obs_joinids if is_one else None, len(self), self.path)
        return self._index

    def _row_ids(self, rows: Any) -> NDArrayJoinId:
        """Return what the reader calls the rows of an index."""
        if isinstance(rows, int | np.integer):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} must lie from {-len(self)} to {len(self) - 1}.")
            rows = [rows]
        ids = self.query_ids.obs_joinids
        if isinstance(rows, slice):
            sliced: NDArrayJoinId = ids[rows]
            return sliced
        numbers = np.asarray(rows)
        if not numbers.size:
            numbers = numbers.astype(np.int64)
        chosen: NDArrayJoinId = ids[numbers]
        return chosen

    def _reader_of_all(self) -> SnapshotReader:
        if self._whole is None:
            self._whole = self.reader()
        return self._whole

    def _places(self, var_joinids: NDArrayJoinId | None) -> tuple[NDArray[np.int32] | None, int]:
        """Return where stored columns go (-1: nowhere), None if all stay, and the number of columns."""
        stored = self.var_joinids
        if var_joinids is None or np.array_equal(var_joinids, stored):
            return None, len(stored)
        order = np.argsort(stored)
        found = np.searchsorted(stored, var_joinids, sorter=order).clip(max=max(0, len(stored) - 1))
        columns = order[found] if len(stored) else np.empty(0, dtype=np.int64)
        if not np.array_equal(stored[columns], var_joinids):
            missing = np.setdiff1d(var_joinids, stored)
            raise ValueError(
                f"var_joinids must be columns of the snapshot {str(self.path)!r}, but {len(missing):,} of "
                f"{len(var_joinids):,} are not, {missing[0]} for instance: it was made from another query; "
                "make a snapshot of this query at another path."
            )
        places = np.full(len(stored), -1, dtype=np.int32)
        places[columns] = np.arange(len(columns), dtype=np.int32)
        return places, len(columns)

    def _obs_columns(self, names: Sequence[str]) -> dict[str, pa.Array]:
        self._check_columns(names)
        stored = [name for name in names if name in self.obs_column_names]
        columns = {name: self._column("obs", name) for name in stored}
        if "soma_joinid" not in columns:
            columns["soma_joinid"] = pa.array(self.obs_joinids)
        return {name: columns[name] for name in names}

    def _check_columns(self, names: Sequence[str]) -> None:
        check_obs_column_names(names, dict.fromkeys(names))
        for name in names:
            known = dict.fromkeys([*self.obs_column_names, "soma_joinid"])
            check_name("obs_column_names", name, known, of=self._a("column of obs"))

    def _a(self, what: str) -> str:
        return f"a {what} in the snapshot {str(self.path)!r}"

    def _frame(self, name: str) -> pa.Table:
        if name not in self._frames:
            file, n_rows = self._frame_file(name)
            self._frames[name] = read_frame(self.path, file, n_rows)
        return self._frames[name]

    def _column(self, frame: str, name: str) -> pa.Array:
        if (frame, name) not in self._columns:
            file, _ = self._frame_file(frame)
            self._columns[frame, name] = checked_column(self.path, file, self._frame(frame), name)
        return self._columns[frame, name]

    def _frame_file(self, name: str) -> tuple[File, int]:
        manifest, (n_obs, n_vars) = self._manifest, self.shape
        return (manifest.obs, n_obs) if name == "obs" else (manifest.var, n_vars)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        manifest = Manifest.read(state["path"])
        if manifest.content.fingerprint != state["fingerprint"]:
            raise ValueError(
                f"snapshot={str(state['path'])!r} must be the one that was pickled, but another is there by "
                "now; open it anew."
            )
        Snapshot.__init__(self, state["path"], manifest)
