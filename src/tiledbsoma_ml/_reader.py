"""Reading: from joinids to rows. The seam between what is planned and where it is stored."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_name
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._plan import Layout
from tiledbsoma_ml._window import Columns, Pages, Room, Window

IOBatch: TypeAlias = tuple[CSR_IO_Buffer, pd.DataFrame]
"""Rows of `X` and the same rows of `obs`, read together."""

DENSE_READ_BYTES = 64 * 2**20
"""At most this much of a dense layer is held, beside the result, while it is read."""

DENSE_GAP_ROWS = 64
"""Rows of a dense layer that are this near are read in one request, with those between them."""

GAP_ROWS = 16
"""Rows of a sparse layer that are this near, in one tile, are asked for in one range, with those between.

TileDB decodes whole tiles in any case and pays for every range: dropping ten rows afterwards is cheaper.
"""

BYTES_PER_JOINID = 48
"""What a row takes up beside its entries, while it is read and given out: its joinid, places, counts."""

OBS_GAP_ROWS = 1024
"""Rows of `obs` that are this near are asked for in one range, with those between them."""


class Reader(Protocol):
    """Something that holds rows and gives them back by joinid."""

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[IOBatch]:
        """Read the rows of `obs_joinids`, which may repeat.

        Returns:
            IO batches that together are these rows in exactly this order. What was taken is not held.
        """
        ...


class SOMAReader:
    """Reads rows of an `X` layer and of `obs` from a SOMA experiment, wherever it is stored.

    Args:
        X: An open layer, sparse or dense.
        obs: The open `obs` of the same experiment.
        var_joinids: Columns of `X`, in the order in which they are wanted; unique.
        obs_column_names: Columns of `obs`, in the order in which they are wanted.
        obs_joinids: Every row that will be asked for: their `obs` is read once, at the first `read`.
        n_parts: In how many IO batches to give out what is read at once.
        use_eager_fetch: Whether to fetch the next entries on a thread while those before are sorted.
        room: What limits the bytes held.
        folder: Where to keep rows, in files, until they are wanted; in memory if None.
    """

    def __init__(
        self,
        X: soma.SparseNDArray | soma.DenseNDArray,
        obs: soma.DataFrame,
        var_joinids: NDArrayJoinId,
        *,
        obs_column_names: Sequence[str],
        obs_joinids: NDArrayJoinId,
        n_parts: int = 1,
        use_eager_fetch: bool = False,
        room: Room | None = None,
        folder: Path | None = None,
    ) -> None:
        check_obs_column_names(obs_column_names, obs)
        self._X = X
        self._obs = obs
        self._obs_column_names = list(obs_column_names)
        self._obs_joinids = obs_joinids
        self._obs_columns: ObsColumns | None = None
        self._var_joinids = var_joinids
        self._columns = Columns(var_joinids, max(X.shape[1], int(var_joinids.max(initial=-1)) + 1))
        self._use_eager_fetch = use_eager_fetch
        self._window_options: dict[str, Any] = {
            "n_parts": n_parts,
            "room": room,
            "folder": folder,
            "pages": Pages(),
        }

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[IOBatch]:
        """Read the rows of `obs_joinids`, which may repeat.

        Returns:
            IO batches that together are these rows in exactly this order. What was taken is not held.
        """
        if self._obs_columns is None:
            self._obs_columns = ObsColumns.read(self._obs, self._obs_column_names, self._obs_joinids)
        return self._with_obs(obs_joinids, self.read_window(obs_joinids))

    def read_window(self, obs_joinids: NDArrayJoinId) -> Window:
        """Read the rows of `obs_joinids`, without their `obs`."""
        dtype = np.dtype(self._X.schema.field("soma_data").type.to_pandas_dtype())
        window = Window(obs_joinids, self._columns, dtype, **self._window_options)
        if len(obs_joinids) and len(self._var_joinids):
            entries = _dense_entries if isinstance(self._X, soma.DenseNDArray) else _sparse_entries
            found = entries(self._X, window.sorted_ids, self._var_joinids)
            with closing(EagerIterator(found) if self._use_eager_fetch else found) as ahead:
                for dim_0, dim_1, values in ahead:
                    window.add(dim_0, dim_1, values)
        return window

    def _with_obs(self, obs_joinids: NDArrayJoinId, window: Window) -> Iterator[IOBatch]:
        assert self._obs_columns is not None
        start = 0
        for rows in window:
            yield rows, self._obs_columns.take(obs_joinids[start : start + len(rows)])
            start += len(rows)


class _PaddingMarker:
    """A Reader that adds a column to `obs`: whether another rank has the row as well."""

    def __init__(self, reader: Reader, column_name: str, padding: NDArrayJoinId) -> None:
        self._reader = reader
        self._column_name = column_name
        self._padding = padding

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[IOBatch]:
        start = 0
        for X, obs in self._reader.read(obs_joinids):
            joinids = obs_joinids[start : start + len(obs)]
            yield X, obs.assign(**{self._column_name: np.isin(joinids, self._padding)})
            start += len(obs)


def mark_padding(reader: Reader, column_name: str | None, padding: NDArrayJoinId) -> Reader:
    """Return a Reader that tells in a column of `obs`, if one is named, which rows are among `padding`."""
    return reader if column_name is None else _PaddingMarker(reader, column_name, padding)


def check_obs_column_names(names: Sequence[str], obs: soma.DataFrame) -> None:
    """Raise a ValueError or TypeError unless `names` are distinct columns of `obs`, at least one."""
    if isinstance(names, str):
        raise TypeError(f"obs_column_names={names!r} must be a list of names; try [{names!r}].")
    if not len(names):
        raise ValueError("obs_column_names=[] must hold at least one name; try ['soma_joinid'].")
    if len(set(names)) < len(names):
        raise ValueError(
            f"obs_column_names={list(names)} must differ from each other; name each column once."
        )
    for name in names:
        check_name("obs_column_names", name, obs.keys(), of="a column of obs")


def measure_layout(reader: SOMAReader, row_tile: int, n_rows: int, obs_joinids: NDArrayJoinId) -> Layout:
    """Return how a layer of `n_rows` is stored, and what its rows take up, from a sample of `obs_joinids`."""
    n_runs = max(1, min(6, len(obs_joinids) // 128))
    starts = np.linspace(0, max(0, len(obs_joinids) - 128), n_runs).astype(int)
    sample = np.concatenate([obs_joinids[start : start + 128] for start in starts.tolist()])
    sample = sample[sample < n_rows]  # that a row does not exist is said when `obs` is read
    n_bytes = reader.read_window(sample).nbytes / max(1, len(sample))
    return Layout(row_tile, n_bytes + BYTES_PER_JOINID)


# X --------------------------------------------------------------------------------------------------------

Entries: TypeAlias = tuple[NDArrayJoinId, NDArrayJoinId, NDArrayNumber]
"""Row and column, as joinids, and value of each of some entries of a layer."""


def row_tile(X: soma.SparseNDArray | soma.DenseNDArray) -> int:
    """Return how many neighbouring rows of a layer are stored, and so decoded, together."""
    return _tile(X, "soma_dim_0")


def _tile(X: soma.SparseNDArray | soma.DenseNDArray, dim: str) -> int:
    return int(json.loads(X.schema_config_options().dims)[dim]["tile"])


def _sparse_entries(
    X: soma.SparseNDArray, sorted_ids: NDArrayJoinId, var_joinids: NDArrayJoinId
) -> Generator[Entries, None, None]:
    """Yield the entries of rows and columns of a sparse layer, and some beside them, as they are stored."""
    coords = (_rows_to_read(X, sorted_ids), _columns_to_read(X, var_joinids))
    for table in X.read(coords=coords).tables():
        dim_0, dim_1, values = (_to_numpy(table[name]) for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        yield dim_0, dim_1, values


def _dense_entries(
    X: soma.DenseNDArray, sorted_ids: NDArrayJoinId, var_joinids: NDArrayJoinId
) -> Generator[Entries, None, None]:
    """Yield the entries of rows of a dense layer, and some beside them, that are not zero."""
    first_col, last_col = int(var_joinids.min()), int(var_joinids.max())
    itemsize = np.dtype(X.schema.field("soma_data").type.to_pandas_dtype()).itemsize
    n_rows = max(1, DENSE_READ_BYTES // ((last_col - first_col + 1) * itemsize))
    for start, stop in _near_runs(sorted_ids, DENSE_GAP_ROWS, n_rows):
        first_row, last_row = int(sorted_ids[start]), int(sorted_ids[stop - 1])
        block = X.read(coords=(slice(first_row, last_row), slice(first_col, last_col))).to_numpy()
        i, j = block.nonzero()
        yield i + first_row, j + first_col, block[i, j]


def _near_runs(sorted_ids: NDArrayJoinId, gap: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of runs of `sorted_ids` without a step over `gap`, spanning at most `n_rows`."""
    borders = [0, *(np.flatnonzero(np.diff(sorted_ids) > gap) + 1).tolist(), len(sorted_ids)]
    for start, end in pairwise(borders):
        while start < end:
            stop = int(np.searchsorted(sorted_ids[start:end], sorted_ids[start] + n_rows)) + start
            yield start, stop
            start = stop


