"""Simulated cells for models of scvi-tools, small models, and what makes and trains them in a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import tiledbsoma as soma

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

from tiledbsoma_ml import SCVIDataModule  # noqa: E402 - it needs scvi-tools

SCVI, SCANVI = scvi.model.SCVI, scvi.model.SCANVI

N_CELLS, N_GENES = 400, 60
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
COVARIATES = {
    "label_column_name": "cell_type",
    "unlabeled_category": "regulatory T cell",
    "categorical_covariate_column_names": ["lane", "donor_id"],
    "continuous_covariate_column_names": ["age"],
}


@contextmanager
def query(uri: str, value_filter: str | None = None, **axes: Any) -> Iterator[soma.ExperimentAxisQuery]:
    obs_query = soma.AxisQuery(value_filter=value_filter) if value_filter else axes.get("obs_query")
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA", obs_query=obs_query) as found:
        yield found


def module(uri: str, value_filter: str | None = None, **options: Any) -> SCVIDataModule:
    defaults = {} if "reference" in options else {"batch_column_names": ["dataset_id"]}
    with query(uri, value_filter) as found:
        return SCVIDataModule(found, **{"batch_size": 100, **defaults, **options})


def trained(model: Any, datamodule: SCVIDataModule, **options: Any) -> Any:
    model.train(datamodule=datamodule, **{"max_epochs": 1, **TRAINER, **options})
    return model


def make(model_class: Any, datamodule: SCVIDataModule, **options: Any) -> Any:
    own = {"datamodule": datamodule} if model_class is SCANVI else {}
    return model_class(registry=datamodule.registry, n_hidden=8, n_latent=3, **own, **options)


def distance(a: pd.DataFrame, b: pd.DataFrame) -> float:
    pd.testing.assert_index_equal(a.index, b.index)
    return float((a - b).abs().to_numpy().max())
