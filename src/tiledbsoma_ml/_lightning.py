"""What data modules for Lightning have in common."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar, cast

import tiledbsoma as soma
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities import CombinedLoader

_Loader = TypeVar("_Loader")

DATASET_DEFAULTS: Mapping[str, Any] = {
    "batch_size": 128,
    "io_batch_size": "auto",
    "shuffle_chunk_size": "auto",
    "shuffle_scope": "global",
}
"""Options of `ExperimentDataset` for which data modules have defaults of their own."""

LENGTH_WARNING = "Your `IterableDataset` has `__len__` defined"
"""So begins a warning of Lightning that the length of a loader could be inaccurate; that of ours is exact."""


class QueryDataModule(LightningDataModule):
    """A data module over the rows of a query: to be printed, subclassed and tuned like any other."""

    _filter: Any = None
    _is_tuned = False

    def __str__(self) -> str:
        """Return its line; that of Lightning would make all loaders, and so write a snapshot."""
        return repr(self)

    def _set_hparams(self, hp: Any) -> None:
        """Leave queries out of `save_hyperparameters`: an open experiment can be neither copied nor saved."""
        if isinstance(hp, dict):
            queries = [name for name, value in hp.items() if isinstance(value, soma.ExperimentAxisQuery)]
            hp = {name: value for name, value in hp.items() if name not in queries}
        super()._set_hparams(hp)

    def setup(self, stage: str | None = None) -> None:
        """Begin a run; called by Lightning. Without a trainer there is nothing to do."""
        if self.trainer is None:
            return
        warnings.filterwarnings("ignore", LENGTH_WARNING)
        self._filter = warnings.filters[0]
        self._is_tuned = any(isinstance(callback, BatchSizeFinder) for callback in self.trainer.callbacks)

    def teardown(self, stage: str | None = None) -> None:
        """End a run; called by Lightning."""
        self._is_tuned = False
        with suppress(ValueError):
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]

    def on_exception(self, exception: BaseException) -> None:
        """End a run that failed; called by Lightning."""
        self.teardown()

    def _handed(self, loader: _Loader, mode: str = "sequential") -> _Loader:
        """Return a loader as Lightning is to get it."""
        return cast("_Loader", WithRowCount(loader, mode)) if self._is_tuned else loader


class WithRowCount(CombinedLoader):
    """A loader, for Lightning's batch size finder.

    That one goes no further than the length of the dataset, and takes it for a number of rows. That of an
    `ExperimentDataset` is the number of mini-batches.
    """

    def _dataset_length(self) -> int:
        return sum(len(loader.dataset.query_ids.obs_joinids) for loader in self.flattened)
