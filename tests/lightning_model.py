"""The model that the runs of Lightning in the tests train."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule


class Model(LightningModule):
    """A linear model that writes down which rows it was given, and its losses."""

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(n_vars, 2)
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.linear(batch["X"]), batch["joinids"] % 2)
        self._note("train", batch, loss)
        sys.stdout.write("step\n")
        sys.stdout.flush()
        return loss

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self._note("val", batch, batch["X"].sum())

    def test_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        self._note("test", batch, batch["X"].sum())

    def predict_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return batch["joinids"]

    def _note(self, part: str, batch: Mapping[str, torch.Tensor], loss: torch.Tensor) -> None:
        rows = batch["joinids"][~batch["is_padding"]].tolist()
        self.seen[part].append([self.trainer.current_epoch, rows, loss.item()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)
