"""`SCVIDataModule` without a model: what scvi-tools reads, batches, bad input. And what models need of it."""

from __future__ import annotations

import inspect
import logging
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
import torch
from scipy import sparse

from stores import MEASUREMENT, N_OBS, N_VARS, Store, expected_X, make_obs
from tiledbsoma_ml import ExperimentDataModule, SCVIDataModule
from tiledbsoma_ml._ingest import experiment as _experiment
from tiledbsoma_ml._scvi.genes import Genes
from tiledbsoma_ml.scvi import write_obsm

OBS = make_obs(np.arange(N_OBS))
KEYS = ["X", "batch", "labels", "extra_categorical_covs", "extra_continuous_covs", "sample"]


@pytest.fixture(scope="module")
def counts(make_store: Callable[..., Store]) -> Store:
    """Whole numbers, as scvi-tools expects."""
    return make_store(dtype=np.int32)


def module(store: Store, obs: Any = None, var: Any = None, **options: Any) -> SCVIDataModule:
    """Return a data module whose batches are `stage` unless others are asked for."""
    with store.query(obs, var) as query:
        return SCVIDataModule(query, **{"batch_column_names": ["stage"], **options})


def epoch_of(datamodule: SCVIDataModule) -> Iterator[tuple[dict[str, torch.Tensor], pd.DataFrame]]:
    """Yield batches as models see them, each with the `obs` of its rows."""
    for X, obs in datamodule.train_dataloader():
        batch = datamodule.on_before_batch_transfer((X, obs), 0)
        yield datamodule.on_after_batch_transfer(batch, 0), OBS.iloc[obs["soma_joinid"]]


def fields_of(datamodule: SCVIDataModule) -> dict[str, Any]:
    return datamodule.registry["field_registries"]


def mapping(datamodule: SCVIDataModule, name: str) -> np.ndarray:
    return fields_of(datamodule)[name]["state_registry"]["categorical_mapping"]


# What scvi-tools reads --------------------------------------------------------------------------------------


def test_every_cell_comes_once_with_its_own_row_of_X(counts: Store) -> None:
    seen = []
    for batch, obs in epoch_of(module(counts, batch_size=50)):
        joinids = obs["soma_joinid"].to_numpy()
        np.testing.assert_array_equal(batch["X"].numpy(), expected_X(joinids, range(N_VARS)))
        seen += joinids.tolist()
    assert sorted(seen) == list(range(N_OBS))


def test_a_batch_has_the_keys_order_and_types_that_scvi_tools_expects(counts: Store) -> None:
    datamodule = module(
        counts,
        label_column_name="cell_type",
        categorical_covariate_column_names=["cell_type", "stage"],
        continuous_covariate_column_names=["score", "n_genes", "is_primary"],
        sample_column_name="cell_type",
        batch_size=64,
    )
    batch, obs = next(epoch_of(datamodule))
    assert list(batch) == KEYS
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "X": ((64, N_VARS), torch.float32),
        "batch": ((64, 1), torch.int64),
        "labels": ((64, 1), torch.int64),
        "extra_categorical_covs": ((64, 2), torch.int64),
        "extra_continuous_covs": ((64, 3), torch.float32),
        "sample": ((64, 1), torch.int64),
    }
    expected = obs[["score", "n_genes", "is_primary"]].to_numpy(np.float32)
    np.testing.assert_array_equal(batch["extra_continuous_covs"].numpy(), expected)


def test_without_covariates_a_batch_has_no_key_of_them(counts: Store) -> None:
    batch, _ = next(epoch_of(module(counts)))
    assert list(batch) == ["X", "batch", "labels", "sample"]
    assert batch["labels"].eq(0).all()


