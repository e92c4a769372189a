"""One h5ad file: its frames, its matrices, and which of them to take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import anndata
import anndata.io
import attrs
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from tiledbsoma_ml._common import check_name

Say: TypeAlias = Callable[[str], None]
"""Takes a line of text on something that the user may want to know."""

_PIECE_VALUES = 2**25
"""Values that are read at once: 128 MiB as float32."""

_X, _COUNTS, _RAW_X = "X", "counts", "raw.X"


@contextmanager
def open_h5ad(path: Path) -> Iterator[H5adFile]:
    """Open an h5ad file: `obs` is read, the matrices are not yet.

    Raises:
        ValueError: If it is missing or of another kind; the message tells the way on.
    """
    check_exists(path)
    try:
        file = h5py.File(path, "r")
    except OSError as err:
        raise _unreadable(path, err) from err
    with file:
        if not {"obs", "var"} <= set(file) or "mod" in file:
            raise ValueError(f"h5ad={str(path)!r} must be an AnnData file, and is {_other_kind(file)}.")
        yield H5adFile(path, file)


class H5adFile:
    """An open h5ad file.

    Attributes:
        path: Path of the file.
        obs: Its cells.
        matrices: `X`, the layers and `raw.X`, as far as they are there, by the name that users give.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        self.obs = self._frame("obs")
        if not len(self.obs):
            raise ValueError(f"h5ad={str(path)!r} must have cells, and has none; choose another file.")
        nodes = {
            _X: (_X, file.get("X")),
            _RAW_X: (_RAW_X, file.get("raw/X", file.get("raw.X"))),
            **{key: (f"layers[{key!r}]", node) for key, node in file.get("layers", {}).items()},
        }
        self.matrices = {
            key: Matrix(key, name, f"{name} of {str(path)!r}", node)
            for key, (name, node) in nodes.items()
            if isinstance(node, h5py.Group) or (node is not None and node.shape is not None)
        }

    def var(self, matrix: Matrix) -> pd.DataFrame:
        """Return the genes of a matrix; those of `raw.X` may be others than those of `X`."""
        return self._frame("raw/var" if matrix.name == _RAW_X else "var")

    def other_than(self, matrix: Matrix) -> str:
        """Return the way on: to name another matrix, if there is one."""
        others = [key for key in self.matrices if key != matrix.key]
        return f", or name another layer: {' or '.join(map(repr, others))}" if others else ""

    def check(self, matrix: Matrix) -> None:
        """Raise a ValueError unless a matrix has the shape that `obs` and `var` tell, and holds numbers."""
        n_vars = len(self.var(matrix))
        with matrix.reading():
            shape, dtype = matrix.shape, matrix.values.dtype
        if not n_vars:
            raise ValueError(
                f"{matrix.title} must have genes, and has none; write the file with its genes"
                f"{self.other_than(matrix)}."
            )
        if shape != (len(self.obs), n_vars) or dtype.kind not in "biuf":
            raise ValueError(
                f"{matrix.title} must hold numbers of {len(self.obs)} cells and {n_vars} genes, and holds "
                f"{dtype} of shape {shape}; write the file anew{self.other_than(matrix)}."
            )

    def check_finite(self, matrix: Matrix, survey: Survey) -> None:
        """Raise a ValueError that tells where a matrix holds no number, if it does so."""
        if survey.odd_place is None:
            return
        row, column, value = matrix.at(survey.odd_place)
        cell, gene = self.obs.index[row], self.var(matrix).index[column]
        raise ValueError(
            f"{matrix.title} must hold numbers that fit float32, and holds {value} for cell {cell!r} and "
            f"gene {gene!r} (row {row}, column {column}); mend the value and write the file anew"
            f"{self.other_than(matrix)}."
        )

    def _frame(self, name: str) -> pd.DataFrame:
        try:
            node = self._file.get(name)
            if node is not None and "encoding-type" in node.attrs:
                frame: pd.DataFrame = anndata.io.read_elem(node)
                return frame
            with warnings.catch_warnings():  # a file of anndata before 0.7
                warnings.simplefilter("ignore")
                adata = anndata.read_h5ad(self.path, backed="r")
            frame = adata.raw.var if name == "raw/var" else getattr(adata, name)
            adata.file.close()
            return frame
        except Exception as err:  # whatever h5py and anndata raise
            raise ValueError(
                f"{name} of {str(self.path)!r} cannot be read ({first_line(err)}); write the file anew with "
                "the anndata that is installed here."
            ) from err


