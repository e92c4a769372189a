"""`Cells`: the codes and numbers of cells, read once from a query. Knows nothing of scvi-tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import attrs
import numpy as np
import tiledbsoma as soma
import torch
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, check_name, warn
from tiledbsoma_ml._scvi.labels import Labels, Unseen, read_numbers
from tiledbsoma_ml._soma.obs import ObsColumns

Batch: TypeAlias = dict[str, torch.Tensor]
"""The tensors that a model of scvi-tools takes, by key."""


@attrs.frozen(kw_only=True)
class Roles:
    """The columns of `obs`, by what they mean to a model; `SCVIDataModule` describes each."""

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
        """Return the columns, by the parameter that names them."""
        return {
            "batch_column_names": self.batch,
            "label_column_name": () if self.label is None else (self.label,),
            "categorical_covariate_column_names": self.categorical,
            "continuous_covariate_column_names": self.continuous,
            "sample_column_name": () if self.sample is None else (self.sample,),
        }


@attrs.frozen(kw_only=True)
class Known:
    """Categories that have a code already; None where the categories of the query are to be taken."""

    batch: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    categorical: tuple[Sequence[str], ...] | None = None
    sample: Sequence[str] | None = None


@attrs.frozen(kw_only=True, eq=False)
class Cells:
    """The codes and numbers of all cells of a query, in the order of `obs_joinids`, which are sorted."""

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
        roles: Roles,
        known: Known,
        *,
        unseen: Unseen,
        is_inference: bool = False,
    ) -> Cells:
        """Read the columns of `roles` for these rows.

        Raises:
            ValueError: If a column does not exist or does not fit.
        """
        if is_inference and roles.label not in set(query.experiment.obs.keys()):
            roles = attrs.evolve(roles, label=None)
        roles.check(query)
        rows = np.unique(obs_joinids)
        columns = _read_columns(query, roles, rows)

        def read(parameter: str, *names: str) -> Labels:
            if not names:
                return Labels.constant(len(rows))
            return Labels.read(columns, rows, names, parameter=parameter)

        def among(labels: Labels, categories: Sequence[str] | None, what: str) -> Labels:
            return labels if categories is None else labels.among(categories, "error", what=what)

        batch = read("batch_column_names", *roles.batch)
        if known.batch is not None:
            batch = batch.among(known.batch, unseen, what="batch")
        labels, unlabeled_code = _labels(
            read("label_column_name", *roles.by_parameter()["label_column_name"]),
            roles,
            known.classes,
            is_inference=is_inference,
        )
        covariates = [read("categorical_covariate_column_names", name) for name in roles.categorical]
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
            continuous=_read_continuous(query, roles, rows),
            sample=among(
                read("sample_column_name", *roles.by_parameter()["sample_column_name"]),
                known.sample,
                "sample",
            ),
        )

    @property
    def classes(self) -> NDArray[np.object_]:
        """The labels, without the one that means "no label"."""
        return self.labels.categories[: self.unlabeled_code]

    def places(self, obs_joinids: NDArrayJoinId) -> NDArray[np.int64]:
        """Return the places of rows of the query in these arrays."""
        first, last = int(self.obs_joinids[0]), int(self.obs_joinids[-1])
        if last - first == len(self.obs_joinids) - 1:
            return obs_joinids - first
        return np.searchsorted(self.obs_joinids, obs_joinids)

    def is_labeled(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which rows have a label."""
        codes = self.labels.codes[places]
        return np.ones(len(codes), bool) if self.unlabeled_code is None else codes != self.unlabeled_code

    def batch_of(self, X: torch.Tensor, places: NDArray[np.int64]) -> Batch:
        """Return rows as models of scvi-tools take them; without covariates, their keys are absent.

        With None in their place, Lightning would warn that the size of the batch is ambiguous.
        """
        batch = {"X": X, "batch": _column(self.batch, places), "labels": _column(self.labels, places)}
        if self.categorical:
            codes = [labels.codes[places].astype(np.int64) for labels in self.categorical]
            batch["extra_categorical_covs"] = torch.from_numpy(np.column_stack(codes))
        if self.continuous is not None:
            batch["extra_continuous_covs"] = torch.from_numpy(self.continuous[places])
        return batch | {"sample": _column(self.sample, places)}


def _read_columns(query: soma.ExperimentAxisQuery, roles: Roles, rows: NDArrayJoinId) -> ObsColumns:
    names = [*roles.batch, *roles.categorical, roles.label, roles.sample]
    wanted = list(dict.fromkeys(name for name in names if name is not None))
    return ObsColumns.read(query.experiment.obs, wanted or ["soma_joinid"], rows)


def _read_continuous(
    query: soma.ExperimentAxisQuery, roles: Roles, rows: NDArrayJoinId
) -> NDArray[np.float32] | None:
    if not roles.continuous:
        return None
    columns = ObsColumns.read(query.experiment.obs, roles.continuous, rows)
    return read_numbers(columns, rows, roles.continuous, parameter="continuous_covariate_column_names")


def _labels(
    labels: Labels, roles: Roles, classes: Sequence[str] | None, *, is_inference: bool
) -> tuple[Labels, int | None]:
    """Return the labels, the unlabelled category last, and the code of this category if it occurs."""
    unlabeled = roles.unlabeled
    if classes is None:
        classes = [name for name in labels.categories if name != unlabeled]
        if not classes:
            raise ValueError(
                f"label_column_name={roles.label!r} must have a label in at least one cell, but all "
                f"{len(labels.codes):,} cells are {unlabeled!r}; choose another column or unlabeled_category."
            )
    elif roles.label is None:  # another query, whose cells nobody has labelled
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
    """Return the labels; unknown ones become the unlabelled category, if there is one."""
    unseen = np.array([name not in classes and name != unlabeled for name in labels.categories])
    if unlabeled is None or not unseen.any():
        return labels
    warn(
        f"the labels {labels.categories[unseen][:3].tolist()} of column {labels.name!r} are not among the "
        f"{len(classes):,} known ones; the {int(labels.counts()[unseen].sum()):,} cells that have them count "
        f"as {unlabeled!r}.",
    )
    names = np.where(unseen, unlabeled, labels.categories).astype(object)
    categories, places = np.unique(names.astype(str), return_inverse=True)
    return attrs.evolve(labels, categories=categories.astype(object), codes=places[labels.codes])


def _column(labels: Labels, places: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(labels.codes[places].astype(np.int64)).unsqueeze(1)