def test_the_index_of_a_category_in_the_registry_is_its_code(counts: Store) -> None:
    datamodule = module(
        counts,
        batch_column_names=["cell_type", "stage"],
        label_column_name="cell_type",
        unlabeled_category="B cell",
        categorical_covariate_column_names=["maybe_type", "barcode"],
        sample_column_name="n_genes",
        batch_size=100,
    )
    covariates = fields_of(datamodule)["extra_categorical_covs"]["state_registry"]
    for batch, obs in epoch_of(datamodule):
        for name, columns in {"batch": ["cell_type", "stage"], "labels": ["cell_type"]}.items():
            expected = obs[columns].astype(str).agg("//".join, axis=1)
            assert (mapping(datamodule, name)[batch[name].squeeze(1)] == expected).all()
        assert (mapping(datamodule, "sample")[batch["sample"].squeeze(1)] == obs["n_genes"].astype(str)).all()
        for place, name in enumerate(["maybe_type", "barcode"]):
            codes = batch["extra_categorical_covs"][:, place]
            assert (covariates["mapping"][name][codes] == obs[name].astype(str)).all()
    assert covariates["n_cats_per_key"] == [2, N_OBS]


def test_labels_are_sorted_and_the_unlabeled_category_is_last(counts: Store) -> None:
    datamodule = module(counts, label_column_name="cell_type", unlabeled_category="B cell")
    assert mapping(datamodule, "labels").tolist() == ["NK cell", "T cell", "B cell"]
    assert (datamodule.n_labels, fields_of(datamodule)["labels"]["summary_stats"]["n_labels"]) == (2, 3)
    assert (datamodule.labels_ == OBS["cell_type"].astype(str)).all()


def test_an_unlabeled_category_that_does_not_occur_is_no_class(counts: Store) -> None:
    datamodule = module(counts, label_column_name="cell_type", unlabeled_category="Unknown")
    assert mapping(datamodule, "labels").tolist() == ["B cell", "NK cell", "T cell"]
    assert datamodule.n_labels == 3


def test_everything_is_there_after_construction_and_the_experiment_may_close(counts: Store) -> None:
    datamodule = module(counts, train_size=0.8, sample_column_name="cell_type", label_column_name="stage")
    assert (datamodule.n_obs, datamodule.n_vars, datamodule.n_batch, datamodule.n_samples) == (311, 23, 2, 3)
    assert (datamodule.n_train, datamodule.n_val, len(datamodule.test_idx)) == (249, 62, 0)
    assert sorted([*datamodule.train_idx, *datamodule.val_idx]) == list(range(N_OBS))
    assert datamodule.batch_labels.tolist() == ["old", "young"]
    assert (datamodule.label_keys, datamodule.n_continuous_cov, datamodule.n_cats_per_cov) == (
        ["stage"],
        0,
        None,
    )
    assert datamodule.var_names.tolist() == [f"gene{j}" for j in range(N_VARS)]
    assert fields_of(datamodule)["sample"]["n_obs_per_sample"]["n_obs_per_sample"].sum() == N_OBS
    summaries = Counter(key for field in fields_of(datamodule).values() for key in field["summary_stats"])
    assert max(summaries.values()) == 1


def test_train_and_validation_loaders_share_no_row_and_split_by_seed(counts: Store) -> None:
    def rows(loader: Any) -> list[int]:
        return [joinid for _, obs in loader for joinid in obs["soma_joinid"]]

    first, again, other = (module(counts, train_size=0.7, seed=seed) for seed in (1, 1, 2))
    train, validation = rows(first.train_dataloader()), rows(first.val_dataloader())
    assert sorted(train + validation) == list(range(N_OBS))
    assert validation == sorted(validation) == rows(again.val_dataloader()) != rows(other.val_dataloader())
    assert train == rows(again.train_dataloader()) != sorted(train)
    assert module(counts).val_dataloader() == []


def test_batch_labels_keep_the_order_that_is_given(counts: Store) -> None:
    datamodule = module(counts, batch_labels=["young", "never seen", "old"])
    assert mapping(datamodule, "batch").tolist() == ["young", "never seen", "old"]
    for batch, obs in epoch_of(datamodule):
        assert (
            batch["batch"].squeeze(1).numpy() == obs["stage"].map({"young": 0, "old": 2}).to_numpy()
        ).all()


