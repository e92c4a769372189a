"""The classifier of the demo, trained in plain PyTorch on shuffled mini-batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader

from tiledbsoma_ml._cli.task import Task
from tiledbsoma_ml.dataloader import experiment_dataloader

__all__ = ["History", "normalise", "train_classifier"]


@attrs.define
class History:
    """The course of training so far."""

    losses: list[float] = attrs.field(factory=list)
    """Training loss of each mini-batch."""
    accuracies: list[float] = attrs.field(factory=list)
    """Held-out accuracy after each epoch."""
    n_rows: int = 0
    train_s: float = 0.0
    """Time taken by reading, shuffling and training, without the tests on held-out cells."""

    @property
    def rows_per_s(self) -> float:
        """Rows trained on per second of `train_s`."""
        return self.n_rows / self.train_s


def train_classifier(
    task: Task,
    *,
    epochs: int,
    num_workers: int,
    seed: int,
    on_batch: Callable[[History], None],
    on_epoch: Callable[[History], None],
) -> History:
    """Train a small classifier on the mini-batches of the training cells, and test it after each epoch.

    Args:
        task: The task to learn.
        epochs: Passes over the training cells.
        num_workers: Processes that read, beside this one.
        seed: Seed of the first weights of the model.
        on_batch: Called after each mini-batch.
        on_epoch: Called after each epoch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _make_classifier(task.n_genes, len(task.classes), seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train_loader = experiment_dataloader(task.train, num_workers=num_workers)
    held_out_loader = experiment_dataloader(task.held_out, num_workers=num_workers)
    history = History()
    for _ in range(epochs):
        start = time.perf_counter() - history.train_s
        for X, obs in train_loader:
            logits = model(normalise(X, device))
            loss = torch.nn.functional.cross_entropy(logits, task.codes(obs).to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            history.losses.append(loss.item())
            history.n_rows += len(obs)
            history.train_s = time.perf_counter() - start
            on_batch(history)
        history.accuracies.append(_accuracy(model, held_out_loader, task, device))
        on_epoch(history)
    return history


def normalise(X: Any, device: torch.device) -> torch.Tensor:
    """Return log(1 + counts per 10,000 of the cell), the usual scale of single-cell counts."""
    counts = torch.as_tensor(X, dtype=torch.float32, device=device)
    counts = counts.view(-1, counts.shape[-1])  # a mini-batch of one row has one dimension only
    return torch.log1p(1e4 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0))


def _make_classifier(n_genes: int, n_classes: int, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(n_genes, 128), torch.nn.ReLU(), torch.nn.Linear(128, n_classes)
        )


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, loader: DataLoader[Any], task: Task, device: torch.device) -> float:
    n_right = n_rows = 0
    for X, obs in loader:
        predicted = model(normalise(X, device)).argmax(dim=1).cpu()
        n_right += int((predicted == task.codes(obs)).sum())
        n_rows += len(obs)
    return n_right / n_rows
