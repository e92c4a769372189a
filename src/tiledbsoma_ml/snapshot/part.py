"""`Part`: what a snapshot is made of. The seam between its files and where its rows come from."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
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
"""Rows of a shard are sorted and written so much at a time, about, in memory that is used again."""


@attrs.frozen(kw_only=True)
class StoredLayer:
    """How a part stores a layer.

    Attributes:
        dtype: Type of the values, little-endian.
        row_tile: Neighbouring rows that are decoded together.
    """

    dtype: np.dtype[Any]
    row_tile: int


@attrs.frozen(kw_only=True)
class StoredArray:
    """What an array of `obsm` is like: its type, little-endian, and the number of its columns."""

    dtype: np.dtype[Any]
    n_cols: int


@attrs.frozen(kw_only=True, eq=False)
class ShardRows:
    """The rows of a shard, which were read.

    Attributes:
        nbytes: Memory that they take up; their values take up less.
        pieces: The rows in order, taken once. The columns of a row come in any order. Values come in the type
            of the layer, or in a narrower one that holds them exactly. A piece belongs to whoever takes it.
    """

    nbytes: int
    pieces: Iterator[CSR_IO_Buffer]


class Part(Protocol):
    """Rows that follow each other in a snapshot: those of one query, or of one source.

    `obs` and `var` are called on one thread while the rows are read on another.
    """

    @property
    def ids(self) -> QueryIDs:
        """Rows, ascending, none twice; and columns of `X`, in their order."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def layer_name(self) -> str:
        """The layer that is read if none is named."""

    @property
    def is_remote(self) -> bool:
        """Whether requests take long."""

    def check(
        self, *, layer_names: Sequence[str], obs_column_names: Sequence[str], obsm_names: Sequence[str]
    ) -> None:
        """Raise a ValueError or TypeError unless it has all of these; no row is read."""

    def origin(self, *, layer_names: Sequence[str], obsm_names: Sequence[str]) -> Origin:
        """Return what the manifest says of where the rows come from."""

    def layer(self, name: str, budget: Budget) -> StoredLayer:
        """Return how a layer is stored."""

    def bytes_per_row(self, layer_name: str, budget: Budget) -> float:
        """Return about how many bytes a row of a layer takes up, once it is read; a sample may be read."""

    def shards(
        self, layer_name: str, borders: Sequence[tuple[int, int]], *, n_pieces: int, budget: Budget
    ) -> Generator[ShardRows, None, None]:
        """Yield the rows of a layer from each start to each stop, as numbers of `ids`.

        Args:
            layer_name: The layer.
            borders: Start and stop of each shard; they ascend.
            n_pieces: Number of pieces that the rows of a shard should come in, about.
            budget: The memory that this may take.
        """

    def obs(self, column_names: Sequence[str]) -> pa.Table:
        """Return columns of `obs` of all rows."""

    def var(self) -> pa.Table:
        """Return all columns of `var`, "soma_joinid" being one of them."""

    def array(self, name: str) -> StoredArray:
        """Return what an array of `obsm` is like."""

    def array_rows(self, name: str) -> Iterator[NDArrayNumber]:
        """Yield an array of `obsm`, some rows at a time, as they follow each other."""


def in_ascending_order(ids: QueryIDs) -> QueryIDs:
    """Return joinids with the rows in ascending order, none twice."""
    return attrs.evolve(ids, obs_joinids=ascending(ids.obs_joinids))
