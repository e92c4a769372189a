"""Matrices in HDF5 files, like those of an AnnData that was opened with `backed="r"`.

HDF5 decodes chunks of many rows, and each request takes a tenth of a millisecond. So all rows of a read are
read in the order in which they are stored, into `HeldRows`, which give them out in the order asked for.
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
from tiledbsoma_ml._soma.held_rows import ByteLimit, Columns, HeldRows, preload_kernels
from tiledbsoma_ml._soma.stores import Extents, Pages
from tiledbsoma_ml.memory.frame import Columns as ObsColumns
from tiledbsoma_ml.memory.frame import Frame
from tiledbsoma_ml.memory.matrices import check_dtype

TILE_BYTES = 2**20
"""Number of bytes of neighbouring rows that are read in hardly more time than one of these rows."""

GAP_BYTES = 2**18
"""Largest gap between two rows that are read in one request, together with the rows in the gap."""

REQUEST_BYTES = 2**24
"""Largest size of a request, unless one row is larger."""

CACHE_BYTES = 2**26
"""Size of HDF5's cache of decoded chunks."""

Entries: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArrayNumber]
"""The rows, columns and values of entries."""


@attrs.frozen(kw_only=True)
class BackedMatrix:
    """A matrix in an HDF5 file, sparse by rows or dense; between two epochs the file is closed.

    Attributes:
        path: Path of the file.
        name: Name of the group or dataset in the file.
        shape: Number of rows and columns.
        dtype: Type of the values.
        is_sparse: Whether the matrix is a group of three arrays.
        stored_bytes: Size of its values and columns.
        chunk_bytes: Size of a decoded chunk.
        version: Size of the file, and the time of its last change.
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
        """Return `X` as a matrix in an HDF5 file; None if it is not in one.

        Raises:
            TypeError: If its values are of another type.
            ValueError: If the file is open for writing, or `X` does not have two dimensions.
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
        arrays = [node] if isinstance(node, h5py.Dataset) else [node["indices"], node["data"]]
        check_dtype(arrays[-1].dtype)
        if len(X.shape) != 2:
            raise ValueError(f"X must have two dimensions, not the shape {X.shape}; choose another dataset.")
        return cls(
            path=path,
            name=node.name,
            shape=(int(X.shape[0]), int(X.shape[1])),
            dtype=arrays[-1].dtype.newbyteorder("="),
            is_sparse=len(arrays) == 2,
            stored_bytes=sum(array.size * array.dtype.itemsize for array in arrays),
            chunk_bytes=sum(int(np.prod(array.chunks or (0,))) * array.dtype.itemsize for array in arrays),
            version=_version(path),
        )

    @property
    def row_tile(self) -> int:
        """Number of neighbouring rows that are read in hardly more time than one; a power of two."""
        bytes_per_row = max(1.0, self.stored_bytes / max(1, self.shape[0]))
        n_rows = min(max(TILE_BYTES, self.chunk_bytes) / bytes_per_row, self.shape[0])
        return 1 << round(math.log2(max(1.0, n_rows)))

    def share(self, budget: Budget) -> WindowShare:
        """Return the share of a budget that windows of this matrix get."""
        return budget.share_of_windows(self.stored_bytes)

    def window_rows(self, budget: Budget, bytes_per_row: float) -> int:
        """Return the number of rows that a window may hold."""
        return max(1, int(self.share(budget).planned_bytes / bytes_per_row))

    def n_bytes(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> int:
        """Return the size of these rows and columns in a window."""
        preload_kernels()
        held = HeldRows(rows, Columns(columns), self.dtype)
        with closing(self.open()) as X:
            X.fill(held, columns)
        return held.nbytes

    def content(self) -> Mapping[str, str]:
        """Return the address of the matrix, and the version of the file."""
        return {"X": f"{self.name} of {self.path}", "file": self.version}

    def open(self) -> OpenMatrix:
        """Open the file, and return the matrix.

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
    """A matrix in an open file; several threads may use this."""

    def __init__(self, matrix: BackedMatrix) -> None:
        import h5py

        self._matrix = matrix
        self._file = h5py.File(matrix.path, "r", rdcc_nbytes=CACHE_BYTES)
        self._lock = threading.Lock()
        self._starts = self._read_starts() if matrix.is_sparse else None

    def fill(self, held: HeldRows, columns: NDArray[np.int64]) -> None:
        """Read the rows that are to be held, and add them.

        Raises:
            RuntimeError: If the file is closed meanwhile.
        """
        if not len(held.sorted_joinids) or not len(columns):
            return
        if self._starts is None:
            left, right = int(columns.min()), int(columns.max()) + 1
            row_bytes = np.full(len(held.sorted_joinids), (right - left) * self._matrix.dtype.itemsize)
            for first, last in _runs(held.sorted_joinids, row_bytes):
                held.add_block(first, left, self._get("", (slice(first, last + 1), slice(left, right))))
        else:
            entry_bytes = self._matrix.dtype.itemsize + 4
            row_bytes = (
                self._starts[held.sorted_joinids + 1] - self._starts[held.sorted_joinids]
            ) * entry_bytes
            for first, last in _runs(held.sorted_joinids, row_bytes):
                held.add(*self._entries(self._starts[first : last + 2], first))

    def close(self) -> None:
        """Close the file, when no other thread reads from it."""
        with self._lock:
            self._file.close()

    def _entries(self, starts: NDArray[np.int64], first: int) -> Entries:
        entries = slice(int(starts[0]), int(starts[-1]))
        rows = np.repeat(np.arange(first, first + len(starts) - 1), np.diff(starts))
        return rows, self._get("indices", entries).astype(np.int64), self._get("data", entries)

    def _get(self, array: str, selection: Any) -> Any:
        """Return a selection of one of the three arrays, or of the dense matrix, in native byte order."""
        with self._lock:
            if not self._file:
                raise RuntimeError(f"{str(self._matrix.path)!r} was closed while rows were read from it")
            node = self._file[f"{self._matrix.name}/{array}" if array else self._matrix.name]
            found = node[selection]
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    def _read_starts(self) -> NDArray[np.int64]:
        starts: NDArray[np.int64] = self._get("indptr", slice(None)).astype(np.int64)
        n_rows, n_values = self._matrix.shape[0], len(self._file[f"{self._matrix.name}/data"])
        has_ends = len(starts) == n_rows + 1 and starts[0] == 0 and starts[-1] == n_values
        if not has_ends or (starts[1:] < starts[:-1]).any():
            self._file.close()
            raise ValueError(
                f"{self._matrix.name} of {str(self._matrix.path)!r} must have an indptr that ascends from 0 "
                "to the number of its values; write the file anew."
            )
        return starts


def _runs(rows: NDArray[np.int64], row_bytes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the first and last row of each request for ascending `rows`, whose sizes are `row_bytes`."""
    mean = max(1.0, float(row_bytes.sum()) / len(rows))
    between = (np.diff(rows, prepend=rows[0] - 1) - 1) * mean
    is_start = between > GAP_BYTES
    ends = np.cumsum(row_bytes + np.where(is_start, 0, between))
    is_start |= np.diff(ends // REQUEST_BYTES, prepend=0) != 0
    is_start[0] = True
    starts = np.flatnonzero(is_start)
    yield from zip(rows[starts].tolist(), rows[np.append(starts[1:], len(rows)) - 1].tolist(), strict=True)


class BackedReader:
    """A reader of the rows of a matrix in a file, and of their `obs`.

    Args:
        matrix: The matrix.
        frame: `obs`, which has the row of each joinid.
        obs: The columns of `obs` to return.
        columns: The columns of `X` to return, in this order.
        budget: The memory, or the space in a file, for the rows of windows.
    """

    def __init__(
        self,
        matrix: BackedMatrix,
        frame: Frame,
        obs: ObsColumns,
        columns: NDArray[np.int64],
        budget: Budget,
    ) -> None:
        preload_kernels()
        self._frame, self._obs = frame, obs
        self._columns, self._dtype = columns, matrix.dtype
        self._window_columns = Columns(columns)
        share, folder = matrix.share(budget), budget.window_dir
        self._n_pieces, self._byte_limit = share.n_pieces, ByteLimit(share.n_bytes)
        self._store = Extents(folder, share.extent_bytes) if folder else Pages(page_bytes=share.page_bytes)
        self._matrix = matrix.open()

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat.

        Returns:
            Pieces that together are these rows, in exactly this order.
        """
        rows = self._frame.rows(obs_joinids)
        held = HeldRows(
            rows,
            self._window_columns,
            self._dtype,
            n_pieces=self._n_pieces,
            byte_limit=self._byte_limit,
            store=self._store,
            may_repeat=True,
        )
        # The rows are read now, not when they are iterated, while the rows of the read before are used.
        self._matrix.fill(held, self._columns)
        return self._with_obs(obs_joinids, rows, held)

    def close(self) -> None:
        """Close the file; a `read` that waits, or still reads, raises a RuntimeError."""
        self._byte_limit.close()
        self._matrix.close()

    def _with_obs(
        self, obs_joinids: NDArrayJoinId, rows: NDArray[np.int64], held: HeldRows
    ) -> Iterator[Rows[CSR_IO_Buffer]]:
        start = 0
        for X in held:
            piece = slice(start, start + len(X))
            yield Rows(obs_joinids=obs_joinids[piece], X=X, obs=self._obs.take(rows[piece]))
            start += len(X)
