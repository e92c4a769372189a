"""Columns of `obs`: read in one scan, kept as Arrow has them (categories stay codes), decoded on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._arrays import ranges, to_numpy
from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._query_ids import check_once

GAP_ROWS = 1024
"""Rows of `obs` that are this near are asked for in one range, with those between them."""

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
    """Columns of `obs` (or `var`) for a set of rows, by joinid."""

    def __init__(self, joinids: NDArrayJoinId, columns: dict[str, pa.Array]) -> None:
        self._joinids = joinids
        self._columns = columns
        self._table = ObsTable(columns)

    @classmethod
    def read(cls, obs: soma.DataFrame, column_names: Sequence[str], joinids: NDArrayJoinId) -> ObsColumns:
        """Read the columns for the rows of `joinids`, in one scan.

        Raises:
            ValueError: If `obs` lacks one of the rows, or has one twice.
        """
        is_sorted = bool((joinids[1:] > joinids[:-1]).all())
        wanted = joinids if is_sorted else np.unique(joinids)
        table = obs.read(
            coords=_coords(obs, wanted),
            column_names=list(dict.fromkeys(["soma_joinid", *column_names])),
        ).concat()
        found = to_numpy(table["soma_joinid"])
        if not np.array_equal(found, wanted):
            table = table.take(pa.array(_places(obs, wanted, found)))
        # A copy: what a read returns lies in buffers that are much larger.
        columns = {name: table[name].unify_dictionaries().combine_chunks() for name in column_names}
        return cls(wanted, columns)

    def codes(self, column_name: str) -> NDArray[np.int64]:
        """Return a number for each row, in the order of the joinids, that is the same where the value is.

        They belong to the caller.
        """
        column = self._columns[column_name]
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        return _codes(column.indices).copy()

    def take(self, joinids: NDArrayJoinId) -> pd.DataFrame:
        """Return the rows of `joinids`, in that order, with a fresh index; see `ObsTable`."""
        return self._table.take(self._rows_of(joinids))

    def columns_of(self, joinids: NDArrayJoinId) -> dict[str, pa.Array]:
        """Return the columns for the rows of `joinids`, in that order, as Arrow has them."""
        if joinids is self._joinids:
            return dict(self._columns)
        rows = pa.array(self._rows_of(joinids))
        return {name: column.take(rows) for name, column in self._columns.items()}

    def _rows_of(self, joinids: NDArrayJoinId) -> NDArray[np.int64]:
        rows = np.searchsorted(self._joinids, joinids)
        assert np.array_equal(self._joinids.take(rows, mode="clip"), joinids)
        return rows


def _places(obs: soma.DataFrame, wanted: NDArrayJoinId, found: NDArrayJoinId) -> NDArray[np.int64]:
    """Return where each joinid of `wanted`, which is sorted, is in `found`."""
    order = np.argsort(found, kind="stable")
    order = order[np.isin(found[order], wanted)]
    check_once(obs, found[order])
    if len(order) < len(wanted):
        missing = np.setdiff1d(wanted, found)
        raise ValueError(
            f"obs_joinids must exist in obs, but {len(missing)} do not, {missing[0]} for instance; "
            "make query_ids from a query on the same experiment."
        )
    return order


def _coords(obs: soma.DataFrame, sorted_ids: NDArrayJoinId) -> tuple[slice | NDArrayJoinId, ...]:
    """Return coordinates that cover the rows that can exist; all rows where another column is the index."""
    if obs.index_column_names != ("soma_joinid",):
        return ()
    first, last = obs.domain[0]
    inside = sorted_ids[(first <= sorted_ids) & (sorted_ids <= last)]
    if not len(inside):
        return (inside,)
    gaps = np.diff(inside, prepend=inside[0] - GAP_ROWS - 1)
    return (ranges(inside, np.flatnonzero(gaps > GAP_ROWS)),)


def in_one_piece(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, without a copy if it is one."""
    return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()


# Decoding -------------------------------------------------------------------------------------------------


class ObsTable:
    """Columns of `obs`, by row number.

    Dictionary columns become categoricals with all their categories. Integer and boolean columns in which a
    value is missing become the nullable types of pandas, and hold every value exactly.

    Args:
        columns: By name, each of one piece; they may be mapped.
        subset: The rows that will be asked for; None for all.
    """

    def __init__(self, columns: Mapping[str, pa.Array], subset: NDArray[np.int64] | None = None) -> None:
        self._takers = {name: _Taker(column, subset) for name, column in columns.items()}

    def take(self, rows: NDArray[np.int64]) -> pd.DataFrame:
        """Return rows, in that order, with a fresh index."""
        decoded = {name: taker.take(rows) for name, taker in self._takers.items()}
        return pd.DataFrame(decoded, index=pd.RangeIndex(len(rows)), copy=False)


class _Taker:
    """Takes values of a column, by the shortest way that gives what Arrow gives."""

    def __init__(self, column: pa.Array, subset: NDArray[np.int64] | None) -> None:
        self._nullable = _nullable(column, subset)
        self._categories: pd.CategoricalDtype | None = None
        if pa.types.is_dictionary(column.type):
            self._categories = column.slice(0, 0).to_pandas().dtype
            column = column.indices
        self._column = column
        self._numbers: NDArray[Any] | None = None
        if not column.null_count and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            self._numbers = column.to_numpy(zero_copy_only=True)

    def take(self, rows: NDArray[np.int64]) -> Any:
        if self._numbers is not None:
            taken = self._numbers.take(rows)
            return taken if self._categories is None else self._categorical(taken)
        column = self._column.take(pa.array(rows))
        if self._categories is None:
            return column.to_pandas(types_mapper=lambda _: self._nullable)
        return self._categorical(_codes(column))

    def _categorical(self, codes: NDArray[Any]) -> Any:
        return pd.Categorical.from_codes(codes, dtype=self._categories)


def _codes(indices: pa.Array) -> NDArray[np.int64]:
    """Return the codes of a dictionary column, -1 where a value is missing."""
    codes: NDArray[np.int64] = indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return codes


def _nullable(column: pa.Array, subset: NDArray[np.int64] | None) -> Any:
    """Return pandas' nullable type for integers or booleans with a value missing; None for all others."""
    if column.null_count and subset is not None:
        column = column.take(pa.array(subset))
    return _NULLABLE_DTYPES.get(column.type) if column.null_count else None
