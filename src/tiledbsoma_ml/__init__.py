"""From a TileDB-SOMA query to training mini-batches, at the speed of local memory."""

from importlib.metadata import version

from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml.dataloader import experiment_dataloader
from tiledbsoma_ml.dataset import ExperimentDataset, ShuffleMode
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.x_locator import XLocator

__version__ = version("tiledbsoma-ml")

__all__ = ["ExperimentDataset", "QueryIDs", "ShuffleMode", "Snapshot", "XLocator", "experiment_dataloader"]
