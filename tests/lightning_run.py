"""A run of Lightning for `test_lightning.py`, in processes of its own: each rank writes what it did.

    python lightning_run.py '{"uri": …, "out": …}'

With `strategy="ddp"` Lightning starts this file again for every further rank. A spawned worker imports
it for the `transform`, so Lightning is only imported where ranks use it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def for_the_model(batch: Any) -> dict[str, torch.Tensor]:
    """Return tensors; the `transform` of the data module."""
    X, obs = batch
    is_padding = obs["is_padding"].to_numpy() if "is_padding" in obs else [False] * len(obs)
    return {
        "X": X / 3e5,
        "joinids": torch.tensor(obs["soma_joinid"].to_numpy()),
        "is_padding": torch.as_tensor(is_padding),
    }


def main(options: Mapping[str, Any]) -> None:
    """Fit and test as the options say, and once more with each of the changes in `then`."""
    for changes in ({}, *options.get("then", ())):
        fit_and_test({**options, **changes})


def fit_and_test(options: Mapping[str, Any]) -> None:
    import tiledbsoma as soma
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_model import Model
    from tiledbsoma_ml import ExperimentDataModule

    with soma.Experiment.open(options["uri"]) as experiment:
        rows = soma.AxisQuery(coords=(slice(0, options["n_rows"] - 1),))
        with experiment.axis_query("RNA", obs_query=rows) as query:
            data = ExperimentDataModule(
                query,
                batch_size=16,
                io_batch_size=64,
                shuffle_chunk_size=8,
                seed=5,
                train_size=0.9 - options.get("val_size", 0.1),
                val_size=options.get("val_size", 0.1),
                transform=for_the_model,
                dataloader_kwargs={"num_workers": options.get("num_workers", 0)},
            )
    out = Path(options["out"])
    out.mkdir(exist_ok=True)
    seed_everything(1, verbose=False)
    model = Model(data.n_vars)
    checkpoints = ModelCheckpoint(
        out, filename="{epoch}-{step}", every_n_train_steps=options["every_n_steps"], save_top_k=-1
    )
    at_epoch_ends = ModelCheckpoint(out, filename="end-{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        strategy=options.get("strategy", "ddp"),
        devices=options.get("devices", 2),
        max_epochs=options.get("max_epochs", 3),
        callbacks=[checkpoints, at_epoch_ends],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    trainer.fit(model, datamodule=data, ckpt_path=options.get("ckpt_path"))
    n_train = len(model.seen["train"])
    trainer.test(model, datamodule=data, verbose=False)
    predicted = [
        [batch["joinids"].tolist(), batch["is_padding"].tolist()]
        for batch in map(for_the_model, data.predict_dataloader())
    ]
    (out / f"rank{trainer.global_rank}.json").write_text(
        json.dumps({**model.seen, "predict": predicted, "n_train": n_train, "pid": os.getpid()})
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
