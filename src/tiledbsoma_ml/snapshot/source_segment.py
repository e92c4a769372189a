"""`SourceSegment`: the rows of any `Source`, as a segment of a snapshot, with checks of these rows."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_distinct
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.obs import in_one_piece
from tiledbsoma_ml._source import Fields, Reader, Source
from tiledbsoma_ml.snapshot.content import SOURCE, Origin
from tiledbsoma_ml.snapshot.files import digest
from tiledbsoma_ml.snapshot.segment import ShardRows, StoredArray, StoredLayer, in_ascending_order
from tiledbsoma_ml.snapshot.shards import narrowest_dtype

LAYER_NAME = "X"
"""Name of the one layer of a source in a snapshot."""

_JOINIDS_ONLY = Fields(obs_column_names=("soma_joinid",))


class SourceSegment:
    """A segment with the rows of a source.

    Args:
        source: The source.
        ids: Joinids of the rows, which are sorted, and of the columns.
    """

    layer_name = LAYER_NAME
    is_remote = False

    def __init__(self, source: Source, ids: QueryIDs) -> None:
        self.ids = in_ascending_order(ids)
        self._source = source
        self._stored: StoredLayer | None = None
        # One thread asks for `obs` while another reads rows, but many files allow only one thread at a time.
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name of the class of the source, with a prefix."""
        return f"{SOURCE}{type(self._source).__name__}"

    def check(
        self, *, layer_names: Sequence[str], obs_column_names: Sequence[str], obsm_names: Sequence[str]
    ) -> None:
        """Raise a ValueError or TypeError unless the columns exist, and no layers or `obsm` are asked for."""
        if tuple(layer_names) != (LAYER_NAME,):
            raise ValueError(
                f"layers={[name for name in layer_names if name != LAYER_NAME]} must be left out, because a "
                f"Source has the layer {LAYER_NAME!r} alone; make a source of each layer."
            )
        if obsm_names:
            raise ValueError(
                f"obsm={list(obsm_names)} must be left out, because a Source has no arrays of obsm; leave it "
                "out."
            )
        check_distinct("obs_column_names", obs_column_names)
        with self._lock:
            self._source.check(self.ids, Fields(obs_column_names=obs_column_names))

    def origin(self, *, layer_names: Sequence[str], obsm_names: Sequence[str]) -> Origin:
        """Return the class of the source, and its content, as the origin.

        Raises:
            TypeError: If the content is not text by name.
        """
        content = dict(self._source.content)
        if wrong := [item for pair in content.items() for item in pair if not isinstance(item, str)]:
            raise TypeError(
                f"the content of {self.name!r} must be texts by name, but has {wrong[0]!r}; try "
                f"{str(wrong[0])!r}."
            )
        return Origin(
            uri=self.name,
            measurement_name="",
            tiledb_timestamp_ms=0,
            versions=dict(sorted(content.items())),
            n_obs=len(self.ids.obs_joinids),
            obs_digest=digest(self.ids.obs_joinids),
        )

    # X ----------------------------------------------------------------------------------------------------

    def layer(self, name: str, budget: Budget) -> StoredLayer:
        """Return the type and tiles of `X`; one row is read for this."""
        if self._stored is None:
            first = self.ids.obs_joinids[:1]
            with self._lock:
                self._source.prepare()
                with closing(self._open(budget)) as reader:
                    dtypes = [rows.X.dtype for rows in reader.read(first)]
                dtype = dtypes[0] if dtypes else np.dtype(np.float32)
                row_tile = self._source.row_tile
            self._stored = StoredLayer(dtype=dtype.newbyteorder("<"), row_tile=row_tile)
        return self._stored

    def bytes_per_row(self, layer_name: str, budget: Budget) -> float:
        """Return the size of a row in memory, from the layout of the source."""
        with self._lock:
            return max(1.0, float(self._source.layout(self.ids, budget).bytes_per_row))

    def shards(
        self, layer_name: str, borders: Iterable[tuple[int, int]], *, n_pieces: int, budget: Budget
    ) -> Generator[ShardRows, None, None]:
        """Yield the rows of each shard, in the pieces of the source."""
        dtype = self.layer(layer_name, budget).dtype
        with self._lock:
            opened = self._open(budget)
        with closing(opened) as reader:
            for start, stop in borders:
                pieces = list(self._pieces(reader, self.ids.obs_joinids[start:stop], dtype))
                yield ShardRows(nbytes=sum(piece.nbytes for piece in pieces), pieces=_taken(pieces))

    def _open(self, budget: Budget) -> Reader:
        return self._source.open(self.ids, _JOINIDS_ONLY, budget)

    def _pieces(
        self, reader: Reader, joinids: NDArrayJoinId, dtype: np.dtype[Any]
    ) -> Iterator[CSR_IO_Buffer]:
        """Yield copies of the pieces of rows, sorted by column, with values in their narrowest type.

        Raises:
            ValueError: If the source gives other rows, or columns or values that are not possible.
        """
        with self._lock:
            found, start = iter(reader.read(joinids)), 0
        while True:
            with self._lock:
                rows = next(found, None)
            if rows is None:
                break
            yield self._checked(rows, joinids[start : start + len(rows)], dtype)
            start += len(rows)
        if start != len(joinids):
            raise self._broken(f"{len(joinids):,} rows that are asked for", f"gives {start:,}")

    def _checked(
        self, rows: Rows[CSR_IO_Buffer], asked: NDArrayJoinId, dtype: np.dtype[Any]
    ) -> CSR_IO_Buffer:
        """Check a piece, and return a copy of its `X`, sorted, with values in their narrowest type."""
        from tiledbsoma_ml._kernels import snapshot as kernels

        X, n_vars = rows.X, len(self.ids.var_joinids)
        if not np.array_equal(rows.obs_joinids, asked):
            raise self._broken("the rows that are asked for, in that order", "gives others")
        if X.dtype.newbyteorder("<") != dtype:
            raise self._broken(f"values of one type, {dtype}", f"gives some of {X.dtype}")
        if X.shape != (len(asked), n_vars):
            raise self._broken(f"X of shape {(len(asked), n_vars)}", f"gives {X.shape}")
        values = np.array(X.data, dtype=X.dtype.newbyteorder("="))
        try:
            copied = CSR_IO_Buffer.from_pjd(X.indptr, X.indices, values, X.shape).sort_indices()
        except ValueError as err:
            raise self._broken("rows in compressed sparse form", f"gives others, where {err}") from err
        wrong = kernels.first_bad_row(copied.indptr, copied.indices, n_vars)
        if wrong >= 0:
            raise self._broken("each column of a row once", f"gives one twice in row {asked[wrong]}")
        copied.data = values.astype(narrowest_dtype(values), copy=False)
        return copied

    def _broken(self, rule: str, but: str) -> ValueError:
        return ValueError(
            f"{self.name!r} must give {rule}, but {but}; `tiledbsoma_ml.testing.check_source` tells more."
        )

    # Frames -----------------------------------------------------------------------------------------------

    def obs(self, column_names: Sequence[str]) -> pa.Table:
        """Return columns of `obs` of all rows."""
        with self._lock:
            frame = self._source.obs(self.ids.obs_joinids, list(column_names))
        return self._table("obs", frame, self.ids.obs_joinids, column_names)

    def var(self) -> pa.Table:
        """Return all columns of `var`, with "soma_joinid" first where the source does not have it."""
        with self._lock:
            frame = self._source.var(self.ids.var_joinids)
        if "soma_joinid" not in frame:
            frame = frame.copy()
            frame.insert(0, "soma_joinid", self.ids.var_joinids)
        return self._table("var", frame, self.ids.var_joinids, list(frame.columns))

    def _table(
        self, what: str, frame: pd.DataFrame, joinids: NDArrayJoinId, column_names: Sequence[str]
    ) -> pa.Table:
        names = [str(name) for name in frame.columns]
        if names != list(column_names) or len(set(names)) < len(names):
            raise self._broken(
                f"{what} with the columns {list(column_names)}, which differ", f"gives {names}"
            )
        if len(frame) != len(joinids):
            raise self._broken(f"{what} of {len(joinids):,} rows", f"gives {len(frame):,}")
        if "soma_joinid" in frame and not np.array_equal(frame["soma_joinid"], joinids):
            raise self._broken(f"{what} of the rows that are asked for, in that order", "gives others")
        columns = {}
        for name in names:
            try:
                columns[name] = _to_arrow(frame[name])
            except (pa.ArrowException, TypeError, ValueError) as err:
                raise ValueError(
                    f"column {name!r} of {what}, of type {frame[name].dtype}, must be one that Arrow can "
                    f"hold, but: {err}; convert it, or leave it out."
                ) from err
        return pa.table(columns)

    # Arrays of obsm ---------------------------------------------------------------------------------------

    def array(self, name: str) -> StoredArray:
        """Raise a NotImplementedError, because a source has no arrays of `obsm`."""
        raise NotImplementedError(f"obsm={name!r} of a Source")

    def array_rows(self, name: str) -> Iterator[NDArrayNumber]:
        """Raise a NotImplementedError, because a source has no arrays of `obsm`."""
        raise NotImplementedError(f"obsm={name!r} of a Source")


def _taken(pieces: list[CSR_IO_Buffer]) -> Iterator[CSR_IO_Buffer]:
    """Yield pieces, and drop each from the list, so that its memory is free when the caller drops it."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()


def _to_arrow(column: pd.Series[Any]) -> pa.Array:
    """Return a column as an Arrow array; NaN in a column of numbers is a number, not a missing value."""
    if isinstance(column.dtype, np.dtype) and column.dtype.kind == "f":
        return pa.array(column.to_numpy(), from_pandas=False)
    found = pa.array(column, from_pandas=True)
    kind = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
    if isinstance(kind, pa.BaseExtensionType) or pa.types.is_nested(kind):
        raise TypeError("Arrow has no plain type for it")
    return in_one_piece(found) if isinstance(found, pa.ChunkedArray) else found
