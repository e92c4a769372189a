"""`SOMAReader`: rows of a SOMA experiment, from joinids."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, TypeAlias

import numpy as np
import tiledbsoma as soma

from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_distinct, check_name
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.arrays import ranges, telling_where, to_numpy
from tiledbsoma_ml._soma.blocks import Extents, Pages
from tiledbsoma_ml._soma.obs import ObsColumns, ObsTypes
from tiledbsoma_ml._soma.window import Columns, Room, Window
from tiledbsoma_ml._threads import at_rest

DENSE_READ_BYTES = 64 * 2**20
"""A dense layer is read in blocks of TileDB's buffer, but of no more than this, where nobody sized that."""

DENSE_GAP_ROWS = 64
"""Rows of a dense layer that are this near are read in one request, with those between them."""

GAP_ROWS = 16
"""Rows of a sparse layer that are this near, in one tile, are asked for in one range, with those between.

TileDB decodes whole tiles in any case and pays for every range: dropping ten rows afterwards is cheaper.
"""

MAX_COLUMNS = 2**20
"""Coordinates of so many columns may be asked for, or sixteen times those that are wanted."""

BYTES_PER_JOINID = 48
"""What a row takes up beside its entries, while it is read and given out: its joinid, places, counts."""


class SOMAReader:
    """Reads rows of an `X` layer and of `obs` from a SOMA experiment, wherever it is stored.

    Args:
        X: An open layer, sparse or dense.
        obs: The open `obs` of the same experiment.
        var_joinids: Columns of `X`, in the order in which they are wanted; unique.
        obs_column_names: Columns of `obs`, in the order in which they are wanted.
        obs_joinids: Every row that will be asked for: their `obs` is read once, at the first `read`.
        obs_types: Types that columns of `obs` have in the whole query; found out from these rows if None.
        n_parts: In how many pieces to give out what is read at once.
        use_eager_fetch: Whether to fetch the next entries on a thread while those before are sorted.
        room: What limits the bytes held.
        store: Where to keep rows until they are wanted; in memory of its own if None.
        opened: What to leave when this is closed.
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
        n_parts: int = 1,
        use_eager_fetch: bool = False,
        room: Room | None = None,
        store: Pages | Extents | None = None,
        opened: ExitStack | None = None,
    ) -> None:
        check_obs_column_names(obs_column_names, obs)
        self._X = X
        self._obs = obs
        self._obs_column_names = list(obs_column_names)
        self._obs_joinids = obs_joinids
        self._obs_types = obs_types
        self._obs_columns: ObsColumns | None = None
        self._var_joinids = var_joinids
        self._columns = Columns(var_joinids)
        self._use_eager_fetch = use_eager_fetch
        self._written = X.non_empty_domain()
        self._window_options: dict[str, Any] = {
            "n_parts": n_parts,
            "room": room,
            "store": store or Pages(),
            "may_repeat": _may_repeat(X),
        }
        self._room, self._opened = room, opened
        self._in_use = threading.Lock()
        self._is_closed = False

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat.

        Returns:
            Pieces that together are these rows in exactly this order. What was taken is not held.
        """
        with self._alone():
            if self._is_closed:
                raise RuntimeError("the iterator was closed while rows were read ahead")
            if self._obs_columns is None:
                self._obs_columns = ObsColumns.read(
                    self._obs, self._obs_column_names, self._obs_joinids, self._obs_types
                )
            window = self.read_window(obs_joinids)
        return self._with_obs(obs_joinids, window)

    def close(self) -> None:
        """Close what is open, when no other thread reads it; whoever waits for room waits no longer."""
        if self._room is not None:
            self._room.close()
        with self._alone():
            self._is_closed = True
            if self._opened is not None:
                self._opened.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Use what is open on no other thread; a fork need not wait for whoever waits here."""
        with at_rest():
            self._in_use.acquire()
        try:
            yield
        finally:
            self._in_use.release()

    def read_window(self, obs_joinids: NDArrayJoinId) -> Window:
        """Read the rows of `obs_joinids`, without their `obs`."""
        dtype = np.dtype(self._X.schema.field("soma_data").type.to_pandas_dtype())
        window = Window(obs_joinids, self._columns, dtype, **self._window_options)
        rows, columns = self._existing(window.sorted_ids)
        if len(rows) and len(columns):
            is_dense = isinstance(self._X, soma.DenseNDArray)
            pieces: Callable[..., Generator[Any, None, None]] = _dense_blocks if is_dense else _sparse_entries
            add: Callable[..., None] = window.add_block if is_dense else window.add
            found = pieces(self._X, rows, columns)
            with closing(EagerIterator(found) if self._use_eager_fetch else found) as ahead:
                for piece in ahead:
                    add(*piece)
        return window

    def _existing(self, sorted_ids: NDArrayJoinId) -> tuple[NDArrayJoinId, NDArrayJoinId]:
        """Return the rows and columns among which anything is written; all others are zero.

        Asking for what is beyond the shape of a layer is an error to TileDB, or not, as it is asked.
        """
        (first_row, last_row), (first_col, last_col) = self._written
        start, stop = np.searchsorted(sorted_ids, [first_row, last_row + 1]).tolist()
        are_within = (first_col <= self._var_joinids) & (self._var_joinids <= last_col)
        return sorted_ids[start:stop], self._var_joinids[are_within]

    def _with_obs(self, obs_joinids: NDArrayJoinId, window: Window) -> Iterator[Rows[CSR_IO_Buffer]]:
        assert self._obs_columns is not None
        start = 0
        for X in window:
            joinids = obs_joinids[start : start + len(X)]
            yield Rows(obs_joinids=joinids, X=X, obs=self._obs_columns.take(joinids))
            start += len(X)


def check_obs_column_names(names: Sequence[str], obs: soma.DataFrame) -> None:
    """Raise a ValueError or TypeError unless `names` are distinct columns of `obs`, at least one."""
    for name in check_distinct("obs_column_names", names):
        check_name("obs_column_names", name, obs.keys(), of="a column of obs")


def measure_row_bytes(reader: SOMAReader, obs_joinids: NDArrayJoinId) -> float:
    """Return the bytes that a row takes up while it waits, from a sample of `obs_joinids`."""
    n_runs = max(1, min(6, len(obs_joinids) // 128))
    starts = np.linspace(0, max(0, len(obs_joinids) - 128), n_runs).astype(int)
    sample = np.concatenate([obs_joinids[start : start + 128] for start in starts.tolist()])
    n_bytes = reader.read_window(sample).nbytes / max(1, len(sample))
    return n_bytes + BYTES_PER_JOINID


# X --------------------------------------------------------------------------------------------------------

Entries: TypeAlias = tuple[NDArrayJoinId, NDArrayJoinId, NDArrayNumber]
"""Row and column, as joinids, and value of each of some entries of a layer."""


def row_tile(X: soma.SparseNDArray | soma.DenseNDArray) -> int:
    """Return how many neighbouring rows of a layer are stored, and so decoded, together.

    A tile that is larger than what is written counts as the smallest power of two that holds all rows.
    """
    (_, last_row), _ = X.non_empty_domain()
    return min(_tile(X, "soma_dim_0"), 1 << int(last_row).bit_length())


def _tile(X: soma.SparseNDArray | soma.DenseNDArray, dim: str) -> int:
    return int(json.loads(X.schema_config_options().dims)[dim]["tile"])


def _may_repeat(X: soma.SparseNDArray | soma.DenseNDArray) -> bool:
    """Whether a layer keeps all values that were written to a coordinate, as those of the Census do."""
    return isinstance(X, soma.SparseNDArray) and bool(X.schema_config_options().allows_duplicates)


def _sparse_entries(
    X: soma.SparseNDArray, sorted_ids: NDArrayJoinId, var_joinids: NDArrayJoinId
) -> Generator[Entries, None, None]:
    """Yield the entries of rows and columns of a sparse layer, and some beside them, as they are stored."""
    coords = (_rows_to_read(X, sorted_ids), _columns_to_read(X, var_joinids))
    with telling_where(X, sorted_ids):
        for table in X.read(coords=coords).tables():
            dim_0, dim_1, values = (to_numpy(table[f"soma_{name}"]) for name in ("dim_0", "dim_1", "data"))
            yield dim_0, dim_1, values


def _dense_blocks(
    X: soma.DenseNDArray, sorted_ids: NDArrayJoinId, var_joinids: NDArrayJoinId
) -> Generator[tuple[int, int, NDArrayNumber], None, None]:
    """Yield what holds rows and columns of a dense layer, in blocks: first row, first column and values."""
    for rows, left, right in _blocks(X, sorted_ids, np.sort(var_joinids)):
        top, bottom = int(rows[0]), int(rows[-1])
        with telling_where(X, rows):
            block = X.read(coords=(slice(top, bottom), slice(left, right))).to_numpy()
        yield top, left, block


def _blocks(
    X: soma.DenseNDArray, sorted_ids: NDArrayJoinId, sorted_columns: NDArrayJoinId
) -> Iterator[tuple[NDArrayJoinId, int, int]]:
    """Yield blocks that cover rows and columns of a dense layer: the rows, and the first and last column.

    TileDB decodes tiles anew whenever its buffer is full, so a block fits into that. It is as many tiles
    below each other as fit with all columns, or as many beside each other, or some rows of one tile.
    """
    itemsize = np.dtype(X.schema.field("soma_data").type.to_pandas_dtype()).itemsize
    buffer_bytes = int(X.context.tiledb_config.get("soma.init_buffer_bytes", 2**30))
    n_values = min(buffer_bytes, DENSE_READ_BYTES) // itemsize
    row_tile, col_tile = _tile(X, "soma_dim_0"), _tile(X, "soma_dim_1")
    width = int(sorted_columns[-1] - sorted_columns[0] + 1)
    for rows in _near_runs(sorted_ids, row_tile * max(1, n_values // (row_tile * width))):
        n_tiles = max(1, n_values // int(rows[-1] - rows[0] + 1) // col_tile)
        strips = np.flatnonzero(np.diff(sorted_columns // (n_tiles * col_tile))) + 1
        for columns in np.split(sorted_columns, strips):
            left, right = int(columns[0]), int(columns[-1])
            n_rows = max(1, n_values // (right - left + 1))
            for some in np.split(rows, np.flatnonzero(np.diff((rows - rows[0]) // n_rows)) + 1):
                yield some, left, right


def _near_runs(sorted_ids: NDArrayJoinId, height: int) -> list[NDArrayJoinId]:
    """Return runs of `sorted_ids` that lie in one stretch of so many rows, without a step over a gap."""
    is_start = (np.diff(sorted_ids) > DENSE_GAP_ROWS) | (np.diff(sorted_ids // height) != 0)
    return np.split(sorted_ids, np.flatnonzero(is_start) + 1)


def _rows_to_read(X: soma.SparseNDArray, sorted_ids: NDArrayJoinId) -> slice | NDArrayJoinId:
    """Return the rows to ask the layer for: cheaper to read than `sorted_ids` alone, and covering them."""
    tile = sorted_ids // _tile(X, "soma_dim_0")
    is_start = (np.diff(sorted_ids, prepend=-GAP_ROWS - 1) > GAP_ROWS) | (np.diff(tile, prepend=-1) != 0)
    return ranges(sorted_ids, np.flatnonzero(is_start))


def _columns_to_read(X: soma.SparseNDArray, var_joinids: NDArrayJoinId) -> slice | NDArrayJoinId:
    """Return the columns to ask the layer for: cheaper to read than `var_joinids` alone, and covering them.

    A layer is decoded tile by tile, and TileDB pays for every range of coordinates, so in each tile the
    range from the first to the last wanted column is asked for; what is not wanted is dropped afterwards.
    In a layer of 20,000 columns in tiles of 2,048, 2,000 scattered columns take 2.6 times as long by their
    own coordinates as all columns do; 2,000 neighbours take a fifth of it.
    """
    wanted = np.sort(var_joinids)
    starts = np.flatnonzero(np.diff(wanted // _tile(X, "soma_dim_1"), prepend=-1))
    return ranges(wanted, starts, at_most=max(MAX_COLUMNS, 16 * len(wanted)))
