"""Matrices in HDF5 files, as AnnData has them with `backed="r"`: read in the order in which they are stored.

HDF5 decodes chunks of many rows, and each request takes a tenth of a millisecond. So all rows that are asked
for at once wait, compactly, in a `Window`, and are given out in the order asked for.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._budget import Budget, WindowShare
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, absolute_path
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.blocks import Extents, Pages
from tiledbsoma_ml._soma.window import Columns, Room, Window, preload_kernels
from tiledbsoma_ml.memory.frame import Columns as ObsColumns
from tiledbsoma_ml.memory.frame import Frame
from tiledbsoma_ml.memory.matrices import check_dtype

TILE_BYTES = 2**20
"""Neighbouring rows of so many bytes are read in hardly more time than one of them."""

GAP_BYTES = 2**18
"""Rows that are this near are read in one request, with those between them."""

PIECE_BYTES = 2**24
"""So much is read in one request at most, but for a row that is larger."""

CACHE_BYTES = 2**26
"""HDF5 keeps so much of what it has decoded."""

Entries: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArrayNumber]
"""Row, column and value of each of some entries."""


@attrs.frozen(kw_only=True)
class BackedMatrix:
    """A matrix in an HDF5 file, sparse by rows or dense; nothing is open between two epochs.

    Attributes:
        path: Path of the file.
        name: Name of the group or dataset in it.
        shape: Number of rows and columns.
        dtype: Type of the values.
        is_sparse: Whether it is a group of three arrays.
        stored_bytes: Size of its values, and of their columns.
        chunk_bytes: Size of what HDF5 decodes at once.
        version: Size of the file, and when it was last changed.
    """

    path: Path
    name: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    is_sparse: bool
    stored_bytes: int
    chunk_bytes: int
    version: str

    @classmethod
    def of(cls, X: Any) -> BackedMatrix | None:
        """Return the matrix if it is one of an HDF5 file.

        Raises:
            TypeError: If it is in a file of another format, or its values are of another type.
            ValueError: If the file is open for writing.
        """
        h5py: Any = sys.modules.get("h5py")
        if h5py is None:
            return None
        node = X if isinstance(X, h5py.Dataset) else getattr(X, "group", None)
        if not isinstance(node, h5py.Dataset | h5py.Group):
            return None
        path = absolute_path(node.file.filename)
        if node.file.mode != "r" or not path.is_file():
            raise ValueError(
                f"X={node.file.filename!r} must be a file that is open for reading only, mode 'r' and not "
                f"{node.file.mode!r}; try anndata.read_h5ad(path, backed='r')."
            )
        parts = [node] if isinstance(node, h5py.Dataset) else [node["indices"], node["data"]]
        check_dtype(parts[-1].dtype)
        n_bytes = [part.dtype.itemsize for part in parts]
        if len(X.shape) != 2:
            raise ValueError(f"X must have two dimensions, not the shape {X.shape}; choose another dataset.")
        return cls(
            path=path,
            name=node.name,
            shape=(int(X.shape[0]), int(X.shape[1])),
            dtype=parts[-1].dtype.newbyteorder("="),
            is_sparse=len(parts) == 2,
            stored_bytes=sum(part.size * size for part, size in zip(parts, n_bytes, strict=True)),
            chunk_bytes=sum(
                int(np.prod(part.chunks or (0,))) * size for part, size in zip(parts, n_bytes, strict=True)
            ),
            version=_version(path),
        )

    @property
    def row_tile(self) -> int:
        """Neighbouring rows that are read in hardly more time than one: a power of two."""
        bytes_per_row = max(1.0, self.stored_bytes / max(1, self.shape[0]))
        n_rows = min(max(TILE_BYTES, self.chunk_bytes) / bytes_per_row, self.shape[0])
        return 1 << round(math.log2(max(1.0, n_rows)))

    def share(self, budget: Budget) -> WindowShare:
        """Return how rows wait within a budget."""
        return budget.share_of_windows(self.stored_bytes)

    def window_rows(self, budget: Budget, bytes_per_row: float) -> int:
        """Return how many rows may wait together."""
        return max(1, int(self.share(budget).planned_bytes / bytes_per_row))

    def n_bytes(self, rows: NDArray[np.int64], numbers: NDArray[np.int64]) -> int:
        """Return the size of some rows of some columns while they wait."""
        preload_kernels()
        window = Window(rows, Columns(numbers), self.dtype)
        with closing(self.open()) as X:
            X.fill(window, numbers)
        return window.nbytes

    def content(self) -> Mapping[str, str]:
        """The address of the matrix, and when the file was last changed."""
        return {"X": f"{self.name} of {self.path}", "file": self.version}

    def open(self) -> OpenMatrix:
        """Return the matrix, open.

        Raises:
            ValueError: If the file has changed.
        """
        if _version(self.path) != self.version:
            raise ValueError(
                f"{str(self.path)!r} must stay as it is, but has changed; make the source of the file anew."
            )
        return OpenMatrix(self)


def _version(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"


class OpenMatrix:
    """A matrix in an open file; may be used by several threads."""

    def __init__(self, matrix: BackedMatrix) -> None:
        import h5py

        self._matrix = matrix
        self._file = h5py.File(matrix.path, "r", rdcc_nbytes=CACHE_BYTES)
        self._lock = threading.Lock()
        self._starts = self._read_starts() if matrix.is_sparse else None

    def fill(self, window: Window, columns: NDArray[np.int64]) -> None:
        """Put the rows that a window lacks into it.

        Raises:
            RuntimeError: If the file is closed meanwhile.
        """
        if not len(window.sorted_ids) or not len(columns):
            return
        if self._starts is None:
            left, right = int(columns.min()), int(columns.max()) + 1
            row_bytes = np.full(len(window.sorted_ids), (right - left) * self._matrix.dtype.itemsize)
            for first, last in _runs(window.sorted_ids, row_bytes):
                window.add_block(first, left, self._get("", (slice(first, last + 1), slice(left, right))))
        else:
            entry_bytes = self._matrix.dtype.itemsize + 4
            row_bytes = (self._starts[window.sorted_ids + 1] - self._starts[window.sorted_ids]) * entry_bytes
            for first, last in _runs(window.sorted_ids, row_bytes):
                window.add(*self._entries(self._starts[first : last + 2], first))

    def close(self) -> None:
        """Close the file, when what is being read from it has been read."""
        with self._lock:
            self._file.close()

    def _entries(self, starts: NDArray[np.int64], first: int) -> Entries:
        where = slice(int(starts[0]), int(starts[-1]))
        rows = np.repeat(np.arange(first, first + len(starts) - 1), np.diff(starts))
        return rows, self._get("indices", where).astype(np.int64), self._get("data", where)

    def _get(self, part: str, where: Any) -> Any:
        """Return some of the matrix, or of one of its three arrays, in the byte order of this machine."""
        with self._lock:
            if not self._file:
                raise RuntimeError(f"{str(self._matrix.path)!r} was closed while rows were read from it")
            node = self._file[f"{self._matrix.name}/{part}" if part else self._matrix.name]
            found = node[where]
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    def _read_starts(self) -> NDArray[np.int64]:
        starts: NDArray[np.int64] = self._get("indptr", slice(None)).astype(np.int64)
        n_rows, n_values = self._matrix.shape[0], len(self._file[f"{self._matrix.name}/data"])
        is_whole = len(starts) == n_rows + 1 and starts[0] == 0 and starts[-1] == n_values
        if not is_whole or (starts[1:] < starts[:-1]).any():
            self._file.close()
            raise ValueError(
                f"{self._matrix.name} of {str(self._matrix.path)!r} must have an indptr that ascends from 0 "
                "to the number of its values; write the file anew."
            )
        return starts


def _runs(rows: NDArray[np.int64], row_bytes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the first and last row of each request for ascending `rows`, of which each has so many bytes."""
    mean = max(1.0, float(row_bytes.sum()) / len(rows))
    between = (np.diff(rows, prepend=rows[0] - 1) - 1) * mean
    is_start = between > GAP_BYTES
    ends = np.cumsum(row_bytes + np.where(is_start, 0, between))
    is_start |= np.diff(ends // PIECE_BYTES, prepend=0) != 0
    is_start[0] = True
    starts = np.flatnonzero(is_start)
    yield from zip(rows[starts].tolist(), rows[np.append(starts[1:], len(rows)) - 1].tolist(), strict=True)


class BackedReader:
    """Reads rows of a matrix in a file, and of `obs`.

    Args:
        matrix: The matrix.
        frame: Finds rows by joinid.
        obs: Columns of `obs`.
        numbers: Numbers of the columns of `X`, in the order in which they are wanted.
        budget: The memory, or the space in a file, in which rows wait.
    """

    def __init__(
        self,
        matrix: BackedMatrix,
        frame: Frame,
        obs: ObsColumns,
        numbers: NDArray[np.int64],
        budget: Budget,
    ) -> None:
        preload_kernels()
        self._frame, self._obs = frame, obs
        self._numbers, self._columns, self._dtype = numbers, Columns(numbers), matrix.dtype
        share, folder = matrix.share(budget), budget.window_dir
        self._n_parts, self._room = share.n_parts, Room(share.n_bytes)
        self._store = Pages() if folder is None else Extents(folder, share.extent_bytes)
        self._matrix = matrix.open()

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat.

        Returns:
            Pieces that together are these rows in exactly this order. What was taken is not held.
        """
        rows = self._frame.rows(obs_joinids)
        options: dict[str, Any] = {"n_parts": self._n_parts, "room": self._room, "store": self._store}
        window = Window(rows, self._columns, self._dtype, may_repeat=True, **options)
        self._matrix.fill(
            window, self._numbers
        )  # here, not when it is iterated: what came before is used meanwhile
        return self._with_obs(obs_joinids, rows, window)

    def close(self) -> None:
        """Close the file; whoever waits for the use of rows that were read, or reads, gets a RuntimeError."""
        self._room.close()
        self._matrix.close()

    def _with_obs(
        self, obs_joinids: NDArrayJoinId, rows: NDArray[np.int64], window: Window
    ) -> Iterator[Rows[CSR_IO_Buffer]]:
        start = 0
        for X in window:
            piece = slice(start, start + len(X))
            yield Rows(obs_joinids=obs_joinids[piece], X=X, obs=self._obs.take(rows[piece]))
            start += len(X)
