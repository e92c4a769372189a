"""`SCVIDataModule`: the cells of a query for the models of scvi-tools, and their embedding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pandas as pd
import tiledbsoma as soma
import torch

from tiledbsoma_ml._common import MiniBatch, check_count
from tiledbsoma_ml._dataset.describe import as_line, as_table, described
from tiledbsoma_ml._scvi.batches import Batches, dense
from tiledbsoma_ml._scvi.cells import Batch, Roles
from tiledbsoma_ml._scvi.facts import Facts
from tiledbsoma_ml._scvi.inference import INFERENCE_BATCH_SIZE, InferenceDataLoader
from tiledbsoma_ml._scvi.labels import Unseen, check_unseen
from tiledbsoma_ml._scvi.models import (
    attach,
    check_fits,
    check_monitors,
    load_query_model,
    load_scvi_model,
    n_batches_of,
    registry_of,
)
from tiledbsoma_ml._scvi.obsm import write_obsm
from tiledbsoma_ml._scvi.registry import known_of
from tiledbsoma_ml._scvi.selection import Scheme, Selection, batch_columns, check_list
from tiledbsoma_ml._scvi.splits import Splits
from tiledbsoma_ml.dataloader import ExperimentDataLoader, check_dataloader_kwargs, experiment_dataloader
from tiledbsoma_ml.dataset import ExperimentDataset

try:
    from tiledbsoma_ml._lightning import DATASET_DEFAULTS, QueryDataModule
except ImportError as err:
    raise ImportError(
        "SCVIDataModule needs lightning and scvi-tools; run `pip install 'tiledbsoma-ml[scvi]'`."
    ) from err

__all__ = ["InferenceDataLoader", "SCVIDataModule", "load_query_model", "load_scvi_model", "write_obsm"]


class SCVIDataModule(Facts, QueryDataModule):
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

    After construction, the data module has everything that scvi-tools asks for; no call of `setup` is needed.
    While `SCANVI` trains, batches are pairs: all cells, and the cells that have a label. Cells without a
    label never reach the classification loss.

    A cell with a missing value in a batch, label, covariate or sample column has the category "nan" there.

    Args:
        query: The cells and genes; its experiment must be open.
        args: Arguments of `ExperimentDataset` after the query, by position.
        batch_column_names: Columns of `obs` whose values together ("a//b") are the batch that the model
            corrects for. If None: the batch columns of the CELLxGENE Census, if `obs` has all of them, else
            all cells are one batch.
        batch_labels: The batches in the order of their codes, where another model has given them codes. If
            None: the batches that occur, sorted as text.
        dataloader_kwargs: Arguments of `experiment_dataloader`. Without workers, threads of this process read
            ahead.
        train_size: Share of the cells to train on; the other cells are for validation.
        seed: Seed of the split and of the order of the cells. Every rank must have the same seed.
        label_column_name: Column of the cells' labels, for `SCANVI`.
        unlabeled_category: The label of cells that have none ("nan" for missing values).
        categorical_covariate_column_names: Further columns to correct for, each with its own categories.
        continuous_covariate_column_names: Numeric columns to correct for.
        sample_column_name: Column of the samples, for `MRVI`.
        var_column_name: Column of `var` that names genes. If None: the first of "feature_id", "var_id",
            "gene_id", "feature_name" and "gene_name" that `var` has.
        reference: A trained model, its registry, or the folder where it was saved. The columns, the
            categories with their codes and the genes are those of the model then; genes that the query lacks
            are zero.
        unseen: The treatment of batches that are neither in `batch_labels` nor in `reference`: "error" to
            refuse them, "extend" to give them codes of their own (see `load_query_model`), or a mapping to
            known batches.
        model_name: What the registry calls the model; the `load` of scvi-tools refuses models of another
            name. If None, the registry names no model, and every class loads.
        kwargs: Other arguments of `ExperimentDataset`: `layer_name`, `batch_size` (128), … and `snapshot`;
            take one if you train for more than one epoch. `shuffle_chunk_size` and `io_batch_size` are "auto"
            and `shuffle_scope` is "global" unless you set them.

    Raises:
        ValueError: If a column does not exist, or its values do not fit.
    """

    def __init__(
        self,
        query: soma.ExperimentAxisQuery,
        *args: Any,
        batch_column_names: Sequence[str] | None = None,
        batch_labels: Sequence[str] | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
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
        roles = Roles(
            batch=batch_columns(query, batch_column_names, reference),
            label=label_column_name,
            unlabeled=unlabeled_category,
            categorical=check_list("categorical_covariate_column_names", categorical_covariate_column_names),
            continuous=check_list("continuous_covariate_column_names", continuous_covariate_column_names),
            sample=sample_column_name,
        )
        self._scheme = Scheme.create(roles, batch_labels, reference, var_column_name)
        unseen = check_unseen(unseen)
        seed = check_count("seed", seed, suggestion=42, minimum=0)
        options = _dataset_options(query, args, kwargs) | {"seed": seed}
        self._is_sparse_asked = "return_sparse_X" in options
        self._selection = Selection.read(query, options.pop("layer_name", None), self._scheme, unseen=unseen)
        where = {"x_locator": self._selection.locator, "query_ids": self._selection.ids}
        self._splits = Splits.create(where | {"snapshot": options.pop("snapshot", None)}, options, train_size)
        self._batches = Batches(self._selection)
        self._dataloader_kwargs = check_dataloader_kwargs(dataloader_kwargs)
        self._model_name = model_name

    def __repr__(self) -> str:
        """Return a line that says what the data module holds; nothing is read or written for it."""
        return as_line(type(self).__name__, self._described())

    def _repr_html_(self) -> str:
        """Return the same as a table."""
        return as_table(type(self).__name__, self._described(), self.train_dataset.not_in_use)

    def _described(self) -> dict[str, str]:
        shape = {"rows": f"{self.n_obs:,} cells by {self.n_vars:,} genes"}
        splits = {"train": f"{self.n_train:,} cells", "val": f"{self.n_val:,} cells"}
        codes = {"batches": f"{self.n_batch:,}", "labels": f"{self.n_labels:,}"}
        return described(self.train_dataset.iterations) | shape | splits | codes

    @property
    def batch_size(self) -> int:
        """Cells per batch, on each rank. A size that you set holds for the loaders that are made later."""
        return self.train_dataset.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        if batch_size != self.batch_size:
            self._splits = self._splits.with_batch_size(batch_size)

    # Training ---------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Begin a run; Lightning calls this.

        Raises:
            ValueError: If a callback waits for a metric of validation, and there are no cells for validation;
                or if `SCANVI` has nothing to classify.
        """
        super().setup(stage)
        if self.trainer is None or stage != "fit":
            return
        if self.val_dataset is None:
            check_monitors(self.trainer)
        if self._trains_semi_supervised() and self.n_labels < 2:
            label = self._scheme.roles.label
            raise ValueError(
                f"label_column_name={label!r} must have two labels or more for a model to tell apart, but "
                f"has {self.n_labels}; choose another column, or train SCVI."
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
        """Return a mini-batch as scvi-tools takes it; `X` is still sparse if the device makes it dense."""
        marks_labeled = self.unlabeled_category is not None and self._trains_semi_supervised()
        return self._batches.make(batch, is_training=self._is_training(), marks_labeled=marks_labeled)

    def on_after_batch_transfer(
        self, batch: Batch, dataloader_idx: int
    ) -> Batch | tuple[Batch, Batch | None]:
        """Return the batch with dense `X`; while `SCANVI` trains, a pair: all cells, and labelled ones."""
        batch["X"] = dense(batch["X"])
        if not self._trains_semi_supervised():
            return batch
        return self._batches.pair(batch, is_training=self._is_training())

    def _dataloader(self, dataset: ExperimentDataset) -> ExperimentDataLoader:
        if not self._is_sparse_asked:
            dataset.return_sparse_X = self._trains_on_gpu()
        return experiment_dataloader(dataset, **self._dataloader_kwargs)

    def _trains_on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"

    def _trains_semi_supervised(self) -> bool:
        if self.trainer is None:
            return False
        from scvi.train import SemiSupervisedTrainingPlan

        return isinstance(self.trainer.lightning_module, SemiSupervisedTrainingPlan)

    def _is_training(self) -> bool:
        return self.trainer is not None and self.trainer.training

    # Embedding --------------------------------------------------------------------------------------------

    def inference_dataloader(
        self,
        query: soma.ExperimentAxisQuery | None = None,
        batch_size: int = INFERENCE_BATCH_SIZE,
        *,
        unseen: Unseen = "error",
        device: str | torch.device = "cpu",
    ) -> InferenceDataLoader:
        """Return a loader of every cell once, in the order of the query, with its joinid.

        Genes of another query are found by their ids; genes that it lacks are zero. Its labels may be
        missing.

        Args:
            query: The cells, of any experiment that has the columns. If None: those of this data module.
            batch_size: Rows per batch.
            unseen: The treatment of batches that the model does not know; see `SCVIDataModule`.
            device: The device on which `X` is made dense.

        Raises:
            ValueError: If the query does not fit.
        """
        batch_size = check_count("batch_size", batch_size, suggestion=INFERENCE_BATCH_SIZE)
        unseen = check_unseen(unseen)
        selection, train = self._selection, self.train_dataset
        where: dict[str, Any] = {"source": train.source, "query_ids": selection.ids}
        if query is not None:
            scheme = attrs.evolve(
                self._scheme, known=known_of(self.registry), gene_ids=self._selection.genes.ids
            )
            layer_name = selection.locator.layer_name
            selection = Selection.read(query, layer_name, scheme, unseen=unseen, is_inference=True)
            where = {"x_locator": selection.locator, "query_ids": selection.ids}
        on_device = torch.device(device)
        dataset = ExperimentDataset(
            **where,
            batch_size=batch_size,
            io_batch_size="auto",
            shuffle=False,
            return_sparse_X=on_device.type != "cpu",
            use_eager_fetch=train.use_eager_fetch,
            memory_budget=train.memory_budget,
            ranks=(0, 1),
        )
        return InferenceDataLoader(dataset, selection, on_device)

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
            model: A model that was trained with this data module, or on other cells of the same genes and
                categories.
            query: See `inference_dataloader`.
            batch_size: Rows per batch.
            unseen: See `inference_dataloader`. Cells of new batches can be embedded without training where
                the encoder does not look at the batch, which is the default of `SCVI` and `SCANVI`.
            kwargs: Arguments of `model.get_latent_representation`.

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


def _dataset_options(
    query: soma.ExperimentAxisQuery, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of the `ExperimentDataset`, `layer_name` and `snapshot` among them."""
    given = inspect.signature(ExperimentDataset).bind(query, *args, **kwargs).arguments
    del given["query"]
    return {**DATASET_DEFAULTS, **given, "obs_column_names": ["soma_joinid"]}
