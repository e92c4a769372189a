"""`Snapshot`: a query on local disk, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from tiledbsoma_ml._batch.gather import KEPT_BYTES
from tiledbsoma_ml._budget import Budget, parse_bytes
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, absolute_path, check_name
from tiledbsoma_ml._query_ids import QueryIDs, check_joinids
from tiledbsoma_ml._source import Source
from tiledbsoma_ml.snapshot.build import DEFAULT_SHARDS, ShardSizes, create
from tiledbsoma_ml.snapshot.check import verify
from tiledbsoma_ml.snapshot.format import Layer, Manifest
from tiledbsoma_ml.snapshot.mapped import Mapped
from tiledbsoma_ml.snapshot.parts import Located, Query, check_origin, located, part_of
from tiledbsoma_ml.snapshot.progress import Progress, ProgressCallback
from tiledbsoma_ml.snapshot.reader import SnapshotReader
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
        self._mapped = Mapped(self.path, manifest)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        query: Query | Sequence[Query],
        *,
        layer_name: str | None = None,
        obs_column_names: Sequence[str] = ("soma_joinid",),
        layers: Sequence[str] = (),
        obsm: Sequence[str] = (),
        memory_budget: int | str = "2GiB",
        progress: bool | ProgressCallback = True,
    ) -> Snapshot:
        """Return the snapshot of a query or of a `Source` at `path`, having made it if it is not there.

        It is made in a folder beside `path` that is renamed at the end, so that `path` holds a whole snapshot
        or none. After a kill, the next call continues where the last one ended. Of several processes that ask
        at once, one makes it and the others wait.

        Args:
            path: The folder of the snapshot, which is made if it is not there.
            query: A query, whose experiment must be open; or a `Source`, of which all rows are kept. Several
                queries, or several sources, must have the same columns: their rows follow each other, and
                `obs` has a column "soma_source" with the number of the query or source.
            layer_name: Layer of `X`, sparse or dense. If left out: "raw" if there is one, else the only one.
                The one layer of a `Source` is called "X".
            obs_column_names: Columns of `obs` to keep. All columns of `var` are kept.
            layers: Further layers of `X` to keep.
            obsm: Arrays of `obsm` to keep.
            memory_budget: Bytes, or a string like "2GiB", for buffers and for what waits to be written.
            progress: Whether to show it on stderr; or a function, called with rows done, rows in all, rows
                per second and seconds left.

        Raises:
            TypeError: If something else than queries or sources is given, or some of both.
            ValueError: If a name does not exist, queries do not fit together, or there is something else at
                `path`, which is never overwritten.
            OSError: If the disk cannot be written to, or is too small.
        """
        return cls.create_from(
            path,
            located(query, layer_name),
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
        queries: Sequence[Located],
        *,
        obs_column_names: Sequence[str],
        layers: Sequence[str] = (),
        obsm: Sequence[str] = (),
        memory_budget: int | str = "2GiB",
        progress: bool | ProgressCallback = True,
        shards: ShardSizes = DEFAULT_SHARDS,
    ) -> Snapshot:
        """Do what `create` does, for queries given as an address, or a `Source`, and joinids."""
        whole = absolute_path(path)
        parts = [part_of(where, ids) for where, ids in queries]
        is_remote = any(part.is_remote for part in parts)
        create(
            whole,
            parts,
            obs_column_names=obs_column_names,
            layers=layers,
            obsm=obsm,
            budget=Budget(parse_bytes("memory_budget", memory_budget), is_remote),
            progress=Progress(progress, whole.name),
            shards=shards,
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
        return self._manifest.content.stored_obs_names

    @property
    def fingerprint(self) -> str:
        """A digest of what it holds: of the experiment, the joinids, the names of layers and columns."""
        return self._manifest.content.fingerprint

    @property
    def obs_joinids(self) -> NDArrayJoinId:
        """Joinids of the rows, read-only; those of several queries may repeat."""
        return self._mapped.obs_joinids

    @property
    def var_joinids(self) -> NDArrayJoinId:
        """Joinids of the columns, read-only."""
        return self._mapped.var_joinids

    @cached_property
    def query_ids(self) -> QueryIDs:
        """What to ask a reader for: joinids; of several queries, in place of `obs_joinids` row numbers."""
        rows = np.arange(len(self)) if len(self._manifest.content.sources) > 1 else self.obs_joinids
        return QueryIDs(obs_joinids=rows, var_joinids=self.var_joinids)

    @property
    def obs(self) -> pd.DataFrame:
        """The columns of `obs`, of all rows."""
        return self._mapped.obs().take(np.arange(len(self)))

    @property
    def var(self) -> pd.DataFrame:
        """All columns of `var`, of the columns of `X`."""
        return self._mapped.var().take(np.arange(self.shape[1]))

    @property
    def obsm(self) -> dict[str, NDArrayNumber]:
        """The arrays of `obsm`, read-only, by name."""
        return self._mapped.obsm()

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
        ids = _chosen(self.query_ids.obs_joinids, rows)
        return self._whole.csr(ids), self._whole.obs(ids)

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
        names = self.obs_column_names if obs_column_names is None else obs_column_names
        return self._mapped.reader(
            self._layer(layer_name), obs_joinids, var_joinids, names, nullable=nullable, kept_bytes=kept_bytes
        )

    def check_holds(self, where: XLocator | Source, obs_column_names: Sequence[str]) -> None:
        """Raise a ValueError that says what differs, unless this was made from a source, or from a layer.

        `reader` checks the rows and columns.

        Args:
            where: Address of the layer, or the source.
            obs_column_names: Columns of `obs` that it must hold.
        """
        check_origin(self.path, self._manifest.content, where)
        self._mapped.check_columns(obs_column_names)

    def to_anndata(self, rows: Any = None) -> Any:
        """Return rows, all if None, as an `AnnData`, with further layers and `obsm`.

        Raises:
            ImportError: If anndata is not installed.
        """
        anndata = _import_anndata()
        ids = _chosen(self.query_ids.obs_joinids, slice(None) if rows is None else rows)
        numbers = self._mapped.index.find(ids)
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
        check_name("layer_name", name, self.layer_names, of=self._mapped.name("layer"))
        return next(layer for layer in self._manifest.layers if layer.name == name)

    @cached_property
    def _whole(self) -> SnapshotReader:
        """What reads all rows and columns of the layer that is read if none is named."""
        return self.reader()

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


def _chosen(ids: NDArrayJoinId, rows: Any) -> NDArrayJoinId:
    """Return a row, a slice, a list of row numbers or a mask of `ids`, as an array."""
    if isinstance(rows, int | np.integer):
        if not -len(ids) <= rows < len(ids):
            raise IndexError(f"row {rows} must lie from {-len(ids)} to {len(ids) - 1}.")
        rows = [rows]
    if not isinstance(rows, slice):
        rows = np.asarray(rows)
        rows = rows if rows.size else rows.astype(np.int64)
    chosen: NDArrayJoinId = ids[rows]
    return chosen


def _import_anndata() -> Any:
    try:
        import anndata
    except ImportError as err:
        raise ImportError(
            "to_anndata needs anndata; run `pip install 'tiledbsoma-ml[cli]'` or `pip install anndata`."
        ) from err
    return anndata
