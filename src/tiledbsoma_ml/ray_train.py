"""`RayTrainRunner`: a Lightning model trained by the workers of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import tiledbsoma as soma

from tiledbsoma_ml._common import absolute_path, absolute_uri, cache_folder, check_count
from tiledbsoma_ml._context import open_experiment
from tiledbsoma_ml._ingest.experiment import MEASUREMENT_NAME
from tiledbsoma_ml._ingest.h5ad import ingest_h5ads
from tiledbsoma_ml.snapshot import Snapshot

try:
    import ray
    import ray.train
    import ray.train.lightning
    import ray.train.torch
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

    from tiledbsoma_ml.data_module import ExperimentDataModule, Transform
except ImportError as err:
    raise ImportError("RayTrainRunner needs Ray; run `pip install 'tiledbsoma-ml[ray]'`.") from err

__all__ = ["ModelArgs", "RayTrainRunner", "Source"]

ModelArgs: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""Returns what a model takes from the data, as arguments of its constructor."""

Source: TypeAlias = (
    LightningDataModule
    | soma.ExperimentAxisQuery
    | Snapshot
    | str
    | os.PathLike[str]
    | Sequence[str | os.PathLike[str]]
)
"""The source of cells: a data module, an open query, a snapshot, the URI of an experiment, or h5ad files."""

CHECKPOINT_NAME = "checkpoint.ckpt"
"""The Lightning checkpoint in the folder of a Ray checkpoint."""

CPUS_PER_WORKER = 4
"""CPUs that each worker gets where the cluster has as many and `resources_per_worker` does not say."""

