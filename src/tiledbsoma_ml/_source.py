"""The Protocols `Source`, `Reader` and `RandomAccess`: the seam between the plan and the storage.

A source holds the rows of one query. `docs/guides/sources.md` has one of forty lines, and
`tiledbsoma_ml.testing.check_source` checks the promises that are made here.
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

__all__ = ["Fields", "RandomAccess", "Reader", "RowsAndColumns", "Source", "TiledReader"]


def _as_names(names: Sequence[str]) -> tuple[str, ...]:
    return check_distinct("obs_column_names", names)


@attrs.frozen(kw_only=True)
class Fields:
    """The fields of each row that a reader returns beside `X`.

    Attributes:
        obs_column_names: Columns of `obs`, in this order. There is at least one, and all differ.
    """

    obs_column_names: tuple[str, ...] = attrs.field(converter=_as_names)


class RowsAndColumns(Protocol):
    """The rows and columns that a reader reads.

    There may be 100 million rows, and a plan may compute them only now: use `obs_joinids` only if necessary.
    """

    @property
    def obs_joinids(self) -> NDArrayJoinId:
        """Joinids of all rows that the reader may be asked for, in any order; int64."""

    @property
    def var_joinids(self) -> NDArrayJoinId:
        """Joinids of the columns of `X`, in the order in which the reader returns them; int64, unique."""


class Reader(Protocol):
    """An object that reads rows of a source during an epoch."""

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat; called on one thread at a time.

        Returns:
            Pieces that together are these rows, in exactly this order. The reader does not keep a piece that
            was taken. Pieces of a few thousand rows let work begin while the reader makes the others.
        """

    def close(self) -> None:
        """Close everything that is open, and end a `read` that waits on another thread."""


@runtime_checkable
class TiledReader(Protocol):
    """A Reader that decodes neighbouring rows together, so that many small reads cost more than a large one.

    It is asked for the rows of several IO batches at once, where that decodes less. The methods are called on
    the thread that calls `read`.
    """

    @property
    def row_tile(self) -> int:
        """Number of neighbouring rows that are decoded together."""

    def n_rows_held(self) -> int:
        """Return how many rows the next read may have, so that memory holds them; at least 1."""

    def read_some(self, obs_joinids: NDArrayJoinId) -> tuple[int, Iterator[Rows[CSR_IO_Buffer]]]:
        """Read the first rows of `obs_joinids`, as many as memory holds; at least one.

        Returns:
            The number of these rows, and their pieces as `read` gives them.
        """


@runtime_checkable
class RandomAccess(Protocol):
    """A Reader that reads single rows as fast as many rows: mini-batches are made from it directly.

    Several threads call its methods at once.
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
    """The rows of a query, wherever they are stored; picklable, because workers get copies of it.

    A class that derives from this one must only have `query_ids`, `obs`, `layout` and `open`.

    Attributes:
        query_ids: Joinids of all rows and columns. The order of the rows is that of an unshuffled epoch.
        locator: Address of the layer of an experiment that `X` comes from; None if it comes from elsewhere.
    """

    query_ids: QueryIDs
    locator: XLocator | None = None

    @property
    def content(self) -> Mapping[str, str]:
        """The facts that identify what the source holds, as text by name.

        Ranks must agree on them, and a snapshot is made of the source with these facts. Examples are a digest
        of `X`, or an address with a date of modification. A change that no fact shows is not noticed.
        """
        return {}

    @abstractmethod
    def obs(self, obs_joinids: NDArrayJoinId, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `obs` for these rows, in this order, with a fresh index.

        "soma_joinid" can always be asked for.

        Raises:
            ValueError: If a column or row does not exist.
        """

    def var(self, var_joinids: NDArrayJoinId, column_names: Sequence[str] | None = None) -> pd.DataFrame:
        """Return columns of `var` (all if None) for these columns of `X`, in this order, with a fresh index.

        Raises:
            ValueError: If a column does not exist.
        """
        frame = pd.DataFrame({"soma_joinid": var_joinids})
        if column_names is None:
            return frame
        return frame[list(check_names("column_names", column_names, frame.columns, of="a column of var"))]

    def check(self, ids: QueryIDs, fields: Fields) -> None:
        """Raise a ValueError or TypeError unless these rows, columns and fields exist; do not read `X`.

        A dataset calls this once, before any other method.
        """
        check_among("obs_joinids", ids.obs_joinids, self.query_ids.obs_joinids)
        check_among("var_joinids", ids.var_joinids, self.query_ids.var_joinids)
        self.obs(ids.obs_joinids[:0], fields.obs_column_names)

    def prepare(self) -> None:
        """Make everything that `open` needs; called in the training process, before workers start."""
        return

    def of_rows(self, ids: QueryIDs) -> Source:
        """Return a source of these rows and columns, which may be pickled for another process.

        A source that does not need the joinids of all rows returns a copy that has these rows only. Then the
        pickled copy is small, also where the query is large.
        """
        return self

    @property
    def row_tile(self) -> int:
        """Number of neighbouring rows that are decoded together; 1 if each row can be read by itself."""
        return 1

    @abstractmethod
    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        """Return how the rows are stored, for a dataset with a size "auto"; this may read a sample.

        It must be the same on every rank, because the order of an epoch depends on it.
        """

    @abstractmethod
    def open(self, ids: RowsAndColumns, fields: Fields, budget: Budget) -> Reader:
        """Return a reader, which the caller closes after an epoch.

        Args:
            ids: The rows that it may be asked for, and the columns that it returns.
            fields: The fields of each row that it returns beside `X`.
            budget: The memory that it may use.
        """
