"""`Snapshot`: the rows of a query on a local disk, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._batch.gather import POOL_BYTES
from tiledbsoma_ml._budget import Budget, parse_bytes
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, absolute_path, check_name
from tiledbsoma_ml._query_ids import QueryIDs, check_joinids
from tiledbsoma_ml._source import Source
from tiledbsoma_ml.snapshot.build import create
from tiledbsoma_ml.snapshot.check import verify
from tiledbsoma_ml.snapshot.compression import Compression, check_compression, warn_of_other
from tiledbsoma_ml.snapshot.creation import Progress, ProgressCallback
from tiledbsoma_ml.snapshot.format import Layer, Manifest
from tiledbsoma_ml.snapshot.mapped import Mapped
from tiledbsoma_ml.snapshot.reader import SnapshotReader, Tiling
from tiledbsoma_ml.snapshot.segment import Segment
from tiledbsoma_ml.snapshot.segments import Located, Query, check_origin, located, segment_of
from tiledbsoma_ml.snapshot.stored_layers import DEFAULT_SHARDS, ShardSizes
from tiledbsoma_ml.x_locator import XLocator


class Snapshot:
    """The rows and columns of a query in a folder on a local disk, memory-mapped, which are read much faster.

    ```python
    experiment = tiledbsoma.Experiment.open(uri, context=tiledbsoma_ml.context())
    with experiment, experiment.axis_query("RNA") as query:
        snapshot = Snapshot.create("lung.snapshot", query, obs_column_names=["cell_type"])
    X, obs = snapshot[[3, 5, 9]]
    ```

    Rows are in the order of their joinids, one query or source after the other. A snapshot is also a
    map-style dataset, which returns a whole mini-batch at once: `DataLoader(snapshot,
    sampler=BatchSampler(sampler, 128, drop_last=False), batch_size=None)`. It is pickled as its path, so all
    processes map the same files. Use `create` or `open` to get one.

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
        compression: Compression | None = None,
        memory_budget: int | str = "2GiB",
        progress: bool | ProgressCallback = True,
    ) -> Snapshot:
        """Return the snapshot of a query or of a `Source` at `path`, after making it if it does not exist.

        `path` has a complete snapshot or nothing. Processes that call this at once make it together, also on
        several machines that share a disk and its locks (`flock`). After a kill, the next call continues.

        Args:
            path: The folder of the snapshot.
            query: A query, whose experiment must be open; or a `Source`, whose rows are all stored. Several
                queries, or several sources, must have the same columns. Their rows follow each other, and
                `obs` gets a column "soma_source" with the number of the query or source.
            layer_name: Layer of `X`, sparse or dense. If left out: "raw" if it exists, else the only layer.
                The one layer of a `Source` is called "X".
            obs_column_names: Columns of `obs` to store. All columns of `var` are stored.
            layers: Further layers of `X` to store.
            obsm: Arrays of `obsm` to store.
            compression: "zstd" to compress `X` in blocks of 64 rows; None to store rows as they are; "auto"
                for what is measured to be faster on this disk while its cache is cold.
            memory_budget: Memory for buffers and for rows that wait, in each process: bytes, or a string
                like "2GiB". It limits the sizes of files, so give all processes the same.
            progress: Whether to show progress on stderr; or a function, which is called with the rows done,
                the rows in all, rows per second and seconds left.

        Raises:
            TypeError: If `query` is not a query or source, or has some of both.
            ValueError: If a name does not exist, queries have different columns, or `path` has other data,
                which are never overwritten, or that another process makes now.
            OSError: If the disk cannot be written to, or is too small.
        """
        return cls.create_from(
            path,
            located(query, layer_name),
            obs_column_names=obs_column_names,
            layers=layers,
            obsm=obsm,
            compression=compression,
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
        compression: Compression | None = None,
        memory_budget: int | str = "2GiB",
        progress: bool | ProgressCallback = True,
        shards: ShardSizes = DEFAULT_SHARDS,
    ) -> Snapshot:
        """Do what `create` does, for queries that are given as an address or a `Source`, and joinids."""
        check_compression(compression)
        folder = absolute_path(path)
        segments = [segment_of(origin, ids) for origin, ids in queries]
        create(
            folder,
            segments,
            obs_column_names=obs_column_names,
            layers=layers,
            obsm=obsm,
            budget=_budget(segments, memory_budget),
            progress=Progress(progress, folder.name),
            shards=shards,
            compression=compression,
        )
        found = cls.open(folder)
        warn_of_other(folder, compression, found._manifest)
        return found

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Return the snapshot at `path`; this reads the manifest and the sizes of files, but no data.

        Raises:
            ValueError: If there is no snapshot, it has a newer format, or a file is missing, is a link, or
                has another size. Damage within a file is found when it is read, or by `verify`.
        """
        folder = absolute_path(path)
        manifest = Manifest.read(folder)
        manifest.check_files(folder)
        return cls(folder, manifest)

    # Content ----------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self._manifest.content.n_obs, self._manifest.content.n_vars

    @property
    def nnz(self) -> int:
        """Number of stored values of the layer that is read by default."""
        return self._layer(None).nnz

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.nbytes for file in self._manifest.files)

    @property
    def compression(self) -> str | None:
        """Name of the compression of `X`; None if it is not compressed."""
        return self._layer(None).compression

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values of the layer that is read by default."""
        return np.dtype(self._layer(None).dtype)

    @property
    def layer_name(self) -> str:
        """The layer that is read by default."""
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
        """A digest of the experiment or source, the joinids, and the names of layers and columns."""
        return self._manifest.content.fingerprint

    @property
    def obs_joinids(self) -> NDArrayJoinId:
        """Joinids of the rows, read-only. They may repeat if there are several queries."""
        return self._mapped.obs_joinids

    @property
    def var_joinids(self) -> NDArrayJoinId:
        """Joinids of the columns, read-only."""
        return self._mapped.var_joinids

    @cached_property
    def query_ids(self) -> QueryIDs:
        """Joinids of all rows and columns; with several queries, row numbers in place of `obs_joinids`."""
        rows = np.arange(len(self)) if len(self._manifest.content.sources) > 1 else self.obs_joinids
        return QueryIDs(obs_joinids=rows, var_joinids=self.var_joinids)

    @property
    def obs(self) -> pd.DataFrame:
        """`obs` of all rows."""
        return self._mapped.obs().take(np.arange(len(self)))

    @property
    def var(self) -> pd.DataFrame:
        """`var` of all columns of `X`."""
        return self._mapped.var().take(np.arange(self.shape[1]))

    @property
    def obsm(self) -> dict[str, NDArrayNumber]:
        """The arrays of `obsm`, read-only, by name."""
        return self._mapped.obsm()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Snapshot {str(self.path)!r}: {self._manifest.describe()}>"

    # Rows -------------------------------------------------------------------------------------------------

    def __getitem__(self, rows: Any) -> tuple[sparse.csr_matrix, pd.DataFrame]:
        """Return `X` and `obs` of a row, a slice, a list of row numbers or a mask."""
        joinids = _chosen(self.query_ids.obs_joinids, rows)
        return self._default_reader.csr(joinids), self._default_reader.obs(joinids)

    def reader(
        self,
        obs_joinids: NDArrayJoinId | None = None,
        var_joinids: NDArrayJoinId | None = None,
        obs_column_names: Sequence[str] | None = None,
        *,
        layer_name: str | None = None,
        nullable: Collection[str] | None = None,
        pool_bytes: int = POOL_BYTES,
    ) -> SnapshotReader:
        """Return a reader of rows, by joinid.

        Args:
            obs_joinids: The rows that it may be asked for; all if None. See `query_ids`.
            var_joinids: Columns of `X` to return, in this order; all in stored order if None.
            obs_column_names: Columns of `obs` to return, in this order; all if None.
            layer_name: Layer of `X`; the default layer if None.
            nullable: Columns of integers or booleans that get nullable types of pandas; if None, those in
                which a value of the rows of `obs_joinids` is missing.
            pool_bytes: Memory of earlier rows that is kept for later ones.

        Raises:
            ValueError: If the snapshot does not have one of these rows, columns or layers.
        """
        if obs_joinids is not None:
            obs_joinids = check_joinids("obs_joinids", obs_joinids)
        if var_joinids is not None:
            var_joinids = check_joinids("var_joinids", var_joinids, unique=True)
        names = self.obs_column_names if obs_column_names is None else obs_column_names
        return self._mapped.reader(
            self._layer(layer_name), obs_joinids, var_joinids, names, nullable=nullable, pool_bytes=pool_bytes
        )

    def tiling(self, layer_name: str | None = None) -> Tiling | None:
        """Return how rows of a layer (the default one if None) are decoded; None if it is not compressed."""
        return self._mapped.tiling(self._layer(layer_name))

    def check_holds(self, origin: XLocator | Source, obs_column_names: Sequence[str]) -> None:
        """Raise a ValueError that names the differences, unless this was made from a layer or source.

        This does not check rows and columns of `X`; `reader` does.

        Args:
            origin: Address of the layer, or the source.
            obs_column_names: Columns of `obs` that the snapshot must have.
        """
        check_origin(self.path, self._manifest.content, origin)
        self._mapped.check_columns(obs_column_names)

    def to_anndata(self, rows: Any = None) -> Any:
        """Return rows (all if None) as an `AnnData`, with further layers and `obsm`.

        Raises:
            ImportError: If anndata is not installed.
        """
        joinids = _chosen(self.query_ids.obs_joinids, slice(None) if rows is None else rows)
        return _to_anndata(self, self._mapped.index.find(joinids), joinids)

    def verify(self) -> None:
        """Read all files, compare them with their checksums, and check the rules of the format.

        Raises:
            ValueError: If a file is missing, was altered, or breaks a rule of the format. The message names
                the file, and both checksums.
        """
        verify(self.path, Manifest.read(self.path))

    # Helpers ----------------------------------------------------------------------------------------------

    def _layer(self, name: str | None) -> Layer:
        if name is None:
            return self._manifest.layers[0]
        check_name("layer_name", name, self.layer_names, of=self._mapped.name("layer"))
        return next(layer for layer in self._manifest.layers if layer.name == name)

    @cached_property
    def _default_reader(self) -> SnapshotReader:
        """The reader of all rows and columns of the default layer."""
        return self.reader()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Snapshot.__init__(self, state["path"], _manifest_of(state["path"], state["fingerprint"]))


