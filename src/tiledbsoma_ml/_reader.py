"""Reading: from joinids to rows. The seam between what is planned and where it is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, check_name
from tiledbsoma_ml._csr import CSR_IO_Buffer, smallest_uint

IOBatch: TypeAlias = tuple[CSR_IO_Buffer, pd.DataFrame]
"""Rows of `X` and the same rows of `obs`, read together."""

DENSE_READ_BYTES = 64 * 2**20
"""At most this much of a dense layer is held, beside the result, while it is read."""

DENSE_GAP_ROWS = 64
"""Rows of a dense layer that are this near are read in one request, with those between them."""


class Reader(Protocol):
    """Something that holds rows and gives them back by joinid."""

    def read(self, obs_joinids: NDArrayJoinId) -> IOBatch:
        """Return the rows of `obs_joinids`, which may repeat, as one IO batch in exactly that order."""
        ...


class SOMAReader:
    """Reads rows of an `X` layer and of `obs` from a SOMA experiment, wherever it is stored.

    Args:
        X: An open layer, sparse or dense.
        obs: The open `obs` of the same experiment.
        var_joinids: Columns of `X`, in the order in which they are wanted; unique.
        obs_column_names: Columns of `obs`, in the order in which they are wanted.
        obs_joinids: Every row that will be asked for: their `obs` is read once, at the first `read`.
    """

    def __init__(
        self,
        X: soma.SparseNDArray | soma.DenseNDArray,
        obs: soma.DataFrame,
        var_joinids: NDArrayJoinId,
        *,
        obs_column_names: Sequence[str],
        obs_joinids: NDArrayJoinId,
    ) -> None:
        check_obs_column_names(obs_column_names, obs)
        self._X = X
        self._obs = obs
        self._obs_column_names = list(obs_column_names)
        self._obs_joinids = obs_joinids
        self._obs_table: ObsColumns | None = None
        self._var_joinids = var_joinids

    def read(self, obs_joinids: NDArrayJoinId) -> IOBatch:
        """Return the rows of `obs_joinids`, which may repeat, as one IO batch in exactly that order."""
        if self._obs_table is None:
            self._obs_table = ObsColumns.read(self._obs, self._obs_column_names, self._obs_joinids)
        read_X = read_dense_rows if isinstance(self._X, soma.DenseNDArray) else read_sparse_rows
        return read_X(self._X, obs_joinids, self._var_joinids), self._obs_table.take(obs_joinids)


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


# X --------------------------------------------------------------------------------------------------------


def read_sparse_rows(
    X: soma.SparseNDArray, obs_joinids: NDArrayJoinId, var_joinids: NDArrayJoinId
) -> CSR_IO_Buffer:
    """Return rows and columns of a sparse layer, in the order asked for.

    The layer is read unordered, as it is stored, and sorted into rows as it arrives.
    """
    from tiledbsoma_ml import _kernels

    shape = (len(obs_joinids), len(var_joinids))
    dtype = np.dtype(X.schema.field("soma_data").type.to_pandas_dtype())
    if 0 in shape:
        return CSR_IO_Buffer.from_ijd_parts([], shape, dtype)
    sorted_ids, first, back = np.unique(obs_joinids, return_index=True, return_inverse=True)
    repeats = len(sorted_ids) < len(obs_joinids)
    row_of = np.arange(len(sorted_ids)) if repeats else first
    col_of = np.full(max(X.shape[1], int(var_joinids.max()) + 1), -1, dtype=np.int64)
    col_of[var_joinids] = np.arange(len(var_joinids))
    col_type = smallest_uint(len(var_joinids))
    parts = []
    for table in X.read(coords=(_as_coords(sorted_ids), _columns_to_read(X, var_joinids))).tables():
        dim_0, dim_1, data = (_to_numpy(table[name]) for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        rows, cols = np.empty(len(data), dtype=np.uint32), np.empty(len(data), dtype=col_type)
        kept = np.empty(len(data), dtype=dtype)
        n_kept = _kernels.locate(
            dim_0,
            dim_1,
            _kernels.as_bits(data),
            sorted_ids,
            row_of,
            col_of,
            rows,
            cols,
            _kernels.as_bits(kept),
        )
        parts.append((rows[:n_kept], cols[:n_kept], kept[:n_kept]))
    matrix = CSR_IO_Buffer.from_ijd_parts(parts, (len(sorted_ids), shape[1]), dtype)
    return matrix.take_rows(back) if repeats else matrix


def read_dense_rows(
    X: soma.DenseNDArray, obs_joinids: NDArrayJoinId, var_joinids: NDArrayJoinId
) -> CSR_IO_Buffer:
    """Return rows and columns of a dense layer, in the order asked for; zeros are not stored."""
    shape = (len(obs_joinids), len(var_joinids))
    dtype = np.dtype(X.schema.field("soma_data").type.to_pandas_dtype())
    if 0 in shape:
        return CSR_IO_Buffer.from_ijd_parts([], shape, dtype)
    sorted_ids, back = np.unique(obs_joinids, return_inverse=True)
    first_col, last_col = int(var_joinids.min()), int(var_joinids.max())
    n_rows = max(1, DENSE_READ_BYTES // ((last_col - first_col + 1) * dtype.itemsize))
    parts = []
    for start, stop in _near_runs(sorted_ids, DENSE_GAP_ROWS, n_rows):
        first_row, last_row = int(sorted_ids[start]), int(sorted_ids[stop - 1])
        block = X.read(coords=(slice(first_row, last_row), slice(first_col, last_col))).to_numpy()
        wanted = block[np.ix_(sorted_ids[start:stop] - first_row, var_joinids - first_col)]
        i, j = wanted.nonzero()
        parts.append(((i + start).astype(np.uint32), j.astype(smallest_uint(shape[1])), wanted[i, j]))
    return CSR_IO_Buffer.from_ijd_parts(parts, (len(sorted_ids), shape[1]), dtype).take_rows(back)


def _near_runs(sorted_ids: NDArrayJoinId, gap: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of runs of `sorted_ids` without a step over `gap`, spanning at most `n_rows`."""
    borders = [0, *(np.flatnonzero(np.diff(sorted_ids) > gap) + 1).tolist(), len(sorted_ids)]
    for start, end in pairwise(borders):
        while start < end:
            stop = int(np.searchsorted(sorted_ids[start:end], sorted_ids[start] + n_rows)) + start
            yield start, stop
            start = stop


