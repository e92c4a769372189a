"""Real SOMA experiments in which every value tells where it belongs."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest import mock

import anndata
import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma

from tiledbsoma_ml import ExperimentDataset, QueryIDs, XLocator, context

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TILEDB_")}
"""The environment before a test, or `conftest.py`, changes it."""

N_OBS, N_VARS = 311, 23
MEASUREMENT = "RNA"

DTYPES = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)] + ["float32", "float64"]
"""All types that a layer may have."""


def expected_X(obs_joinids: Sequence[int], var_joinids: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """Return the rows and columns of `X` in every test experiment: `1000 * row + column + 1`, or zero.

    Four of five places are zero, and so are all of every seventh row.
    """
    i, j = np.asarray(obs_joinids, dtype=np.int64)[:, None], np.asarray(var_joinids, dtype=np.int64)[None, :]
    return np.where(((3 * i + j) % 5 == 0) & (i % 7 != 3), 1000 * i + j + 1, 0).astype(dtype)


def make_obs(joinids: np.ndarray) -> pd.DataFrame:
    """Return an `obs` with a column of every kind, in which every value follows from the joinid."""
    i = pd.Series(joinids)
    cell_types = pd.Categorical.from_codes(joinids % 3, categories=["B cell", "T cell", "NK cell", "unseen"])
    return pd.DataFrame(
        {
            "soma_joinid": joinids,
            "cell_type": cell_types,
            "stage": pd.Categorical.from_codes(joinids % 2, categories=["young", "old"], ordered=True),
            "maybe_type": pd.Categorical.from_codes(np.where(joinids % 4 == 0, -1, 0), categories=["known"]),
            "barcode": "cell-" + i.astype(str),
            "n_genes": joinids.astype(np.int32),
            "score": joinids / 7,
            "is_primary": joinids % 2 == 0,
            "maybe_int": pd.array(i.where(i % 5 != 0), dtype="Int64"),
            "maybe_bool": pd.array([None if k % 6 == 0 else k % 2 == 0 for k in joinids], dtype="boolean"),
            "maybe_text": pd.Series([None if k % 3 == 0 else f"t{k}" for k in joinids], dtype=object),
            "taken_at": pd.Timestamp("2024-01-01") + pd.to_timedelta(joinids, unit="s"),
        }
    )


def make_experiment(
    uri: str | Path,
    *,
    obs_joinids: Sequence[int] = range(N_OBS),
    n_vars: int = N_VARS,
    dtype: Any = np.float32,
    layers: Sequence[str] = ("raw",),
    dense: bool = False,
    tile: tuple[int, int] = (64, 8),
    X_shape: tuple[int, int] | None = None,
) -> str:
    """Write an experiment whose `X` is `expected_X`, cut into small tiles; return its URI.

    With `X_shape`, `X` is declared with that shape, and has what lies within it.
    """
    joinids = np.asarray(obs_joinids, dtype=np.int64)
    n_rows = int(joinids.max()) + 1
    obs = pa.Table.from_pandas(make_obs(joinids), preserve_index=False)
    var = pa.table({"soma_joinid": np.arange(n_vars), "feature_id": [f"gene{j}" for j in range(n_vars)]})
    dims = {"soma_dim_0": {"tile": tile[0]}, "soma_dim_1": {"tile": tile[1]}}
    config = {"tiledb": {"create": {"dims": dims, "capacity": 256}}}
    shape = X_shape or (n_rows, n_vars)
    joinids = joinids[joinids < shape[0]]
    X = expected_X(joinids, range(min(n_vars, shape[1])), dtype)
    with soma.Experiment.create(str(uri)) as experiment:
        _write_frame(experiment, "obs", obs, n_rows)
        measurement = experiment.add_new_collection("ms").add_new_collection(MEASUREMENT, soma.Measurement)
        _write_frame(measurement, "var", var, n_vars)
        collection = measurement.add_new_collection("X")
        for name in layers:
            if dense:
                whole = np.zeros(shape, dtype)
                whole[joinids] = X
                layer = collection.add_new_dense_ndarray(
                    name, type=pa.from_numpy_dtype(dtype), shape=whole.shape, platform_config=config
                )
                layer.write((slice(0, shape[0] - 1), slice(0, shape[1] - 1)), pa.Tensor.from_numpy(whole))
            else:
                i, j = X.nonzero()
                layer = collection.add_new_sparse_ndarray(
                    name, type=pa.from_numpy_dtype(dtype), shape=shape, platform_config=config
                )
                layer.write(
                    pa.table(
                        {"soma_dim_0": joinids[i], "soma_dim_1": j.astype(np.int64), "soma_data": X[i, j]}
                    )
                )
    return str(uri)


def _write_frame(parent: soma.Collection, name: str, table: pa.Table, n_rows: int) -> None:
    frame = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=[[0, n_rows - 1]]
    )
    frame.close()
    with soma.DataFrame.open(frame.uri, "w") as frame:
        frame.write(table)


def make_cells(
    X: Any,
    *,
    obs: Mapping[str, Any] | None = None,
    var: Mapping[str, Any] | None = None,
    genes: Sequence[str] | None = None,
    **more: Any,
) -> anndata.AnnData:
    """Return cells for an h5ad file, named c0, c1, …, with these columns; genes are g0, g1, … if not named.

    Without `X`, there are as many cells as `obs` has rows.
    """
    n_obs = X.shape[0] if X is not None else len(next(iter((obs or {}).values())))
    names = [f"g{j}" for j in range(X.shape[1])] if genes is None else list(genes)
    cells = [f"c{i}" for i in range(n_obs)]
    return anndata.AnnData(
        X, obs=pd.DataFrame(obs or {}, index=cells), var=pd.DataFrame(var or {}, index=names), **more
    )


@attrs.frozen
class Store:
    """A test experiment, and short ways to query it."""

    uri: str
    locator: XLocator

    @contextmanager
    def query(
        self, obs: slice | Sequence[int] | str | None = None, var: slice | Sequence[int] | None = None
    ) -> Iterator[soma.ExperimentAxisQuery]:
        """Query rows (by joinids, or by a value filter) and columns (by joinids)."""
        obs_query = soma.AxisQuery(value_filter=obs) if isinstance(obs, str) else _by_coords(obs)
        with (
            soma.Experiment.open(self.uri, context=context()) as experiment,
            experiment.axis_query(MEASUREMENT, obs_query=obs_query, var_query=_by_coords(var)) as query,
        ):
            yield query

    def dataset(
        self,
        obs_joinids: Sequence[int] = range(N_OBS),
        var_joinids: Sequence[int] = range(N_VARS),
        **options: Any,
    ) -> ExperimentDataset:
        """Return a dataset over these rows and columns, in this order.

        Tests that draw options draw such as are not in use with each other.
        """
        ids = QueryIDs(obs_joinids=obs_joinids, var_joinids=var_joinids)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* changes nothing here: ")
            return ExperimentDataset(x_locator=self.locator, query_ids=ids, **options)


def _by_coords(joinids: slice | Sequence[int] | None) -> soma.AxisQuery:
    if joinids is None:
        return soma.AxisQuery()
    return soma.AxisQuery(coords=(joinids if isinstance(joinids, slice) else np.asarray(joinids),))


@cache
def fork_server() -> ForkServerContext:
    """Start the server from which processes are forked that have loaded what `preloaded` loads.

    It is for tests to which it does not matter how processes start: spawned ones take seconds longer.
    """
    multiprocessing.set_forkserver_preload(["preloaded"])
    # The server of Python 3.11 does not get `sys.path`, and ignores modules that it does not find. It keeps
    # the environment that it starts with, which must not be that of some test.
    paths = [str(Path(__file__).parent), *sys.path]
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}
    with mock.patch.dict(os.environ, environment, clear=True):
        ensure_running()
    return multiprocessing.get_context("forkserver")


def workers(n: int) -> dict[str, Any]:
    """Return options of a loader with so many workers, which are forked from the server."""
    return {"num_workers": n} | ({"multiprocessing_context": fork_server()} if n else {})


def joinids_of(mini_batches: Any) -> np.ndarray:
    """Return the joinids that mini-batches yield, in order, having checked that each row of X is its own."""
    ids = [np.empty(0, dtype=np.int64)]
    for X, obs in mini_batches:
        ids.append(obs["soma_joinid"].to_numpy())
        n_vars = X.shape[-1]
        dense = np.asarray(
            X.todense() if hasattr(X, "todense") else X.to_dense() if hasattr(X, "to_dense") else X
        )
        np.testing.assert_array_equal(dense.reshape(-1, n_vars), expected_X(ids[-1], range(n_vars)))
    return np.concatenate(ids)


def eager_threads() -> set[threading.Thread]:
    """Return the threads that read ahead."""
    return {thread for thread in threading.enumerate() if "EagerIterator" in thread.name}
