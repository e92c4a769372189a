"""Real data sets, streamed whole and compared with what `anndata` says their files hold."""

from __future__ import annotations

import tarfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
import tiledbsoma.io
from scipy import sparse

from tiledbsoma_ml import ExperimentDataset, experiment_dataloader
from tiledbsoma_ml._ingest.experiment import write_cells

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"the real data sets are not beside the checkout ({DATA.name}/)"
    ),
]

H5ADS = {
    "pbmc3k_counts.h5ad": ["cell_type"],
    "mouse_bladder_counts.h5ad": ["label"],
    "cellxgene_liver_bcells_counts.h5ad": ["donor_id", "assay", "suspension_type", "cell_type"],
}


def ingest(name: str, directory: Path) -> tuple[str, anndata.AnnData]:
    adata = anndata.read_h5ad(DATA / name)
    uri = str(directory / "experiment")
    write_cells(uri, adata)
    return uri, adata


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "columns"), H5ADS.items())
def test_every_value_of_an_h5ad_file_is_yielded(name: str, columns: list[str], tmp_path: Path) -> None:
    uri, adata = ingest(name, tmp_path)
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA") as query:
        dataset = ExperimentDataset(
            query,
            obs_column_names=["soma_joinid", *columns],
            batch_size=128,
            io_batch_size=1024,
            return_sparse_X=True,
            seed=0,
        )
    mini_batches = list(experiment_dataloader(dataset))
    obs = pd.concat([obs for _, obs in mini_batches])
    order = obs["soma_joinid"].to_numpy()
    assert sorted(order) == list(range(adata.n_obs))
    X = sparse.vstack([X for X, _ in mini_batches], format="csr")
    assert (sparse.csr_matrix(adata.X)[order] != X).nnz == 0
    assert X.dtype == adata.X.dtype
    for column in columns:
        expected = adata.obs[column].iloc[order]
        found = obs[column].reset_index(drop=True).astype(expected.dtype)
        pd.testing.assert_series_equal(found, expected.reset_index(drop=True))
        assert isinstance(obs[column].dtype, pd.CategoricalDtype) == isinstance(
            expected.dtype, pd.CategoricalDtype
        )


def test_an_experiment_written_by_the_r_package_is_read_layer_by_layer(tmp_path: Path) -> None:
    with tarfile.open(DATA / "soma_pbmc_small_by_others.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    uri = str(
        next(path for path in tmp_path.rglob("*") if (path / "obs").is_dir() and (path / "ms").is_dir())
    )
    with soma.Experiment.open(uri) as experiment:
        obs = experiment.obs.read().concat().to_pandas()
        for measurement_name, measurement in experiment.ms.items():
            for layer_name, layer in measurement.X.items():
                table = layer.read().tables().concat()
                i, j, values = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
                with experiment.axis_query(measurement_name) as query:
                    dataset = ExperimentDataset(
                        query, layer_name, obs_column_names=list(obs.columns), batch_size=32, shuffle=False
                    )
                expected = sparse.csr_matrix((values, (i, j)), shape=(len(obs), dataset.shape[1]))
                mini_batches = list(dataset)
                X = np.concatenate([X for X, _ in mini_batches])
                np.testing.assert_array_equal(X, expected.toarray())
                found = pd.concat([obs for _, obs in mini_batches], ignore_index=True)
                pd.testing.assert_frame_equal(found, obs)
