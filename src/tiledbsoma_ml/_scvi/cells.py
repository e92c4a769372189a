"""What scvi-tools wants to know of cells and genes, read once from a query. Knows nothing of scvi-tools."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import pandas as pd
import tiledbsoma as soma
import torch
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._common import NDArrayJoinId, NDArrayNumber, check_name
from tiledbsoma_ml._scvi.labels import Labels, Unseen, read_numbers
from tiledbsoma_ml._soma.obs import ObsColumns

VAR_ID_COLUMNS = ("feature_id", "var_id", "gene_id", "feature_name", "gene_name")
"""Columns of `var` in which the id of a gene is looked for, in this order."""

Batch: TypeAlias = dict[str, torch.Tensor]
"""What a model of scvi-tools takes."""

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Fields:
    """Which columns of `obs` mean what."""

    batch: tuple[str, ...] = ()
    label: str | None = None
    unlabeled: str | None = None
    categorical: tuple[str, ...] = ()
    continuous: tuple[str, ...] = ()
    sample: str | None = None

    def check(self, query: soma.ExperimentAxisQuery) -> None:
        """Raise a ValueError unless each is a column of the query's `obs`."""
        for parameter, names in self.by_parameter().items():
            for name in names:
                check_name(parameter, name, query.experiment.obs.keys(), of="a column of obs")

    def by_parameter(self) -> dict[str, tuple[str, ...]]:
        """Return the columns by the parameter that names them."""
        return {
            "batch_column_names": self.batch,
            "label_column_name": () if self.label is None else (self.label,),
            "categorical_covariate_column_names": self.categorical,
            "continuous_covariate_column_names": self.continuous,
            "sample_column_name": () if self.sample is None else (self.sample,),
        }


@attrs.frozen(kw_only=True)
class Known:
    """Categories that have a code already; None where those of the query itself are to be taken."""

    batch: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    categorical: tuple[Sequence[str], ...] | None = None
    sample: Sequence[str] | None = None