def _columns_to_read(X: soma.SparseNDArray, var_joinids: NDArrayJoinId) -> slice | NDArrayJoinId:
    """Return the columns to ask the layer for: cheaper to read than `var_joinids` alone, and covering them.

    A layer is decoded tile by tile, and TileDB pays for every range of coordinates, so in each tile the
    range from the first to the last wanted column is asked for; what is not wanted is dropped afterwards.
    Of 20,000 columns in tiles of 2,048, reading 2,000 scattered ones by their own coordinates takes 2.6
    times as long as reading all columns; 2,000 neighbours take a fifth of it.
    """
    wanted = np.sort(var_joinids)
    tile = _column_tile(X)
    starts = np.flatnonzero(np.diff(wanted // tile, prepend=-1))
    firsts, lasts = wanted[starts], wanted[np.append(starts[1:], len(wanted)) - 1]
    if (np.diff(firsts // tile) == 1).all():
        return slice(int(firsts[0]), int(lasts[-1]))
    return np.concatenate([np.arange(a, b + 1) for a, b in zip(firsts, lasts, strict=True)])


def _column_tile(X: soma.SparseNDArray) -> int:
    return int(json.loads(X.schema_config_options().dims)["soma_dim_1"]["tile"])


def _as_coords(sorted_ids: NDArrayJoinId) -> slice | NDArrayJoinId:
    """Return the same coordinates, as a slice if they have no gap."""
    first, last = int(sorted_ids[0]), int(sorted_ids[-1])
    return slice(first, last) if last - first == len(sorted_ids) - 1 else sorted_ids


def _to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    array: NDArray[Any] = column.combine_chunks().to_numpy(zero_copy_only=False)
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
        wanted = np.unique(joinids)
        table = obs.read(
            coords=_obs_coords(obs, wanted),
            column_names=list(dict.fromkeys(["soma_joinid", *column_names])),
        ).concat()
        found = _to_numpy(table["soma_joinid"])
        rows = np.argsort(found)
        rows = rows[np.isin(found[rows], wanted)]
        if len(rows) < len(wanted):
            missing = np.setdiff1d(wanted, found)
            raise ValueError(
                f"obs_joinids must exist in obs, but {len(missing)} do not, {missing[0]} for instance; "
                "make query_ids from a query on the same experiment."
            )
        table = table.take(pa.array(rows))
        return cls(wanted, {name: _combined(table[name]) for name in column_names})

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


def _obs_coords(obs: soma.DataFrame, sorted_ids: NDArrayJoinId) -> tuple[slice | NDArrayJoinId, ...]:
    """Return coordinates of those rows that can exist; none (all rows) where another column is the index."""
    if obs.index_column_names != ("soma_joinid",):
        return ()
    first, last = obs.domain[0]
    inside = sorted_ids[(first <= sorted_ids) & (sorted_ids <= last)]
    return (_as_coords(inside) if len(inside) else inside,)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    return column.unify_dictionaries().combine_chunks()


def _nullable_dtype(column: pa.Array) -> pd.api.extensions.ExtensionDtype | None:
    """Return pandas' nullable type for integers or booleans with a value missing; None for all others."""
    return _NULLABLE_DTYPES.get(column.type) if column.null_count else None
