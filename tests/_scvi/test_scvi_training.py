"""Models of scvi-tools are trained with `SCVIDataModule`."""

from __future__ import annotations

import argparse
import functools
import importlib
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scvi_models import COVARIATES, N_CELLS, SCANVI, SCVI, distance, make, module, query, scvi, trained
from tiledbsoma_ml import SCVIDataModule
from tiledbsoma_ml.scvi import load_scvi_model

# scvi-tools and Lightning themselves say in warnings what they will do one day.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("few_threads")]


class Recording(SCVIDataModule):
    """A data module that remembers what it handed to the training plan."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        handed = super().on_after_batch_transfer(batch, dataloader_idx)
        self.__dict__.setdefault("handed", []).append(handed)
        self.__dict__.setdefault("was_training", []).append(self.trainer.training)
        return handed


def test_scvi_trains_and_validates_and_keeps_the_indices(uri: str) -> None:
    datamodule = module(uri, train_size=0.75)
    model = trained(make(SCVI, datamodule), datamodule, max_epochs=2, check_val_every_n_epoch=1)
    assert len(model.history["elbo_validation"]) == len(model.history["elbo_train"]) == 2
    assert np.isfinite(model.history["elbo_validation"].to_numpy(float)).all()
    assert (len(model.train_indices), len(model.validation_indices)) == (300, 100)
    assert model.get_elbo(dataloader=datamodule.inference_dataloader()) < 0


def test_the_benchmark_for_a_gpu_tells_how_long_scvi_waits_for_data(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    gpu: Any = importlib.import_module("gpu")
    options = argparse.Namespace(batch_size=64, device=torch.device("cpu"), limit_s=0.1)
    with query(uri) as found:
        told = gpu.scvi_waits(found, tmp_path / "cells.snapshot", options)
    assert min(told["rows_per_s"], told["rows_per_s_without_data"]) > 0
    assert 0 <= told["share_waiting"] < 1


def test_scvi_without_a_registry_is_as_good_as_one_with_it_once_it_is_trained(
    uri: str, tmp_path: Path
) -> None:
    datamodule = module(uri, **COVARIATES)
    model = SCVI(n_hidden=8)
    for call in (lambda: datamodule.embed(model), lambda: module(uri, reference=model)):
        with pytest.raises(ValueError, match="this SCVI was made without one and not trained with an SCVIDa"):
            call()
    trained(model, datamodule)
    assert model.module.n_batch == datamodule.n_batch == 6
    assert model.module.decoder.px_decoder.n_cat_list == [6, *datamodule.n_cats_per_cov]
    model.save(tmp_path / "model")
    loaded = load_scvi_model(SCVI, tmp_path / "model")
    assert distance(datamodule.embed(loaded), datamodule.embed(model)) < 1e-5
    assert module(uri, reference=model).registry.keys() == datamodule.registry.keys()


@pytest.mark.parametrize("model_class", [SCVI, SCANVI])
def test_checkpoints_are_kept_while_training_and_the_best_is_loaded(
    uri: str, tmp_path: Path, model_class: Any
) -> None:
    datamodule = module(uri, train_size=0.8, **COVARIATES)
    callback = scvi.train.SaveCheckpoint(
        monitor="elbo_validation", dirpath=str(tmp_path), load_best_on_end=True
    )
    model = trained(make(model_class, datamodule), datamodule, callbacks=[callback])
    [folder] = tmp_path.iterdir()
    assert folder.name.startswith("epoch=0-step=4-elbo_validation=")
    loaded = load_scvi_model(model_class, folder)
    assert distance(datamodule.embed(loaded), datamodule.embed(model)) < 1e-5


def test_what_can_never_come_is_refused_before_the_first_batch(uri: str) -> None:
    with query(uri) as found:
        datamodule = Recording(found, batch_size=100)
    waiting = {
        "LoudEarlyStopping waits for 'elbo_validation'": {"early_stopping": True},
        "SaveCheckpoint waits for 'validation_loss'": {"callbacks": [scvi.train.SaveCheckpoint()]},
        "reduce_lr_on_plateau waits for 'elbo_validation'": {"plan_kwargs": {"reduce_lr_on_plateau": True}},
    }
    model = make(SCVI, datamodule)
    for who, options in waiting.items():
        message = f"{who}, but train_size=1 leaves no cells for validation; make"
        with pytest.raises(ValueError, match=message):
            trained(model, datamodule, **options)
    with pytest.raises(
        ValueError, match=r"label_column_name=None must have two labels or more .* but has 1;"
    ):
        trained(make(SCANVI, datamodule), datamodule)
    assert not hasattr(datamodule, "handed")


def test_nothing_is_warned_about_that_nobody_can_act_on(uri: str) -> None:
    datamodule = module(uri, train_size=0.8, batch_size=61)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(make(SCVI, datamodule), datamodule, check_val_every_n_epoch=1)
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "ambiguous" in text or "__len__" in text]


def test_only_labelled_cells_reach_the_classification_loss(uri: str) -> None:
    with query(uri) as found:
        datamodule = Recording(
            found, batch_column_names=["dataset_id"], batch_size=20, train_size=0.75, **COVARIATES
        )
    trained(make(SCANVI, datamodule), datamodule, check_val_every_n_epoch=1)
    for full, labelled in datamodule.handed:
        is_labelled = (full["labels"] < datamodule.n_labels).flatten()
        assert 0 < is_labelled.sum() == len(labelled["X"])
        for key, value in labelled.items():
            assert value is full[key] is None or torch.equal(value, full[key][is_labelled])
    assert any(len(labelled["X"]) < len(full["X"]) for full, labelled in datamodule.handed)


@pytest.mark.parametrize("version", ["1.4", "1.5"])
def test_no_version_classifies_cells_without_a_label_or_trains_on_one_alone(
    sparsely_labelled: tuple[Any, Recording], version: str
) -> None:
    model, datamodule = sparsely_labelled
    parts = {True: [], False: []}
    for batch, is_training in zip(datamodule.handed, datamodule.was_training, strict=True):
        parts[is_training].append(classified(batch, version, is_training))
    for found in parts.values():
        assert None in found
        assert all(part["labels"].lt(2).all() for part in found if part is not None)
    sizes = [len(part["labels"]) for part in parts[True] if part is not None]
    assert min(sizes) > 1
    is_labelled = np.isin(datamodule.labels_[datamodule.train_idx], ["plasma cell", "platelet"])
    assert 2 * is_labelled.sum() - sum(sizes) <= 1  # two epochs; one cell may still wait for another
    assert np.isfinite(model.history["train_loss"].to_numpy(float)).all()


def test_the_installed_version_has_the_rule_that_is_taken_for_it(
    sparsely_labelled: tuple[Any, Recording],
) -> None:
    model, datamodule = sparsely_labelled
    batches = zip(datamodule.handed, datamodule.was_training, strict=True)
    by_rule = [classified(batch, INSTALLED, is_training) for batch, is_training in batches]
    for found, expected in zip(model.classified, by_rule, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found["X"], expected["X"])


@pytest.fixture(scope="module")
def sparsely_labelled(uri: str) -> tuple[Any, Recording]:
    """A model that was trained where most mini-batches have one labelled cell or none.

    They have every key by which a version could take a batch alone for one of labelled cells. `classified` of
    the model are the cells that the training plan classified, step by step.
    """
    options = {**COVARIATES, "unlabeled_category": "CD4-positive, alpha-beta T cell"}
    with query(uri, "cell_type in ['CD4-positive, alpha-beta T cell', 'plasma cell', 'platelet']") as found:
        datamodule = Recording(found, batch_size=3, train_size=0.8, seed=0, **options)
    model = make(SCANVI, datamodule)
    model.classified, loss = [], model.module.loss

    @functools.wraps(loss)
    def recorded(*args: Any, labelled_tensors: Any = None, **options: Any) -> Any:
        model.classified.append(labelled_tensors)
        return loss(*args, labelled_tensors=labelled_tensors, **options)

    model.module.loss = recorded
    return trained(model, datamodule, max_epochs=4, check_val_every_n_epoch=1), datamodule


INSTALLED = "1.4" if metadata.version("scvi-tools").startswith("1.4.") else "1.5"


def classified(batch: Any, version: str, is_training: bool) -> dict[str, torch.Tensor] | None:
    """Return the cells that the training plan of a version of scvi-tools classifies, by the rule it has."""
    keys = ["X", "batch", "labels", "extra_categorical_covs", "extra_continuous_covs"]
    if version == "1.4":
        if len(batch) == 2:
            return batch[1]
        return batch if is_training and list(batch)[:5] == keys else None
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[1]
    return batch if all(key in batch for key in keys) else None


def test_all_cells_are_classified_where_there_is_no_unlabeled_category(uri: str) -> None:
    with query(uri) as found:
        datamodule = Recording(found, batch_size=100, label_column_name="cell_type")
    model = trained(make(SCANVI, datamodule), datamodule)
    assert all(full is labelled for full, labelled in datamodule.handed)
    assert model.module.n_labels == datamodule.n_labels


def test_one_data_module_serves_scvi_and_then_scanvi_built_on_it(uri: str) -> None:
    datamodule = module(uri, **COVARIATES)
    first = trained(make(SCVI, datamodule), datamodule)
    second = SCANVI.from_scvi_model(
        first, "regulatory T cell", registry=datamodule.registry, datamodule=datamodule
    )
    trained(second, datamodule)
    predicted = second.predict(dataloader=datamodule.inference_dataloader())
    assert len(predicted) == N_CELLS
    assert "regulatory T cell" not in predicted


def test_a_last_batch_of_one_cell_trains(uri: str) -> None:
    for model_class in (SCVI, SCANVI):
        datamodule = module(uri, batch_size=399, **COVARIATES)
        model = trained(make(model_class, datamodule), datamodule)
        assert np.isfinite(model.history["train_loss"].to_numpy(float)).all()


def test_mrvi_trains_on_samples(uri: str, tmp_path: Path) -> None:
    # Until 1.5 `MRVI` chooses between this one and one of JAX.
    mrvi = getattr(scvi.external, "TorchMRVI", None) or scvi.external.MRVI
    datamodule = module(uri, sample_column_name="donor_id")
    model = trained(mrvi(registry=datamodule.registry), datamodule)
    embedding = datamodule.embed(model, give_z=True)
    assert embedding.shape[0] == N_CELLS
    model.save(tmp_path / "model", datamodule=datamodule)
    loaded = load_scvi_model(mrvi, tmp_path / "model")
    assert distance(datamodule.embed(loaded, give_z=True), embedding) < 1e-5


def test_the_data_module_of_scvi_tools_runs_on_this_package(uri: str) -> None:
    with query(uri) as found:
        datamodule = scvi.dataloaders.TileDBDataModule(
            found,
            layer_name="raw",
            batch_column_names=["dataset_id"],
            label_keys=["cell_type"],
            train_size=0.75,
            split_seed=0,
            batch_size=100,
            shuffle_chunk_size=8,
            io_batch_size=64,
            seed=0,
        )
        datamodule.setup()
        model = SCVI(registry=datamodule.registry, n_hidden=8)
        trained(model, datamodule, max_epochs=2, check_val_every_n_epoch=1)
        assert len(model.history["elbo_validation"]) == 2
        latent = model.get_latent_representation(dataloader=datamodule.inference_dataloader())
    assert latent.shape == (300, 10)
    assert np.isfinite(latent).all()


DDP = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from pathlib import Path
import numpy as np, scvi, tiledbsoma as soma
from tiledbsoma_ml import SCVIDataModule

class Recording(SCVIDataModule):
    joinids, ends = [], []

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.joinids.extend(batch[1]["soma_joinid"])
        self.ends.append(len(self.joinids))
        return super().on_before_batch_transfer(batch, dataloader_idx)

if __name__ == "__main__":
    uri, folder = sys.argv[1:]
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA") as query:
        datamodule = Recording(query, batch_column_names=["dataset_id"], batch_size=64)
    model = scvi.model.SCVI(registry=datamodule.registry, n_hidden=8)
    model.train(
        datamodule=datamodule, max_epochs=2, accelerator="cpu", devices=2,
        strategy="ddp_find_unused_parameters_true",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )
    rank = torch.distributed.get_rank()
    weights = torch.cat([weight.flatten() for weight in model.module.parameters()]).detach().numpy()
    embedded = datamodule.embed(model)
    one = soma.AxisQuery(coords=([7],))
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA", obs_query=one) as query:
        if rank == 0:  # needs nothing of the others
            np.testing.assert_allclose(datamodule.embed(model, query), embedded.loc[[7]], atol=1e-5)
    np.savez(
        Path(folder) / f"rank{rank}.npz", joinids=datamodule.joinids, ends=datamodule.ends, weights=weights,
        embedded=embedded.index.to_numpy(),
    )
"""


def test_two_processes_train_on_disjoint_rows_in_equal_steps(uri: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DDP)
    done = subprocess.run(
        [sys.executable, script, uri, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (dict(np.load(tmp_path / f"rank{rank}.npz")) for rank in range(2))
    assert first["ends"].tolist() == second["ends"].tolist()
    n_per_epoch = N_CELLS // 2
    for start in (0, n_per_epoch):
        rows = [rank["joinids"][start : start + n_per_epoch] for rank in (first, second)]
        assert sorted(np.concatenate(rows)) == list(range(N_CELLS))
    np.testing.assert_allclose(first["weights"], second["weights"])
    assert first["embedded"].tolist() == second["embedded"].tolist() == list(range(N_CELLS))
