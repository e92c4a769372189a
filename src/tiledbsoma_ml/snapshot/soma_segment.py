"""`SOMASegment`: the rows of a query on an experiment, as a segment of a snapshot."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import pyarrow as pa
import tiledbsoma as soma

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_name, check_obs_column_names
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._soma.obs import ObsColumns
from tiledbsoma_ml._soma.reader import SOMAReader, measure_row_bytes, row_tile
from tiledbsoma_ml._soma.versions import opened, written_at
from tiledbsoma_ml.snapshot.content import Origin
from tiledbsoma_ml.snapshot.files import digest
from tiledbsoma_ml.snapshot.segment import (
    PIECE_BYTES,
    ShardRows,
    StoredArray,
    StoredLayer,
    in_ascending_order,
)
from tiledbsoma_ml.x_locator import XLocator

MAX_OBSM_COLUMNS = 2**20
"""Largest declared number of columns of an array of `obsm`; with more, the written columns count.

tiledbsoma up to 1.14 declares arrays with as many columns as possible.
"""

SAMPLE_RUNS, SAMPLE_SHARE = 6, 2**17
"""Largest number of runs of 128 rows that are read as a sample, and number of rows for each such run."""


@attrs.frozen(kw_only=True)
class SOMASegment:
    """A segment with the rows of a layer of an experiment.

    Attributes:
        locator: Address of the layer.
        ids: Joinids of the rows, which are sorted, and of the columns.
    """

    locator: XLocator
    ids: QueryIDs = attrs.field(converter=in_ascending_order)

    @property
    def name(self) -> str:
        """URI of the experiment."""
        return self.locator.uri

    @property
    def layer_name(self) -> str:
        """The layer at the address."""
        return self.locator.layer_name

    @property
    def is_remote(self) -> bool:
        """Whether the experiment is in an object store or on a server."""
        return self.locator.is_remote

    def check(
        self, *, layer_names: Sequence[str], obs_column_names: Sequence[str], obsm_names: Sequence[str]
    ) -> None:
        """Raise a ValueError or TypeError unless these layers, columns and arrays exist."""
        with opened(self.locator) as (measurement, obs):
            check_obs_column_names(obs_column_names, obs.keys())
            for name in layer_names:
                check_name("layers", name, measurement.X.keys(), of="an X layer of the measurement")
            known = measurement.obsm.keys() if "obsm" in measurement else []
            for name in obsm_names:
                check_name("obsm", name, known, of="an array of obsm")

    def origin(self, *, layer_names: Sequence[str], obsm_names: Sequence[str]) -> Origin:
        """Return the experiment as the origin, with the writes until its timestamp."""
        written = written_at(self.locator, layer_names, obsm_names)
        return Origin(
            uri=written.uri,
            measurement_name=self.locator.measurement_name,
            tiledb_timestamp_ms=self.locator.tiledb_timestamp_ms,
            versions=written.versions,
            n_obs=len(self.ids.obs_joinids),
            obs_digest=digest(self.ids.obs_joinids),
        )

    # X ----------------------------------------------------------------------------------------------------

    def layer(self, name: str, budget: Budget) -> StoredLayer:
        """Return the type and tiles of a layer."""
        with self._open(name, budget) as (X, _):
            return StoredLayer(dtype=_dtype(X), row_tile=row_tile(X))

    def bytes_per_row(self, layer_name: str, budget: Budget) -> float:
        """Return the approximate size of a row of a layer in memory, measured on a sample."""
        ids = self.ids.obs_joinids
        n_runs = min(1 + len(ids) // SAMPLE_SHARE, SAMPLE_RUNS)
        starts = np.linspace(0, max(0, len(ids) - 128), n_runs + 2)[1:-1].astype(int).tolist()
        sample = np.unique(np.concatenate([ids[start : start + 128] for start in starts]))
        with self._open(layer_name, budget) as (X, obs):
            return measure_row_bytes(self._reader(X, obs), sample)

    def shards(
        self, layer_name: str, borders: Iterable[tuple[int, int]], *, n_pieces: int, budget: Budget
    ) -> Generator[ShardRows, None, None]:
        """Yield the rows of a layer for each shard; a shard is read at once, and given out in pieces."""
        with self._open(layer_name, budget) as (X, obs):
            reader = self._reader(X, obs, n_pieces=n_pieces)
            for start, stop in borders:
                held = reader.hold(self.ids.obs_joinids[start:stop])
                yield ShardRows(nbytes=held.nbytes, pieces=held.give_out(narrow=True))

    @contextmanager
    def _open(self, layer_name: str, budget: Budget) -> Iterator[tuple[Any, soma.DataFrame]]:
        with attrs.evolve(self.locator, layer_name=layer_name).open(budget) as opened_arrays:
            yield opened_arrays

    def _reader(
        self,
        array: Any,
        obs: soma.DataFrame,
        var_joinids: NDArrayJoinId | None = None,
        *,
        n_pieces: int = 1,
    ) -> SOMAReader:
        """Return a reader of a layer, or of an array of `obsm` with these columns."""
        return SOMAReader(
            array,
            obs,
            self.ids.var_joinids if var_joinids is None else var_joinids,
            obs_column_names=["soma_joinid"],
            obs_joinids=np.empty(0, dtype=np.int64),
            n_pieces=n_pieces,
            use_eager_fetch=True,
        )

    # Frames -----------------------------------------------------------------------------------------------

    def obs(self, column_names: Sequence[str]) -> pa.Table:
        """Return columns of `obs` of all rows."""
        with opened(self.locator) as (_, obs):
            return _table(obs, column_names, self.ids.obs_joinids)

    def var(self) -> pa.Table:
        """Return all columns of `var`, "soma_joinid" first."""
        with opened(self.locator) as (measurement, _):
            var = measurement.var
            names = [name for name in var.schema.names if name != "soma_joinid"]
            return _table(var, ["soma_joinid", *names], self.ids.var_joinids)

    # Arrays of obsm ---------------------------------------------------------------------------------------

    def array(self, name: str) -> StoredArray:
        """Return the type of an array of `obsm`, and its number of columns."""
        with opened(self.locator) as (measurement, _):
            array = measurement.obsm[name]
            return StoredArray(dtype=_dtype(array), n_cols=_width(name, array))

    def array_rows(self, name: str) -> Iterator[NDArrayNumber]:
        """Yield the rows of an array of `obsm`, in order, several rows at a time."""
        with opened(self.locator) as (measurement, obs):
            array = measurement.obsm[name]
            width, ids = _width(name, array), self.ids.obs_joinids
            reader = self._reader(array, obs, np.arange(width))
            step = max(1, PIECE_BYTES // (8 * width))
            for start in range(0, len(ids), step):
                for rows in reader.hold(ids[start : start + step]):
                    yield rows.slice_tonumpy(slice(None))


def _table(frame: soma.DataFrame, column_names: Sequence[str], joinids: NDArrayJoinId) -> pa.Table:
    return pa.table(ObsColumns.read(frame, column_names, joinids).columns_of(joinids))


def _dtype(array: soma.SparseNDArray | soma.DenseNDArray) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(array.schema.field("soma_data").type.to_pandas_dtype())
    return dtype.newbyteorder("<")


def _width(name: str, array: soma.SparseNDArray | soma.DenseNDArray) -> int:
    """Return the number of columns of an array of `obsm`: as declared, or as written if that is too large.

    Raises:
        ValueError: If the writes do not show the number of columns.
    """
    if array.shape[1] <= MAX_OBSM_COLUMNS:
        return int(array.shape[1])
    (_, last_row), (_, last_col) = array.non_empty_domain()
    if last_row == last_col == 0 or last_col >= MAX_OBSM_COLUMNS:  # zeros are what an empty array has
        raise ValueError(
            f"obsm={name!r} must have at most {MAX_OBSM_COLUMNS:,} columns, but is declared with "
            f"{array.shape[1]:,}, and what is written does not tell how many there are; leave it out."
        )
    return int(last_col) + 1
