"""A source as somebody else would write one: the rows of a SciPy matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from stores import N_OBS, N_VARS, expected_X, make_obs
from tiledbsoma_ml import Layout, QueryIDs, Rows, Source
from tiledbsoma_ml._common import check_name


def unchanged(rows: Rows[Any]) -> Rows[Any]:
    return rows


class MatrixSource(Source):
    """Rows of a SciPy matrix, and of a frame of the same length, numbered from 0.

    Its readers give each piece as `given` returns it.
    """

    row_tile = 64

    def __init__(
        self,
        X: Any,
        frame: pd.DataFrame,
        features: Any = None,
        content: Any = None,
        given: Callable[[Rows[Any]], Rows[Any]] = unchanged,
    ) -> None:
        self.X, self.frame, self.features, self.given = sparse.csr_matrix(X), frame, features, given
        self.query_ids = QueryIDs(obs_joinids=np.arange(X.shape[0]), var_joinids=np.arange(X.shape[1]))
        self._content = {"version": "1"} if content is None else content

    @property
    def content(self) -> Mapping[str, str]:
        return self._content

    def obs(self, obs_joinids: np.ndarray, column_names: Sequence[str]) -> pd.DataFrame:
        for name in column_names:
            check_name("obs_column_names", name, ["soma_joinid", *self.frame], of="a column of obs")
        if not np.isin(obs_joinids, self.query_ids.obs_joinids).all():
            raise ValueError(f"obs_joinids={obs_joinids} must be rows of the matrix.")
        frame = self.frame.iloc[obs_joinids].assign(soma_joinid=obs_joinids)
        return frame[list(column_names)].reset_index(drop=True)

    def var(self, var_joinids: np.ndarray, column_names: Any = None) -> pd.DataFrame:
        if self.features is None:
            return super().var(var_joinids, column_names)
        return self.features.iloc[var_joinids].reset_index(drop=True)

    def layout(self, ids: QueryIDs, budget: Any) -> Layout:
        return Layout(self.row_tile, 8.0 * self.X.nnz / max(1, self.X.shape[0]))

    def open(self, ids: Any, fields: Any, budget: Any) -> MatrixReader:
        return MatrixReader(self, ids.var_joinids, fields.obs_column_names)


class MatrixReader:
    """Reads rows of a `MatrixSource`, thirty at a time."""

    def __init__(self, source: MatrixSource, var_joinids: np.ndarray, names: Sequence[str]) -> None:
        self.source, self.var_joinids, self.names = source, var_joinids, names
        self.is_closed = False

    def read(self, obs_joinids: np.ndarray) -> Iterator[Rows[Any]]:
        for start in range(0, len(obs_joinids), 30):
            ids = obs_joinids[start : start + 30]
            X = self.source.X[ids][:, self.var_joinids]
            yield self.source.given(Rows.from_scipy(ids, X, self.source.obs(ids, self.names)))

    def close(self) -> None:
        self.is_closed = True


def matrix_source(
    n_obs: int = N_OBS, kind: type[MatrixSource] = MatrixSource, **options: Any
) -> MatrixSource:
    """Return a source of the same rows as the test experiment has."""
    frame = make_obs(np.arange(n_obs)).drop(columns="soma_joinid")
    return kind(expected_X(range(n_obs), range(N_VARS)), frame, **options)
