"""h5ad files, written as one SOMA experiment."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Sequence
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

from tiledbsoma_ml._common import absolute_path, absolute_uri
from tiledbsoma_ml._context import context, open_experiment
from tiledbsoma_ml._ingest.h5ad_file import H5adFile, Matrix, Say, check_exists, choose_matrix, open_h5ad
from tiledbsoma_ml.snapshot.progress import check_own_folder, locked

Choose: TypeAlias = Callable[[H5adFile, str | None, Say], Matrix]
"""Chooses the matrix of a file."""

MEASUREMENT_NAME, LAYER_NAME = "RNA", "raw"
"""Measurement and layer of the experiment that hold the matrix of h5ad files."""


def ingest_h5ads(
    paths: Sequence[Path],
    layer_name: str | None,
    folder: Path,
    say: Say,
    choose: Choose = choose_matrix,
) -> str:
    """Return the URI of an experiment in `folder` that holds the cells of h5ad files, file after file.

    It is made once for the same files, by one process if several ask for it. Genes are those of all files,
    matched by name; what a file lacks is zero. Of `obs` and `var`, columns of classes and of numbers are
    kept; cells of a file that lacks a column have none of its values. Names of cells that are not unique get
    a number. Values that a file has more than once for a place are added up. Rows are read piece by piece
    where a file stores them as CSR or dense; a CSC matrix is held in memory.

    Args:
        paths: The files.
        layer_name: The matrix to take: "X", one of `layers`, or "raw.X". It is written as the layer "raw", as
            float32.
        folder: The folder in which the experiment gets a folder of its own.
        say: Called with a line for each thing that is done.
        choose: Finds the matrix, and looks at its values, before anything is written.

    Raises:
        ValueError: If a file is missing, is no h5ad file, lacks the layer, cells or genes, or holds a value
            that is no number.
    """
    paths = [absolute_path(path) for path in paths]
    for path in paths:
        check_exists(path)
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    place = absolute_path(folder) / f"{paths[0].stem}-{fingerprint(choose.__name__, layer_name, *files)}.soma"
    build_once(place, lambda uri: _write(uri, paths, layer_name, say, choose), say)
    return str(place)


def _write(uri: str, paths: Sequence[Path], layer_name: str | None, say: Say, choose: Choose) -> None:
    obs_of_files, var_of_files, keys = [], [], []
    for path in paths:
        with open_h5ad(path) as file:
            matrix = choose(file, layer_name, say)
            keys.append(matrix.key)
            obs_of_files.append(file.obs)
            var_of_files.append(_with_unique_names(file.var(matrix)))
    obs, var = clean(_concat(obs_of_files), "obs", say), clean(_genes(var_of_files), "var", say)
    empty = anndata.AnnData(X=sp.csr_matrix((len(obs), len(var)), dtype=np.float32), obs=obs, var=var)
    write_cells(uri, empty)
    start = 0
    with open_experiment(uri, "w") as experiment:
        X = experiment.ms[MEASUREMENT_NAME].X[LAYER_NAME]
        for path, key, genes in zip(paths, keys, var_of_files, strict=True):
            columns = var.index.get_indexer(genes.index).astype(np.int64)
            with open_h5ad(path) as file:
                for rows in file.matrices[key].pieces():
                    X.write(_entries(rows, start, columns))
                    start += rows.shape[0]


def _with_unique_names(genes: pd.DataFrame) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Suffix used .* to deduplicate", category=UserWarning)
        return genes.set_axis(anndata.utils.make_index_unique(genes.index.astype(str)))


def _genes(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the genes of all files, each once, as the first file that has it tells them."""
    genes = pd.concat(frames)
    return genes[~genes.index.duplicated()]


def _concat(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all frames, with all columns; categories are those of all frames."""
    whole = pd.concat(frames)
    for name in whole:
        columns = [frame[name] for frame in frames if name in frame]
        are_categorical = all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns)
        if are_categorical and not isinstance(whole[name].dtype, pd.CategoricalDtype):
            categories = pd.Index(np.concatenate([column.cat.categories for column in columns])).unique()
            whole[name] = pd.Categorical(whole[name], categories=categories)
    return whole


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


def write_cells(
    uri: str, cells: anndata.AnnData, *, layer_name: str = LAYER_NAME, var_id_name: str = "var_id"
) -> None:
    """Write cells in memory to a new experiment.

    Args:
        uri: Address of the experiment.
        cells: Their `X` becomes a layer of the measurement "RNA".
        layer_name: Name of that layer.
        var_id_name: Column of `var` that gets the names of genes.
    """
    tiledbsoma.io.from_anndata(
        absolute_uri(uri),
        cells,
        MEASUREMENT_NAME,
        context=context(),
        X_layer_name=layer_name,
        var_id_name=var_id_name,
    )


def clean(frame: pd.DataFrame, axis: str, say: Say) -> pd.DataFrame:
    """Return the columns that SOMA can hold, under unique row names; `axis` is "obs" or "var"."""
    names = frame.index.astype(str)
    if not names.is_unique:
        names = pd.Index([f"{name}-{i}" for i, name in enumerate(names)])
    kept = {name: column.array for name, column in frame.items() if is_kept(column, axis)}
    if left_out := [str(name) for name in frame if name not in kept]:
        say(f"left out of {axis}: {', '.join(left_out)} (neither classes nor numbers, or a name of SOMA's)")
    return pd.DataFrame(kept, index=names.rename(f"{axis}_id"))


def is_kept(column: pd.Series[Any], axis: str) -> bool:
    """Whether SOMA can hold a column: its name is free there, and it holds classes or numbers."""
    name = str(column.name)
    is_number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)
    is_free = not name.startswith(("soma_", "__")) and name not in {"index", f"{axis}_id"}
    return is_free and (is_number or is_categorical(column))


def is_categorical(column: pd.Series[Any]) -> bool:
    """Whether a column holds classes, kept as a pandas categorical, as strings or as true and false."""
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    kinds = {"string", "boolean", "integer", "empty"} if values is not column else {"string", "boolean"}
    return pd.api.types.infer_dtype(values, skipna=True) in kinds


def build_once(folder: Path, build: Callable[[str], None], say: Say) -> None:
    """Let `build` write the experiment `folder`, unless it is there already.

    It is written beside its place and moved there when it is complete: what has this name is complete, and
    nothing that exists is changed or deleted. Of several processes one builds, and the others wait; what one
    that was killed left behind is removed by the next.
    """
    if _is_built(folder, say):
        return
    with locked(folder, say):
        if _is_built(folder, say):
            return
        say(f"building the experiment {folder}")
        building = folder.with_name(f".{folder.name}.building")
        if check_own_folder(building, folder):
            shutil.rmtree(building)
        building.mkdir(mode=0o700)
        try:
            build(str(building / folder.name))
            (building / folder.name).rename(folder)
        finally:
            shutil.rmtree(building)


def _is_built(folder: Path, say: Say) -> bool:
    if soma.Experiment.exists(str(folder), context()):
        say(f"using the experiment built before: {folder}")
        return True
    if folder.exists():
        raise ValueError(f"{folder} exists and is not an experiment; choose another folder.")
    return False


def fingerprint(*parts: object) -> str:
    """Return eight letters that differ where the parts, or versions of this package, differ."""
    return hashlib.blake2b(repr((*parts, version("tiledbsoma-ml"))).encode(), digest_size=4).hexdigest()
