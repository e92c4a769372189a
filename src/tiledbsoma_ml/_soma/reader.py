"""`SOMAReader`: reads rows of a SOMA experiment."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import tiledbsoma as soma

from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_obs_column_names
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerIterator, interleaved
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.arrays import naming_rows, ranges, to_numpy
from tiledbsoma_ml._soma.held_rows import ByteLimit, Columns, HeldRows
from tiledbsoma_ml._soma.obs import ObsColumns, ObsTypes
from tiledbsoma_ml._soma.stores import Extents, Pages
from tiledbsoma_ml._threads import at_rest

DENSE_READ_BYTES = 64 * 2**20
"""Largest block of a dense layer that is read at once; TileDB's buffer can be larger."""

DENSE_GAP_ROWS = 64
"""Largest gap between two rows of a dense layer that are read at once, together with the rows in the gap."""

GAP_ROWS = 16
"""Largest gap between two rows of a tile of a sparse layer that are read in one range, with those between.

TileDB decodes whole tiles in any case, and each range costs time: dropping ten rows afterwards is cheaper.
"""

MAX_COLUMNS = 2**20
"""Largest number of columns to ask for, unless sixteen times the wanted columns are more."""

MAX_ROWS = 2**31 - 1
"""Largest number of rows of a read, which are numbered by int32."""

BYTES_PER_JOINID = 48
"""Bytes of a held row beside its entries: its joinid, indices and counts."""


