"""`InferenceDataLoader`: all cells of a query, in its order, as batches for a model that was trained."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._scvi.batches import dense
from tiledbsoma_ml._scvi.cells import Batch
from tiledbsoma_ml._scvi.selection import Selection
from tiledbsoma_ml.dataset import ExperimentDataset

INFERENCE_BATCH_SIZE = 1024


class InferenceDataLoader:
    """Every cell of a query once, in its order, as batches for a model.

    `SCVIDataModule.inference_dataloader` makes it. Batches have the keys that scvi-tools expects, and
    "soma_joinid" of shape (n, 1). You can iterate it many times. Every rank of a distributed job gets all
    cells.

    Attributes:
        soma_joinids: Joinids of all cells, in the order in which they come.
        batch_labels: The batches; the index of each is its code. Batches that were not known come last.
    """

    def __init__(self, dataset: ExperimentDataset, selection: Selection, device: torch.device) -> None:
        self._dataset = dataset
        self._selection = selection
        self._device = device
        self.soma_joinids: NDArrayJoinId = dataset.query_ids.obs_joinids
        self.batch_labels: NDArray[np.object_] = selection.cells.batch.categories

    def __iter__(self) -> Iterator[Batch]:
        cells, genes = self._selection.cells, self._selection.genes
        for X, obs in self._dataset:
            joinids = obs["soma_joinid"].to_numpy()
            batch = cells.batch_of(dense(genes.widened(X).to(self._device)), cells.places(joinids))
            yield {**batch, "soma_joinid": torch.from_numpy(joinids).unsqueeze(1)}

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil(len(self.soma_joinids) / self._dataset.batch_size)
