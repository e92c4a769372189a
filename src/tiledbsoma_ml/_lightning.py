"""`QueryDataModule`: the base of data modules for Lightning."""

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
"""Beginning of a warning of Lightning: it takes the lengths of loaders for inaccurate, but ours are exact."""


class QueryDataModule(LightningDataModule):
    """A data module over the rows of a query: to be printed, subclassed and tuned like any other."""

    _filter: Any = None
    _is_tuned = False

    def __str__(self) -> str:
        """Return the line of `repr`. `str` of Lightning would make all loaders, and so write a snapshot."""
        return repr(self)

    def _set_hparams(self, hp: Any) -> None:
        """Save hyperparameters without queries: an open experiment can be neither copied nor saved."""
        if isinstance(hp, dict):
            queries = [name for name, value in hp.items() if isinstance(value, soma.ExperimentAxisQuery)]
            hp = {name: value for name, value in hp.items() if name not in queries}
        super()._set_hparams(hp)

    def setup(self, stage: str | None = None) -> None:
        """Begin a run; Lightning calls this. Without a trainer, it does nothing."""
        if self.trainer is None:
            return
        warnings.filterwarnings("ignore", LENGTH_WARNING)
        self._filter = warnings.filters[0]
        self._is_tuned = any(isinstance(callback, BatchSizeFinder) for callback in self.trainer.callbacks)

    def teardown(self, stage: str | None = None) -> None:
        """End a run; Lightning calls this."""
        self._is_tuned = False
        with suppress(ValueError):
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]

    def on_exception(self, exception: BaseException) -> None:
        """End a run that failed; Lightning calls this."""
        self.teardown()

    def _handed(self, loader: _Loader, mode: str = "sequential") -> _Loader:
        """Return a loader in the form that Lightning needs."""
        return cast("_Loader", WithRowCount(loader, mode)) if self._is_tuned else loader


class WithRowCount(CombinedLoader):
    """A loader for Lightning's batch size finder.

    The finder tries no size above the length of the dataset, which it takes for a number of rows. But the
    length of an `ExperimentDataset` is the number of mini-batches.
    """

    def _dataset_length(self) -> int:
        return sum(len(loader.dataset.query_ids.obs_joinids) for loader in self.flattened)
