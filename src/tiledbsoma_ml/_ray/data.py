"""The data of a run: a data module, or what one is made of."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import tiledbsoma as soma
from lightning.pytorch import LightningDataModule

from tiledbsoma_ml._common import absolute_path, absolute_uri, cache_folder
from tiledbsoma_ml._context import open_experiment
from tiledbsoma_ml._ingest.experiment import MEASUREMENT_NAME
from tiledbsoma_ml._ingest.h5ad import ingest_h5ads
from tiledbsoma_ml.data_module import ExperimentDataModule, Transform
from tiledbsoma_ml.snapshot import Snapshot

TrainingData: TypeAlias = (
    LightningDataModule
    | soma.ExperimentAxisQuery
    | Snapshot
    | str
    | os.PathLike[str]
    | Sequence[str | os.PathLike[str]]
)
"""A data module, an open query, a snapshot, the URI of an experiment, or h5ad files."""

_logger = logging.getLogger(__name__)


@attrs.frozen
class UnopenedQuery:
    """The query to make of an experiment that is given by its URI, or by h5ad files.

    Attributes:
        measurement_name: The measurement of an experiment that is given by its URI.
        obs_query: The rows; all if None.
        var_query: The columns; all if None.
        experiments_path: Folder for the experiment that is made of h5ad files; None for the user's cache
            directory.
    """

    measurement_name: str
    obs_query: soma.AxisQuery | None
    var_query: soma.AxisQuery | None
    experiments_path: str | os.PathLike[str] | None

    def of_experiment(self, uri: str, options: Mapping[str, Any]) -> ExperimentDataModule:
        """Return a data module with these options over the rows of an experiment."""
        with (
            open_experiment(uri) as experiment,
            experiment.axis_query(
                self.measurement_name, obs_query=self.obs_query, var_query=self.var_query
            ) as query,
        ):
            return ExperimentDataModule(query, **options)

    def of_h5ads(
        self, files: Sequence[str | os.PathLike[str]], options: Mapping[str, Any]
    ) -> ExperimentDataModule:
        """Return a data module with these options over the rows of h5ad files.

        The files are first written to an experiment. `layer_name` among the options is a layer of the files.
        """
        paths = [absolute_path(file, "data") for file in files]
        if not paths:
            raise ValueError("data=[] must hold at least one h5ad file; try ['cells.h5ad'].")
        path = cache_folder() if self.experiments_path is None else self.experiments_path
        folder = absolute_path(path, "experiments_path")
        uri = ingest_h5ads(paths, options.get("layer_name"), folder, _logger.info)
        rest = {name: value for name, value in options.items() if name != "layer_name"}
        return attrs.evolve(self, measurement_name=MEASUREMENT_NAME).of_experiment(uri, rest)


def as_data_module(
    data: TrainingData,
    query: UnopenedQuery,
    options: Mapping[str, Any],
    before_dense: Transform | None,
    after_dense: Transform | None,
) -> LightningDataModule:
    """Return the data module to train on.

    Args:
        data: The data module itself, or what to make one of.
        query: What to read of an experiment.
        options: Options of `ExperimentDataModule`.
        before_dense: See `RayTrainRunner`.
        after_dense: See `RayTrainRunner`.

    Raises:
        ValueError: If `data` is a data module, and options or callbacks are given as well.
    """
    callbacks = {"before_dense": before_dense, "after_dense": after_dense}
    given = [name for name, callback in callbacks.items() if callback is not None]
    if isinstance(data, LightningDataModule):
        if options or given:
            raise ValueError(
                f"{', '.join([*options, *given])} must be left out where data is a data module; "
                "set them there, before_dense as transform and after_dense as device_transform."
            )
        return data
    if given:
        options = {
            "return_sparse_X": True,
            "transform": before_dense,
            "device_transform": Dense(after_dense),
            **options,
        }
    if isinstance(data, Snapshot):
        return ExperimentDataModule(snapshot=data, **options)
    if isinstance(data, soma.ExperimentAxisQuery):
        return ExperimentDataModule(data, **options)
    if isinstance(data, str | os.PathLike) and not str(data).endswith(".h5ad"):
        return query.of_experiment(absolute_uri(data, "data"), options)
    return query.of_h5ads([data] if isinstance(data, str | os.PathLike) else data, options)


@attrs.frozen
class Dense:
    """Makes `X` of a batch dense on its device, and calls a function with the batch.

    Attributes:
        after_dense: The function; None for none.
    """

    after_dense: Transform | None

    def __call__(self, batch: Any) -> Any:
        """Return what the function makes of the dense batch."""
        X, rest = batch
        dense = (X.to_dense(), rest)
        return dense if self.after_dense is None else self.after_dense(dense)