def test_the_batches_of_the_census_are_the_default_where_its_columns_are_there(
    counts: Store, tmp_path: Path
) -> None:
    assert module(counts, batch_column_names=None).batch_labels.tolist() == ["all"]
    census = ["dataset_id", "assay", "suspension_type", "donor_id"]
    uri = write_cells(
        tmp_path, obs=pd.DataFrame({name: [f"{name}-{i % 2}" for i in range(4)] for name in census})
    )
    with query_of(uri) as query:
        datamodule = SCVIDataModule(query)
    assert datamodule.batch_labels[0] == "dataset_id-0//assay-0//suspension_type-0//donor_id-0"
    assert datamodule.n_batch == 2


def test_snapshot_and_sparse_give_the_same_batches(counts: Store, tmp_path: Path) -> None:
    options = {
        "label_column_name": "cell_type",
        "batch_size": 64,
        "shuffle_chunk_size": 16,
        "io_batch_size": 128,
    }
    expected = [batch for batch, _ in epoch_of(module(counts, **options))]
    for extra in ({"snapshot": tmp_path / "s"}, {"snapshot": tmp_path / "s", "return_sparse_X": True}):
        found = [batch for batch, _ in epoch_of(module(counts, **options, **extra))]
        assert all(
            torch.equal(a[key], b[key])
            for a, b in zip(found, expected, strict=True)
            for key in ("X", "batch", "labels")
        )


def test_sparse_rows_stay_sparse_until_they_are_on_the_device(counts: Store) -> None:
    datamodule = module(counts, return_sparse_X=True, batch_size=64)
    batch = datamodule.on_before_batch_transfer(next(iter(datamodule.train_dataloader())), 0)
    assert batch["X"].layout == torch.sparse_csr
    assert batch["X"].dtype == torch.float32
    assert datamodule.on_after_batch_transfer(batch, 0)["X"].layout == torch.strided


@pytest.mark.parametrize("options", [{}, {"return_sparse_X": True}, {"device": "cpu"}])
def test_batches_of_one_row_are_batches(counts: Store, options: dict[str, Any]) -> None:
    batch, obs = next(epoch_of(module(counts, batch_size=1, **options)))
    np.testing.assert_array_equal(batch["X"].numpy(), expected_X(obs["soma_joinid"], range(N_VARS)))


def test_a_pickled_data_module_yields_the_same(counts: Store) -> None:
    datamodule = module(counts, label_column_name="cell_type", train_size=0.9)
    copy = pickle.loads(pickle.dumps(datamodule))
    for (ours, _), (theirs, _) in zip(epoch_of(copy), epoch_of(datamodule), strict=True):
        assert torch.equal(ours["X"], theirs["X"])
        assert torch.equal(ours["labels"], theirs["labels"])


def test_options_reach_the_dataset_by_position_and_by_name(counts: Store) -> None:
    with counts.query() as query:
        datamodule = SCVIDataModule(
            query, "raw", batch_column_names=[], io_batch_size=256, shuffle_chunk_size=32
        )
    dataset = datamodule.train_dataset
    assert (dataset.x_locator.layer_name, dataset.io_batch_size, dataset.batch_size) == ("raw", 256, 128)
    assert datamodule.train_dataloader().num_workers == 0
    loader = module(counts, dataloader_kwargs={"num_workers": 1}).train_dataloader()
    assert loader.num_workers == 1


