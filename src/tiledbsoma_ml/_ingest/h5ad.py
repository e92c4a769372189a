"""h5ad files to one SOMA experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from tiledbsoma_ml._common import absolute_path
from tiledbsoma_ml._context import open_experiment
from tiledbsoma_ml._ingest.choose import Choose, choose_matrix
from tiledbsoma_ml._ingest.experiment import (
    LAYER_NAME,
    MEASUREMENT_NAME,
    Say,
    build_once,
    fingerprint,
    write_cells,
)
from tiledbsoma_ml._ingest.frames import clean, concat_cells, merge_genes, with_unique_names
from tiledbsoma_ml._ingest.h5ad_file import check_exists, open_h5ad


def ingest_h5ads(
    paths: Sequence[Path],
    layer_name: str | None,
    folder: Path,
    say: Say,
    choose: Choose = choose_matrix,
) -> str:
    """Return the URI of an experiment in `folder` that holds the cells of h5ad files, file after file.

    It is made once for the same files, by one process if several ask for it. Its genes are those of all
    files, matched by name; values of genes that a file lacks are zero. Columns of `obs` and `var` are kept
    if they hold classes or numbers; values of columns that a file lacks are missing. Names of cells that are
    not unique get a number. Values that a file stores several times for one coordinate are added up. Rows
    are read piece by piece if a file stores them as CSR or dense; a CSC matrix is held in memory.

    Args:
        paths: The files.
        layer_name: The matrix to take: "X", one of `layers`, or "raw.X". It is written as the layer "raw", as
            float32.
        folder: The folder in which the experiment gets a folder of its own.
        say: Called with a line for each step.
        choose: Finds the matrix, and looks at its values, before anything is written.

    Raises:
        ValueError: If a file is missing, is no h5ad file, lacks the layer, cells or genes, or holds a value
            that is not a number.
    """
    paths = [absolute_path(path) for path in paths]
    for path in paths:
        check_exists(path)
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    name = f"{paths[0].stem}-{fingerprint(choose.__name__, layer_name, *files)}.soma"
    experiment = absolute_path(folder) / name
    build_once(experiment, lambda uri: _write(uri, paths, layer_name, say, choose), say)
    return str(experiment)


def _write(uri: str, paths: Sequence[Path], layer_name: str | None, say: Say, choose: Choose) -> None:
    obs_of_files, var_of_files, keys = [], [], []
    for path in paths:
        with open_h5ad(path) as file:
            matrix = choose(file, layer_name, say)
            keys.append(matrix.key)
            obs_of_files.append(file.obs)
            var_of_files.append(with_unique_names(file.var(matrix)))
    obs, var = clean(concat_cells(obs_of_files), "obs", say), clean(merge_genes(var_of_files), "var", say)
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
