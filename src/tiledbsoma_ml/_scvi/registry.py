"""The registry of scvi-tools: a dictionary with all that a model knows of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tiledbsoma_ml._scvi.cells import Cells, Known, Roles
from tiledbsoma_ml._scvi.labels import Labels


def make_registry(
    cells: Cells, roles: Roles, gene_ids: NDArray[np.object_], model_name: str | None
) -> dict[str, Any]:
    """Return the registry of cells and genes, with the keys that data modules of scvi-tools have.

    It holds plain values and arrays only. scvi-tools does not read `column_names`: they say which columns of
    `obs` a category was made of.
    """
    n_obs, n_vars = len(cells.obs_joinids), len(gene_ids)
    return {
        "scvi_version": version("scvi-tools"),
        **({} if model_name is None else {"model_name": model_name}),
        "setup_method_name": "setup_datamodule",
        "setup_args": {
            "layer": None,
            "batch_key": "_scvi_batch",
            "labels_key": roles.label,
            "size_factor_key": None,
            "categorical_covariate_keys": list(roles.categorical) or None,
            "continuous_covariate_keys": list(roles.continuous) or None,
        },
        "field_registries": {
            "X": {
                "data_registry": {"attr_name": "X", "attr_key": None},
                "state_registry": {"n_obs": n_obs, "n_vars": n_vars, "column_names": gene_ids.tolist()},
                "summary_stats": {"n_vars": n_vars, "n_cells": n_obs},
            },
            "batch": _categorical("batch", "batch", cells.batch),
            "labels": _labels(cells, roles),
            "ind_x": _field("_indices"),
            "size_factor": {"data_registry": {}, "state_registry": {}, "summary_stats": {}},
            "sample": _sample(cells.sample),
            "extra_categorical_covs": _categorical_covariates(cells.categorical),
            "extra_continuous_covs": _continuous_covariates(roles.continuous),
        },
    }


def roles_of(registry: Mapping[str, Any]) -> Roles:
    """Return the columns that a registry was made of.

    Raises:
        ValueError: If the registry was not made by this package.
    """
    state = {name: field["state_registry"] for name, field in registry["field_registries"].items()}
    if "column_names" not in state.get("batch", {}):
        raise ValueError(
            "reference must be a model that was trained with an SCVIDataModule, but its registry does not "
            "say which columns of obs it was made of; name these columns and batch_labels instead."
        )
    return Roles(
        batch=tuple(state["batch"]["column_names"]),
        label=next(iter(state["labels"]["column_names"]), None),
        unlabeled=state["labels"]["unlabeled_category"],
        categorical=tuple(state["extra_categorical_covs"].get("field_keys", ())),
        continuous=tuple(state["extra_continuous_covs"].get("columns", ())),
        sample=next(iter(state["sample"]["column_names"]), None),
    )


def known_of(registry: Mapping[str, Any]) -> Known:
    """Return the categories that have a code in a registry."""
    state = {name: field["state_registry"] for name, field in registry["field_registries"].items()}
    labels, unlabeled = state["labels"]["categorical_mapping"], state["labels"]["unlabeled_category"]
    covariates = state["extra_categorical_covs"].get("mapping", {})
    return Known(
        batch=state["batch"]["categorical_mapping"],
        classes=[name for name in labels if name != unlabeled],
        categorical=tuple(covariates.values()),
        sample=state["sample"]["categorical_mapping"] if state["sample"]["column_names"] else None,
    )


def gene_ids_of(registry: Mapping[str, Any]) -> NDArray[np.object_]:
    """Return the genes of a registry, in the order of the model."""
    return np.array(registry["field_registries"]["X"]["state_registry"]["column_names"], dtype=object)


def _field(attr_key: str, state: dict[str, Any] | None = None, **summary: int) -> dict[str, Any]:
    return {
        "data_registry": {"attr_name": "obs", "attr_key": attr_key},
        "state_registry": state or {},
        "summary_stats": summary,
    }


def _categorical(name: str, original_key: str, labels: Labels) -> dict[str, Any]:
    state = {
        "categorical_mapping": labels.categories,
        "original_key": labels.name or original_key,
        "column_names": list(labels.column_names),
    }
    return _field(f"_scvi_{name}", state, **{f"n_{name}": len(labels.categories)})


def _labels(cells: Cells, roles: Roles) -> dict[str, Any]:
    field = _categorical("labels", "label", cells.labels)
    field["state_registry"]["unlabeled_category"] = roles.unlabeled
    return field


def _sample(labels: Labels) -> dict[str, Any]:
    counts = torch.tensor(labels.counts(), dtype=torch.float32)
    return {**_categorical("sample", "sample", labels), "n_obs_per_sample": {"n_obs_per_sample": counts}}


def _categorical_covariates(covariates: Sequence[Labels]) -> dict[str, Any]:
    field = _field("_scvi_extra_categorical_covs", n_extra_categorical_covs=len(covariates))
    if not covariates:
        return {**field, "data_registry": {}}
    field["data_registry"]["attr_name"] = "obsm"
    field["state_registry"] = {
        "field_keys": [labels.name for labels in covariates],
        "mapping": {labels.name: labels.categories for labels in covariates},
        "n_cats_per_key": [len(labels.categories) for labels in covariates],
    }
    return field


def _continuous_covariates(names: Sequence[str]) -> dict[str, Any]:
    field = _field("_scvi_extra_continuous_covs", n_extra_continuous_covs=len(names))
    if not names:
        return {**field, "data_registry": {}}
    field["data_registry"]["attr_name"] = "obsm"
    field["state_registry"] = {"columns": np.array(names, dtype=object)}
    return field
