"""The work of one process of the cluster: it trains, and reports metrics and checkpoints to Ray."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import ray
import ray.train
import ray.train.lightning
import ray.train.torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tiledbsoma_ml._common import absolute_uri, check_count

CHECKPOINT_NAME = "checkpoint.ckpt"
"""The Lightning checkpoint in the folder of a Ray checkpoint."""


@attrs.frozen(kw_only=True)
class Training:
    """The length of a run, and its beginning.

    Attributes:
        trainer_options: Options of Lightning's `Trainer`, `max_epochs` among them.
        ckpt_path: The Lightning checkpoint to go on from; None to begin anew.
        every_n_steps: Number of steps between checkpoints within an epoch; None for none within an epoch.
    """

    trainer_options: Mapping[str, Any]
    ckpt_path: str | None
    every_n_steps: int | None

    @classmethod
    def create(
        cls,
        max_epochs: int,
        trainer_options: Mapping[str, Any] | None,
        ckpt_path: str | os.PathLike[str] | None,
        checkpoint_every_n_steps: int | None,
    ) -> Training:
        """Return what the arguments of `RayTrainRunner.train` say, checked."""
        check_count("max_epochs", max_epochs, suggestion=1)
        if checkpoint_every_n_steps is not None:
            check_count("checkpoint_every_n_steps", checkpoint_every_n_steps, suggestion=1000)
        return cls(
            trainer_options={"max_epochs": max_epochs, **(trainer_options or {})},
            ckpt_path=None if ckpt_path is None else checkpoint_file(ckpt_path),
            every_n_steps=checkpoint_every_n_steps,
        )


@attrs.frozen(kw_only=True)
class Task:
    """The work of each worker.

    Attributes:
        Model: The class of the model.
        model_args: The arguments of its constructor.
        data: A reference to the data module.
        strategy: A strategy of `ray.train.lightning`; None for `RayDDPStrategy()`.
        training: How long to train, and where to begin.
    """

    Model: type[LightningModule]
    model_args: Mapping[str, Any]
    data: ray.ObjectRef[Any]
    strategy: Any
    training: Training


def checkpoint_file(path: str | os.PathLike[str]) -> str:
    """Return the checkpoint of Lightning at a path, or in the folder of a checkpoint of Ray.

    Raises:
        ValueError: If there is none.
    """
    whole = absolute_uri(path, "ckpt_path")
    if "://" in whole:
        return whole if whole.endswith(".ckpt") else f"{whole.rstrip('/')}/{CHECKPOINT_NAME}"
    file = Path(whole) / CHECKPOINT_NAME if Path(whole).is_dir() else Path(whole)
    if not file.is_file():
        raise ValueError(
            f"ckpt_path={str(path)!r} must be a checkpoint file, or a folder with {CHECKPOINT_NAME!r}; "
            "try result.checkpoint.path of an earlier run."
        )
    return str(file)


def train_in_worker(config: Mapping[str, Task]) -> None:
    """Train in this process, from the last checkpoint of this run if there is one.

    Args:
        config: The task, under the key "task"; Ray passes it as a dictionary.
    """
    task = config["task"]
    options = dict(task.training.trainer_options)
    trainer = Trainer(
        **{
            "accelerator": "gpu" if ray.train.torch.get_device().type == "cuda" else "cpu",
            "devices": "auto",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            **options,
            "strategy": task.strategy or ray.train.lightning.RayDDPStrategy(),
            "plugins": [ray.train.lightning.RayLightningEnvironment(), *options.get("plugins", ())],
            "callbacks": [*options.get("callbacks", ()), Reports(task.training.every_n_steps)],
        }
    )
    trainer = ray.train.lightning.prepare_trainer(trainer)
    model = task.Model(**task.model_args)
    with ExitStack() as stack:
        path = task.training.ckpt_path
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            path = str(Path(stack.enter_context(checkpoint.as_directory())) / CHECKPOINT_NAME)
        trainer.fit(model, datamodule=ray.get(task.data), ckpt_path=path)


class Reports(Callback):
    """Reports metrics and a checkpoint to Ray, after a number of steps and at the end of each epoch.

    Args:
        every_n_steps: The number of steps; None for reports at the end of epochs only.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        self._every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report after a step, where its number says so; Lightning calls this."""
        step = trainer.global_step
        is_last = batch_idx + 1 == trainer.num_training_batches
        if self._every_n_steps and not step % self._every_n_steps and step > self._last_step and not is_last:
            self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report at the end of an epoch; Lightning calls this."""
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
