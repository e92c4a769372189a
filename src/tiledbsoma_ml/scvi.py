"""`SCVIDataModule`: the cells of a query for the models of scvi-tools, and their embedding."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
import torch
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._common import MiniBatch, NDArrayJoinId, check_count, check_name
from tiledbsoma_ml._context import open_experiment
from tiledbsoma_ml._dataset.describe import as_line, as_table, described
from tiledbsoma_ml._dataset.options import OF_SHUFFLING
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._scvi.cells import Batch, Cells, Fields, Genes, Known
from tiledbsoma_ml._scvi.labels import Unseen
from tiledbsoma_ml._scvi.models import (
    attach,
    check_fits,
    check_monitors,
    load_query_model,
    load_scvi_model,
    n_batches_of,
    registry_of,
)
from tiledbsoma_ml._scvi.registry import fields_of, gene_ids_of, known_of, make_registry
from tiledbsoma_ml.dataloader import ExperimentDataLoader, experiment_dataloader
from tiledbsoma_ml.dataset import ExperimentDataset
from tiledbsoma_ml.x_locator import XLocator

try:
    from tiledbsoma_ml._lightning import QueryDataModule
except ImportError as err:
    raise ImportError(
        "SCVIDataModule needs lightning and scvi-tools; run `pip install 'tiledbsoma-ml[scvi]'`."
    ) from err

__all__ = ["InferenceDataLoader", "SCVIDataModule", "load_query_model", "load_scvi_model", "write_obsm"]

CENSUS_BATCH_COLUMNS = ("dataset_id", "assay", "suspension_type", "donor_id")
"""What together is a batch in the CELLxGENE Census."""

DATASET_DEFAULTS: Mapping[str, Any] = {
    "shuffle_scope": "global",
    "batch_size": 128,
    "shuffle_chunk_size": "auto",
    "io_batch_size": "auto",
}
"""Options of the `ExperimentDataset` that differ from its own defaults."""

INFERENCE_BATCH_SIZE = 1024

ROWS_TO_CHECK = 1024
"""Rows whose values are looked at before it is believed that a layer holds counts."""

ROWS_TO_CHECK_AT_ONCE = 128
"""And how many of a mini-batch: to look at all of a large one takes longer than to make it."""


class SCVIDataModule(QueryDataModule):
    """The cells of a query for `SCVI`, `SCANVI` and other models of scvi-tools that take a data module.

    ```python
    with experiment.axis_query("RNA", obs_query=lung) as query:
        datamodule = SCVIDataModule(
            query, batch_column_names=["dataset_id"], train_size=0.9, snapshot=True
        )
    model = scvi.model.SCVI(registry=datamodule.registry)
    model.train(datamodule=datamodule, max_epochs=20)
    embedding = datamodule.embed(model)
    ```

    Everything scvi-tools asks for is there after construction: nothing needs `setup()`. While
    `SCANVI` trains, batches are pairs of all cells and those with a label: others never reach the
    classification loss.

    Cells with a missing value in a batch, label, covariate or sample column are the category "nan".

    Args:
        query: The cells and genes; its experiment must be open.
        args: For `ExperimentDataset`, after the query.
        batch_column_names: Columns of `obs` whose values together ("a//b") are the batch that is corrected
            for. If None, those of the CELLxGENE Census if `obs` has them all, else all cells are one batch.
        batch_labels: The batches, in the order of their codes, where another model has them already. If None,
            those that occur, sorted as text.
        dataloader_kwargs: For `experiment_dataloader`. Without workers, threads of this process read ahead.
        train_size: Share of the cells to train on; the others are for validation.
        seed: Seed of the split and of the order of cells.
        label_column_name: Column of the cells' labels, for `SCANVI`.
        unlabeled_category: The label of cells that have none ("nan" for missing values).
        categorical_covariate_column_names: Further columns to correct for, each with its own categories.
        continuous_covariate_column_names: Numeric columns to correct for.
        sample_column_name: Column of the samples, for `MRVI`.
        var_column_name: Column of `var` that names genes; if None, the first of "feature_id", "var_id",
            "gene_id", "feature_name" and "gene_name" that there is.
        reference: A trained model, its registry, or the folder where it was saved. Then columns, categories
            with their codes, and genes are those of the model: genes that the query lacks are zero.
        unseen: What to do about batches that are not among `batch_labels` or those of `reference`: "error",
            "extend" to give them codes of their own (see `load_query_model`), or a mapping to known ones.
        model_name: What the registry calls the model; scvi-tools' `load` refuses models of another name. With
            None the registry names none, and every class loads.
        kwargs: For `ExperimentDataset`: `layer_name`, `batch_size` (128), … and `snapshot`, the way to take
            for more than one epoch.

    Raises:
        ValueError: If a column does not exist, or its values do not fit.
    """

    def __init__(
        self,
        query: soma.ExperimentAxisQuery,
        *args: Any,
        batch_column_names: Sequence[str] | None = None,
        batch_labels: Sequence[str] | None = None,
        dataloader_kwargs: dict[str, Any] | None = None,
        train_size: float = 1.0,
        seed: int = 42,
        label_column_name: str | None = None,
        unlabeled_category: str | None = None,
        categorical_covariate_column_names: Sequence[str] = (),
        continuous_covariate_column_names: Sequence[str] = (),
        sample_column_name: str | None = None,
        var_column_name: str | None = None,
        reference: Any = None,
        unseen: Unseen = "error",
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        fields = Fields(
            batch=_batch_columns(query, batch_column_names, reference),
            label=label_column_name,
            unlabeled=unlabeled_category,
            categorical=tuple(categorical_covariate_column_names),
            continuous=tuple(continuous_covariate_column_names),
            sample=sample_column_name,
        )
        known, gene_ids = Known(batch=_check_batch_labels(batch_labels)), None
        if reference is not None:
            registry = registry_of(reference)
            _check_only_reference(fields, batch_labels)
            fields, known, gene_ids = fields_of(registry), known_of(registry), gene_ids_of(registry)
        if fields.unlabeled is not None and fields.label is None:
            raise ValueError(
                f"unlabeled_category={fields.unlabeled!r} must come with label_column_name; name the column."
            )
        ids = _check_not_empty(QueryIDs.create(query))
        self._fields, self._var_column_name, self._model_name = fields, var_column_name, model_name
        self._genes = Genes.read(query, ids.var_joinids, var_column_name, gene_ids)
        self._cells = Cells.read(query, ids.obs_joinids, fields, known, unseen=unseen)
        self._obs_joinids = ids.obs_joinids
        self._dataloader_kwargs = dataloader_kwargs or {}
        self._train_size, self._seed = train_size, seed
        self._options = self._read_options(query, args, kwargs, seed)
        self._make_datasets()
        self._n_rows_to_check = ROWS_TO_CHECK
        self._waiting: Batch | None = None

    def __repr__(self) -> str:
        """Return what it holds, in a line; nothing is read for it, or written."""
        return as_line(type(self).__name__, self._described())

    def _repr_html_(self) -> str:
        """Return the same as a table."""
        return as_table(type(self).__name__, self._described(), self.train_dataset.not_in_use)

    def _described(self) -> dict[str, str]:
        shape = {"rows": f"{self.n_obs:,} cells by {self.n_vars:,} genes"}
        parts = {"train": f"{self.n_train:,} cells", "val": f"{self.n_val:,} cells"}
        codes = {"batches": f"{self.n_batch:,}", "labels": f"{self.n_labels:,}"}
        return described(self.train_dataset.iterations) | shape | parts | codes

    @property
    def batch_size(self) -> int:
        """Cells per batch, on each rank. Once it is set, loaders that are made from then on have it."""
        return self.train_dataset.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        if batch_size != self.batch_size:
            epoch = self.train_dataset.iterations.upcoming_epoch
            self._options["batch_size"] = batch_size
            self._make_datasets()
            self.train_dataset.set_epoch(epoch)

    # What scvi-tools reads --------------------------------------------------------------------------------

    @property
    def registry(self) -> dict[str, Any]:
        """What a model knows of the data; the index of a category is its code."""
        return make_registry(self._cells, self._fields, self._genes.ids, self._model_name)

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self._obs_joinids)

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self._genes.ids)

    @property
    def var_names(self) -> NDArray[np.object_]:
        """Ids of the genes, in the order of the columns of `X`."""
        return self._genes.ids

    @property
    def n_batch(self) -> int:
        """Number of batches."""
        return len(self._cells.batch.categories)

    @property
    def batch_labels(self) -> NDArray[np.object_]:
        """The batches; the index of each is its code."""
        return self._cells.batch.categories

    @property
    def n_labels(self) -> int:
        """Number of labels, without the one of unlabelled cells."""
        return len(self._cells.classes)

    @property
    def labels_(self) -> NDArray[np.object_]:
        """The label of each cell, in the order of the query."""
        labels = self._cells.labels
        names: NDArray[np.object_] = labels.categories[labels.codes[self._cells.places(self._obs_joinids)]]
        return names

    @property
    def label_keys(self) -> list[str] | None:
        """The column of the labels, in a list."""
        return None if self._fields.label is None else [self._fields.label]

    @property
    def unlabeled_category(self) -> str | None:
        """The label of unlabelled cells."""
        return self._fields.unlabeled

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self._cells.sample.categories)

    @property
    def n_continuous_cov(self) -> int:
        """Number of continuous covariates."""
        return len(self._fields.continuous)

    @property
    def n_cats_per_cov(self) -> list[int] | None:
        """Number of categories of each categorical covariate."""
        return [len(labels.categories) for labels in self._cells.categorical] or None

    @property
    def train_idx(self) -> NDArray[np.int64]:
        """Where the cells to train on are in the query."""
        return self._places_of(self.train_dataset)

    @property
    def val_idx(self) -> NDArray[np.int64]:
        """Where the cells for validation are in the query."""
        return self._places_of(self.val_dataset)

    @property
    def test_idx(self) -> NDArray[np.int64]:
        """Empty: no cells are set aside for a test."""
        return self._places_of(None)

    @property
    def n_train(self) -> int:
        """Number of cells to train on."""
        return len(self.train_dataset.query_ids.obs_joinids)

    @property
    def n_val(self) -> int:
        """Number of cells for validation."""
        return 0 if self.val_dataset is None else len(self.val_dataset.query_ids.obs_joinids)

    def setup(self, stage: str | None = None) -> None:
        """Begin a run; called by Lightning.

        Raises:
            ValueError: If a callback waits for a metric of validation, and no cells are left for it; or if
                `SCANVI` has nothing to classify.
        """
        super().setup(stage)
        if self.trainer is None or stage != "fit":
            return
        if self.val_dataset is None:
            check_monitors(self.trainer, self._train_size)
        if self._trains_semi_supervised() and self.n_labels < 2:
            raise ValueError(
                f"label_column_name={self._fields.label!r} must have two labels or more for a model to tell "
                f"apart, but has {self.n_labels}; choose another column, or train SCVI."
            )
        if (model := getattr(self.trainer, "_model", None)) is not None:
            attach(model, self)

    def train_dataloader(self) -> ExperimentDataLoader:
        """Return the loader of the cells to train on, shuffled anew every epoch."""
        return self._handed(self._dataloader(self.train_dataset), "max_size_cycle")

    def val_dataloader(self) -> ExperimentDataLoader | list[Any]:
        """Return the loader of the cells for validation, sorted by joinid; an empty list without any."""
        return [] if self.val_dataset is None else self._handed(self._dataloader(self.val_dataset))

    def on_before_batch_transfer(self, batch: MiniBatch, dataloader_idx: int) -> Batch:
        """Return a mini-batch as scvi-tools takes it; `X` is sparse still if the device makes it dense."""
        X, obs = batch
        self._check_counts(X)
        places = self._cells.places(obs["soma_joinid"].to_numpy())
        made = self._cells.batch_of(self._genes.widened(X), places)
        if len(places) == 1 and self._is_training():
            made = {key: _twice(value) for key, value in made.items()}
            places = places.repeat(2)
        if self._fields.unlabeled is not None and self._trains_semi_supervised():
            made["labeled"] = torch.from_numpy(np.flatnonzero(self._cells.is_labeled(places)))
        return made

    def on_after_batch_transfer(
        self, batch: Batch, dataloader_idx: int
    ) -> Batch | tuple[Batch, Batch | None]:
        """Return the batch with dense `X`; while `SCANVI` trains, a pair: all cells, and labelled ones.

        It is always a pair, of None where there is nothing to classify: what scvi-tools does with a batch
        alone depends on its keys, and on the version.
        """
        batch["X"] = _dense(batch["X"])
        if not self._trains_semi_supervised():
            return batch
        if "labeled" not in batch:
            return batch, batch
        return batch, self._labeled(batch, batch.pop("labeled"))

    # Embedding --------------------------------------------------------------------------------------------

    def inference_dataloader(
        self,
        query: soma.ExperimentAxisQuery | None = None,
        batch_size: int = INFERENCE_BATCH_SIZE,
        *,
        unseen: Unseen = "error",
        device: torch.device | str = "cpu",
    ) -> InferenceDataLoader:
        """Return a loader of every cell once, in the order of the query, with its joinid.

        Genes of another query are found by their ids; those it lacks are zero. Its labels may be missing.

        Args:
            query: The cells; those of this data module if None. Of any experiment that has the columns.
            batch_size: Rows per batch.
            unseen: What to do about batches of cells that the model does not know; see `SCVIDataModule`.
            device: The device on which `X` is made dense.

        Raises:
            ValueError: If the query does not fit.
        """
        batch_size = check_count("batch_size", batch_size, suggestion=INFERENCE_BATCH_SIZE)
        if query is None:
            cells, genes, locator, ids = self._cells, self._genes, self._x_locator, self._ids
            options = dict(self._inference_options)
        else:
            ids = _check_not_empty(QueryIDs.create(query))
            known = known_of(self.registry)
            cells = Cells.read(
                query,
                ids.obs_joinids,
                self._fields,
                known,
                unseen=unseen,
                is_inference=True,
            )
            genes = Genes.read(query, ids.var_joinids, self._var_column_name, self._genes.ids)
            locator = XLocator.create(query.experiment, query.measurement_name, self._layer_name)
            ids = attrs.evolve(ids, var_joinids=genes.var_joinids)
            options = {name: value for name, value in self._inference_options.items() if name != "snapshot"}
        options |= {"batch_size": batch_size, "return_sparse_X": torch.device(device).type != "cpu"}
        dataset = ExperimentDataset(x_locator=locator, query_ids=ids, ranks=(0, 1), **options)
        return InferenceDataLoader(dataset, cells, genes, torch.device(device))

    def embed(
        self,
        model: Any,
        query: soma.ExperimentAxisQuery | None = None,
        batch_size: int = INFERENCE_BATCH_SIZE,
        *,
        unseen: Unseen = "error",
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Return the latent representation of every cell: rows in the order of the query, by joinid.

        Args:
            model: Trained with this data module, or on other cells of the same genes and categories.
            query: As for `inference_dataloader`, and so are `batch_size` and `unseen`.
            batch_size: See there.
            unseen: See there. Cells of new batches can be embedded without training where the encoder does
                not look at the batch (the default of `SCVI` and `SCANVI`).
            kwargs: For `model.get_latent_representation`.

        Raises:
            ValueError: If the model does not know the genes or batches.
        """
        registry = registry_of(model)
        check_fits(registry, self.registry)
        loader = self.inference_dataloader(query, batch_size, unseen=unseen, device=model.device)
        n_known = n_batches_of(registry)
        if len(loader.batch_labels) > n_known and getattr(model.module, "encode_covariates", True):
            raise ValueError(
                f"the model knows {n_known:,} batches and its encoder looks at them, but the query has "
                f"{len(loader.batch_labels) - n_known:,} more; train what load_query_model returns."
            )
        latent = model.get_latent_representation(dataloader=loader, **kwargs)
        index = pd.Index(loader.soma_joinids, name="soma_joinid")
        return pd.DataFrame(latent, index=index, columns=[f"latent_{k}" for k in range(latent.shape[1])])

    # Datasets ---------------------------------------------------------------------------------------------

    def _read_options(
        self, query: soma.ExperimentAxisQuery, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
    ) -> dict[str, Any]:
        """Return the options of the `ExperimentDataset`."""
        given = inspect.signature(ExperimentDataset).bind(query, *args, **kwargs).arguments
        own = {"obs_column_names": ["soma_joinid"]}
        options: dict[str, Any] = {**DATASET_DEFAULTS, "seed": seed, **given, **own}
        del options["query"]
        self._is_sparse_asked = options.get("return_sparse_X")
        self._x_locator = XLocator.create(
            query.experiment, query.measurement_name, options.pop("layer_name", None)
        )
        self._layer_name = self._x_locator.layer_name
        self._ids = attrs.evolve(QueryIDs.create(query), var_joinids=self._genes.var_joinids)
        keep = ("snapshot", "memory_budget", "use_eager_fetch")
        kept = {name: value for name, value in options.items() if name in keep}
        self._inference_options = {**DATASET_DEFAULTS, "shuffle": False, **kept}
        return options

    def _make_datasets(self) -> None:
        make = partial(ExperimentDataset, x_locator=self._x_locator, query_ids=self._ids)
        in_order = {name: value for name, value in self._options.items() if name not in OF_SHUFFLING}
        in_order["shuffle"] = False
        self.train_dataset = make(**self._options)
        self.val_dataset: ExperimentDataset | None = None
        if self._train_size != 1:
            shares = (self._train_size, 1 - self._train_size)
            self.train_dataset, _ = self.train_dataset.random_split(*shares, seed=self._seed)
            _, self.val_dataset = make(**in_order).random_split(*shares, seed=self._seed)
            _check_parts(self._train_size, self.n_train, self.n_val)

    def _places_of(self, dataset: ExperimentDataset | None) -> NDArray[np.int64]:
        if dataset is None:
            return np.empty(0, dtype=np.int64)
        order = np.argsort(self._obs_joinids, kind="stable")
        found = np.searchsorted(self._obs_joinids, dataset.query_ids.obs_joinids, sorter=order)
        return order[found]

    def _dataloader(self, dataset: ExperimentDataset) -> ExperimentDataLoader:
        if self._is_sparse_asked is None:
            dataset.return_sparse_X = self._trains_on_gpu()
        return experiment_dataloader(dataset, **self._dataloader_kwargs)

    # While training ---------------------------------------------------------------------------------------

    def _trains_on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"

    def _trains_semi_supervised(self) -> bool:
        if self.trainer is None:
            return False
        from scvi.train import SemiSupervisedTrainingPlan

        return isinstance(self.trainer.lightning_module, SemiSupervisedTrainingPlan)

    def _labeled(self, batch: Batch, rows: torch.Tensor) -> Batch | None:
        """Return these rows, if any. In training a single one waits for the next: see `_twice`."""
        labeled = {key: value[rows] for key, value in batch.items()}
        if not self._is_training():
            return labeled if len(rows) else None
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            labeled = {
                key: torch.cat([waiting[key].to(value.device), value]) for key, value in labeled.items()
            }
        if len(labeled["labels"]) > 1:
            return labeled
        self._waiting = labeled if len(labeled["labels"]) else None
        return None

    def _is_training(self) -> bool:
        return self.trainer is not None and self.trainer.training

    def _check_counts(self, X: Any) -> None:
        """Warn, once, if what comes first are no counts."""
        if self._n_rows_to_check <= 0:
            return
        rows = X[:ROWS_TO_CHECK_AT_ONCE] if X.ndim == 2 else X[None]
        values = rows.data if sparse.issparse(rows) else rows
        values = _values(values) if isinstance(values, torch.Tensor) else torch.as_tensor(values)
        self._n_rows_to_check -= rows.shape[0]
        is_fractional = values.is_floating_point() and bool((values != values.floor()).any())
        if is_fractional or bool((values < 0).any()):
            self._n_rows_to_check = 0
            warnings.warn(
                f"layer_name={self._layer_name!r} has negative or fractional values, but scvi-tools "
                "expects counts; choose the layer of raw counts.",
                stacklevel=2,
            )


