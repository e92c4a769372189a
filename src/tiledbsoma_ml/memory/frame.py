"""`Frame`: `obs` or `var` as a table of pandas whose rows have joinids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, check_names
from tiledbsoma_ml._query_ids import check_joinids


class Frame:
    """A table whose rows have joinids: those of its column "soma_joinid", or else their row numbers.

    Columns keep their types, and categoricals keep all categories. The index is a column as well, with the
    name of the index, or "index" if it has none, unless another column has that name. The table is not
    copied.

    Args:
        name: "obs" or "var".
        frame: The table.
        has_index: Whether the index of the table is a column.

    Attributes:
        joinids: The joinid of each row, read-only.

    Raises:
        TypeError: If `frame` is not a DataFrame, or its joinids are not integers.
        ValueError: If a column or a joinid repeats.
    """

    def __init__(self, name: str, frame: pd.DataFrame, *, has_index: bool = True) -> None:
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(
                f"{name} must be a DataFrame, not of type {type(frame).__name__}; try pd.DataFrame({name})."
            )
        if repeated := frame.columns[frame.columns.duplicated()].tolist():
            raise ValueError(f"{name} must have each column once, but {repeated[0]!r} repeats; rename one.")
        self._name = name
        self._columns: dict[str, Any] = {key: frame[key] for key in frame.columns if isinstance(key, str)}
        if has_index and not isinstance(frame.index, pd.MultiIndex):
            key = "index" if frame.index.name is None else frame.index.name
            self._columns = {str(key): frame.index} | self._columns
        given = self._columns.get("soma_joinid")
        ids = np.arange(len(frame)) if given is None else _joinids(name, given)
        ids.flags.writeable = False
        self.joinids: NDArrayJoinId = ids
        first = {"soma_joinid": pd.Series(ids, copy=False)}
        self._columns = first | self._columns | first
        ascends = bool((ids[1:] > ids[:-1]).all())
        self._order = None if ascends else np.argsort(ids)
        self._sorted = ids if self._order is None else ids[self._order]
        self._are_numbers = ascends and (not len(ids) or int(ids[-1]) == len(ids) - 1)

    def __len__(self) -> int:
        return len(self.joinids)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, "soma_joinid" first."""
        return list(self._columns)

    def rows(self, joinids: object) -> NDArray[np.int64]:
        """Return the row of each joinid.

        Raises:
            TypeError: If the joinids are not integers.
            ValueError: If no row has one of them.
        """
        parameter = f"{self._name}_joinids"
        ids = check_joinids(parameter, joinids)
        rows = ids if self._are_numbers else np.searchsorted(self._sorted, ids)
        if not len(self):
            is_missing = np.ones(len(ids), dtype=np.bool_)
        elif self._are_numbers:
            is_missing = ids >= len(self)
        else:
            is_missing = self._sorted.take(rows, mode="clip") != ids
        if is_missing.any():
            raise ValueError(
                f"{parameter} must be rows of {self._name}, but {is_missing.sum():,} of {len(ids):,} are "
                f"not, {ids[is_missing][0]} for instance; take them from query_ids."
            )
        found: NDArray[np.int64] = rows if self._order is None else self._order[rows]
        return found

    def check(self, parameter: str, names: Sequence[str]) -> tuple[str, ...]:
        """Return names if they are different columns, and at least one; see `check_names`."""
        return check_names(parameter, names, self._columns, of=f"a column of {self._name}")

    def columns(self, parameter: str, names: Sequence[str]) -> Columns:
        """Return columns, in this order; see `check`."""
        return Columns({name: _values(self._columns[name]) for name in self.check(parameter, names)})

    def digest(self) -> str:
        """Return a digest of the names, types and values of the columns."""
        found = hashlib.blake2b(digest_size=16)
        for name, column in self._columns.items():
            found.update(repr((name, str(column.dtype))).encode())
            if isinstance(column.dtype, pd.CategoricalDtype):
                found.update(repr((column.dtype.ordered, column.dtype.categories.tolist())).encode())
            values = pd.Series(column).reset_index(drop=True)
            try:
                hashed = pd.util.hash_pandas_object(values, index=False, categorize=False)
            except (TypeError, ValueError):  # lists and other objects without a hash
                hashed = pd.util.hash_pandas_object(values.map(repr), index=False, categorize=False)
            found.update(hashed.to_numpy().data)
        return found.hexdigest()


class Columns:
    """Columns of a table; several threads may use this at once."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def take(self, rows: NDArray[np.int64]) -> pd.DataFrame:
        """Return these rows, in this order, with a fresh index."""
        taken = {name: values.take(rows) for name, values in self._values.items()}
        return pd.DataFrame(taken, index=pd.RangeIndex(len(rows)), copy=False)


def _joinids(name: str, column: Any) -> NDArrayJoinId:
    parameter = f'{name}["soma_joinid"]'
    if column.isna().any():
        raise TypeError(f"{parameter} must have a value in every row, and lacks some; give every row one.")
    return check_joinids(parameter, column.to_numpy(), unique=True).copy()


def _values(column: Any) -> Any:
    """Return the values of a column as the array whose `take` is fastest."""
    return column.to_numpy() if isinstance(column.dtype, np.dtype) else column.array