@attrs.frozen
class Survey:
    """What values a matrix holds."""

    odd_place: int | None
    """Where the first value is that is no number, or none of float32."""
    least: float
    is_whole: bool
    is_zero: bool

    @property
    def is_usable(self) -> bool:
        """Whether there are values to learn from, of 0 or more."""
        return self.odd_place is None and self.least >= 0 and not self.is_zero


@attrs.frozen
class Matrix:
    """A matrix of an open h5ad file, read piece by piece.

    Attributes:
        key: The name by which users choose it.
        name: Its name in Python.
        title: Its name in messages.
        node: A dataset if it is dense, a group of three of them if it is sparse.
    """

    key: str
    name: str
    title: str
    node: h5py.Dataset | h5py.Group

    @property
    def values(self) -> h5py.Dataset:
        """The values that are stored: all if it is dense."""
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

    def pieces(self) -> Iterator[sp.csr_matrix]:
        """Yield the rows, some at a time, as float32; values of one place are added up."""
        with self.reading():
            if self._is_csc:
                yield from self._pieces_of_csc()
                return
            starts = self._starts()
            for first, last in _cuts(starts):
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

    def survey(self) -> Survey:
        """Look at every value once."""
        odd_place, least, is_whole, is_zero = None, 0.0, True, True
        with self.reading(), np.errstate(over="ignore"):
            starts = self._starts()
            for first, last in _cuts(starts):
                values = (
                    self.node[first:last].ravel()
                    if self._is_dense
                    else self.values[starts[first] : starts[last]]
                )
                if not values.size:
                    continue
                is_number = np.isfinite(values.astype(np.float32))
                if not is_number.all():
                    odd_place = int(starts[first]) + int(np.argmin(is_number))
                    break
                least = min(least, float(values.min()))
                is_zero = is_zero and not values.any()
                is_whole = is_whole and np.array_equal(values, np.floor(values))
        return Survey(odd_place, least, is_whole, is_zero)

    def at(self, place: int) -> tuple[int, int, Any]:
        """Return row, column and value of the stored value at a place."""
        if self._is_dense:
            row, column = divmod(place, self.shape[1])
            return row, column, self.node[row, column]
        major = int(np.searchsorted(self._starts(), place, side="right")) - 1
        minor = int(self.node["indices"][place])
        row, column = (minor, major) if self._is_csc else (major, minor)
        return row, column, self.values[place]

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

    def _pieces_of_csc(self) -> Iterator[sp.csr_matrix]:
        parts = (self.values[:].astype(np.float32), self.node["indices"][:], self._starts())
        columns = sp.csc_matrix(parts, self.shape)
        columns.check_format(full_check=True)
        rows = columns.tocsr()
        for first, last in _cuts(rows.indptr):
            yield _canonical(rows[first:last])

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say which matrix it is that cannot be read."""
        try:
            yield
        except (OSError, KeyError, IndexError, ValueError) as err:
            raise ValueError(
                f"{self.title} cannot be read ({first_line(err)}); copy the file again or write it anew."
            ) from err


def _cuts(starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of runs of rows that hold about `_PIECE_VALUES` values."""
    first, n_rows = 0, len(starts) - 1
    while first < n_rows:
        last = int(np.searchsorted(starts, starts[first] + _PIECE_VALUES, side="right")) - 1
        last = min(max(last, first + 1), n_rows)
        yield first, last
        first = last


def _canonical(rows: sp.csr_matrix) -> sp.csr_matrix:
    rows.check_format(full_check=True)
    rows.sum_duplicates()
    return rows


# Which matrix ---------------------------------------------------------------------------------------------


def choose_matrix(file: H5adFile, layer_name: str | None, say: Say) -> Matrix:
    """Return the matrix of this name; without a name `X`, or what stands in for it where there is none.

    Raises:
        ValueError: If there is none, `X` is scaled and its counts are beside it, or a value is no number.
    """
    matrix = _named(file, layer_name) or _x_or_stand_in(file, say)
    file.check(matrix)
    survey = matrix.survey()
    file.check_finite(matrix, survey)
    others = [key for key in (_COUNTS, _RAW_X) if key in file.matrices]
    if layer_name is None and survey.least < 0 and others:
        raise ValueError(
            f"{matrix.title} is centred or scaled (it holds {survey.least:g}), and the file has the values "
            f"before that; name a layer: {' or '.join(map(repr, others))}, or 'X' to take it as it is."
        )
    return matrix


