"""From a TileDB-SOMA query to training mini-batches, at the speed of local memory."""

import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tiledbsoma_ml._context import context
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import QueryIDs, SamplingMethod
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._source import Fields, RandomAccess, Reader, Source, TiledReader
from tiledbsoma_ml.dataloader import experiment_dataloader
from tiledbsoma_ml.dataset import ExperimentDataset, ShuffleMode
from tiledbsoma_ml.memory import MemorySource
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
    "Fields",
    "Layout",
    "MemorySource",
    "QueryIDs",
    "RandomAccess",
    "RayTrainRunner",
    "Reader",
    "Rows",
    "SCVIDataModule",
    "SamplingMethod",
    "ShuffleMode",
    "Snapshot",
    "Source",
    "TiledReader",
    "XLocator",
    "context",
    "experiment_dataloader",
]

# What needs an extra is imported when it is asked for: its module, and the packages that it takes.
_ON_FIRST_USE = {
    "ExperimentDataModule": ("data_module", ["lightning"]),
    "RayTrainRunner": ("ray_train", ["lightning", "ray"]),
    "SCVIDataModule": ("scvi", ["lightning", "scvi"]),
}


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a folder without code is not a package


# `from tiledbsoma_ml import *`, `dir` and `help` see what can be used here.
for _name, (_, _packages) in _ON_FIRST_USE.items():
    if not all(map(_is_installed, _packages)):
        __all__.remove(_name)


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_ON_FIRST_USE[name][0]}"), name)
    except ImportError as err:
        # For an AttributeError, `from tiledbsoma_ml import …` would not show which package to install.
        if sys._getframe(1).f_code.co_name == "_handle_fromlist":
            raise
        raise AttributeError(str(err)) from err


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
