"""Train a classifier of cell types in several processes, in plain PyTorch.

    torchrun --nproc-per-node 2 notebooks/train_ddp.py
    torchrun --nproc-per-node 8 notebooks/train_ddp.py --uri s3://bucket/experiment --label cell_type

Without --uri, an experiment is simulated. GPUs are used if there are any. With --checkpoint, the state of the
run is written to that file every --every steps; a run that was stopped, within an epoch too, goes on with the
next mini-batch when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import tiledbsoma as soma
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tiledbsoma_ml import ExperimentDataset, context, experiment_dataloader
from tiledbsoma_ml.simulate import simulate_experiment

PADDING = "is_padding"


def main() -> None:
    """Train, and test on held-out cells after each epoch."""
    options = parse_options()
    with ExitStack() as stack:
        device = join_the_others(stack)
        uri = options.uri or simulate_once(stack, options.cells)
        train, held_out, classes = load(uri, options)
        run = Run(train, len(classes), device, options)
        while run.epoch < options.epochs and run.n_steps != options.steps:
            for X, obs in run.loader:
                run.step(normalise(X, device), codes_of(obs[options.label], classes).to(device))
                if run.n_steps == options.steps:
                    break
            else:
                run.end_epoch()
            accuracy = measure_accuracy(run.model, held_out, options.label, classes, device)
            say(f"held-out accuracy {accuracy:.3f} after {run.epoch} epochs, {run.n_steps} steps")
        dist.barrier()  # before what was simulated is removed, everyone has read it


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--uri", help="experiment to learn from; one is simulated if left out")
    parser.add_argument("--cells", type=int, default=5000, help="cells of the simulated experiment")
    parser.add_argument("--label", default="cell_type", help="column of obs to learn")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="stop after so many steps, those of earlier runs included")
    parser.add_argument("--batch-size", type=int, default=128, help="rows of a mini-batch, on each rank")
    parser.add_argument("--num-workers", type=int, default=0, help="processes of each rank that read")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, order and first weights")
    parser.add_argument("--checkpoint", type=Path, help="file for the state of the run, to go on from")
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    return parser.parse_args()


def join_the_others(stack: ExitStack) -> torch.device:
    """Meet the other ranks, which torchrun names in the environment; return the device of this rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stack.callback(dist.destroy_process_group)
    return device


def say(text: str) -> None:
    """Print, on one rank only."""
    if dist.get_rank() == 0:
        print(text, flush=True)


# Data -----------------------------------------------------------------------------------------------------


def simulate_once(stack: ExitStack, n_cells: int) -> str:
    """Return the URI of an experiment that rank 0 makes, and removes at the end."""
    uri = [""]
    if dist.get_rank() == 0:
        uri = [stack.enter_context(tempfile.TemporaryDirectory()) + "/simulated"]
        simulate_experiment(uri[0], n_cells=n_cells, n_genes=500)
    dist.broadcast_object_list(uri)
    return uri[0]


def load(uri: str, options: argparse.Namespace) -> tuple[ExperimentDataset, ExperimentDataset, pd.Index[Any]]:
    """Return training cells, held-out cells and the classes there are; the same ones on every rank."""
    columns = {"obs_column_names": [options.label], "batch_size": options.batch_size, "seed": options.seed}
    experiment = soma.Experiment.open(uri, context=context())
    with experiment, experiment.axis_query("RNA") as query:
        labels = query.obs(column_names=[options.label]).concat().to_pandas()[options.label]
        # Chunks of all cells are shuffled and then dealt: each rank sees other cells in every epoch.
        shuffled = ExperimentDataset(query, shuffle_scope="global", **columns)
        # Every held-out cell is tested: where ranks do not divide them, marked repeats fill up.
        in_order = ExperimentDataset(query, shuffle=False, tail="pad", padding_column_name=PADDING, **columns)
    train, _ = shuffled.random_split(0.8, 0.2, seed=options.seed)
    _, held_out = in_order.random_split(0.8, 0.2, seed=options.seed)
    return train, held_out, pd.Index(sorted(labels.dropna().unique()))


def normalise(X: Any, device: torch.device) -> torch.Tensor:
    """Return log(1 + counts per 10,000 of the cell), on the device."""
    counts = torch.from_numpy(X).to(device, torch.float32)
    return torch.log1p(1e4 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1))


def codes_of(labels: pd.Series[Any], classes: pd.Index[Any]) -> torch.Tensor:
    """Return the number of each label among the classes."""
    return torch.from_numpy(classes.get_indexer(labels))


# Training -------------------------------------------------------------------------------------------------


class Run:
    """A run of training on this rank: its model, where it is in the data, and how it goes on."""

    def __init__(
        self, train: ExperimentDataset, n_classes: int, device: torch.device, options: argparse.Namespace
    ) -> None:
        self._checkpoint, self._every = options.checkpoint, options.every
        self.loader = experiment_dataloader(train, num_workers=options.num_workers)
        torch.manual_seed(options.seed)  # the same first weights on every rank
        self.model = DistributedDataParallel(
            torch.nn.Linear(len(train.query_ids.var_joinids), n_classes).to(device)
        )
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.epoch = self.n_steps = 0
        if self._checkpoint is not None and self._checkpoint.exists():
            self._resume(torch.load(self._checkpoint, map_location=device))

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.module.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        self.epoch, self.n_steps = state["epoch"], state["n_steps"]
        say(f"going on from {self._checkpoint}: epoch {self.epoch}, step {self.n_steps}")

    def step(self, X: torch.Tensor, codes: torch.Tensor) -> None:
        """Learn from a mini-batch."""
        loss = torch.nn.functional.cross_entropy(self.model(X), codes)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.n_steps += 1
        say(f"step {self.n_steps}: loss {loss.item():.6f}")
        if self.n_steps % self._every == 0 and self.n_steps % len(self.loader):
            self._write_checkpoint()

    def end_epoch(self) -> None:
        """Count the epoch."""
        self.epoch += 1
        self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        """Write, on rank 0: the state of its loader holds for all ranks."""
        if self._checkpoint is None or dist.get_rank():
            return
        state = {
            "model": self.model.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "epoch": self.epoch,
            "n_steps": self.n_steps,
        }
        unfinished = self._checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self._checkpoint)  # a run that is stopped here leaves the one before


@torch.inference_mode()
def measure_accuracy(
    model: torch.nn.Module,
    held_out: ExperimentDataset,
    label: str,
    classes: pd.Index[Any],
    device: torch.device,
) -> float:
    """Return the share of all held-out cells that are classified rightly."""
    right_and_all = torch.zeros(2, device=device)
    for X, obs in experiment_dataloader(held_out):
        counts = torch.from_numpy(~obs[PADDING].to_numpy()).to(device)
        right = model(normalise(X, device)).argmax(dim=1) == codes_of(obs[label], classes).to(device)
        right_and_all += torch.stack([(right & counts).sum(), counts.sum()])
    dist.all_reduce(right_and_all)
    n_right, n_cells = right_and_all.tolist()
    say(f"{n_cells:.0f} held-out cells on {dist.get_world_size()} ranks")
    return n_right / n_cells


if __name__ == "__main__":
    main()