class InferenceDataLoader:
    """Every cell of a query once, in its order, as batches for a model; made by `inference_dataloader`.

    Batches have the keys that scvi-tools expects, and "soma_joinid" of shape (n, 1). It can be iterated
    many times. Every rank of a distributed job gets all cells.

    Attributes:
        soma_joinids: Joinids of all cells, in the order in which they come.
        batch_labels: The batches; the index of each is its code. Those that were not known come last.
    """

    def __init__(self, dataset: ExperimentDataset, cells: Cells, genes: Genes, device: torch.device) -> None:
        self._dataset = dataset
        self._cells = cells
        self._genes = genes
        self._device = device
        self.soma_joinids: NDArrayJoinId = dataset.query_ids.obs_joinids
        self.batch_labels: NDArray[np.object_] = cells.batch.categories

    def __iter__(self) -> Iterator[Batch]:
        for X, obs in self._dataset:
            joinids = obs["soma_joinid"].to_numpy()
            dense = _dense(self._genes.widened(X).to(self._device))
            batch = self._cells.batch_of(dense, self._cells.places(joinids))
            yield {**batch, "soma_joinid": torch.from_numpy(joinids).unsqueeze(1)}

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil(len(self.soma_joinids) / self._dataset.batch_size)


def write_obsm(experiment_uri: str, measurement_name: str, name: str, embedding: pd.DataFrame) -> None:
    """Store an embedding in the `obsm` of a measurement, where queries and `to_anndata` find it.

    It becomes a sparse array of float32, as `tiledbsoma.io` writes them, with the rows of `obs`. What is
    there already is never overwritten.

    Args:
        experiment_uri: The experiment.
        measurement_name: For instance "RNA".
        name: For instance "X_scvi".
        embedding: Indexed by `soma_joinid`, as `SCVIDataModule.embed` returns it; of all cells or some.

    Raises:
        ValueError: If the measurement does not exist, the name is taken, or rows are not rows of `obs`.
    """
    joinids, values = embedding.index.to_numpy(), embedding.to_numpy(dtype=np.float32)
    with open_experiment(experiment_uri) as experiment:
        n_obs = _check_obsm(experiment, measurement_name, name, embedding)
    table = pa.table(
        {
            "soma_dim_0": np.repeat(joinids, values.shape[1]),
            "soma_dim_1": np.tile(np.arange(values.shape[1]), len(values)),
            "soma_data": values.ravel(),
        }
    )
    with open_experiment(experiment_uri, "w") as experiment:
        measurement = experiment.ms[measurement_name]
        obsm = measurement["obsm"] if "obsm" in measurement else measurement.add_new_collection("obsm")
        obsm.add_new_sparse_ndarray(name, type=pa.float32(), shape=(n_obs, values.shape[1])).write(table)