def test_defaults_are_those_of_the_data_module_for_lightning(counts: Store) -> None:
    with counts.query() as query:
        others = ExperimentDataModule(query).train_dataloader().dataset.options
    assert module(counts).train_dataset.options == others
    assert (others.batch_size, others.seed, others.io_batch_size) == (128, 42, "auto")
    ours, theirs = (inspect.signature(each).parameters for each in (SCVIDataModule, ExperimentDataModule))
    same = ours.keys() & theirs.keys() - {"query", "train_size"}
    assert same == {"dataloader_kwargs", "seed"}
    assert {name: ours[name].default for name in same} == {name: theirs[name].default for name in same}


def test_printing_makes_no_loader_and_so_no_snapshot(counts: Store, tmp_path: Path) -> None:
    datamodule = module(counts, snapshot=tmp_path / "s", train_size=0.8, label_column_name="cell_type")
    assert str(datamodule) == repr(datamodule)
    for fact in (
        "<SCVIDataModule: 311 cells by 23 genes; ",
        "batch_size=128, shuffle_chunk_size=auto, which is found out when it is needed",
        "train=249 cells, val=62 cells, batches=2, labels=3",
    ):
        assert fact in repr(datamodule)
    assert "<td style='text-align:left'>249 cells</td>" in datamodule._repr_html_()
    assert not list(tmp_path.iterdir())


def test_a_batch_size_that_is_set_leaves_the_parts_as_they_are(counts: Store) -> None:
    datamodule, expected = module(counts, train_size=0.8), module(counts, train_size=0.8, batch_size=50)
    datamodule.batch_size = 50
    assert datamodule.batch_size == 50
    for (batch, _), (other, _) in zip(epoch_of(datamodule), epoch_of(expected), strict=True):
        assert torch.equal(batch["X"], other["X"])
    assert (datamodule.val_idx == expected.val_idx).all()


# Inference --------------------------------------------------------------------------------------------------


def test_inference_yields_every_cell_once_in_the_order_of_the_query(counts: Store) -> None:
    datamodule = module(counts, train_size=0.5)
    loader = datamodule.inference_dataloader(batch_size=100)
    for _ in range(2):  # it can be iterated again
        batches = list(loader)
        assert len(batches) == len(loader) == 4
        joinids = torch.cat([batch["soma_joinid"] for batch in batches]).squeeze(1).numpy()
        assert joinids.tolist() == loader.soma_joinids.tolist() == list(range(N_OBS))
        X = torch.cat([batch["X"] for batch in batches]).numpy()
        np.testing.assert_array_equal(X, expected_X(joinids, range(N_VARS)))
    assert list(batches[0]) == ["X", "batch", "labels", "sample", "soma_joinid"]


def test_inference_on_another_query_aligns_genes_and_codes(
    counts: Store, make_store: Callable[..., Store]
) -> None:
    datamodule = module(counts, var=[2, 3, 5, 7], label_column_name="cell_type")
    with (
        make_store(dtype=np.int32, n_vars=6).query([4, 7, 8], [0, 2, 5, 3]) as query,
        pytest.warns(UserWarning, match="1 of the model's 4 genes are missing in the query \\('gene7'"),
    ):
        [batch] = datamodule.inference_dataloader(query)
    expected = np.column_stack([expected_X([4, 7, 8], [2, 3, 5]), np.zeros(3)])
    np.testing.assert_array_equal(batch["X"].numpy(), expected)
    assert (mapping(datamodule, "batch")[batch["batch"].squeeze(1)] == ["young", "old", "young"]).all()
    found = mapping(datamodule, "labels")[batch["labels"].squeeze(1)]
    assert (found == OBS["cell_type"].iloc[[4, 7, 8]]).all()


def test_missing_genes_are_zero_in_sparse_rows_as_in_dense_ones() -> None:
    ids = np.array(["a", "b", "c", "d"], dtype=object)
    genes = Genes(ids=ids, var_joinids=np.arange(2), places=np.array([1, 3]))
    X = expected_X(range(5), range(2))
    for rows in (X, torch.from_numpy(X), sparse.csr_matrix(X), torch.from_numpy(X).to_sparse_csr()):
        wide = genes.widened(rows).to_dense().numpy()
        np.testing.assert_array_equal(wide[:, [1, 3]], X)
        assert not wide[:, [0, 2]].any()


