"""`Rows`: rows of a query on their way from a source to a mini-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any, Generic, TypeVar

import attrs
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._device import DeviceRows

MANY_CATEGORIES = 1000
"""Number of categories above which `pd.concat` is slower than concatenating codes."""

Matrix = TypeVar("Matrix", CSR_IO_Buffer, DeviceRows)
"""A matrix of sparse rows, in memory or on a device."""


@attrs.frozen(kw_only=True, eq=False)
class Rows(Generic[Matrix]):
    """Rows of a query, in one order, with their joinids, `X`, `obs`, layers and `obsm`.

    Attributes:
        obs_joinids: The joinid of each row, of shape (n_rows,).
        X: The rows of the main layer, of shape (n_rows, n_vars).
        obs: Columns of `obs`, with any index.
        layers: Further layers by name, each of the shape of `X`.
        obsm: Arrays by name, each of shape (n_rows, n).
    """

    obs_joinids: NDArrayJoinId
    X: Matrix
    obs: pd.DataFrame
    layers: Mapping[str, Matrix] = attrs.field(factory=dict)
    obsm: Mapping[str, NDArrayNumber] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        parts: list[Sized] = [self.X, self.obs, *self.layers.values(), *self.obsm.values()]
        assert all(len(part) == len(self) for part in parts)

    @classmethod
    def from_scipy(
        cls, obs_joinids: NDArrayJoinId, X: sparse.csr_matrix | sparse.csr_array, obs: pd.DataFrame
    ) -> Rows[CSR_IO_Buffer]:
        """Return rows with `X` from SciPy; values of a coordinate that repeats are added up."""
        if not X.has_canonical_format:
            X = X.copy()
            X.sum_duplicates()
        matrix = CSR_IO_Buffer.from_pjd(X.indptr, X.indices, X.data, X.shape)
        return Rows(obs_joinids=obs_joinids, X=matrix, obs=obs)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.obs_joinids)

    def slice(self, start: int, stop: int) -> Rows[Matrix]:
        """Return the rows from `start` to `stop`, without copying their values."""
        return Rows(
            obs_joinids=self.obs_joinids[start:stop],
            X=self.X.slice(start, stop),
            obs=self.obs.iloc[start:stop],
            layers={name: layer.slice(start, stop) for name, layer in self.layers.items()},
            obsm={name: array[start:stop] for name, array in self.obsm.items()},
        )

    def take(self, rows: NDArray[np.int64]) -> Rows[Matrix]:
        """Return the rows with these numbers, in this order; a number may repeat."""
        return Rows(
            obs_joinids=self.obs_joinids[rows],
            X=self.X.take(rows),
            obs=self.obs.take(rows).reset_index(drop=True),
            layers={name: layer.take(rows) for name, layer in self.layers.items()},
            obsm={name: array[rows] for name, array in self.obsm.items()},
        )

    def narrowed(self: Rows[CSR_IO_Buffer]) -> Rows[CSR_IO_Buffer]:
        """Return the rows with columns of the smallest type, which take fewer bytes to send."""
        layers = {name: layer.narrowed() for name, layer in self.layers.items()}
        return attrs.evolve(self, X=self.X.narrowed(), layers=layers)

    def to(self: Rows[CSR_IO_Buffer], device: torch.device) -> Rows[DeviceRows]:
        """Return the rows with their matrices on a device; the entries of each row are sorted by column."""
        return Rows(
            obs_joinids=self.obs_joinids,
            X=_put(self.X, device),
            obs=self.obs,
            layers={name: _put(layer, device) for name, layer in self.layers.items()},
            obsm=self.obsm,
        )

    @classmethod
    def concat(cls, parts: Sequence[Rows[Matrix]]) -> Rows[Matrix]:
        """Return the rows of one or more parts, below each other."""
        first = parts[0]
        concat = type(first.X).concat
        return Rows(
            obs_joinids=np.concatenate([part.obs_joinids for part in parts]),
            X=concat([part.X for part in parts]),
            obs=concat_obs([part.obs for part in parts]),
            layers={name: concat([part.layers[name] for part in parts]) for name in first.layers},
            obsm={name: np.concatenate([part.obsm[name] for part in parts]) for name in first.obsm},
        )


def _put(matrix: CSR_IO_Buffer, device: torch.device) -> DeviceRows:
    matrix = matrix.narrowed().sort_indices()
    return DeviceRows.put(matrix.indptr, matrix.indices, matrix.data, matrix.shape[1], device)


@attrs.frozen(kw_only=True, eq=False)
class Padding:
    """The rows of a rank that another rank yields as well, and the column of `obs` that marks them.

    Attributes:
        column_name: The column to add; None to add none.
        obs_joinids: The joinids of the rows that repeat.
    """

    column_name: str | None
    obs_joinids: NDArrayJoinId

    def mark(self, obs: pd.DataFrame, obs_joinids: NDArrayJoinId) -> pd.DataFrame:
        """Return `obs` of rows, with the column that marks those that repeat, if there is one."""
        if self.column_name is None:
            return obs
        return obs.assign(**{self.column_name: np.isin(obs_joinids, self.obs_joinids)})


def concat_obs(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the `obs` of the parts, below each other, with a fresh index."""
    first = parts[0]
    if len(parts) == 1:
        return first.reset_index(drop=True)
    if not any(_has_many_categories(dtype) for dtype in first.dtypes):
        return pd.concat(parts, ignore_index=True)
    columns = {name: _concat_column([part[name] for part in parts]) for name in first}
    return pd.DataFrame(columns, copy=False)


def _concat_column(parts: list[pd.Series[Any]]) -> Any:
    """Return what `pd.concat` returns, without hashing categories that are the same in all parts."""
    dtype: Any = parts[0].dtype
    if _has_many_categories(dtype) and all(_is_same(dtype, part.dtype) for part in parts[1:]):
        codes = np.concatenate([part.cat.codes.to_numpy() for part in parts])
        return pd.Categorical.from_codes(codes, dtype=dtype)
    return pd.concat(parts, ignore_index=True)


def _has_many_categories(dtype: Any) -> bool:
    return isinstance(dtype, pd.CategoricalDtype) and len(dtype.categories) > MANY_CATEGORIES


def _is_same(dtype: Any, other: Any) -> bool:
    return (
        isinstance(other, pd.CategoricalDtype)
        and dtype.ordered == other.ordered
        and dtype.categories.equals(other.categories)
    )
