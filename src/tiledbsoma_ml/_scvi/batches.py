"""`Batches`: mini-batches of a dataset become batches for a model of scvi-tools, or pairs of batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse

from tiledbsoma_ml._common import MiniBatch, warn
from tiledbsoma_ml._scvi.cells import Batch
from tiledbsoma_ml._scvi.selection import Selection

ROWS_TO_CHECK = 1024
"""Number of rows whose values are checked before a layer is believed to hold counts."""

ROWS_TO_CHECK_AT_ONCE = 128
"""Number of rows that are checked of one mini-batch.

To check all rows of a large mini-batch takes longer than to make it.
"""


class Batches:
    """Makes batches of mini-batches.

    Args:
        selection: The cells and genes that the mini-batches are of.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._n_rows_to_check = ROWS_TO_CHECK
        self._waiting: Batch | None = None

    def make(self, mini_batch: MiniBatch, *, is_training: bool, marks_labeled: bool) -> Batch:
        """Return a batch; its `X` is still sparse if the device makes it dense.

        Args:
            mini_batch: `X`, and `obs` with a column "soma_joinid".
            is_training: Whether a model is trained on it.
            marks_labeled: Whether to add a key "labeled", the places of the cells that have a label.
        """
        X, obs = mini_batch
        self._check_counts(X)
        cells = self._selection.cells
        places = cells.places(obs["soma_joinid"].to_numpy())
        batch = cells.batch_of(self._selection.genes.widened(X), places)
        if len(places) == 1 and is_training:
            batch = {key: _twice(value) for key, value in batch.items()}
            places = places.repeat(2)
        if marks_labeled:
            batch["labeled"] = torch.from_numpy(np.flatnonzero(cells.is_labeled(places)))
        return batch

    def pair(self, batch: Batch, *, is_training: bool) -> tuple[Batch, Batch | None]:
        """Return all cells of a batch, and those that have a label; None where there is nothing to classify.

        scvi-tools classifies the cells of the second batch. It always gets a pair: what it does with a single
        batch depends on the keys of the batch, and on its version.
        """
        if "labeled" not in batch:
            return batch, batch
        return batch, self._labeled(batch, batch.pop("labeled"), is_training=is_training)

    def _labeled(self, batch: Batch, rows: torch.Tensor, *, is_training: bool) -> Batch | None:
        """Return these rows, if any. In training a single row waits for the next one: see `_twice`."""
        labeled = {key: value[rows] for key, value in batch.items()}
        if not is_training:
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

    def _check_counts(self, X: Any) -> None:
        """Warn, once, if the first rows hold no counts."""
        if self._n_rows_to_check <= 0:
            return
        rows = X[:ROWS_TO_CHECK_AT_ONCE] if X.ndim == 2 else X[None]
        values = rows.data if sparse.issparse(rows) else rows
        values = _values(values) if isinstance(values, torch.Tensor) else torch.as_tensor(values)
        self._n_rows_to_check -= rows.shape[0]
        is_fractional = values.is_floating_point() and bool((values != values.floor()).any())
        if is_fractional or bool((values < 0).any()):
            self._n_rows_to_check = 0
            warn(
                f"layer_name={self._selection.locator.layer_name!r} has negative or fractional values, but "
                "scvi-tools expects counts; choose the layer of raw counts."
            )


def dense(X: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor; a dense one as it is."""
    return X if X.layout == torch.strided else X.to_dense()


def _twice(value: torch.Tensor) -> torch.Tensor:
    """Return a row twice: batch normalization cannot train on one row, and two equal ones have its loss."""
    return dense(value).repeat(2, 1)


def _values(X: torch.Tensor) -> torch.Tensor:
    return X if X.layout == torch.strided else X.values()