def test_unseen_batches_follow_the_policy(counts: Store) -> None:
    datamodule = module(counts, [0, 2, 4])  # all young
    with counts.query([0, 1, 3]) as query:
        with pytest.raises(
            ValueError, match=r"column 'stage'.* but 2 of 3 cells have 'old'; there are 'young'"
        ):
            datamodule.inference_dataloader(query)
        with pytest.raises(ValueError, match="2 of 3 cells have 'old'"):
            datamodule.inference_dataloader(query, unseen={"other": "young"})
        extended = datamodule.inference_dataloader(query, unseen="extend")
        mapped = datamodule.inference_dataloader(query, unseen={"old": "young"})
    assert extended.batch_labels.tolist() == ["young", "old"]
    assert next(iter(extended))["batch"].flatten().tolist() == [0, 1, 1]
    assert mapped.batch_labels.tolist() == ["young"]
    assert next(iter(mapped))["batch"].flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("unseen", ["typo", None, ["extend"]])
def test_an_unknown_treatment_of_unseen_batches_is_refused_in_one_sentence(
    counts: Store, unseen: Any
) -> None:
    sentence = re.escape(f"unseen={unseen!r} must be 'error', 'extend' or a mapping of new batches to known")
    with pytest.raises(ValueError, match=f"^{sentence}"):
        module(counts, unseen=unseen)
    datamodule = module(counts)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        datamodule.inference_dataloader(unseen=unseen)


def test_unseen_labels_count_as_unlabeled_with_a_warning(counts: Store) -> None:
    options = {"label_column_name": "cell_type", "unlabeled_category": "B cell"}
    datamodule = module(counts, [0, 1, 3, 4], **options)  # B and T cells
    with (
        counts.query([0, 1, 2, 5]) as query,
        pytest.warns(UserWarning, match=r"\['NK cell'\] of column 'cell_type' .* the 2 cells that have them"),
    ):
        [batch] = datamodule.inference_dataloader(query)
    assert batch["labels"].flatten().tolist() == [1, 0, 1, 1]