_logger = logging.getLogger(__name__)


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
        model_args: Called once, with the data module, where `train` is called; what it returns is passed to
            `Model`.
        before_dense: Takes the batch `(X, obs)`, `X` as `torch.sparse_csr` on the CPU, and returns such a
            pair: `X` still sparse, and what the model needs of `obs`.
        after_dense: Takes that pair on the device of the model, with `X` dense, and returns what the model
            takes.
        address: Address of the cluster. If None, the cluster is the one that this process is connected to,
            that of `RAY_ADDRESS`, or one that runs on this machine, or else a new one, which ends with
            `train`.
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
        data: Source,
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

        Every node must be able to read the data and to write to `storage_path`: on a cluster of several
        machines, both are in an object store or on a shared file system.

        Args:
            data: A data module that can be pickled, such as `ExperimentDataModule`; or what to make one of,
                with `data_options`: an open query, a `Snapshot`, the URI of an experiment, or a list of h5ad
                files, which are first written to an experiment.
            measurement_name: The measurement to read, where `data` is a URI.
            obs_query: The rows to read, where `data` is a URI or h5ad files; all if None.
            var_query: The columns to read, likewise.
            experiments_path: Folder for the experiment made of h5ad files, once for the same files; by
                default in the user's cache directory.
            max_epochs: Number of epochs after which training ends.
            num_workers: Number of processes that train. By default one for each GPU or, on CPUs, as many as
                the cluster has resources for.
            resources_per_worker: Resources that Ray reserves for each, for instance `{"CPU": 8, "GPU": 1}`.
            use_gpu: Whether to train on GPUs. Where the cluster has none, it is done on CPUs, with a warning.
            storage_path: Folder for results and checkpoints, or a URI like "s3://bucket/results".
            name: Name of the folder of this run there. The same name again continues an interrupted run.
            ckpt_path: A checkpoint of Lightning, or the folder of one of Ray's, to go on from.
            checkpoint_every_n_steps: Number of steps between checkpoints within an epoch; one is written at
                its end in any case.
            max_failures: Number of times that training starts again after workers died.
            trainer_options: Options of Lightning's `Trainer`.
            data_options: Options of `ExperimentDataModule`: sizes of the parts, `batch_size`, `snapshot`, ….

        Raises:
            ValueError: If an argument does not fit.
            ray.train.WorkerGroupError: If workers failed more often than `max_failures`; it says which, and
                why.
        """
        check_count("max_epochs", max_epochs, suggestion=1)
        if num_workers is not None:
            check_count("num_workers", num_workers, suggestion=2)
        if checkpoint_every_n_steps is not None:
            check_count("checkpoint_every_n_steps", checkpoint_every_n_steps, suggestion=1000)
        resumed = None if ckpt_path is None else _checkpoint_file(ckpt_path)
        queried = _Queried(measurement_name, obs_query, var_query, experiments_path)
        module = self._data_module(data, queried, data_options)
        model_args = {} if self._model_args is None else dict(self._model_args(module))
        with _connected(self._address, self._runtime_env), _naming_ranks():
            config = {
                "Model": self._Model,
                "model_args": model_args,
                "data": ray.put(module),
                "strategy": self._strategy,
                "every_n_steps": checkpoint_every_n_steps,
                "ckpt_path": resumed,
                "trainer_options": {"max_epochs": max_epochs, **(trainer_options or {})},
            }
            return ray.train.torch.TorchTrainer(
                _train_in_worker,
                train_loop_config=config,
                scaling_config=_scaling(num_workers, resources_per_worker, use_gpu),
                run_config=ray.train.RunConfig(
                    name=name,
                    storage_path=absolute_uri(storage_path),
                    failure_config=ray.train.FailureConfig(max_failures=max_failures),
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                ),
            ).fit()

    def _data_module(self, data: Source, queried: _Queried, options: dict[str, Any]) -> LightningDataModule:
        """Return the data module to train on, made of what was given unless it is one."""
        callbacks = {"before_dense": self._before_dense, "after_dense": self._after_dense}
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
                "transform": self._before_dense,
                "device_transform": _Dense(self._after_dense),
                **options,
            }
        if isinstance(data, Snapshot):
            return ExperimentDataModule(snapshot=data, **options)
        if isinstance(data, soma.ExperimentAxisQuery):
            return ExperimentDataModule(data, **options)
        if isinstance(data, str | os.PathLike) and not str(data).endswith(".h5ad"):
            return queried.module(str(data), options)
        return queried.module_of_h5ads([data] if isinstance(data, str | os.PathLike) else data, options)


@attrs.frozen
class _Queried:
    """The query to make of an experiment that is given by its URI, or by h5ad files."""

    measurement_name: str
    obs_query: soma.AxisQuery | None
    var_query: soma.AxisQuery | None
    experiments_path: str | os.PathLike[str] | None

    def module(self, uri: str, options: Mapping[str, Any]) -> ExperimentDataModule:
        with (
            open_experiment(uri) as experiment,
            experiment.axis_query(
                self.measurement_name, obs_query=self.obs_query, var_query=self.var_query
            ) as query,
        ):
            return ExperimentDataModule(query, **options)

    def module_of_h5ads(
        self, files: Sequence[str | os.PathLike[str]], options: Mapping[str, Any]
    ) -> ExperimentDataModule:
        paths = [Path(file) for file in files]
        if not paths:
            raise ValueError("data=[] must hold at least one h5ad file; try ['cells.h5ad'].")
        folder = absolute_path(self.experiments_path or cache_folder())
        uri = ingest_h5ads(paths, options.get("layer_name"), folder, _logger.info)
        rest = {name: value for name, value in options.items() if name != "layer_name"}
        return attrs.evolve(self, measurement_name=MEASUREMENT_NAME).module(uri, rest)


@attrs.frozen
class _Dense:
    """Makes `X` of a batch dense, where it is."""

    after_dense: Transform | None

    def __call__(self, batch: Any) -> Any:
        X, rest = batch
        dense = (X.to_dense(), rest)
        return dense if self.after_dense is None else self.after_dense(dense)


# The cluster ----------------------------------------------------------------------------------------------


@contextmanager
def _connected(address: str | None, runtime_env: Mapping[str, Any] | None) -> Iterator[None]:
    """Connect to a cluster; what was started or changed for it is ended and set back."""
    is_connected = ray.is_initialized()
    if is_connected and (address is not None or runtime_env is not None):
        warnings.warn(
            f"address={address!r} and runtime_env are ignored: this process is connected to a Ray cluster "
            "already; call ray.shutdown() first.",
            stacklevel=4,
        )
    on_interrupt = signal.getsignal(signal.SIGINT)
    if not is_connected:
        ray.init(address=address, runtime_env=dict(runtime_env or {}))
    try:
        yield
    finally:
        if not is_connected:
            ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Ray's trainer puts its own there


@contextmanager
def _naming_ranks() -> Iterator[None]:
    """Say which workers failed and why, which Ray's own message cuts short."""
    try:
        yield
    except ray.train.WorkerGroupError as err:
        causes = [f"rank {rank}: {_cause(failure)}" for rank, failure in sorted(err.worker_failures.items())]
        raise ray.train.WorkerGroupError("\n".join(causes), err.worker_failures) from err


