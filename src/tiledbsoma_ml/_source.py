"""`Source`: where rows come from. The seam between what is planned and where it is stored.

A source is one query: rows, columns, and what is known of them. `docs/guides/sources.md` has one of forty
lines, and `tiledbsoma_ml.testing.check_source` says whether one does what it must.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs
import numpy as np
import pandas as pd
from scipy import sparse

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_distinct, check_names
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import QueryIDs, check_among
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml.x_locator import XLocator

__all__ = ["Fields", "RandomAccess", "Reader", "RowsAndColumns", "Source"]


def _as_names(names: Sequence[str]) -> tuple[str, ...]:
    return check_distinct("obs_column_names", names)


@attrs.frozen(kw_only=True)
class Fields:
    """What of each row is wanted beside `X`.

    Attributes:
        obs_column_names: Columns of `obs`, in this order; all differ, and there is one at least.
    """

    obs_column_names: tuple[str, ...] = attrs.field(converter=_as_names)


class RowsAndColumns(Protocol):
    """The rows and columns that are read. There may be 100 million rows: look at them only if need be."""

    @property
    def obs_joinids(self) -> NDArrayJoinId:
        """Every row that will be asked for, in any order; int64."""

    @property
    def var_joinids(self) -> NDArrayJoinId:
        """Columns of `X`, in the order in which they are wanted; int64, unique."""


class Reader(Protocol):
    """What an epoch is read with."""

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat; called on one thread at a time.

        Returns:
            Pieces that together are these rows in exactly this order. What was taken is not held. Pieces of a
            few thousand rows let work begin while the others are made.
        """

    def close(self) -> None:
        """Give up what is open; whoever waits in `read`, on another thread, need not wait any longer."""


@runtime_checkable
class RandomAccess(Protocol):
    """A Reader that is as fast at single rows as at many: mini-batches are made of it straight away.

    Its methods are called on several threads at once.
    """

    @property
    def n_vars(self) -> int:
        """Number of columns of `X`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values of `X`."""

    def csr(self, obs_joinids: NDArrayJoinId) -> sparse.csr_matrix:
        """Return `X` of the rows of `obs_joinids`, in that order, as a canonical matrix."""

    def fill_dense(self, obs_joinids: NDArrayJoinId, out: NDArrayNumber) -> None:
        """Write `X` of the rows of `obs_joinids` into `out`, of shape (n_rows, n_vars), zeros included."""

    def obs(self, obs_joinids: NDArrayJoinId) -> pd.DataFrame:
        """Return `obs` of the rows of `obs_joinids`, in that order, with a fresh index."""


class Source(Protocol):
    """Where the rows of a query come from; picklable, as workers have copies of it.

    A class that derives from this one need only have `query_ids`, `obs`, `layout` and `open`.

    Attributes:
        query_ids: All rows and columns, by joinid; the order of the rows is that of an unshuffled epoch.
        locator: Address of the layer of an experiment that `X` comes from, if it does.
    """

    query_ids: QueryIDs
    locator: XLocator | None = None

    @property
    def content(self) -> Mapping[str, str]:
        """What it holds, as texts by name: ranks must agree about it, and a snapshot is of it.

        For instance a digest of `X`, an address with a date of modification. Of what this does not tell, no
        change is noticed.
        """
        return {}

    @abstractmethod
    def obs(self, obs_joinids: NDArrayJoinId, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `obs` of some rows, in that order, with a fresh index.

        "soma_joinid" is one of the columns, whatever others there are.

        Raises:
            ValueError: If there is no such column or row.
        """

    def var(self, var_joinids: NDArrayJoinId, column_names: Sequence[str] | None = None) -> pd.DataFrame:
        """Return columns of `var`, all if None, of some columns of `X`, in that order, with a fresh index.

        Raises:
            ValueError: If there is no such column.
        """
        frame = pd.DataFrame({"soma_joinid": var_joinids})
        if column_names is None:
            return frame
        return frame[list(check_names("column_names", column_names, frame.columns, of="a column of var"))]

    def check(self, ids: QueryIDs, fields: Fields) -> None:
        """Raise a ValueError or TypeError unless there are such rows, columns and fields; `X` is not read.

        Called once for a dataset, before all else.
        """
        check_among("obs_joinids", ids.obs_joinids, self.query_ids.obs_joinids)
        check_among("var_joinids", ids.var_joinids, self.query_ids.var_joinids)
        self.obs(ids.obs_joinids[:0], fields.obs_column_names)

    def prepare(self) -> None:
        """Make what `open` needs and is not there yet; called in the process that starts workers."""
        return

    def of_rows(self, ids: QueryIDs) -> Source:
        """Return a source of these rows and columns for another process, or this one.

        A source that can do without the joinids of all rows returns a copy that has these alone, so that a
        part of a large query takes no others along.
        """
        return self

    @property
    def row_tile(self) -> int:
        """Neighbouring rows that are decoded together; 1 where every row can be read by itself."""
        return 1

    @abstractmethod
    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        """Return how the rows are stored, for a dataset with a size "auto"; a sample may be read for it.

        The same on every rank: the order of an epoch depends on it.
        """

    @abstractmethod
    def open(self, ids: RowsAndColumns, fields: Fields, budget: Budget) -> Reader:
        """Return what reads rows; it is closed after an epoch.

        Args:
            ids: The rows that will be asked for, and the columns.
            fields: What of each row is wanted beside `X`.
            budget: The memory that this may take.
        """
