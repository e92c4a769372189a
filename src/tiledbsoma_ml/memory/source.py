"""`MemorySource`: the rows of a SciPy matrix, of an array, or of an AnnData."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import sparse

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_name
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._source import Fields, Reader, RowsAndColumns, Source
from tiledbsoma_ml.memory.backed import BackedMatrix, BackedReader
from tiledbsoma_ml.memory.frame import Columns, Frame
from tiledbsoma_ml.memory.matrices import ChosenColumns, DenseMatrix, SparseMatrix

__all__ = ["MemorySource"]

BYTES_PER_JOINID = 48
"""Bytes of a row beside its entries, while it is in a window."""

SAMPLED_RUNS, RUN_ROWS = 6, 128
"""Largest number of runs of neighbouring rows that are sampled for the size of a row, and rows of each."""

_Matrix: TypeAlias = SparseMatrix | DenseMatrix | BackedMatrix


class MemorySource(Source):
    """The rows of a matrix in memory, with their `obs`.

    The joinid of a row is in the column "soma_joinid" of `obs`; without this column, it is the number of the
    row. The same holds for `var` and the columns of `X`. Columns of `obs` keep their types, and categoricals
    keep all categories. The index of `obs` is a column as well, with its name, or "index" if it has none.

    The source never changes `X`, `obs` and `var`, and never returns a view of them. It does not copy them
    either, so you must not change them. It converts some matrices once, into a copy: a sparse matrix of
    another format than CSR; a CSR matrix whose indices are int64, or whose entries repeat (these are added
    up) or are not sorted by column; an array in another byte order.

    `X` of an AnnData that was opened with `backed="r"` stays on disk, and each epoch opens the file by its
    path. A matrix that is stored there by columns (CSC) is read into memory, because each of its rows is
    scattered over the file.

    A worker process that is spawned gets a copy of the matrix in memory. Threads of the training process need
    no copy: start with `num_workers=0`.

    Args:
        X: A SciPy matrix or array of any format, an array of NumPy, or `X` of a backed AnnData. Its values
            are booleans, integers, float32 or float64.
        obs: A table with a row for each row of `X`.
        var: A table with a row for each column of `X`. If left out, its only column is "soma_joinid".

    Attributes:
        query_ids: Joinids of all rows and columns, in their order.

    Raises:
        TypeError: If `X`, `obs` or `var` is of another type.
        ValueError: If their numbers of rows do not match, or a joinid is negative or repeats.
    """

    def __init__(self, X: Any, obs: pd.DataFrame, var: pd.DataFrame | None = None) -> None:
        self._X = _matrix(X)
        n_obs, n_vars = self._X.shape
        self._obs = Frame("obs", obs)
        known = pd.DataFrame(index=pd.RangeIndex(n_vars)) if var is None else var
        self._var = Frame("var", known, has_index=var is not None)
        for frame, name, n, of in (
            (self._obs, "obs", n_obs, "row"),
            (self._var, "var", n_vars, "column"),
        ):
            if len(frame) != n:
                raise ValueError(
                    f"{name} must have a row for each of the {n:,} {of}s of X, and has {len(frame):,}; "
                    f"try the {name} that X came with."
                )

    @classmethod
    def from_anndata(cls, adata: Any, layer: str | None = None) -> MemorySource:
        """Return the rows of an AnnData, in memory or backed.

        Args:
            adata: The AnnData.
            layer: The layer to take as `X`; `X` itself if None.

        Raises:
            TypeError: If `adata` is not an AnnData.
            ValueError: If the layer or `X` does not exist.
        """
        if not all(hasattr(adata, name) for name in ("obs", "var", "layers")):
            raise TypeError(
                f"adata must be an AnnData, not of type {type(adata).__name__}; try anndata.AnnData."
            )
        if layer is not None:
            check_name("layer", layer, adata.layers.keys(), of="a layer of adata")
        X = adata.X if layer is None else adata.layers[layer]
        if X is None:
            raise ValueError(
                f"adata must have an X, and has none; try layer={next(iter(adata.layers), None)!r}."
            )
        return cls(X, adata.obs, adata.var)

    def __repr__(self) -> str:
        """Return the numbers of rows and columns, in one line."""
        n_obs, n_vars = self._X.shape
        return f"<MemorySource: {n_obs:,} rows by {n_vars:,} columns of {self._X.dtype}>"

    @cached_property
    def query_ids(self) -> QueryIDs:  # type: ignore[override]  # it is made once
        """Joinids of all rows and columns, in their order."""
        return QueryIDs(obs_joinids=self._obs.joinids, var_joinids=self._var.joinids)

    @cached_property
    def content(self) -> Mapping[str, str]:
        """Digests of `X`, `obs` and `var`, computed once; for `X` in a file, its path, size and date."""
        return {**self._X.content(), "obs": self._obs.digest(), "var": self._var.digest()}

    def obs(self, obs_joinids: NDArrayJoinId, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `obs` for these rows, in this order, with a fresh index.

        Raises:
            TypeError: If the joinids are not integers, or `column_names` is not a list.
            ValueError: If a column or row does not exist.
        """
        columns = self._obs.columns("column_names", column_names)
        return columns.take(self._obs.rows(obs_joinids))

    def var(self, var_joinids: NDArrayJoinId, column_names: Sequence[str] | None = None) -> pd.DataFrame:
        """Return columns of `var` (all if None) for these columns of `X`, in this order, with a fresh index.

        Raises:
            TypeError: If the joinids are not integers, or `column_names` is not a list.
            ValueError: If a column of `var` or of `X` does not exist.
        """
        names = self._var.column_names if column_names is None else column_names
        return self._var.columns("column_names", names).take(self._var.rows(var_joinids))

    def check(self, ids: QueryIDs, fields: Fields) -> None:
        """Raise a ValueError or TypeError unless these rows, columns and fields exist."""
        self._obs.rows(ids.obs_joinids)
        self._var.rows(ids.var_joinids)
        self._obs.check("obs_column_names", fields.obs_column_names)

    @property
    def row_tile(self) -> int:
        """Number of neighbouring rows that are read together: 1 in memory."""
        return self._X.row_tile

    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        """Return how the rows are stored; the size of a row is measured on a sample."""
        rows = self._obs.rows(ids.obs_joinids)
        n_runs = max(1, min(SAMPLED_RUNS, len(rows) // RUN_ROWS))
        starts = np.linspace(0, max(0, len(rows) - RUN_ROWS), n_runs).astype(int)
        sample = np.concatenate([rows[start : start + RUN_ROWS] for start in starts.tolist()])
        n_bytes = self._X.n_bytes(sample, self._var.rows(ids.var_joinids)) / max(1, len(sample))
        bytes_per_row = n_bytes + BYTES_PER_JOINID
        return Layout(self._X.row_tile, bytes_per_row, self._X.window_rows(budget, bytes_per_row))

    def open(self, ids: RowsAndColumns, fields: Fields, budget: Budget) -> Reader:
        """Return a reader; that of a matrix in memory has `RandomAccess`."""
        columns = self._var.rows(ids.var_joinids)
        obs = self._obs.columns("obs_column_names", fields.obs_column_names)
        if isinstance(self._X, BackedMatrix):
            return BackedReader(self._X, self._obs, obs, columns, budget)
        return MemoryReader(self._X.choose(columns), self._obs, obs, self._X.piece_rows)


class MemoryReader:
    """A reader of the rows of a matrix in memory, and of their `obs`; several threads may use it at once.

    Args:
        X: The columns of the matrix to return.
        frame: `obs`, which has the row of each joinid.
        obs: The columns of `obs` to return.
        piece_rows: Number of rows of a piece.
    """

    def __init__(self, X: ChosenColumns, frame: Frame, obs: Columns, piece_rows: int) -> None:
        self._X, self._frame, self._obs, self._piece_rows = X, frame, obs, piece_rows

    @property
    def n_vars(self) -> int:
        """Number of columns of `X`."""
        return self._X.n_vars

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values of `X`."""
        return self._X.dtype

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        """Read the rows of `obs_joinids`, which may repeat.

        Returns:
            Pieces that together are these rows, in exactly this order.
        """
        rows = self._frame.rows(obs_joinids)
        for start in range(0, len(rows), self._piece_rows):
            piece = slice(start, start + self._piece_rows)
            X, obs = self._X.buffer(rows[piece]), self._obs.take(rows[piece])
            yield Rows(obs_joinids=obs_joinids[piece], X=X, obs=obs)

    def csr(self, obs_joinids: NDArrayJoinId) -> sparse.csr_matrix:
        """Return `X` of the rows of `obs_joinids`, in this order, as a canonical `csr_matrix`."""
        return self._X.csr(self._frame.rows(obs_joinids))

    def fill_dense(self, obs_joinids: NDArrayJoinId, out: NDArrayNumber) -> None:
        """Write `X` of the rows of `obs_joinids` into `out`, of shape (n_rows, n_vars), zeros included."""
        self._X.fill_dense(self._frame.rows(obs_joinids), out)

    def obs(self, obs_joinids: NDArrayJoinId) -> pd.DataFrame:
        """Return `obs` of the rows of `obs_joinids`, in this order, with a fresh index."""
        return self._obs.take(self._frame.rows(obs_joinids))

    def close(self) -> None:
        """Do nothing, because nothing is open."""


def _matrix(X: Any) -> _Matrix:
    """Return `X` as a matrix whose rows can be read.

    Raises:
        TypeError: If `X` or its values are of another type.
        ValueError: If it does not have two dimensions, or its arrays contradict each other.
    """
    if getattr(X, "format", None) == "csc" and hasattr(X, "to_memory"):  # a matrix of AnnData, on disk
        X = X.to_memory()
    backed = BackedMatrix.of(X)
    if backed is not None:
        return backed
    if sparse.issparse(X):
        return SparseMatrix(X)
    if isinstance(X, np.ndarray):
        return DenseMatrix(X)
    raise TypeError(
        f"X must be a SciPy matrix, an array of NumPy or a matrix in an HDF5 file, not of type "
        f"{type(X).__name__}; try numpy.asarray(X), or adata.to_memory()."
    )
