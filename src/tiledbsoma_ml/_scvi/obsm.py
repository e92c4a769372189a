"""`write_obsm`: an embedding goes to where queries find it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma

from tiledbsoma_ml._common import absolute_uri, check_name
from tiledbsoma_ml._context import open_experiment


def write_obsm(experiment_uri: str, measurement_name: str, name: str, embedding: pd.DataFrame) -> None:
    """Store an embedding in the `obsm` of a measurement, where queries and `to_anndata` find it.

    It becomes a sparse array of float32, as `tiledbsoma.io` writes them, with the rows of `obs`. An array
    that is there already is never overwritten.

    Args:
        experiment_uri: The experiment.
        measurement_name: For instance "RNA".
        name: Name of the new array, for instance "X_scvi".
        embedding: Indexed by `soma_joinid`, as `SCVIDataModule.embed` returns it; of all cells or some.

    Raises:
        ValueError: If the measurement does not exist, the name is taken, or rows are not rows of `obs`.
    """
    uri = absolute_uri(experiment_uri, "experiment_uri")
    joinids, values = embedding.index.to_numpy(), embedding.to_numpy(dtype=np.float32)
    with open_experiment(uri) as experiment:
        n_obs = _check_obsm(experiment, measurement_name, name, embedding)
    table = pa.table(
        {
            "soma_dim_0": np.repeat(joinids, values.shape[1]),
            "soma_dim_1": np.tile(np.arange(values.shape[1]), len(values)),
            "soma_data": values.ravel(),
        }
    )
    with open_experiment(uri, "w") as experiment:
        measurement = experiment.ms[measurement_name]
        obsm = measurement["obsm"] if "obsm" in measurement else measurement.add_new_collection("obsm")
        obsm.add_new_sparse_ndarray(name, type=pa.float32(), shape=(n_obs, values.shape[1])).write(table)


def _check_obsm(
    experiment: soma.Experiment, measurement_name: str, name: str, embedding: pd.DataFrame
) -> int:
    """Return the number of rows that an array of `obsm` has."""
    check_name(
        "measurement_name", measurement_name, experiment.ms.keys(), of="a measurement of the experiment"
    )
    measurement = experiment.ms[measurement_name]
    if "obsm" in measurement and name in measurement.obsm:
        raise ValueError(
            f"name={name!r} must be new, but obsm of measurement {measurement_name!r} has an array of that "
            "name, which is never overwritten; choose another."
        )
    if embedding.index.name != "soma_joinid" or not embedding.index.is_unique:
        raise ValueError(
            f"embedding must be indexed by soma_joinid, each once, not by {embedding.index.name!r}; "
            "give what SCVIDataModule.embed returned."
        )
    known = experiment.obs.read(column_names=["soma_joinid"]).concat()["soma_joinid"].to_numpy()
    unknown = np.setdiff1d(embedding.index.to_numpy(), known)
    if len(unknown):
        raise ValueError(
            f"embedding must hold rows of obs only, but {len(unknown):,} of its {len(embedding):,} are not, "
            f"soma_joinid {unknown[0]} for instance; write it to the experiment that was embedded."
        )
    return int(known.max()) + 1
