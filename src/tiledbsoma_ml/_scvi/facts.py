"""`Facts`: the attributes that scvi-tools reads from a data module, above all the registry."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._scvi.registry import make_registry
from tiledbsoma_ml._scvi.selection import Scheme, Selection
from tiledbsoma_ml._scvi.splits import Splits
from tiledbsoma_ml.dataset import ExperimentDataset


class Facts:
    """The attributes that scvi-tools reads from a data module, by the names that it expects."""

    _scheme: Scheme
    _selection: Selection
    _splits: Splits
    _model_name: str | None

    @property
    def registry(self) -> dict[str, Any]:
        """All that a model knows of the data; the index of a category is its code."""
        return make_registry(
            self._selection.cells, self._scheme.roles, self._selection.genes.ids, self._model_name
        )

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self._selection.ids.obs_joinids)

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.var_names)

    @property
    def var_names(self) -> NDArray[np.object_]:
        """Ids of the genes, in the order of the columns of `X`."""
        return self._selection.genes.ids

    @property
    def n_batch(self) -> int:
        """Number of batches."""
        return len(self.batch_labels)

    @property
    def batch_labels(self) -> NDArray[np.object_]:
        """The batches; the index of each is its code."""
        return self._selection.cells.batch.categories

    @property
    def n_labels(self) -> int:
        """Number of labels, without the one of unlabelled cells."""
        return len(self._selection.cells.classes)

    @property
    def labels_(self) -> NDArray[np.object_]:
        """The label of each cell, in the order of the query."""
        cells = self._selection.cells
        codes = cells.labels.codes[cells.places(self._selection.ids.obs_joinids)]
        names: NDArray[np.object_] = cells.labels.categories[codes]
        return names

    @property
    def label_keys(self) -> list[str] | None:
        """The column of the labels, in a list."""
        label = self._scheme.roles.label
        return None if label is None else [label]

    @property
    def unlabeled_category(self) -> str | None:
        """The label of unlabelled cells."""
        return self._scheme.roles.unlabeled

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self._selection.cells.sample.categories)

    @property
    def n_continuous_cov(self) -> int:
        """Number of continuous covariates."""
        return len(self._scheme.roles.continuous)

    @property
    def n_cats_per_cov(self) -> list[int] | None:
        """Number of categories of each categorical covariate."""
        return [len(labels.categories) for labels in self._selection.cells.categorical] or None

    @property
    def train_dataset(self) -> ExperimentDataset:
        """The cells to train on."""
        return self._splits.train

    @property
    def val_dataset(self) -> ExperimentDataset | None:
        """The cells for validation; None without any."""
        return self._splits.val

    @property
    def n_train(self) -> int:
        """Number of cells to train on."""
        return len(self._splits.train.query_ids.obs_joinids)

    @property
    def n_val(self) -> int:
        """Number of cells for validation."""
        return self.n_obs - self.n_train

    @property
    def train_idx(self) -> NDArray[np.int64]:
        """The places in the query of the cells to train on."""
        return self._places_of(self.train_dataset)

    @property
    def val_idx(self) -> NDArray[np.int64]:
        """The places in the query of the cells for validation."""
        return self._places_of(self.val_dataset)

    @property
    def test_idx(self) -> NDArray[np.int64]:
        """Empty: no cells are set aside for a test."""
        return self._places_of(None)

    def _places_of(self, dataset: ExperimentDataset | None) -> NDArray[np.int64]:
        if dataset is None:
            return np.empty(0, dtype=np.int64)
        joinids = self._selection.ids.obs_joinids
        order = np.argsort(joinids, kind="stable")
        return order[np.searchsorted(joinids, dataset.query_ids.obs_joinids, sorter=order)]