class SOMAReader:
    """A reader of the rows of an `X` layer, and of their `obs`, from a SOMA experiment, local or remote.

    Args:
        X: The open layer, sparse or dense.
        obs: The open `obs` of the same experiment.
        var_joinids: Columns of `X` to return, in this order; unique.
        obs_column_names: Columns of `obs` to return, in this order.
        obs_joinids: All rows that may be asked for. Their `obs` is read once, at the first `read`.
        obs_types: Types that the columns of `obs` have in the query; if None, these rows decide.
        n_pieces: Number of pieces of a read.
        use_eager_fetch: Whether the next entries are fetched on threads while those before are sorted.
        n_streams: Number of threads that fetch entries of a sparse layer, each of some rows of a read.
        byte_limit: Limit to the bytes of held rows; None for no limit.
        read_bytes: Bytes that the rows of one read may take.
        store: The store of held rows; pages of memory of its own if None.
        pool: The memory in which pieces are given out; new memory if None.
        opened: Contexts to leave when this is closed.
    """

    def __init__(
        self,
        X: soma.SparseNDArray | soma.DenseNDArray,
        obs: soma.DataFrame,
        var_joinids: NDArrayJoinId,
        *,
        obs_column_names: Sequence[str],
        obs_joinids: NDArrayJoinId,
        obs_types: ObsTypes | None = None,
        n_pieces: int = 1,
        use_eager_fetch: bool = False,
        n_streams: int = 1,
        byte_limit: ByteLimit | None = None,
        read_bytes: float = math.inf,
        store: Pages | Extents | None = None,
        pool: Pool | None = None,
        opened: ExitStack | None = None,
    ) -> None:
        check_obs_column_names(obs_column_names, obs.keys())
        self._X = X
        self._obs = obs
        self._obs_column_names = list(obs_column_names)
        self._obs_joinids = obs_joinids
        self._obs_types = obs_types
        self._obs_columns: ObsColumns | None = None
        self._var_joinids = var_joinids
        self._columns = Columns(var_joinids)
        self._dtype: np.dtype[Any] = np.dtype(X.schema.field("soma_data").type.to_pandas_dtype())
        self._use_eager_fetch, self._n_streams = use_eager_fetch, n_streams
        self._written = X.non_empty_domain()
        self._held_options: dict[str, Any] = {
            "n_pieces": n_pieces,
            "byte_limit": byte_limit,
            "store": store or Pages(),
            "pool": pool,
            "may_repeat": _may_repeat(X),
        }
        self._byte_limit, self._opened = byte_limit, opened
        self._read_bytes, self._row_bytes = read_bytes, 0.0
        self._in_use = threading.Lock()
        self._is_closed = False

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat.

        Returns:
            Pieces that together are these rows, in exactly this order.
        """
        return self._with_obs(obs_joinids, self._hold_with_obs(obs_joinids, may_drop=False))

    def read_some(self, obs_joinids: NDArrayJoinId) -> tuple[int, Iterator[Rows[CSR_IO_Buffer]]]:
        """Read the first rows of `obs_joinids`, as many as memory holds.

        Returns:
            The number of these rows, and the pieces that together are these rows.
        """
        held = self._hold_with_obs(obs_joinids, may_drop=True)
        return held.n_rows, self._with_obs(obs_joinids, held)

    def _hold_with_obs(self, obs_joinids: NDArrayJoinId, *, may_drop: bool) -> HeldRows:
        with self._alone():
            self._check_open()
            obs = self._read_obs()
            with closing(
                EagerIterator(obs) if self._use_eager_fetch and not self._obs_columns else obs
            ) as columns:
                held = self.hold(obs_joinids, may_drop=may_drop)
                self._obs_columns = next(columns)
            self._row_bytes = held.nbytes / max(1, held.n_rows) + BYTES_PER_JOINID
        return held

    def _read_obs(self) -> Generator[ObsColumns, None, None]:
        """Yield the columns of `obs`, which are read once."""
        yield self._obs_columns or ObsColumns.read(
            self._obs, self._obs_column_names, self._obs_joinids, self._obs_types
        )

    @cached_property
    def row_tile(self) -> int:
        """Number of neighbouring rows that are decoded together."""
        return row_tile(self._X)

    def n_rows_held(self) -> int:
        """Return how many rows a read may have: the last one tells their size, before it a sample does."""
        if not self._row_bytes:
            entry_bytes = self._columns.dtype.itemsize + self._dtype.itemsize
            most = self._columns.n * entry_bytes + BYTES_PER_JOINID
            if most * len(self._obs_joinids) <= self._read_bytes:
                return max(1, len(self._obs_joinids))
            with self._alone():
                self._check_open()
                self._row_bytes = measure_row_bytes(self, self._obs_joinids)
        return max(1, int(min(self._read_bytes / self._row_bytes, MAX_ROWS)))

    def close(self) -> None:
        """End the waits of reads, and close the arrays when no other thread reads them."""
        if self._byte_limit is not None:
            self._byte_limit.close()
        with self._alone():
            self._is_closed = True
            if self._opened is not None:
                self._opened.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the iterator was closed while rows were read ahead")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one thread at a time use the open arrays; a fork does not wait for a thread that waits here."""
        with at_rest():
            self._in_use.acquire()
        try:
            yield
        finally:
            self._in_use.release()

    def hold(self, obs_joinids: NDArrayJoinId, *, may_drop: bool = False) -> HeldRows:
        """Read the rows of `obs_joinids`, without their `obs`, and hold them, or the first ones of them."""
        held = HeldRows(obs_joinids, self._columns, self._dtype, may_drop=may_drop, **self._held_options)
        rows, columns = self._existing(held.sorted_joinids)
        if len(rows) and len(columns):
            is_dense = isinstance(self._X, soma.DenseNDArray)
            read: Callable[..., Generator[Any, None, None]] = _dense_blocks if is_dense else _sparse_entries
            add: Callable[..., None] = held.add_block if is_dense else held.add
            n_streams = 1 if is_dense or not self._use_eager_fetch else self._n_streams
            streams = [read(self._X, some, columns) for some in _whole_tiles(self._X, rows, n_streams)]
            with closing(interleaved(streams) if self._use_eager_fetch else streams[0]) as ahead:
                for entries in ahead:
                    add(*entries)
        return held

    def _existing(self, sorted_joinids: NDArrayJoinId) -> tuple[NDArrayJoinId, NDArrayJoinId]:
        """Return those rows and columns that may have entries; all others are zero.

        TileDB can raise an error if it is asked for coordinates outside the shape of a layer.
        """
        (first_row, last_row), (first_col, last_col) = self._written
        start, stop = np.searchsorted(sorted_joinids, [first_row, last_row + 1]).tolist()
        are_within = (first_col <= self._var_joinids) & (self._var_joinids <= last_col)
        return sorted_joinids[start:stop], self._var_joinids[are_within]

    def _with_obs(self, obs_joinids: NDArrayJoinId, held: HeldRows) -> Iterator[Rows[CSR_IO_Buffer]]:
        assert self._obs_columns is not None
        start = 0
        for X in held:
            joinids = obs_joinids[start : start + len(X)]
            yield Rows(obs_joinids=joinids, X=X, obs=self._obs_columns.take(joinids))
            start += len(X)


