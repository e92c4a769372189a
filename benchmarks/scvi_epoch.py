"""One epoch of batches for scVI from `SCVIDataModule`: its loader and its transfer hooks, measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import tiledbsoma as soma
from measure import measure_epoch
from soma_epoch import load_kernels

from tiledbsoma_ml.scvi import SCVIDataModule


def scvi_epoch(task: dict[str, Any]) -> dict[str, Any]:
    """Measure an epoch of dictionaries with the keys of scVI, sparse or dense.

    The registry and codes of the cells are made before the clock starts, as `AnnDataLoader` makes its own.
    With `epochs_before`, so many epochs are used up first.
    """
    kernels_s = load_kernels(task)
    with ExitStack() as stack:
        experiment = stack.enter_context(soma.Experiment.open(task["uri"]))
        query = stack.enter_context(experiment.axis_query("RNA"))
        datamodule = SCVIDataModule(
            query,
            layer_name="raw",
            batch_column_names=["cell_type"],
            batch_size=task["batch_size"],
            seed=0,
            **task["options"],
        )
        for _ in range(task["epochs_before"]):
            for _ in _batches(datamodule, task["options"]["return_sparse_X"]):
                pass
        record: dict[str, Any] = measure_epoch(
            lambda: _batches(datamodule, task["options"]["return_sparse_X"]),
            X=lambda batch: batch["X"],
            limit_s=task["limit_s"],
        )
    record["first_s"] += kernels_s
    return record


def _batches(datamodule: SCVIDataModule, is_sparse: bool) -> Iterator[dict[str, Any]]:
    """Yield batches as they reach the device: what is sparse is made dense there."""
    for mini_batch in datamodule.train_dataloader():
        batch = datamodule.on_before_batch_transfer(mini_batch, 0)
        yield batch if is_sparse else datamodule.on_after_batch_transfer(batch, 0)
