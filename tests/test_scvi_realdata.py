"""scVI and scANVI on real counts: through `SCVIDataModule`, and by scvi-tools from cells in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import tiledbsoma as soma
import tiledbsoma.io
import torch

from tiledbsoma_ml import SCVIDataModule
from tiledbsoma_ml._ingest.experiment import write_cells

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"the real data sets are not beside the checkout ({DATA.name}/)"
    ),
    # Of scvi-tools and Lightning themselves: both say in warnings what they will do one day.
    pytest.mark.filterwarnings("ignore"),
]

N_GENES = 500
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "check_val_every_n_epoch": 1,
}
NETWORK = {"n_hidden": 32, "n_latent": 8}


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Blood cells with the genes that are seen most; a part of their labels is hidden."""
    cells = anndata.read_h5ad(DATA / "pbmc3k_counts.h5ad")
    n_molecules = np.asarray(cells.X.sum(axis=0)).ravel()
    cells = cells[:, np.sort(np.argsort(n_molecules)[-N_GENES:])].copy()
    cells = cells[cells.obs["cell_type"].notna().to_numpy()].copy()
    rng = np.random.default_rng(0)
    hidden = rng.random(cells.n_obs) < 0.5
    labels = np.where(hidden, "Unknown", cells.obs["cell_type"].astype(str))
    cells.obs = cells.obs[["cell_type"]].assign(
        label=labels, lane=[f"lane-{i % 2}" for i in range(cells.n_obs)]
    )
    return cells


@pytest.fixture(scope="module")
def uri(cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("pbmc") / "experiment")
    write_cells(uri, cells)
    return uri


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module(uri: str, **options: Any) -> SCVIDataModule:
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA") as query:
        return SCVIDataModule(query, batch_column_names=["lane"], **options)


def test_scvi_reaches_the_validation_loss_of_training_in_memory(uri: str, cells: anndata.AnnData) -> None:
    from_soma, in_memory = [], []
    for seed in range(2):
        scvi.settings.seed = seed
        datamodule = module(uri, train_size=0.8, seed=seed)
        model = scvi.model.SCVI(registry=datamodule.registry, **NETWORK)
        model.train(datamodule=datamodule, max_epochs=6, **TRAINER)
        from_soma.append(float(model.history["elbo_validation"].iloc[-1, 0]))

        scvi.settings.seed = seed
        scvi.model.SCVI.setup_anndata(cells, batch_key="lane")
        model = scvi.model.SCVI(cells, **NETWORK)
        split = {"train_idx": datamodule.train_idx, "valid_idx": datamodule.val_idx}
        indexing = [split["train_idx"], split["valid_idx"], np.empty(0, dtype=np.int64)]
        model.train(max_epochs=6, datasplitter_kwargs={"external_indexing": indexing}, **TRAINER)
        in_memory.append(float(model.history["elbo_validation"].iloc[-1, 0]))
    spread = np.ptp(in_memory) + np.ptp(from_soma)
    assert abs(np.mean(from_soma) - np.mean(in_memory)) <= spread


def test_scanvi_predicts_hidden_labels_as_well_as_in_memory(uri: str, cells: anndata.AnnData) -> None:
    hidden = (cells.obs["label"] == "Unknown").to_numpy()
    truth = cells.obs["cell_type"].astype(str).to_numpy()

    scvi.settings.seed = 0
    datamodule = module(uri, label_column_name="label", unlabeled_category="Unknown", seed=0)
    model = scvi.model.SCANVI(registry=datamodule.registry, datamodule=datamodule, **NETWORK)
    model.train(datamodule=datamodule, max_epochs=10, **TRAINER)
    predicted = model.predict(dataloader=datamodule.inference_dataloader())
    accuracy = (predicted == truth)[hidden].mean()

    scvi.settings.seed = 0
    scvi.model.SCANVI.setup_anndata(cells, "label", "Unknown", batch_key="lane")
    model = scvi.model.SCANVI(cells, **NETWORK)
    model.train(max_epochs=10, train_size=1.0, **{**TRAINER, "check_val_every_n_epoch": None})
    in_memory = (np.asarray(model.predict()) == truth)[hidden].mean()

    most_frequent = np.unique(truth[hidden], return_counts=True)[1].max() / hidden.sum()
    assert accuracy > in_memory - 0.05
    assert accuracy > most_frequent + 0.2
