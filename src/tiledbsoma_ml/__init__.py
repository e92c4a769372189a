"""From a TileDB-SOMA query to training mini-batches, at the speed of local memory."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tiledbsoma_ml._context import context
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml.dataloader import experiment_dataloader
from tiledbsoma_ml.dataset import ExperimentDataset, ShuffleMode
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.x_locator import XLocator

if TYPE_CHECKING:
    from tiledbsoma_ml.data_module import ExperimentDataModule
    from tiledbsoma_ml.ray_train import RayTrainRunner
    from tiledbsoma_ml.scvi import SCVIDataModule

__version__ = version("tiledbsoma-ml")

__all__ = [
    "ExperimentDataModule",
    "ExperimentDataset",
    "QueryIDs",
    "RayTrainRunner",
    "SCVIDataModule",
    "ShuffleMode",
    "Snapshot",
    "XLocator",
    "context",
    "experiment_dataloader",
]

# What needs an extra is imported when it is asked for.
_ON_FIRST_USE = {
    "ExperimentDataModule": "data_module",
    "RayTrainRunner": "ray_train",
    "SCVIDataModule": "scvi",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
