"""`Genes`: the genes that a model knows, and their places in a measurement. Knows nothing of scvi-tools."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import attrs
import numpy as np
import pandas as pd
import tiledbsoma as soma
import torch
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_name, warn

VAR_ID_COLUMNS = ("feature_id", "var_id", "gene_id", "feature_name", "gene_name")
"""Columns of `var` in which the id of a gene is looked for, in this order."""

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True, eq=False)
class Genes:
    """The genes that a model knows, and where they are in a measurement.

    Attributes:
        ids: All genes of the model, in its order.
        var_joinids: Joinids of the columns that the measurement has, in that order.
        places: Where each of these is among `ids`; None if they are all there.
    """

    ids: NDArray[np.object_]
    var_joinids: NDArrayJoinId
    places: NDArray[np.int64] | None = None

    @classmethod
    def read(
        cls,
        query: soma.ExperimentAxisQuery,
        var_joinids: NDArrayJoinId,
        var_column_name: str | None,
        known: NDArray[np.object_] | None = None,
    ) -> Genes:
        """Read the ids of the query's genes; with `known` ones, find these among them.

        Raises:
            ValueError: If none of the known ones is there, or an id is there twice.
        """
        var = query.experiment.ms[query.measurement_name].var
        name = _var_id_column(var, var_column_name)
        table = query.var(column_names=list(dict.fromkeys(["soma_joinid", name]))).concat().to_pandas()
        ids = table.set_index("soma_joinid", drop=False).loc[var_joinids, name].astype(str).to_numpy(object)
        if known is None:
            return cls(ids=ids, var_joinids=var_joinids)
        return cls._aligned(known, pd.Index(ids), var_joinids, name)

    @classmethod
    def _aligned(
        cls, known: NDArray[np.object_], ids: pd.Index[str], var_joinids: NDArrayJoinId, name: str
    ) -> Genes:
        for whose, index in (("the query", ids), ("the model", pd.Index(known))):
            if not index.is_unique:
                raise ValueError(
                    f"var_column_name={name!r} must name each gene once, but {whose} has "
                    f"{index[index.duplicated()][0]!r} twice; choose another column of var."
                )
        columns = ids.get_indexer(pd.Index(known))
        places = np.flatnonzero(columns >= 0)
        n_missing = len(known) - len(places)
        if not len(places):
            raise ValueError(
                f"var_column_name={name!r} must share genes with the model's {len(known):,} ones "
                f"({known[0]!r}, …), but the query has none of them ({', '.join(map(repr, ids[:2]))}, …); "
                "choose the column that has the same kind of id."
            )
        if n_missing:
            warn(
                f"{n_missing:,} of the model's {len(known):,} genes are missing in the query "
                f"({known[columns < 0][0]!r} for instance) and count as zero in all its cells.",
            )
        found = var_joinids[columns[places]]
        return cls(ids=known, var_joinids=found, places=places if n_missing else None)

    def widened(self, X: NDArrayNumber | sparse.csr_matrix | torch.Tensor) -> torch.Tensor:
        """Return `X` as a tensor of float32 with a column for each of `ids`."""
        if isinstance(X, torch.Tensor):
            return self._widened_tensor((X if X.ndim == 2 else X.unsqueeze(0)).to(torch.float32))
        if isinstance(X, sparse.csr_matrix):
            indices = X.indices if self.places is None else self.places.astype(X.indices.dtype)[X.indices]
            return _sparse_tensor(X.indptr, indices, X.data, (X.shape[0], len(self.ids)))
        return self._widened_tensor(torch.from_numpy(np.atleast_2d(X)).to(torch.float32))

    def _widened_tensor(self, X: torch.Tensor) -> torch.Tensor:
        if self.places is None:
            return X
        X = X.to_dense() if X.layout != torch.strided else X
        wide = X.new_zeros(X.shape[0], len(self.ids))
        wide[:, torch.from_numpy(self.places).to(X.device)] = X
        return wide


def _sparse_tensor(
    indptr: NDArray[np.integer[Any]],
    indices: NDArray[np.integer[Any]],
    data: NDArrayNumber,
    shape: tuple[int, int],
) -> torch.Tensor:
    """Return a `torch.sparse_csr` tensor of float32 that shares the memory of the arrays where it can."""
    crow, col = torch.from_numpy(indptr), torch.from_numpy(indices)
    values = torch.from_numpy(data.astype(np.float32, copy=False))
    with warnings.catch_warnings():  # torch says once that such tensors are "in beta state"
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def _var_id_column(var: soma.DataFrame, name: str | None) -> str:
    if name is not None:
        return check_name("var_column_name", name, var.keys(), of="a column of var")
    known = set(var.keys())
    found = next((column for column in VAR_ID_COLUMNS if column in known), "soma_joinid")
    logger.info("genes are known by the column %r of var.", found)
    return found