def _batch_columns(
    query: soma.ExperimentAxisQuery, names: Sequence[str] | None, reference: Any
) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"batch_column_names={names!r} must be a list of names; try [{names!r}].")
    if names is not None or reference is not None:
        return tuple(names or ())
    is_census = set(CENSUS_BATCH_COLUMNS) <= set(query.experiment.obs.keys())
    return CENSUS_BATCH_COLUMNS if is_census else ()


def _check_batch_labels(labels: Sequence[str] | None) -> list[str] | None:
    if labels is None:
        return None
    names = [str(label) for label in labels]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"batch_labels must name each batch once, but has {twice[0]!r} twice; name it once.")
    return names


def _check_only_reference(fields: Fields, batch_labels: Sequence[str] | None) -> None:
    given = [name for name, columns in fields.by_parameter().items() if columns]
    given += ["unlabeled_category"] if fields.unlabeled is not None else []
    given += ["batch_labels"] if batch_labels is not None else []
    if given:
        raise ValueError(
            f"{', '.join(given)} must be left out where reference is given: the model knows its columns."
        )


def _check_not_empty(ids: QueryIDs) -> QueryIDs:
    for axis, joinids in (("cell", ids.obs_joinids), ("gene", ids.var_joinids)):
        if not len(joinids):
            raise ValueError(
                f"the query must select at least one {axis}, but selects none; check its filters."
            )
    return ids


def _check_parts(train_size: float, n_train: int, n_val: int) -> None:
    for n, what in ((n_train, "to train on"), (n_val, "for validation")):
        if not n:
            raise ValueError(
                f"train_size={train_size} must leave at least one of {n_train + n_val:,} cells {what}, but "
                "leaves none; try 0.9, or train_size=1 for no validation."
            )


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


def _dense(X: torch.Tensor) -> torch.Tensor:
    return X if X.layout == torch.strided else X.to_dense()


def _twice(value: torch.Tensor) -> torch.Tensor:
    """Return a row twice: batch normalization cannot train on one, and two equal ones have the same loss."""
    return _dense(value).repeat(2, 1)


def _values(X: torch.Tensor) -> torch.Tensor:
    return X if X.layout == torch.strided else X.values()
