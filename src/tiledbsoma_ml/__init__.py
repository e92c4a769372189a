"""From a TileDB-SOMA query to training mini-batches, at the speed of local memory."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml.dataloader import experiment_dataloader
from tiledbsoma_ml.dataset import ExperimentDataset, ShuffleMode
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.x_locator import XLocator

__version__ = version("tiledbsoma-ml")

__all__ = ["ExperimentDataset", "QueryIDs", "ShuffleMode", "Snapshot", "XLocator", "experiment_dataloader"]

_IN_EXTRAS = {"SCVIDataModule": "scvi"}


def __getattr__(name: str) -> Any:
    """Return a class that needs an extra; its module is imported on first use."""
    if name in _IN_EXTRAS:
        return getattr(import_module(f"{__name__}.{_IN_EXTRAS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
