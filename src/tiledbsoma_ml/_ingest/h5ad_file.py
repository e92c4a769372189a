"""One h5ad file: its frames, its matrices, and errors that name the way to a file that can be read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import anndata.io
import h5py
import pandas as pd

from tiledbsoma_ml._common import first_line
from tiledbsoma_ml._ingest.matrix import Matrix, Survey

X_KEY, COUNTS_KEY, RAW_X_KEY = "X", "counts", "raw.X"
"""Keys of the matrices in which counts are looked for; "counts" is a layer."""


@contextmanager
def open_h5ad(path: Path) -> Iterator[H5adFile]:
    """Open an h5ad file: `obs` is read, the matrices are not yet.

    Raises:
        ValueError: If the file is missing or of another kind; the message names the way out.
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
        matrices: Those of `X`, the layers and `raw.X` that the file has, by the name that users give.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        self.obs = self._frame("obs")
        if not len(self.obs):
            raise ValueError(f"h5ad={str(path)!r} must have cells, and has none; choose another file.")
        nodes = {
            X_KEY: (X_KEY, file.get("X")),
            RAW_X_KEY: (RAW_X_KEY, file.get("raw/X", file.get("raw.X"))),
            **{key: (f"layers[{key!r}]", node) for key, node in file.get("layers", {}).items()},
        }
        self.matrices = {
            key: Matrix(key, name, f"{name} of {str(path)!r}", node)
            for key, (name, node) in nodes.items()
            if isinstance(node, h5py.Group) or (node is not None and node.shape is not None)
        }

    def var(self, matrix: Matrix) -> pd.DataFrame:
        """Return the genes of a matrix; `raw.X` may have other genes than `X`."""
        return self._frame("raw/var" if matrix.name == RAW_X_KEY else "var")

    def other_than(self, matrix: Matrix) -> str:
        """Return the end of a message that offers the other matrices; "" if there are none."""
        others = [key for key in self.matrices if key != matrix.key]
        return f", or name another layer: {' or '.join(map(repr, others))}" if others else ""

    def check(self, matrix: Matrix) -> None:
        """Raise a ValueError unless a matrix holds numbers, and has the shape that `obs` and `var` imply."""
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
        """Raise a ValueError that names the cell and the gene if a value is not a number of float32."""
        if survey.bad_position is None:
            return
        row, column, value = matrix.at(survey.bad_position)
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


# Files of other kinds -------------------------------------------------------------------------------------


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
    """Return the error for a file that is not in HDF5, or is incomplete."""
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
    """Return the kind of an HDF5 file that is no AnnData file, and the way to one that is."""
    if "mod" in file:
        return "one of MuData; write the cells of one kind with `mdata['rna'].write_h5ad(path)`"
    if "row_attrs" in file:
        return "a loom file; write one with `anndata.io.read_loom(path).write_h5ad(file)`"
    if any(isinstance(group, h5py.Group) and "barcodes" in group for group in file.values()):
        return "one of Cell Ranger; write one with `scanpy.read_10x_h5(path).write_h5ad(file)`"
    return "another HDF5 file, without obs and var; write one with `adata.write_h5ad(path)`"
