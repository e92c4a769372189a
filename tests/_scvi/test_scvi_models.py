"""Models that were trained with `SCVIDataModule` embed cells, are saved and loaded, and get new batches."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiledbsoma as soma
import torch

from scvi_models import COVARIATES, N_CELLS, N_GENES, SCANVI, SCVI, distance, make, module, query, trained
from tiledbsoma_ml import SCVIDataModule
from tiledbsoma_ml._ingest.experiment import write_cells
from tiledbsoma_ml.scvi import load_query_model, load_scvi_model

# scvi-tools and Lightning themselves say in warnings what they will do one day.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("few_threads")]

# Embedding --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_and_module(uri: str) -> tuple[Any, SCVIDataModule]:
    torch.manual_seed(0)
    datamodule = module(uri, train_size=0.8)
    return trained(make(SCVI, datamodule, encode_covariates=True), datamodule), datamodule


def test_a_row_of_the_embedding_is_that_of_its_cell(model_and_module: Any, uri: str) -> None:
    model, datamodule = model_and_module
    whole = datamodule.embed(model)
    assert whole.index.tolist() == list(range(N_CELLS))
    assert distance(datamodule.embed(model, batch_size=37), whole) < 1e-5
    assert len(np.unique(whole.round(4), axis=0)) > 0.9 * N_CELLS
    for joinids in ([7], [399], [250, 3, 77, 120]):
        with query(uri, obs_query=soma.AxisQuery(coords=(joinids,))) as found:
            part = datamodule.embed(model, found)
            assert part.index.tolist() == found.obs_joinids().to_pylist()
        assert sorted(part.index) == sorted(joinids)
        assert distance(part, whole.loc[part.index]) < 1e-5


def test_the_latent_space_does_not_depend_on_the_order_of_genes(
    model_and_module: Any, uri: str, tmp_path: Path
) -> None:
    model, datamodule = model_and_module
    with query(uri) as found:
        cells = found.to_anndata("raw")
    cells = cells[:50, np.random.default_rng(0).permutation(N_GENES)].copy()
    cells.var.index = [f"gene-{j}" for j in range(N_GENES)]
    other = str(tmp_path / "other")
    write_cells(other, cells)
    with query(other) as found:
        part = datamodule.embed(model, found)
    assert distance(part, datamodule.embed(model).iloc[:50]) < 1e-5


def test_a_model_that_was_trained_on_cells_in_memory_embeds_a_query_of_the_same_batches(uri: str) -> None:
    with query(uri) as found:
        cells = found.to_anndata("raw")
    cells.var_names = cells.var["feature_id"].astype(str).rename(None)
    for columns, key in ((["dataset_id"], {"batch_key": "dataset_id"}), ([], {})):
        SCVI.setup_anndata(cells, **key)
        model = SCVI(cells, n_hidden=8, n_latent=3)
        model.is_trained_ = True
        model.module.eval()
        found = module(uri, batch_column_names=columns).embed(model)
        np.testing.assert_allclose(found, model.get_latent_representation(), atol=1e-5)
        with pytest.raises(ValueError, match=r"the batches of the data module \(20\) must be the model's"):
            module(uri, batch_column_names=["donor_id"]).embed(model)


def test_a_model_of_other_data_is_refused(model_and_module: Any, uri: str) -> None:
    model, _ = model_and_module
    with pytest.raises(ValueError, match=r"the batches of the data module \(6\) must be the model's \(2\)"):
        module(uri).embed(make(SCVI, module(uri, "dataset_id in ['dataset-3', 'dataset-1']")))
    with pytest.raises(ValueError, match=r"the genes of the data module"):
        module(uri, var_column_name="feature_name").embed(model)


# Saving and loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "options", "own_options"),
    [
        (SCVI, {}, {}),
        (SCVI, COVARIATES, {"encode_covariates": True, "n_layers": 2, "use_layer_norm": "both"}),
        (SCANVI, COVARIATES, {"encode_covariates": True, "linear_classifier": True}),
        (SCANVI, {"label_column_name": "cell_type"}, {}),
    ],
)
def test_a_model_that_was_saved_is_the_same_when_it_is_loaded(
    uri: str, tmp_path: Path, model_class: Any, options: Any, own_options: Any
) -> None:
    datamodule = module(uri, **options)
    model = trained(make(model_class, datamodule, **own_options), datamodule)
    model.save(tmp_path / "model", datamodule=datamodule)
    loaded = load_scvi_model(model_class, tmp_path / "model")
    assert distance(datamodule.embed(loaded), datamodule.embed(model)) < 1e-5
    again = module(uri, reference=tmp_path / "model")
    assert again.registry["field_registries"].keys() == datamodule.registry["field_registries"].keys()
    assert distance(again.embed(loaded), datamodule.embed(model)) < 1e-5
    if model_class is SCANVI:
        same = loaded.predict(dataloader=datamodule.inference_dataloader())
        assert (same == model.predict(dataloader=datamodule.inference_dataloader())).all()


def test_the_load_of_scvi_tools_works_where_its_network_is_a_plain_one(uri: str, tmp_path: Path) -> None:
    datamodule = module(uri, label_column_name="cell_type", unlabeled_category="regulatory T cell")
    for model_class, options in ((SCVI, {}), (SCANVI, {"datamodule": datamodule})):
        model = trained(make(model_class, datamodule), datamodule)
        model.save(tmp_path / model_class.__name__, datamodule=datamodule)
        loaded = model_class.load(tmp_path / model_class.__name__, adata=False, accelerator="cpu", **options)
        assert distance(datamodule.embed(loaded), datamodule.embed(model)) < 1e-5


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold a model of scvi-tools, but there is no model\.pt"):
        load_scvi_model(SCVI, tmp_path)


# Mapping new batches onto a model ---------------------------------------------------------------------------

OLD = "dataset_id in ['dataset-3', 'dataset-4']"
NEW = "dataset_id in ['dataset-1', 'dataset-4', 'dataset-6']"


@pytest.mark.parametrize("model_class", [SCVI, SCANVI])
@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("old", [OLD, "dataset_id == 'dataset-4'"])
def test_new_batches_leave_the_cells_of_old_ones_where_they_were(
    uri: str, tmp_path: Path, model_class: Any, encodes: bool, old: str
) -> None:
    options = {"label_column_name": "cell_type", "unlabeled_category": "regulatory T cell"}
    reference = module(uri, old, categorical_covariate_column_names=["lane"], **options)
    model = trained(make(model_class, reference, encode_covariates=encodes, n_layers=2), reference)
    with query(uri, NEW) as found:
        if encodes:
            with pytest.raises(ValueError, match="its encoder looks at them, but the query has 2 more"):
                reference.embed(model, found, unseen="extend")
        else:
            assert len(reference.embed(model, found, unseen="extend")) > 0
    new = module(uri, NEW, reference=model, unseen="extend")
    assert new.batch_labels.tolist()[: reference.n_batch] == reference.batch_labels.tolist()
    assert set(new.batch_labels[reference.n_batch :]) == {"dataset-1", "dataset-6"}
    extended = load_query_model(model_class, model, new)
    before, after = reconstruction(model, reference), reconstruction(extended, reference)
    np.testing.assert_allclose(before, after, rtol=1e-4)
    trained(extended, new, plan_kwargs={"weight_decay": 0.0})
    if not encodes:
        assert distance(reference.embed(extended), reference.embed(model)) < 1e-5
    extended.save(tmp_path / "extended", datamodule=new)
    loaded = load_scvi_model(model_class, tmp_path / "extended")
    assert distance(new.embed(loaded), new.embed(extended)) < 1e-5


def reconstruction(model: Any, datamodule: SCVIDataModule) -> np.ndarray:
    """Return the expected share of each gene in each cell: of the encoder and the decoder."""
    model.is_trained_ = True
    shares = []
    for batch in datamodule.inference_dataloader():
        with torch.no_grad():
            inputs = model.module._get_inference_input(batch)
            inferred = model.module.inference(**inputs)
            inferred["z"] = inferred["qz"].loc
            generated = model.module.generative(**model.module._get_generative_input(batch, inferred))
        shares.append(generated["px"].scale.numpy())
    return np.concatenate(shares)


def test_what_is_neither_true_nor_false_is_refused_where_weights_are_frozen(
    model_and_module: Any, uri: str
) -> None:
    model, _ = model_and_module
    extended = module(uri, reference=model, unseen="extend")
    with pytest.raises(TypeError, match="unfrozen='no' must be True or False"):
        load_query_model(SCVI, model, extended, unfrozen="no")  # type: ignore[arg-type]


def test_a_data_module_of_other_classes_is_no_query_of_a_model(uri: str) -> None:
    reference = module(uri, OLD)
    model = trained(make(SCVI, reference), reference)
    with pytest.raises(ValueError, match=r"batches of the data module \(3\) must be the model's \(2\)"):
        load_query_model(SCVI, model, module(uri, NEW))
    with pytest.raises(ValueError, match="batch_column_names must be left out where reference is given"):
        module(uri, NEW, reference=model, batch_column_names=["assay"])


def test_a_reference_that_scvi_tools_could_not_take_can_still_be_taken(uri: str) -> None:
    reference = module(uri, OLD)
    model = trained(make(SCVI, reference), reference)
    new = module(uri, NEW, reference=model, unseen="extend")
    with suppress(TypeError, ValueError):
        SCVI.load_query_data(registry=reference.registry, reference_model=model, datamodule=reference)
    before, after = model.module.state_dict(), load_query_model(SCVI, model, new).module.state_dict()
    assert before.keys() == after.keys()