def _budget(segments: Sequence[Segment], memory_budget: int | str) -> Budget:
    is_remote = any(segment.is_remote for segment in segments)
    return Budget(parse_bytes("memory_budget", memory_budget), is_remote)


def _manifest_of(path: Path, fingerprint: str) -> Manifest:
    manifest = Manifest.read(path)
    if manifest.content.fingerprint != fingerprint:
        raise ValueError(
            f"snapshot={str(path)!r} must be the one that was pickled, but another is there by now; open it "
            "anew."
        )
    return manifest


def _chosen(joinids: NDArrayJoinId, rows: Any) -> NDArrayJoinId:
    """Return the joinids of a row, a slice, a list of row numbers or a mask."""
    if isinstance(rows, int | np.integer):
        if not -len(joinids) <= rows < len(joinids):
            raise IndexError(f"row {rows} must lie from {-len(joinids)} to {len(joinids) - 1}.")
        rows = [rows]
    if not isinstance(rows, slice):
        rows = np.asarray(rows)
        rows = rows if rows.size else rows.astype(np.int64)
    chosen: NDArrayJoinId = joinids[rows]
    return chosen


def _to_anndata(snapshot: Snapshot, rows: NDArray[np.int64], joinids: NDArrayJoinId) -> Any:
    try:
        import anndata
    except ImportError as err:
        raise ImportError(
            "to_anndata needs anndata; run `pip install 'tiledbsoma-ml[cli]'` or `pip install anndata`."
        ) from err
    X, obs = snapshot[rows]
    var = snapshot.var
    obs.index, var.index = obs.index.astype(str), var.index.astype(str)
    layers = {name: snapshot.reader(layer_name=name).csr(joinids) for name in snapshot.layer_names[1:]}
    obsm = {name: values[rows] for name, values in snapshot.obsm.items()}
    return anndata.AnnData(X=X, obs=obs, var=var, layers=layers, obsm=obsm)