def find_counts(file: H5adFile, layer_name: str | None, say: Say) -> Matrix:
    """Return the matrix of this name; without a name the first one with counts, else with no negative number.

    Raises:
        ValueError: If there is none, or a value is no number.
    """
    first = _named(file, layer_name) or _x_or_stand_in(file, say)
    others = [file.matrices[key] for key in (_COUNTS, _RAW_X) if key in file.matrices and key != first.key]
    candidates = [first] if layer_name else [first, *others]
    candidates = [matrix for matrix in candidates if len(file.var(matrix))] or candidates
    surveys: list[Survey] = []
    for matrix in candidates:
        file.check(matrix)
        survey = matrix.survey()
        if survey.is_usable and survey.is_whole:
            if matrix.key != first.key:
                say(f"no counts found in {first.name}: {matrix.name} is taken")
            return matrix
        surveys.append(survey)
    for matrix, survey in zip(candidates, surveys, strict=True):
        if survey.is_usable:
            names = ", ".join(candidate.name for candidate in candidates)
            say(f"no counts found in {names}: {matrix.name} is taken as it is")
            return matrix
    matrix, survey = candidates[0], surveys[0]
    file.check_finite(matrix, survey)
    found, way_out = (
        (f"{survey.least:g}", "before the values are centred or scaled")
        if survey.least < 0
        else ("nothing but 0", "with its values")
    )
    raise ValueError(
        f"{matrix.title} must hold counts, or other numbers of 0 or more, and holds {found}; write the file "
        f"{way_out}{file.other_than(matrix)}."
    )


def _named(file: H5adFile, layer_name: str | None) -> Matrix | None:
    if layer_name is None:
        return None
    what = f"one of the layers of {str(file.path)!r}"
    return file.matrices[check_name("layer_name", layer_name, file.matrices, of=what)]


def _x_or_stand_in(file: H5adFile, say: Say) -> Matrix:
    """Return `X`; where there is none the counts, the only layer, or `raw.X`."""
    if _X in file.matrices:
        return file.matrices[_X]
    layers = [key for key in file.matrices if key != _RAW_X]
    for key in (_COUNTS, *(layers if len(layers) == 1 else [] if layers else [_RAW_X])):
        if key in file.matrices:
            say(f"{file.path.name} has no X: {file.matrices[key].name} is taken")
            return file.matrices[key]
    listed = (
        f"; name a layer: {' or '.join(map(repr, file.matrices))}" if file.matrices else ", and no layers"
    )
    raise ValueError(f"h5ad={str(file.path)!r} must have X, and has none{listed}.")


# What is no h5ad file -------------------------------------------------------------------------------------


def check_exists(path: Path) -> None:
    """Raise a ValueError unless a file is there."""
    if path.is_dir():
        raise ValueError(
            f"h5ad={str(path)!r} must be a file, and is a folder; write a zarr store as a file with "
            "`anndata.read_zarr(path).write_h5ad(file)`, and name an experiment by its URI."
        )
    if not path.is_file():
        raise ValueError(f"h5ad={str(path)!r} must be an existing file; check the path.")


_UNPACKED_BY = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"PK": "unzip", b"\xfd7": "unxz", b"(\xb5": "unzstd"}


def _unreadable(path: Path, err: OSError) -> ValueError:
    """Return what to say of a file that is not in HDF5, or not whole."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        start = b"?"
    if start in _UNPACKED_BY:
        found = f"is packed; unpack it first with {_UNPACKED_BY[start]}"
    elif not start:
        found = "is empty; copy or download it again"
    else:
        found = (
            f"cannot be read as one ({first_line(err)}); copy or download it again, or write one with "
            "`adata.write_h5ad(path)`"
        )
    return ValueError(f"h5ad={str(path)!r} must be an AnnData file, and {found}.")


def _other_kind(file: h5py.File) -> str:
    """Return what an HDF5 file is that is no AnnData file, and the way to one."""
    if "mod" in file:
        return "one of MuData; write the cells of one kind with `mdata['rna'].write_h5ad(path)`"
    if "row_attrs" in file:
        return "a loom file; write one with `anndata.io.read_loom(path).write_h5ad(file)`"
    if any(isinstance(group, h5py.Group) and "barcodes" in group for group in file.values()):
        return "one of Cell Ranger; write one with `scanpy.read_10x_h5(path).write_h5ad(file)`"
    return "another HDF5 file, without obs and var; write one with `adata.write_h5ad(path)`"


def first_line(err: Exception) -> str:
    """Return what an error says, without the call stack that TileDB adds."""
    return str(err).strip().partition("\n")[0].removeprefix("SOMAError: ").strip("'\"")