@attrs.frozen(kw_only=True, eq=False)
class Cells:
    """Codes and numbers of all cells of a query, in the order of `obs_joinids`, which are sorted."""

    obs_joinids: NDArrayJoinId
    batch: Labels
    labels: Labels
    unlabeled_code: int | None
    categorical: tuple[Labels, ...]
    continuous: NDArray[np.float32] | None
    sample: Labels

    @classmethod
    def read(
        cls,
        query: soma.ExperimentAxisQuery,
        obs_joinids: NDArrayJoinId,
        fields: Fields,
        known: Known,
        *,
        unseen: Unseen,
        is_inference: bool = False,
    ) -> Cells:
        """Read the columns of `fields` for these rows.

        Raises:
            ValueError: If a column does not exist or does not fit.
        """
        if is_inference and fields.label not in set(query.experiment.obs.keys()):
            fields = attrs.evolve(fields, label=None)
        fields.check(query)
        rows = np.unique(obs_joinids)
        columns = _read_columns(query, fields, rows)

        def read(parameter: str, *names: str) -> Labels:
            if not names:
                return Labels.constant(len(rows))
            return Labels.read(columns, rows, names, parameter=parameter)

        def among(labels: Labels, categories: Sequence[str] | None, what: str) -> Labels:
            return labels if categories is None else labels.among(categories, "error", what=what)

        batch = read("batch_column_names", *fields.batch)
        if known.batch is not None:
            batch = batch.among(known.batch, unseen, what="batch")
        labels, unlabeled_code = _labels(
            read("label_column_name", *fields.by_parameter()["label_column_name"]),
            fields,
            known.classes,
            is_inference=is_inference,
        )
        covariates = [read("categorical_covariate_column_names", name) for name in fields.categorical]
        known_covariates = known.categorical or (None,) * len(covariates)
        return cls(
            obs_joinids=rows,
            batch=batch,
            labels=labels,
            unlabeled_code=unlabeled_code,
            categorical=tuple(
                among(covariate, categories, "categorical covariate")
                for covariate, categories in zip(covariates, known_covariates, strict=True)
            ),
            continuous=_read_continuous(query, fields, rows),
            sample=among(
                read("sample_column_name", *fields.by_parameter()["sample_column_name"]),
                known.sample,
                "sample",
            ),
        )

    @property
    def classes(self) -> NDArray[np.object_]:
        """The labels but the one that stands for none."""
        return self.labels.categories[: self.unlabeled_code]

    def places(self, obs_joinids: NDArrayJoinId) -> NDArray[np.int64]:
        """Return where rows of the query are in these arrays."""
        first, last = int(self.obs_joinids[0]), int(self.obs_joinids[-1])
        if last - first == len(self.obs_joinids) - 1:
            return obs_joinids - first
        return np.searchsorted(self.obs_joinids, obs_joinids)

    def is_labeled(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which rows have a label."""
        codes = self.labels.codes[places]
        return np.ones(len(codes), bool) if self.unlabeled_code is None else codes != self.unlabeled_code

    def batch_of(self, X: torch.Tensor, places: NDArray[np.int64]) -> Batch:
        """Return rows as models of scvi-tools take them; without covariates there is no key of them.

        None in their place is what Lightning takes for a batch whose size is ambiguous.
        """
        batch = {"X": X, "batch": _column(self.batch, places), "labels": _column(self.labels, places)}
        if self.categorical:
            codes = [labels.codes[places].astype(np.int64) for labels in self.categorical]
            batch["extra_categorical_covs"] = torch.from_numpy(np.column_stack(codes))
        if self.continuous is not None:
            batch["extra_continuous_covs"] = torch.from_numpy(self.continuous[places])
        return batch | {"sample": _column(self.sample, places)}


def _read_columns(query: soma.ExperimentAxisQuery, fields: Fields, rows: NDArrayJoinId) -> ObsColumns:
    names = [*fields.batch, *fields.categorical, fields.label, fields.sample]
    wanted = list(dict.fromkeys(name for name in names if name is not None))
    return ObsColumns.read(query.experiment.obs, wanted or ["soma_joinid"], rows)


def _read_continuous(
    query: soma.ExperimentAxisQuery, fields: Fields, rows: NDArrayJoinId
) -> NDArray[np.float32] | None:
    if not fields.continuous:
        return None
    columns = ObsColumns.read(query.experiment.obs, fields.continuous, rows)
    return read_numbers(columns, rows, fields.continuous, parameter="continuous_covariate_column_names")


def _labels(
    labels: Labels, fields: Fields, classes: Sequence[str] | None, *, is_inference: bool
) -> tuple[Labels, int | None]:
    """Return the labels with the category of unlabelled cells last, and its code if it occurs."""
    unlabeled = fields.unlabeled
    if classes is None:
        classes = [name for name in labels.categories if name != unlabeled]
        if not classes:
            raise ValueError(
                f"label_column_name={fields.label!r} must have a label in at least one cell, but all "
                f"{len(labels.codes):,} cells are {unlabeled!r}; choose another column or unlabeled_category."
            )
    elif fields.label is None:  # another query, whose cells nobody has labelled
        categories = np.array([*classes, *([] if unlabeled is None else [unlabeled])], dtype=object)
        code = len(classes) if len(categories) > 1 else 0  # no class has it: it is wrong to ask for one
        codes = np.full(len(labels.codes), code, dtype=np.min_scalar_type(code))
        return Labels(categories, codes), None if unlabeled is None else code
    else:
        labels = _without_unseen(labels, unlabeled, set(classes))
    occurs = unlabeled is not None and unlabeled in labels.categories[labels.counts() > 0]
    wanted = [*classes, *([unlabeled] if occurs and unlabeled is not None else [])]
    labels = labels.among(wanted, "extend" if is_inference else "error", what="label")
    return labels, len(classes) if occurs else None


def _without_unseen(labels: Labels, unlabeled: str | None, classes: set[str]) -> Labels:
    """Return the labels with those that are not known as unlabelled, where there is a category for that."""
    unseen = np.array([name not in classes and name != unlabeled for name in labels.categories])
    if unlabeled is None or not unseen.any():
        return labels
    warnings.warn(
        f"the labels {labels.categories[unseen][:3].tolist()} of column {labels.name!r} are not among the "
        f"{len(classes):,} known ones; the {int(labels.counts()[unseen].sum()):,} cells that have them count "
        f"as {unlabeled!r}.",
        stacklevel=2,
    )
    names = np.where(unseen, unlabeled, labels.categories).astype(object)
    categories, places = np.unique(names.astype(str), return_inverse=True)
    return attrs.evolve(labels, categories=categories.astype(object), codes=places[labels.codes])


def _column(labels: Labels, places: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(labels.codes[places].astype(np.int64)).unsqueeze(1)


# Genes ----------------------------------------------------------------------------------------------------


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
            warnings.warn(
                f"{n_missing:,} of the model's {len(known):,} genes are missing in the query "
                f"({known[columns < 0][0]!r} for instance) and count as zero in all its cells.",
                stacklevel=2,
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
