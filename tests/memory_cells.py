"""Cells in memory in every kind of matrix, whose values tell where they belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

import stores
from stores import make_obs
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._source import Fields
from tiledbsoma_ml.memory import MemorySource

N_OBS, N_VARS = 90, 17
DTYPES = ["bool", *stores.DTYPES]

BUDGET = Budget(2**28)


def make_X(n_obs: int = N_OBS, n_vars: int = N_VARS, dtype: Any = np.float32) -> NDArray[Any]:
    """Return values that tell where they belong, and zeros; the last row and column are empty."""
    i, j = np.arange(n_obs)[:, None], np.arange(n_vars)[None, :]
    X = np.where((3 * i + 2 * j) % 5 < 2, n_vars * i + j + 1, 0).astype(dtype)
    X[-1:], X[:, -1:] = 0, 0
    return X


def make_table(n_obs: int = N_OBS) -> pd.DataFrame:
    obs = make_obs(np.arange(n_obs)).drop(columns="soma_joinid")
    return obs.set_index(pd.Index([f"cell{i}" for i in range(n_obs)], name="cell_id"))


def make_adata(X: Any) -> anndata.AnnData:
    obs = make_table(X.shape[0]).drop(columns=["taken_at", "maybe_text"])  # anndata cannot write them
    return anndata.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(X.shape[1])]))


KINDS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "csr_matrix": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "coo_array": sparse.coo_array,
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
}
BACKED: dict[str, Callable[[NDArray[Any]], Any]] = {
    "on disk, CSR": sparse.csr_matrix,
    "on disk, CSC": sparse.csc_matrix,
    "on disk, dense": np.ascontiguousarray,
}


def read(source: MemorySource, rows: Any, columns: Any, names: Any = ("soma_joinid",)) -> Any:
    """Return dense X and obs of rows by joinid, as `read` gives them."""
    ids = QueryIDs(obs_joinids=source.query_ids.obs_joinids, var_joinids=columns)
    reader = source.open(ids, Fields(obs_column_names=names), BUDGET)
    pieces = list(reader.read(np.asarray(rows, dtype=np.int64)))
    reader.close()
    X = [piece.X.slice_tonumpy(slice(None)) for piece in pieces]
    return np.concatenate(X), pd.concat([piece.obs for piece in pieces], ignore_index=True)


def joinids(frame: pd.DataFrame, values: Any) -> pd.DataFrame:
    return frame.assign(soma_joinid=values)


def broken(**arrays: Any) -> sparse.csr_matrix:
    X = sparse.csr_matrix(make_X())
    for name, values in arrays.items():
        setattr(X, name, values)
    return X