def measure_row_bytes(reader: SOMAReader, obs_joinids: NDArrayJoinId) -> float:
    """Return the mean size of a held row, measured on a sample of `obs_joinids`."""
    n_runs = max(1, min(6, len(obs_joinids) // 128))
    starts = np.linspace(0, max(0, len(obs_joinids) - 128), n_runs).astype(int)
    sample = np.concatenate([obs_joinids[start : start + 128] for start in starts.tolist()])
    held = reader.hold(sample)
    n_bytes = held.nbytes
    for _ in held:  # which frees their memory
        pass
    return n_bytes / max(1, len(sample)) + BYTES_PER_JOINID


# X --------------------------------------------------------------------------------------------------------

Entries: TypeAlias = tuple[NDArrayJoinId, NDArrayJoinId, NDArrayNumber]
"""The rows and columns, as joinids, and the values of entries of a layer."""


def row_tile(X: soma.SparseNDArray | soma.DenseNDArray) -> int:
    """Return the number of neighbouring rows of a layer that are decoded together.

    If a tile is larger than all written rows, this is the smallest power of two that is not below their
    number.
    """
    (_, last_row), _ = X.non_empty_domain()
    return min(_tile(X, "soma_dim_0"), 1 << int(last_row).bit_length())


def _tile(X: soma.SparseNDArray | soma.DenseNDArray, dim: str) -> int:
    return int(json.loads(X.schema_config_options().dims)[dim]["tile"])


def _may_repeat(X: soma.SparseNDArray | soma.DenseNDArray) -> bool:
    """Return whether a layer keeps all values that were written to a coordinate, as in the Census."""
    return isinstance(X, soma.SparseNDArray) and bool(X.schema_config_options().allows_duplicates)


def _sparse_entries(
    X: soma.SparseNDArray, sorted_joinids: NDArrayJoinId, var_joinids: NDArrayJoinId
) -> Generator[Entries, None, None]:
    """Yield the entries of these rows and columns of a sparse layer, as they are stored, and some others."""
    coords = (_rows_to_read(X, sorted_joinids), _columns_to_read(X, var_joinids))
    with naming_rows(X, sorted_joinids):
        for table in X.read(coords=coords).tables():
            dim_0, dim_1, values = (to_numpy(table[f"soma_{name}"]) for name in ("dim_0", "dim_1", "data"))
            yield dim_0, dim_1, values


def _dense_blocks(
    X: soma.DenseNDArray, sorted_joinids: NDArrayJoinId, var_joinids: NDArrayJoinId
) -> Generator[tuple[int, int, NDArrayNumber], None, None]:
    """Yield blocks that cover these rows and columns of a dense layer: first row, first column and values."""
    for rows, left, right in _blocks(X, sorted_joinids, np.sort(var_joinids)):
        top, bottom = int(rows[0]), int(rows[-1])
        with naming_rows(X, rows):
            block = X.read(coords=(slice(top, bottom), slice(left, right))).to_numpy()
        yield top, left, block


def _blocks(
    X: soma.DenseNDArray, sorted_joinids: NDArrayJoinId, sorted_columns: NDArrayJoinId
) -> Iterator[tuple[NDArrayJoinId, int, int]]:
    """Yield blocks that cover these rows and columns: the rows of each, and its first and last column.

    TileDB decodes tiles again each time its buffer is full, so a block must fit into the buffer. A block is
    some tiles below each other with all columns, or some tiles beside each other, or some rows of one tile.
    """
    itemsize = np.dtype(X.schema.field("soma_data").type.to_pandas_dtype()).itemsize
    buffer_bytes = int(X.context.tiledb_config.get("soma.init_buffer_bytes", 2**30))
    n_values = min(buffer_bytes, DENSE_READ_BYTES) // itemsize
    row_tile, col_tile = _tile(X, "soma_dim_0"), _tile(X, "soma_dim_1")
    width = int(sorted_columns[-1] - sorted_columns[0] + 1)
    for rows in _near_runs(sorted_joinids, row_tile * max(1, n_values // (row_tile * width))):
        n_tiles = max(1, n_values // int(rows[-1] - rows[0] + 1) // col_tile)
        strips = np.flatnonzero(np.diff(sorted_columns // (n_tiles * col_tile))) + 1
        for columns in np.split(sorted_columns, strips):
            left, right = int(columns[0]), int(columns[-1])
            n_rows = max(1, n_values // (right - left + 1))
            for some in np.split(rows, np.flatnonzero(np.diff((rows - rows[0]) // n_rows)) + 1):
                yield some, left, right


def _near_runs(sorted_joinids: NDArrayJoinId, height: int) -> list[NDArrayJoinId]:
    """Return `sorted_joinids` in groups without large gaps, none of which crosses a multiple of `height`."""
    is_start = (np.diff(sorted_joinids) > DENSE_GAP_ROWS) | (np.diff(sorted_joinids // height) != 0)
    return np.split(sorted_joinids, np.flatnonzero(is_start) + 1)


def _whole_tiles(
    X: soma.SparseNDArray | soma.DenseNDArray, sorted_joinids: NDArrayJoinId, n_parts: int
) -> list[NDArrayJoinId]:
    """Return rows in up to `n_parts` parts of about equal size; no two parts have rows of the same tile."""
    tile = sorted_joinids // _tile(X, "soma_dim_0")
    cuts = np.linspace(0, len(tile), n_parts + 1)[1:-1].astype(np.int64)
    borders = np.unique(np.searchsorted(tile, tile[cuts])) if len(cuts) else cuts
    return [part for part in np.split(sorted_joinids, borders) if len(part)]


def _rows_to_read(X: soma.SparseNDArray, sorted_joinids: NDArrayJoinId) -> slice | NDArrayJoinId:
    """Return the rows to ask a layer for, which cover `sorted_joinids` and are faster to read."""
    tile = sorted_joinids // _tile(X, "soma_dim_0")
    is_start = (np.diff(sorted_joinids, prepend=-GAP_ROWS - 1) > GAP_ROWS) | (np.diff(tile, prepend=-1) != 0)
    return ranges(sorted_joinids, np.flatnonzero(is_start))


def _columns_to_read(X: soma.SparseNDArray, var_joinids: NDArrayJoinId) -> slice | NDArrayJoinId:
    """Return the columns to ask a layer for, which cover `var_joinids` and are faster to read.

    TileDB decodes whole tiles, and each range of coordinates costs time. So this returns, for each tile, the
    range from the first to the last wanted column; other columns are dropped afterwards. In a layer of 20,000
    columns in tiles of 2,048, reading 2,000 scattered columns by their own coordinates takes 2.6 times as
    long as reading all columns; reading 2,000 neighbours takes a fifth of that.
    """
    wanted = np.sort(var_joinids)
    starts = np.flatnonzero(np.diff(wanted // _tile(X, "soma_dim_1"), prepend=-1))
    return ranges(wanted, starts, at_most=max(MAX_COLUMNS, 16 * len(wanted)))
