"""Columns of `obs`: read in one scan, stored as Arrow arrays (categories as codes), and decoded on use."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._query_ids import check_once
from tiledbsoma_ml._shared_array import SharedArray
from tiledbsoma_ml._soma.arrays import naming_rows, ranges, to_numpy
from tiledbsoma_ml.x_locator import XLocator

GAP_ROWS = 1024
"""Largest gap between two rows of `obs` that are read in one range, together with the rows in the gap."""

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
    """Columns of `obs` or `var` for some rows, which are taken by joinid."""

    def __init__(
        self, joinids: NDArrayJoinId, columns: dict[str, pa.Array], types: ObsTypes | None = None
    ) -> None:
        self._joinids = joinids
        self._columns = columns
        nullable = with_missing(columns)
        self._table = ObsTable(columns, nullable | (frozenset() if types is None else types.nullable))

    @classmethod
    def read(
        cls,
        obs: soma.DataFrame,
        column_names: Sequence[str],
        joinids: NDArrayJoinId,
        types: ObsTypes | None = None,
    ) -> ObsColumns:
        """Read columns for the rows of `joinids`, in one scan.

        Args:
            obs: The open `obs` or `var`.
            column_names: The columns.
            joinids: The rows.
            types: The types that the columns have in the query; if None, the rows that are read decide.

        Raises:
            ValueError: If a row does not exist, or exists twice.
        """
        wanted = ascending(joinids)
        names = list(dict.fromkeys(["soma_joinid", *column_names]))
        with naming_rows(obs, wanted):
            table = obs.read(coords=_coords(obs, wanted), column_names=names).concat()
        found = to_numpy(table["soma_joinid"])
        if not np.array_equal(found, wanted):
            table = table.take(pa.array(_indices_in(obs, found, wanted)))
        # Chunks are copied, because a read returns them in buffers that are much larger.
        columns = {name: table[name].unify_dictionaries().combine_chunks() for name in column_names}
        if types is not None:
            types.learn(obs, columns)
        return cls(wanted, columns, types)

    def codes(self, column_name: str) -> NDArray[np.int64]:
        """Return a code for each row, in the order of joinids; rows with the same value have the same code.

        The caller may write to the array.
        """
        column = self._columns[column_name]
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        return _codes(column.indices).copy()

    def take(self, joinids: NDArrayJoinId) -> pd.DataFrame:
        """Return the rows of `joinids`, in this order, with a fresh index; see `ObsTable`."""
        return self._table.take(self._rows_of(joinids))

    def columns_of(self, joinids: NDArrayJoinId) -> dict[str, pa.Array]:
        """Return the columns for the rows of `joinids`, in this order, as Arrow arrays."""
        if joinids is self._joinids:
            return dict(self._columns)
        rows = pa.array(self._rows_of(joinids))
        return {name: column.take(rows) for name, column in self._columns.items()}

    def _rows_of(self, joinids: NDArrayJoinId) -> NDArray[np.int64]:
        rows = np.searchsorted(self._joinids, joinids)
        assert np.array_equal(self._joinids.take(rows, mode="clip"), joinids)
        return rows


def ascending(joinids: NDArrayJoinId) -> NDArrayJoinId:
    """Return the distinct joinids in ascending order; the same array if it is so already."""
    return joinids if (joinids[1:] > joinids[:-1]).all() else np.unique(joinids)


def _indices_in(obs: soma.DataFrame, found: NDArrayJoinId, wanted: NDArrayJoinId) -> NDArray[np.int64]:
    """Return the index in `found` of each joinid of `wanted`, which is sorted."""
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


def _coords(obs: soma.DataFrame, sorted_joinids: NDArrayJoinId) -> tuple[slice | NDArrayJoinId, ...]:
    """Return coordinates that cover these rows; all coordinates if `obs` is indexed by another column."""
    if obs.index_column_names != ("soma_joinid",):
        return ()
    first, last = obs.domain[0]
    inside = sorted_joinids[(first <= sorted_joinids) & (sorted_joinids <= last)]
    if not len(inside):
        return (inside,)
    gaps = np.diff(inside, prepend=inside[0] - GAP_ROWS - 1)
    return (ranges(inside, np.flatnonzero(gaps > GAP_ROWS)),)


def in_one_piece(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array of Arrow, without a copy if it has one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()


# Types ----------------------------------------------------------------------------------------------------


_UNKNOWN, _PLAIN, _NULLABLE = range(3)


class ObsTypes:
    """The columns of `obs` that have nullable types of pandas in a query.

    A column of integers or booleans is nullable if a value is missing in any row of the query. So its type is
    the same in all mini-batches: of each worker, rank and split, and after a resume. The columns are found
    when they are first needed. Forks share the result, and a pickled copy has it.

    Args:
        locator: Address of the experiment.
        column_names: Columns of `obs`.
        joinids: The rows of the query.
    """

    def __init__(self, locator: XLocator, column_names: Sequence[str], joinids: NDArrayJoinId) -> None:
        self._locator = locator
        self._column_names = [name for name in column_names if name != "soma_joinid"]
        self._joinids: NDArrayJoinId | None = joinids
        self._kinds = SharedArray(np.full(len(self._column_names), _UNKNOWN, dtype=np.int64))

    @property
    def nullable(self) -> frozenset[str]:
        """Names of the nullable columns."""
        self._find_out()
        kinds = zip(self._column_names, self._kinds.numbers, strict=True)
        return frozenset(name for name, kind in kinds if kind == _NULLABLE)

    def learn(self, obs: soma.DataFrame, columns: Mapping[str, pa.Array] | None = None) -> None:
        """Find the nullable columns, unless they are known.

        Args:
            obs: The open `obs`. It is read unless `columns` have all rows of the query.
            columns: Columns for distinct rows of the query.
        """
        if self._is_known:
            return
        assert self._joinids is not None
        rows = ascending(self._joinids)
        if columns and all(len(column) == len(rows) for column in columns.values()):
            nullable = with_missing(columns)
        else:
            nullable = _read_missing(obs, self._column_names, rows)
        self._kinds.numbers[:] = [_NULLABLE if name in nullable else _PLAIN for name in self._column_names]

    @property
    def _is_known(self) -> bool:
        return _UNKNOWN not in self._kinds.numbers

    def _find_out(self) -> None:
        if not self._is_known:
            with self._locator.open() as (_, obs):
                self.learn(obs)

    def __getstate__(self) -> dict[str, Any]:
        self._find_out()
        return self.__dict__ | {"_joinids": None}


def with_missing(columns: Mapping[str, pa.Array], rows: NDArray[np.int64] | None = None) -> frozenset[str]:
    """Return the columns of integers or booleans in which a value of `rows` (all if None) is missing."""
    found = {name for name, x in columns.items() if x.null_count and x.type in _NULLABLE_DTYPES}
    if rows is not None:
        found = {name for name in found if columns[name].take(pa.array(rows)).null_count}
    return frozenset(found)


def _read_missing(
    obs: soma.DataFrame, column_names: Sequence[str], sorted_joinids: NDArrayJoinId
) -> frozenset[str]:
    """Return what `with_missing` returns, from those columns of `obs` in which a value can be missing."""
    fields = {name: obs.schema.field(name) for name in column_names}
    names = {name for name, field in fields.items() if field.nullable and field.type in _NULLABLE_DTYPES}
    found: set[str] = set()
    if names and len(sorted_joinids):
        with naming_rows(obs, sorted_joinids):
            for table in obs.read(coords=_coords(obs, sorted_joinids), column_names=["soma_joinid", *names]):
                found |= {name for name in names - found if _is_missing_in(table, name, sorted_joinids)}
                if found == names:
                    break
    return frozenset(found)


def _is_missing_in(table: pa.Table, name: str, sorted_joinids: NDArrayJoinId) -> bool:
    """Return whether a value of a column is missing in one of these rows; the table may have others, too."""
    if not table[name].null_count:
        return False
    joinids = to_numpy(table["soma_joinid"].filter(table[name].is_null()))
    indices = np.searchsorted(sorted_joinids, joinids)
    return bool((sorted_joinids.take(indices, mode="clip") == joinids).any())


# Decoding -------------------------------------------------------------------------------------------------


class ObsTable:
    """Columns of `obs`, whose rows are taken by row number.

    Dictionary columns become categoricals with all their categories.

    Args:
        columns: The columns by name; they may be mapped from a file.
        nullable: Columns of integers or booleans that get nullable types of pandas, which hold all values
            exactly, and show which ones are missing.
    """

    def __init__(self, columns: Mapping[str, pa.Array], nullable: Collection[str]) -> None:
        self.nullable = frozenset(nullable)
        self._takers = {name: _Taker(column, name in nullable) for name, column in columns.items()}

    def take(self, rows: NDArray[np.int64]) -> pd.DataFrame:
        """Return these rows, in this order, with a fresh index."""
        decoded = {name: taker.take(rows) for name, taker in self._takers.items()}
        return pd.DataFrame(decoded, index=pd.RangeIndex(len(rows)), copy=False)


class _Taker:
    """A column whose values are taken in the fastest way that equals Arrow's `to_pandas`."""

    def __init__(self, column: pa.Array, is_nullable: bool) -> None:
        self._nullable: Any = _NULLABLE_DTYPES.get(column.type) if is_nullable else None
        self._categories: pd.CategoricalDtype | None = None
        if pa.types.is_dictionary(column.type):
            self._categories = column.slice(0, 0).to_pandas().dtype
            column = column.indices
        self._column = column
        self._numbers: NDArray[Any] | None = None
        is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        if is_number and self._nullable is None and not column.null_count:
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
