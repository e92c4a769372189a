"""Data modules of the test experiments."""

from __future__ import annotations

from typing import Any

from stores import Store
from tiledbsoma_ml import ExperimentDataModule

SIZES = {"train_size": 0.6, "val_size": 0.3, "test_size": 0.1}

FIXED_SIZES = {"shuffle_chunk_size": 64, "io_batch_size": 65_536}
"""Sizes of the same order from an experiment and from a snapshot, for which "auto" stands for others."""


def make(store: Store, obs: slice | None = None, **options: Any) -> ExperimentDataModule:
    with store.query(obs) as query:
        return ExperimentDataModule(query, **{"batch_size": 16, "seed": 3, **options})
