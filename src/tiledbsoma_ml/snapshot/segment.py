"""The Protocol `Segment`: the seam between the builder of a snapshot and the sources of its rows."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
import pyarrow as pa

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._soma.obs import ascending
from tiledbsoma_ml.snapshot.content import Origin

PIECE_BYTES = 2**21
"""Approximate size of a piece of a shard. Pieces are sorted and written one by one, in the same memory."""


@attrs.frozen(kw_only=True)
class StoredLayer:
    """The type and tiles of a layer of a segment.

    Attributes:
        dtype: Type of the values, little-endian.
        row_tile: Number of neighbouring rows that are decoded together.
    """

    dtype: np.dtype[Any]
    row_tile: int


@attrs.frozen(kw_only=True)
class StoredArray:
    """The type of an array of `obsm`, little-endian, and its number of columns."""

    dtype: np.dtype[Any]
    n_cols: int


@attrs.frozen(kw_only=True, eq=False)
class ShardRows:
    """The rows of a shard.

    Attributes:
        nbytes: Memory of the rows; their values need less.
        pieces: The rows in order, which can be taken once. The columns of a row come in any order. Values
            have the type of the layer, or a narrower one that holds them exactly. The caller may change a
            piece.
    """

    nbytes: int
    pieces: Iterator[CSR_IO_Buffer]


class Segment(Protocol):
    """Consecutive rows of a snapshot, which come from one query or one source.

    `obs` and `var` are called on one thread while another thread reads rows.
    """

    @property
    def ids(self) -> QueryIDs:
        """Joinids of the rows, which ascend and differ, and of the columns of `X`, in their order."""

    @property
    def name(self) -> str:
        """Name of the segment in messages."""

    @property
    def layer_name(self) -> str:
        """The layer that is read by default."""

    @property
    def is_remote(self) -> bool:
        """Whether requests take long."""

    def check(
        self, *, layer_names: Sequence[str], obs_column_names: Sequence[str], obsm_names: Sequence[str]
    ) -> None:
        """Raise a ValueError or TypeError unless these layers, columns and arrays exist; read no rows."""

    def origin(self, *, layer_names: Sequence[str], obsm_names: Sequence[str]) -> Origin:
        """Return the origin of the rows, as the manifest has it."""

    def layer(self, name: str, budget: Budget) -> StoredLayer:
        """Return the type and tiles of a layer."""

    def bytes_per_row(self, layer_name: str, budget: Budget) -> float:
        """Return the approximate size of a row of a layer in memory; this may read a sample."""

    def shards(
        self, layer_name: str, borders: Iterable[tuple[int, int]], *, n_pieces: int, budget: Budget
    ) -> Generator[ShardRows, None, None]:
        """Yield the rows of a layer for each shard.

        Args:
            layer_name: The layer.
            borders: Start and stop of each shard, as row numbers of this segment; they ascend. One is taken
                when its rows are to be read, because then no other process reads them.
            n_pieces: Approximate number of pieces of the largest shard.
            budget: The memory that this may use.
        """

    def obs(self, column_names: Sequence[str]) -> pa.Table:
        """Return columns of `obs` of all rows."""

    def var(self) -> pa.Table:
        """Return all columns of `var`, including "soma_joinid"."""

    def array(self, name: str) -> StoredArray:
        """Return the type of an array of `obsm`, and its number of columns."""

    def array_rows(self, name: str) -> Iterator[NDArrayNumber]:
        """Yield the rows of an array of `obsm`, in order, several rows at a time."""


def in_ascending_order(ids: QueryIDs) -> QueryIDs:
    """Return joinids whose rows ascend and differ."""
    return attrs.evolve(ids, obs_joinids=ascending(ids.obs_joinids))