def _cause(failure: Exception) -> str:
    text = str(failure).strip()
    if text.startswith("Traceback"):
        return text.splitlines()[-1]
    return f"{type(failure).__name__}: {' '.join(text.split())}"


def _scaling(
    num_workers: int | None, resources: Mapping[str, float] | None, use_gpu: bool
) -> ray.train.ScalingConfig:
    """Return how many workers there are, and what each has, as far as the cluster's nodes can hold them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    n_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if use_gpu and not n_gpus:
        warnings.warn(
            "use_gpu=True, but the Ray cluster has no GPU: training on CPUs; set use_gpu=False if so wanted.",
            stacklevel=3,
        )
        use_gpu = False
    wanted = num_workers or (n_gpus if use_gpu else 1)
    if resources is None:
        choices = [_resources(n_cpus, use_gpu) for n_cpus in range(CPUS_PER_WORKER, 0, -1)]
        each = next((each for each in choices if _n_places(nodes, each) >= wanted), choices[-1])
    else:
        each = {name: amount for name, amount in resources.items() if name != "GPU" or use_gpu}
    n_places = _n_places(nodes, each)
    n_workers = num_workers or max(1, n_places)
    if n_workers > n_places:
        warnings.warn(
            f"num_workers={n_workers} with {each} each, but the Ray cluster has room for {n_places} of them: "
            "Ray waits until nodes are added; ask for fewer or smaller workers if none will be.",
            stacklevel=3,
        )
    return ray.train.ScalingConfig(num_workers=n_workers, use_gpu=use_gpu, resources_per_worker=each)


def _resources(n_cpus: int, use_gpu: bool) -> dict[str, float]:
    return {"CPU": n_cpus, "GPU": 1} if use_gpu else {"CPU": n_cpus}


def _n_places(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Return how many workers the nodes have room for."""
    needed = {name: amount for name, amount in each.items() if amount}
    return sum(int(min(node.get(name, 0) // amount for name, amount in needed.items())) for node in nodes)


def _checkpoint_file(path: str | os.PathLike[str]) -> str:
    """Return the checkpoint of Lightning at a path, or in the folder of a checkpoint of Ray."""
    place = absolute_uri(path)
    if "://" in place:
        return place if place.endswith(".ckpt") else f"{place.rstrip('/')}/{CHECKPOINT_NAME}"
    file = Path(place) / CHECKPOINT_NAME if Path(place).is_dir() else Path(place)
    if not file.is_file():
        raise ValueError(
            f"ckpt_path={str(path)!r} must be a checkpoint file, or a folder with {CHECKPOINT_NAME!r}; "
            "try result.checkpoint.path of an earlier run."
        )
    return str(file)


# In a worker ----------------------------------------------------------------------------------------------


def _train_in_worker(config: dict[str, Any]) -> None:
    """Train in one process of the cluster, from the last checkpoint of this run if there is one."""
    options = dict(config["trainer_options"])
    trainer = Trainer(
        **{
            "accelerator": "gpu" if ray.train.torch.get_device().type == "cuda" else "cpu",
            "devices": "auto",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            **options,
            "strategy": config["strategy"] or ray.train.lightning.RayDDPStrategy(),
            "plugins": [ray.train.lightning.RayLightningEnvironment(), *options.get("plugins", ())],
            "callbacks": [*options.get("callbacks", ()), _Reports(config["every_n_steps"])],
        }
    )
    trainer = ray.train.lightning.prepare_trainer(trainer)
    model = config["Model"](**config["model_args"])
    with ExitStack() as stack:
        path = config["ckpt_path"]
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            path = str(Path(stack.enter_context(checkpoint.as_directory())) / CHECKPOINT_NAME)
        trainer.fit(model, datamodule=ray.get(config["data"]), ckpt_path=path)


class _Reports(Callback):
    """Reports metrics and a checkpoint to Ray, after so many steps and at the end of an epoch."""

    def __init__(self, every_n_steps: int | None) -> None:
        self._every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        is_last = batch_idx + 1 == trainer.num_training_batches
        if self._every_n_steps and not step % self._every_n_steps and step > self._last_step and not is_last:
            self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        self._last_step = trainer.global_step
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        metrics |= {"epoch": trainer.current_epoch, "step": trainer.global_step}
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_checkpoint(Path(folder) / CHECKPOINT_NAME, weights_only=False)
            is_written = any(Path(folder).iterdir())  # by rank 0 only, but for sharded strategies
            checkpoint = ray.train.Checkpoint.from_directory(folder) if is_written else None
            ray.train.report(metrics, checkpoint=checkpoint)