def test_the_query_to_embed_needs_no_labels(counts: Store, tmp_path: Path) -> None:
    datamodule = module(counts, label_column_name="cell_type", unlabeled_category="B cell", var=[0, 1])
    uri = write_cells(tmp_path, obs=pd.DataFrame({"stage": ["old", "young"]}), genes=["gene0", "gene1"])
    with query_of(uri) as query:
        [batch] = datamodule.inference_dataloader(query)
    assert batch["labels"].flatten().tolist() == [2, 2]


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_column_names": ["stagee"]}, "batch_column_names='stagee' .* did you mean 'stage'"),
        ({"label_column_name": "celltype"}, "label_column_name='celltype' .* did you mean 'cell_type'"),
        ({"sample_column_name": "x"}, "sample_column_name='x' must be a column of obs"),
        ({"var_column_name": "gene"}, "var_column_name='gene' must be a column of var"),
        ({"batch_labels": ["old", "young", "old"]}, "batch_labels must name each batch once, but has 'old'"),
        ({"batch_labels": ["old"]}, "column 'stage'.* 156 of 311 cells have 'young'"),
        ({"unlabeled_category": "x"}, "unlabeled_category='x' must come with label_column_name"),
        ({"train_size": 0.9999}, "train_size=0.9999 must leave at least one of 311 cells for validation"),
        ({"train_size": 1.5}, "train_size=1.5 must be a share above 0, up to 1; try 0.9"),
        ({"train_size": 0}, "train_size=0 must be a share above 0, up to 1; try 0.9"),
        ({"continuous_covariate_column_names": ["maybe_int"]}, "'maybe_int' has none in 63 of 311 cells"),
        ({"continuous_covariate_column_names": ["barcode"]}, "must hold numeric columns, but 'barcode' is"),
        ({"label_column_name": "stage", "unlabeled_category": "old", "obs": [1, 3]}, "all 2 cells are 'old'"),
        ({"obs": "n_genes < 0"}, "the query must select at least one cell"),
    ],
)
def test_bad_input_is_told_in_one_sentence(counts: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        module(counts, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parameter",
    ["batch_column_names", "categorical_covariate_column_names", "continuous_covariate_column_names"],
)
def test_one_column_name_in_place_of_a_list_is_refused(counts: Store, parameter: str) -> None:
    with pytest.raises(TypeError, match=rf"{parameter}='stage' must be a list of names; try \['stage'\]"):
        module(counts, **{parameter: "stage"})


def test_a_seed_must_be_given_because_both_parts_and_all_ranks_share_it(counts: Store) -> None:
    with pytest.raises(TypeError, match=r"seed=None must be an integer of at least 0"):
        module(counts, seed=None)


def test_a_setting_that_is_not_in_use_is_told_once_and_at_the_line_of_the_user(
    counts: Store, tmp_path: Path
) -> None:
    options = {"mixing": 0.9, "shuffle_chunk_size": 8, "window_dir": tmp_path, "window_budget": 2**26}
    with counts.query() as query, pytest.warns(UserWarning, match=" changes nothing here: ") as told:
        datamodule = SCVIDataModule(query, train_size=0.8, snapshot=tmp_path / "s", **options)
    assert [str(warning.message).partition("=")[0] for warning in told] == ["mixing", "window_dir"]
    assert {warning.filename for warning in told} == {__file__}
    datamodule.batch_size = 40  # says nothing: a warning is an error
    assert "window_dir (not in use)" in datamodule._repr_html_()


def test_what_auto_stands_for_is_that_of_the_whole_query_for_other_batch_sizes_too(counts: Store) -> None:
    datamodule = module(counts, train_size=0.05)
    whole = module(counts, batch_size=8).train_dataset.plan
    datamodule.batch_size = 8
    assert datamodule.train_dataset.plan == whole


def test_missing_values_are_a_category_of_their_own_and_said_in_the_log(
    counts: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tiledbsoma_ml"):
        datamodule = module(counts, batch_column_names=["maybe_type"], label_column_name="maybe_bool")
    assert datamodule.batch_labels.tolist() == ["known", "nan"]
    assert mapping(datamodule, "labels").tolist() == ["False", "True", "nan"]
    assert caplog.messages == [
        "batch_column_names: 78 of 311 cells have no value in 'maybe_type'; they are the category 'nan'.",
        "label_column_name: 52 of 311 cells have no value in 'maybe_bool'; they are the category 'nan'.",
    ]


def test_a_numeric_batch_column_with_thousands_of_values_is_warned_about(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(obs_joinids=range(1100), n_vars=2, dtype=np.int32)
    with pytest.warns(
        UserWarning, match="numeric column 'n_genes' with 1,100 different values in 1,100 cells"
    ):
        module(store, batch_column_names=["n_genes"])


@pytest.mark.parametrize("value", [-1.0, 0.5])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_values_that_are_no_counts_are_warned_about_once(
    value: float, is_sparse: bool, tmp_path: Path
) -> None:
    X = np.ones((8, 2), np.float32)
    X[5, 1] = value
    with query_of(write_cells(tmp_path, obs=pd.DataFrame(index=range(8)), X=X)) as query:
        datamodule = SCVIDataModule(query, batch_size=2, return_sparse_X=is_sparse)
    batches = [*datamodule.train_dataloader(), *datamodule.train_dataloader()]
    with pytest.warns(UserWarning, match="layer_name='raw' has negative or fractional values") as caught:
        assert [len(datamodule.on_before_batch_transfer(batch, 0)["X"]) for batch in batches] == [2] * 8
    assert len(caught) == 1


def test_genes_without_a_common_id_are_refused(counts: Store, tmp_path: Path) -> None:
    uri = write_cells(tmp_path, obs=pd.DataFrame({"stage": ["old"]}), genes=["ENSG1", "ENSG2"])
    with (
        query_of(uri) as query,
        pytest.raises(ValueError, match=r"must share genes .*'gene0', .*'ENSG1', 'ENSG2'"),
    ):
        module(counts).inference_dataloader(query)


def test_a_gene_that_is_there_twice_is_refused(counts: Store, tmp_path: Path) -> None:
    uri = write_cells(tmp_path, obs=pd.DataFrame({"stage": ["old"]}), genes=["gene0", "gene0"])
    with query_of(uri) as query, pytest.raises(ValueError, match="the query has 'gene0' twice"):
        module(counts).inference_dataloader(query)


# obsm -------------------------------------------------------------------------------------------------------


def test_an_embedding_is_found_by_queries_and_never_overwritten(tmp_path: Path) -> None:
    uri = write_cells(tmp_path, obs=pd.DataFrame(index=range(5)))
    rng = np.random.default_rng(0)
    embedding = pd.DataFrame(
        rng.normal(size=(4, 3)).astype(np.float32), pd.Index([4, 0, 2, 3], name="soma_joinid")
    )
    for name in ("X_scvi", "X_other"):
        write_obsm(uri, "RNA", name, embedding)
    with soma.Experiment.open(uri) as experiment:
        with experiment.axis_query("RNA", obs_query=soma.AxisQuery(coords=([0, 2, 3, 4],))) as query:
            found = query.to_anndata("raw", obsm_layers=["X_scvi"]).obsm["X_scvi"]
        assert experiment.ms["RNA"].obsm["X_scvi"].shape == (5, 3)
    np.testing.assert_array_equal(found, embedding.sort_index().to_numpy())
    with pytest.raises(ValueError, match="name='X_scvi' must be new"):
        write_obsm(uri, "RNA", "X_scvi", embedding)
    with pytest.raises(ValueError, match="1 of its 4 are not, soma_joinid 9"):
        write_obsm(uri, "RNA", "other", embedding.rename(index={4: 9}))
    with pytest.raises(ValueError, match="indexed by soma_joinid, each once, not by None"):
        write_obsm(uri, "RNA", "other", embedding.reset_index(drop=True))
    with pytest.raises(ValueError, match="measurement_name='DNA' must be a measurement"):
        write_obsm(uri, "DNA", "other", embedding)
    with pytest.raises(ValueError, match=r"^experiment_uri='' must not be empty"):
        write_obsm("", "RNA", "other", embedding)


# The package ----------------------------------------------------------------------------------------------


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import tiledbsoma_ml

    with pytest.raises(AttributeError, match="has no attribute 'SCVI'"):
        tiledbsoma_ml.SCVI  # noqa: B018


# Experiments ------------------------------------------------------------------------------------------------


def write_cells(
    directory: Path, *, obs: pd.DataFrame, genes: list[str] | None = None, X: np.ndarray | None = None
) -> str:
    """Write an experiment of cells with these labels, all of whose counts are 1 unless `X` is given."""
    import anndata

    genes = genes or ["gene0", "gene1"]
    X = np.ones((len(obs), len(genes)), np.float32) if X is None else X
    obs = obs.set_index(pd.Index([f"cell{i}" for i in range(len(obs))], name="obs_id"))
    var = pd.DataFrame({"feature_id": genes}, index=[f"v{j}" for j in range(len(genes))])
    adata = anndata.AnnData(sparse.csr_matrix(X), obs=obs, var=var)
    uri = str(directory / "written")
    _experiment.write_cells(uri, adata)
    return uri


@contextmanager
def query_of(uri: str) -> Iterator[soma.ExperimentAxisQuery]:
    with soma.Experiment.open(uri) as experiment, experiment.axis_query(MEASUREMENT) as query:
        yield query