def _rows_to_read(X: soma.SparseNDArray, sorted_ids: NDArrayJoinId) -> slice | NDArrayJoinId:
    """Return the rows to ask the layer for: cheaper to read than `sorted_ids` alone, and covering them."""
    tile = sorted_ids // row_tile(X)
    is_start = (np.diff(sorted_ids, prepend=-GAP_ROWS - 1) > GAP_ROWS) | (np.diff(tile, prepend=-1) != 0)
    return _ranges(sorted_ids, np.flatnonzero(is_start))


def _columns_to_read(X: soma.SparseNDArray, var_joinids: NDArrayJoinId) -> slice | NDArrayJoinId:
    """Return the columns to ask the layer for: cheaper to read than `var_joinids` alone, and covering them.

    A layer is decoded tile by tile, and TileDB pays for every range of coordinates, so in each tile the
    range from the first to the last wanted column is asked for; what is not wanted is dropped afterwards.
    Of 20,000 columns in tiles of 2,048, reading 2,000 scattered ones by their own coordinates takes 2.6
    times as long as reading all columns; 2,000 neighbours take a fifth of it.
    """
    wanted = np.sort(var_joinids)
    return _ranges(wanted, np.flatnonzero(np.diff(wanted // _tile(X, "soma_dim_1"), prepend=-1)))


def _ranges(sorted_ids: NDArrayJoinId, starts: NDArray[np.int64]) -> slice | NDArrayJoinId:
    """Return the ids from the first to the last of each run, as a slice if these touch; `starts` of runs."""
    firsts, lasts = sorted_ids[starts], sorted_ids[np.append(starts[1:], len(sorted_ids)) - 1]
    lengths = lasts - firsts + 1
    total = int(lengths.sum())
    if total == lasts[-1] - firsts[0] + 1:
        return slice(int(firsts[0]), int(lasts[-1]))
    offset: NDArrayJoinId = np.repeat(firsts - (np.cumsum(lengths) - lengths), lengths)
    return np.arange(total) + offset


def _to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which always copies
    array: NDArray[Any] = whole.to_numpy(zero_copy_only=False)
    return array


# obs ------------------------------------------------------------------------------------------------------


_NULLABLE_DTYPES = {
    pa.bool_(): pd.BooleanDtype(),
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
}


class ObsColumns:
    """Columns of `obs` for a set of rows: kept as Arrow has them (categories stay codes), decoded on use."""

    def __init__(self, joinids: NDArrayJoinId, columns: dict[str, pa.Array]) -> None:
        self._joinids = joinids
        self._columns = columns
        self._dtypes = {name: _nullable_dtype(column) for name, column in columns.items()}

    @classmethod
    def read(cls, obs: soma.DataFrame, column_names: Sequence[str], joinids: NDArrayJoinId) -> ObsColumns:
        """Read the columns for the rows of `joinids`, in one scan.

        Raises:
            ValueError: If `obs` lacks one of the rows.
        """
        is_sorted = bool((joinids[1:] > joinids[:-1]).all())
        wanted = joinids if is_sorted else np.unique(joinids)
        table = obs.read(
            coords=_obs_coords(obs, wanted),
            column_names=list(dict.fromkeys(["soma_joinid", *column_names])),
        ).concat()
        found = _to_numpy(table["soma_joinid"])
        if not np.array_equal(found, wanted):
            table = table.take(pa.array(_places(wanted, found)))
        return cls(wanted, {name: _combined(table[name]) for name in column_names})

    def codes(self, column_name: str) -> NDArray[np.int64]:
        """Return a number for each row, in the order of the joinids, that is the same where the value is."""
        column = self._columns[column_name]
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        codes: NDArray[Any] = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return codes.astype(np.int64)

    def take(self, joinids: NDArrayJoinId) -> pd.DataFrame:
        """Return the rows of `joinids`, in that order, with a fresh index.

        Dictionary columns become categoricals with all their categories. Integer and boolean columns in which
        a value is missing become the nullable types of pandas, and hold every value exactly.
        """
        rows = pa.array(np.searchsorted(self._joinids, joinids))
        decoded = {
            name: column.take(rows).to_pandas(types_mapper=lambda _, dtype=self._dtypes[name]: dtype)
            for name, column in self._columns.items()
        }
        return pd.DataFrame(decoded, index=pd.RangeIndex(len(joinids)))


def _places(wanted: NDArrayJoinId, found: NDArrayJoinId) -> NDArray[np.int64]:
    """Return where each joinid of `wanted`, which is sorted, is in `found`."""
    order = np.argsort(found, kind="stable")
    order = order[np.isin(found[order], wanted)]
    if len(order) < len(wanted):
        missing = np.setdiff1d(wanted, found)
        raise ValueError(
            f"obs_joinids must exist in obs, but {len(missing)} do not, {missing[0]} for instance; "
            "make query_ids from a query on the same experiment."
        )
    return order


def _obs_coords(obs: soma.DataFrame, sorted_ids: NDArrayJoinId) -> tuple[slice | NDArrayJoinId, ...]:
    """Return coordinates that cover the rows that can exist; all rows where another column is the index."""
    if obs.index_column_names != ("soma_joinid",):
        return ()
    first, last = obs.domain[0]
    inside = sorted_ids[(first <= sorted_ids) & (sorted_ids <= last)]
    if not len(inside):
        return (inside,)
    gaps = np.diff(inside, prepend=inside[0] - OBS_GAP_ROWS - 1)
    return (_ranges(inside, np.flatnonzero(gaps > OBS_GAP_ROWS)),)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    return column.unify_dictionaries().combine_chunks()


def _nullable_dtype(column: pa.Array) -> pd.api.extensions.ExtensionDtype | None:
    """Return pandas' nullable type for integers or booleans with a value missing; None for all others."""
    return _NULLABLE_DTYPES.get(column.type) if column.null_count else None
