"""`RayTrainRunner`: a Lightning model trained by the workers of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import tiledbsoma as soma

try:
    import ray
    import ray.train
    import ray.train.torch
    from lightning.pytorch import LightningDataModule, LightningModule

    from tiledbsoma_ml._ingest.experiment import MEASUREMENT_NAME
    from tiledbsoma_ml._ray.cluster import Workers, connected, naming_ranks, run_config, warn_if_connected
    from tiledbsoma_ml._ray.data import TrainingData, UnopenedQuery, as_data_module
    from tiledbsoma_ml._ray.worker import Task, Training, train_in_worker
    from tiledbsoma_ml.data_module import Transform
except ImportError as err:
    raise ImportError("RayTrainRunner needs Ray; run `pip install 'tiledbsoma-ml[ray]'`.") from err

__all__ = ["ModelArgs", "RayTrainRunner", "TrainingData"]

ModelArgs: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""Returns what a model takes from the data, as arguments of its constructor."""


class RayTrainRunner:
    """Trains a Lightning model on the workers of a Ray cluster: an existing one, or one of this machine.

    ```python
    runner = RayTrainRunner(Classifier, model_args=lambda data: {"n_genes": data.n_vars})
    result = runner.train(
        "s3://bucket/experiment",
        obs_query=tiledbsoma.AxisQuery(value_filter="tissue == 'lung'"),
        obs_column_names=["cell_type"],
        batch_size=1024,
        num_workers=4,
        max_epochs=10,
    )
    ```

    A worker that dies does not end the run: all workers start again from the last checkpoint, and go on with
    the mini-batch after it.

    Args:
        Model: The class of the model, which is made anew in each worker.
        model_args: A function that `train` calls once, with the data module. What it returns are the
            arguments of `Model`.
        before_dense: Takes the batch `(X, obs)`, `X` as `torch.sparse_csr` on the CPU, and returns such a
            pair: `X` still sparse, and what the model needs of `obs`.
        after_dense: Takes that pair on the device of the model, with `X` dense, and returns what the model
            takes.
        address: Address of the cluster. If None: the cluster that this process is connected to, that of
            `RAY_ADDRESS`, one that runs on this machine, or else a new one, which ends with `train`.
        runtime_env: The environment that workers need, as `ray.init` takes it.
        strategy: A strategy of `ray.train.lightning`, by default `RayDDPStrategy()`.
    """

    def __init__(
        self,
        Model: type[LightningModule],
        *,
        model_args: ModelArgs | None = None,
        before_dense: Transform | None = None,
        after_dense: Transform | None = None,
        address: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        strategy: Any = None,
    ) -> None:
        self._Model = Model
        self._model_args = model_args
        self._before_dense = before_dense
        self._after_dense = after_dense
        self._address = address
        self._runtime_env = runtime_env
        self._strategy = strategy

    def train(
        self,
        data: TrainingData,
        *,
        measurement_name: str = MEASUREMENT_NAME,
        obs_query: soma.AxisQuery | None = None,
        var_query: soma.AxisQuery | None = None,
        experiments_path: str | os.PathLike[str] | None = None,
        max_epochs: int = 1,
        num_workers: int | None = None,
        resources_per_worker: Mapping[str, float] | None = None,
        use_gpu: bool = True,
        storage_path: str | os.PathLike[str] = "~/tiledbsoma_ml_results",
        name: str | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        checkpoint_every_n_steps: int | None = None,
        max_failures: int = 3,
        trainer_options: Mapping[str, Any] | None = None,
        **data_options: Any,
    ) -> ray.train.Result:
        """Train until `max_epochs`, and return Ray's result: its metrics, checkpoint and path.

        Every node must be able to read the data and to write to `storage_path`. On a cluster of several
        machines, both are in an object store or on a shared file system.

        Args:
            data: A data module that can be pickled, such as `ExperimentDataModule`. Or what to make one of:
                an open query, a `Snapshot`, the URI of an experiment, or a list of h5ad files, which are
                first written to an experiment.
            measurement_name: The measurement to read, where `data` is a URI.
            obs_query: The rows to read, where `data` is a URI or h5ad files; all if None.
            var_query: The columns to read, likewise.
            experiments_path: Folder for the experiment that is made of h5ad files, once for the same files;
                by default in the user's cache directory.
            max_epochs: Number of epochs after which training ends.
            num_workers: Number of processes that train. By default one for each GPU or, on CPUs, as many as
                the cluster has resources for.
            resources_per_worker: Resources that Ray reserves for each, for instance `{"CPU": 8, "GPU": 1}`.
            use_gpu: Whether to train on GPUs. Where the cluster has none, CPUs are used, with a warning.
            storage_path: Folder for results and checkpoints, or a URI like "s3://bucket/results".
            name: Name of the folder of this run there. The same name again continues an interrupted run.
            ckpt_path: A checkpoint of Lightning, or the folder of one of Ray's, to go on from.
            checkpoint_every_n_steps: Number of steps between checkpoints within an epoch. There is a
                checkpoint at the end of each epoch in any case.
            max_failures: Number of times that training starts again after workers died.
            trainer_options: Options of Lightning's `Trainer`.
            data_options: Options of `ExperimentDataModule`: `layer_name`, `batch_size`, `snapshot`, ….

        Raises:
            ValueError: If an argument does not fit.
            ray.train.WorkerGroupError: If workers failed more often; it says which, and why.
        """
        training = Training.create(max_epochs, trainer_options, ckpt_path, checkpoint_every_n_steps)
        workers = Workers.create(num_workers, resources_per_worker, use_gpu)
        query = UnopenedQuery(measurement_name, obs_query, var_query, experiments_path)
        module = as_data_module(data, query, data_options, self._before_dense, self._after_dense)
        return self._fit(module, training, workers, run_config(storage_path, name, max_failures))

    def _fit(
        self,
        module: LightningDataModule,
        training: Training,
        workers: Workers,
        run_config: ray.train.RunConfig,
    ) -> ray.train.Result:
        model_args = {} if self._model_args is None else dict(self._model_args(module))
        warn_if_connected(self._address, self._runtime_env)
        with connected(self._address, self._runtime_env), naming_ranks():
            task = Task(
                Model=self._Model,
                model_args=model_args,
                data=ray.put(module),
                strategy=self._strategy,
                training=training,
            )
            return ray.train.torch.TorchTrainer(
                train_in_worker,
                train_loop_config={"task": task},
                scaling_config=workers.scaling(),
                run_config=run_config,
            ).fit()
