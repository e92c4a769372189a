"""One matrix of an open h5ad file, which is read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import h5py
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from tiledbsoma_ml._common import first_line

PIECE_VALUES = 2**25
"""Values that are read at once: 128 MiB as float32."""


@attrs.frozen
class Survey:
    """The kind of values that a matrix holds.

    Attributes:
        bad_position: Position of the first stored value that is not a number of float32; None if all are.
        least: The smallest value, if it is below 0; else 0.
        is_whole: Whether all values are whole numbers.
        is_zero: Whether all values are 0.
    """

    bad_position: int | None
    least: float
    is_whole: bool
    is_zero: bool

    @property
    def is_usable(self) -> bool:
        """Whether there are values to learn from, none of them below 0."""
        return self.bad_position is None and self.least >= 0 and not self.is_zero


@attrs.frozen
class Matrix:
    """A matrix of an open h5ad file.

    Attributes:
        key: The name by which users choose it.
        name: Its name in Python.
        title: Its name in messages.
        node: A dataset if it is dense, a group of three datasets if it is sparse.
    """

    key: str
    name: str
    title: str
    node: h5py.Dataset | h5py.Group

    @property
    def values(self) -> h5py.Dataset:
        """The values that are stored; a dense matrix stores all of them."""
        return self.node if self._is_dense else self.node["data"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of cells and number of genes."""
        attributes = self.node.attrs
        shape = (
            self.node.shape
            if self._is_dense
            else attributes["shape"]
            if "shape" in attributes
            else attributes["h5sparse_shape"]
        )
        return tuple(int(size) for size in shape)

    def pieces(self, n_values: int = PIECE_VALUES) -> Iterator[sp.csr_matrix]:
        """Yield the rows as float32; values of one coordinate are added up.

        Args:
            n_values: Values of a piece of whole rows. A longer row is a piece of its own.
        """
        with self.reading():
            if self._is_csc:
                yield from self._pieces_of_csc(n_values)
                return
            starts = self._starts()
            for first, last in _cuts(starts, n_values):
                if self._is_dense:
                    yield sp.csr_matrix(self.node[first:last], dtype=np.float32)
                    continue
                stored = slice(starts[first], starts[last])
                parts = (
                    self.values[stored],
                    self.node["indices"][stored],
                    starts[first : last + 1] - starts[first],
                )
                yield _canonical(sp.csr_matrix(parts, (last - first, self.shape[1]), dtype=np.float32))

    def survey(self, n_values: int = PIECE_VALUES) -> Survey:
        """Look at every value once, so many at a time, up to the first that is not a number of float32."""
        bad_position, least, is_whole, is_zero = None, 0.0, True, True
        with self.reading(), np.errstate(over="ignore"):
            starts = self._starts()
            for first, last in _cuts(starts, n_values):
                values = (
                    self.node[first:last].ravel()
                    if self._is_dense
                    else self.values[starts[first] : starts[last]]
                )
                if not values.size:
                    continue
                is_number = np.isfinite(values.astype(np.float32))
                if not is_number.all():
                    bad_position = int(starts[first]) + int(np.argmin(is_number))
                    break
                least = min(least, float(values.min()))
                is_zero = is_zero and not values.any()
                is_whole = is_whole and np.array_equal(values, np.floor(values))
        return Survey(bad_position, least, is_whole, is_zero)

    def at(self, position: int) -> tuple[int, int, Any]:
        """Return row, column and value of the stored value at a position."""
        if self._is_dense:
            row, column = divmod(position, self.shape[1])
            return row, column, self.node[row, column]
        major = int(np.searchsorted(self._starts(), position, side="right")) - 1
        minor = int(self.node["indices"][position])
        row, column = (minor, major) if self._is_csc else (major, minor)
        return row, column, self.values[position]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Name the matrix in an error that is raised while it is read."""
        try:
            yield
        except (OSError, KeyError, IndexError, ValueError) as err:
            raise ValueError(
                f"{self.title} cannot be read ({first_line(err)}); copy the file again or write it anew."
            ) from err

    @property
    def _is_dense(self) -> bool:
        return isinstance(self.node, h5py.Dataset)

    @property
    def _is_csc(self) -> bool:
        attributes = self.node.attrs
        return "csc" in str(attributes.get("encoding-type", attributes.get("h5sparse_format")))

    def _starts(self) -> NDArray[np.int64]:
        """Return where the values of each row (in a CSC matrix: column) start, and where the last end."""
        if self._is_dense:
            return np.arange(self.shape[0] + 1) * self.shape[1]
        starts: NDArray[np.int64] = self.node["indptr"][:].astype(np.int64)
        return starts

    def _pieces_of_csc(self, n_values: int) -> Iterator[sp.csr_matrix]:
        parts = (self.values[:].astype(np.float32), self.node["indices"][:], self._starts())
        columns = sp.csc_matrix(parts, self.shape)
        columns.check_format(full_check=True)
        rows = columns.tocsr()
        for first, last in _cuts(rows.indptr, n_values):
            yield _canonical(rows[first:last])


def _cuts(starts: NDArray[np.int64], n_values: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of runs of rows that hold at most `n_values` values, or are one row."""
    first, n_rows = 0, len(starts) - 1
    while first < n_rows:
        last = int(np.searchsorted(starts, starts[first] + n_values, side="right")) - 1
        last = min(max(last, first + 1), n_rows)
        yield first, last
        first = last


def _canonical(rows: sp.csr_matrix) -> sp.csr_matrix:
    rows.check_format(full_check=True)
    rows.sum_duplicates()
    return rows
