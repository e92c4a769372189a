"""h5ad files: opened, and written as one SOMA experiment."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma
import tiledbsoma.io

from tiledbsoma_ml._common import check_name

Say: TypeAlias = Callable[[str], None]
"""Takes a line of text on something that the user may want to know."""

MEASUREMENT_NAME, LAYER_NAME = "RNA", "raw"
"""Where the matrix of h5ad files is in the experiment made of them."""

_WRITE_ROWS = 65_536


def ingest_h5ads(paths: Sequence[Path], layer_name: str | None, folder: Path, say: Say) -> str:
    """Return the URI of an experiment in `folder` that holds the cells of h5ad files, file after file.

    It is made once for the same files. Genes are those of all files, matched by name; what a file lacks is
    zero. Of `obs` and `var`, columns of classes and of numbers are kept; cells of a file that lacks a column
    have none of its values. Names of cells that are not unique get a number. Rows are read piece by piece
    where a file stores them as CSR or dense; a CSC matrix is held in memory.

    Args:
        paths: The files.
        layer_name: Which of `layers` to take; `X` if None. It is written as the layer "raw", as float32.
        folder: Where the experiment is to be, in a folder of its own.
        say: Told what is done.

    Raises:
        ValueError: If a file is missing, is no h5ad file, or lacks the layer.
    """
    for path in paths:
        check_exists(path)
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    made_of = fingerprint(layer_name, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    place = folder / f"{made_of}.soma"
    folder.mkdir(parents=True, exist_ok=True)
    build_once(place, lambda uri: _write(uri, paths, layer_name), say)
    return str(place)


def _write(uri: str, paths: Sequence[Path], layer_name: str | None) -> None:
    obs, var = _frames(paths)
    empty = anndata.AnnData(X=sp.csr_matrix((len(obs), len(var)), dtype=np.float32), obs=obs, var=var)
    tiledbsoma.io.from_anndata(uri, empty, MEASUREMENT_NAME, X_layer_name=LAYER_NAME)
    start = 0
    with soma.Experiment.open(uri, "w") as experiment:
        X = experiment.ms[MEASUREMENT_NAME].X[LAYER_NAME]
        for path in paths:
            adata = open_h5ad(path)
            try:
                columns = var.index.get_indexer(_unique(adata.var_names)).astype(np.int64)
                for rows in _pieces(adata, layer_name, path):
                    X.write(_entries(rows, start, columns))
                    start += rows.shape[0]
            finally:
                adata.file.close()


def _frames(paths: Sequence[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `obs` of the cells of all files, and `var` of all genes."""
    obs, var = [], []
    for path in paths:
        adata = open_h5ad(path)
        obs.append(clean(adata.obs))
        var.append(clean(adata.var.set_axis(_unique(adata.var_names))))
        adata.file.close()
    genes = pd.concat(var)
    return clean(_concat(obs)), genes[~genes.index.duplicated()]


def _concat(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all frames, with all columns; categories are those of all frames."""
    whole = pd.concat(frames)
    for name in whole:
        columns = [frame[name] for frame in frames if name in frame]
        if all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
            categories = pd.Index(np.concatenate([column.cat.categories for column in columns])).unique()
            whole[name] = pd.Categorical(whole[name], categories=categories)
    return whole


def _unique(names: pd.Index[Any]) -> pd.Index[Any]:
    unique: pd.Index[Any] = anndata.utils.make_index_unique(names.astype(str))
    return unique


def _pieces(adata: anndata.AnnData, layer_name: str | None, path: Path) -> Iterator[sp.csr_matrix]:
    """Yield the rows of a matrix, some at a time."""
    if layer_name is not None:
        check_name("layer_name", layer_name, adata.layers, of=f"one of the layers of {str(path)!r}")
    X = adata.X if layer_name is None else adata.layers[layer_name]
    if X is None:
        raise ValueError(
            f"{str(path)!r} must have X, and has none; name one of its layers: layer_name='counts'."
        )
    if getattr(X, "format", None) == "csc":
        X = sp.csr_matrix(X if sp.issparse(X) else X.to_memory())
    for start in range(0, adata.n_obs, _WRITE_ROWS):
        yield sp.csr_matrix(X[start : start + _WRITE_ROWS], dtype=np.float32)


def _entries(rows: sp.csr_matrix, start: int, columns: np.ndarray) -> pa.Table:
    """Return the stored values of rows that begin at joinid `start`."""
    entries = rows.tocoo()
    return pa.table(
        {
            "soma_dim_0": entries.row.astype(np.int64) + start,
            "soma_dim_1": columns[entries.col],
            "soma_data": entries.data,
        }
    )


# Also for the demo ----------------------------------------------------------------------------------------


def open_h5ad(path: Path) -> anndata.AnnData:
    """Open an h5ad file: `obs` is read, the matrices are not yet."""
    check_exists(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* names are not unique", category=UserWarning)
            return anndata.read_h5ad(path, backed="r")
    except Exception as err:  # whatever h5py and anndata raise on bytes of another kind
        raise ValueError(
            f"h5ad={str(path)!r} must be an AnnData file, and cannot be read as one ({first_line(err)}); "
            "write one with `adata.write_h5ad(path)`."
        ) from err


def clean(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that SOMA can hold, under unique row names."""
    names = frame.index.astype(str)
    if not names.is_unique:
        names = pd.Index([f"{name}-{i}" for i, name in enumerate(names)])
    kept = {
        str(name): column.array
        for name, column in frame.items()
        if not str(name).startswith("soma_")
        and (is_categorical(column) or pd.api.types.is_numeric_dtype(column))
    }
    return pd.DataFrame(kept, index=names.rename(None))


def is_categorical(column: pd.Series[Any]) -> bool:
    """Whether a column holds classes, kept as a pandas categorical, as strings or as true and false."""
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    kinds = {"string", "boolean", "integer", "empty"} if values is not column else {"string", "boolean"}
    return pd.api.types.infer_dtype(values, skipna=True) in kinds


def build_once(folder: Path, build: Callable[[str], None], say: Say) -> None:
    """Let `build` write the experiment `folder`, unless it is there already.

    It is written beside its place and moved there when it is complete: what has this name is complete, and
    nothing that exists is changed or deleted.
    """
    if soma.Experiment.exists(str(folder)):
        say(f"using the experiment built before: {folder}")
        return
    if folder.exists():
        raise ValueError(f"{folder} exists and is not an experiment; choose another folder.")
    say(f"building the experiment {folder}")
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as building:
        unfinished = Path(building) / folder.name
        build(str(unfinished))
        unfinished.rename(folder)


def fingerprint(*parts: object) -> str:
    """Return eight letters that differ where the parts, or versions of this package, differ."""
    return hashlib.blake2b(repr((*parts, version("tiledbsoma-ml"))).encode(), digest_size=4).hexdigest()


def first_line(err: Exception) -> str:
    """Return what an error says, without the call stack that TileDB adds."""
    return str(err).strip().partition("\n")[0].removeprefix("SOMAError: ").strip("'")


def check_exists(path: Path) -> None:
    """Raise a ValueError unless a file is there."""
    if not path.is_file():
        raise ValueError(f"h5ad={str(path)!r} must be an existing file; check the path.")
