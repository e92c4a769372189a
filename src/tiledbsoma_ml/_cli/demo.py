"""`tiledbsoma-ml demo`: train a classifier of cell types."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import attrs
import numpy as np
import torch
from rich.console import Console
from typer import Option

from tiledbsoma_ml._cli.classifier import History, train_classifier
from tiledbsoma_ml._cli.errors import errors_in_one_line, refusal
from tiledbsoma_ml._cli.options import (
    BATCH_SIZE,
    CELLS,
    READING,
    SEED,
    BatchSize,
    MeasurementName,
    ObsFilter,
)
from tiledbsoma_ml._cli.report import progress_bar, save_curves, summary
from tiledbsoma_ml._cli.task import LabelledCells, Task, build_simulated, ingest_h5ad, load_task
from tiledbsoma_ml._common import absolute_path, check_count
from tiledbsoma_ml._ingest.experiment import Say
from tiledbsoma_ml.simulate import N_CELLS, N_GENES

__all__ = ["demo"]

# Options --------------------------------------------------------------------------------------------------

TRAINING = "How to train"

H5ad: TypeAlias = Annotated[Path | None, Option(help="Train on this AnnData file.", rich_help_panel=CELLS)]

ExperimentUri: TypeAlias = Annotated[
    str | None,
    Option(help="Train on this SOMA Experiment, local or on S3; needs --label.", rich_help_panel=CELLS),
]

Label: TypeAlias = Annotated[
    str | None,
    Option(
        metavar="COLUMN",
        help="Column of obs to learn. Without it: the first of cell_type, celltype, label, cluster, "
        "leiden and louvain, else the only categorical column.",
        rich_help_panel=CELLS,
    ),
]

LayerName: TypeAlias = Annotated[
    str | None,
    Option(
        help="Layer of X, with --uri or --h5ad. Without it: raw or the only one; in a file, counts.",
        rich_help_panel=CELLS,
    ),
]

NCells: TypeAlias = Annotated[
    int | None,
    Option("--cells", help="Cells to simulate.", show_default=str(N_CELLS), rich_help_panel=CELLS),
]

NGenes: TypeAlias = Annotated[
    int | None,
    Option("--genes", help="Genes to simulate.", show_default=str(N_GENES), rich_help_panel=CELLS),
]

NumWorkers: TypeAlias = Annotated[
    int, Option(help="Processes that read, beside this one.", rich_help_panel=READING)
]

IsSnapshot: TypeAlias = Annotated[
    bool | None,
    Option(
        "--snapshot/--stream",
        help="Read epochs from a snapshot of the cells, which is made first, or from the experiment.",
        show_default="snapshot, if there is more than one epoch",
        rich_help_panel=READING,
    ),
]

Epochs: TypeAlias = Annotated[int, Option(help="Passes over the cells.", rich_help_panel=TRAINING)]

DemoSeed: TypeAlias = Annotated[
    int,
    Option(help="Seed of the simulation, the split, the order and the weights.", rich_help_panel=TRAINING),
]

OutputDir: TypeAlias = Annotated[
    Path,
    Option(help="Folder for loss.png, new experiments and snapshots.", rich_help_panel=TRAINING),
]


def demo(
    h5ad: H5ad = None,
    uri: ExperimentUri = None,
    label: Label = None,
    obs_filter: ObsFilter = None,
    layer_name: LayerName = None,
    measurement_name: MeasurementName = None,
    n_cells: NCells = None,
    n_genes: NGenes = None,
    batch_size: BatchSize = BATCH_SIZE,
    num_workers: NumWorkers = 0,
    snapshot: IsSnapshot = None,
    epochs: Epochs = 5,
    seed: DemoSeed = SEED,
    output_dir: OutputDir = Path("demo_output"),
) -> None:
    """Train a classifier of cell types on shuffled mini-batches of a SOMA Experiment.

    The classifier learns from four fifths of the cells, and is tested on the others. Without `--h5ad` and
    `--uri` the cells are simulated. The counts of a file are first written to a SOMA Experiment, once. For
    more than one epoch the cells are put in a snapshot, from which they are read many times faster.

    **Examples**

    - `tiledbsoma-ml demo`
    - `tiledbsoma-ml demo --h5ad pbmc.h5ad --label cell_type`
    - `tiledbsoma-ml demo --uri lung.soma --label cell_type --obs-filter "tissue == 'lung'"`
    """
    run_demo(
        DemoOptions(
            h5ad=h5ad,
            uri=uri,
            label=label,
            obs_filter=obs_filter,
            layer_name=layer_name,
            measurement_name=measurement_name,
            n_cells=n_cells,
            n_genes=n_genes,
            batch_size=batch_size,
            num_workers=num_workers,
            snapshot=epochs > 1 if snapshot is None else snapshot,
            epochs=epochs,
            seed=seed,
            output_dir=output_dir,
        )
    )


@attrs.frozen(kw_only=True)
class DemoOptions:
    """The options of `tiledbsoma-ml demo`, as they were given."""

    h5ad: Path | None
    uri: str | None
    label: str | None
    obs_filter: str | None
    layer_name: str | None
    measurement_name: str | None
    n_cells: int | None
    n_genes: int | None
    batch_size: int
    num_workers: int
    snapshot: bool
    epochs: int
    seed: int
    output_dir: Path = attrs.field(converter=absolute_path)

    def check(self) -> None:
        """Raise a ValueError if options contradict each other, or a number is too small."""
        check_count("epochs", self.epochs, suggestion=5)
        check_count("batch_size", self.batch_size, suggestion=BATCH_SIZE)
        check_count("seed", self.seed, suggestion=SEED, minimum=0)
        check_count("num_workers", self.num_workers, suggestion=0, minimum=0)
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"output_dir={str(self.output_dir)!r} must be a folder; choose another.")
        if self.h5ad is not None and self.uri is not None:
            raise ValueError(f"--h5ad={self.h5ad} and --uri={self.uri} exclude each other; give one of them.")
        if self.uri is not None and self.label is None:
            raise ValueError(f"--uri={self.uri} needs the column of obs to learn; add --label COLUMN.")
        for name, size in {"cells": self.n_cells, "genes": self.n_genes}.items():
            if size is not None and (self.uri is not None or self.h5ad is not None):
                raise ValueError(
                    f"--{name}={size} is for simulated cells; leave out --uri and --h5ad, or this."
                )
            check_count(name, 1 if size is None else size, suggestion=2_000)
        if self.measurement_name is not None and self.uri is None:
            raise ValueError(
                f"--measurement-name={self.measurement_name} chooses within an experiment; add --uri, or "
                "leave it out."
            )
        if self.layer_name is not None and self.uri is None and self.h5ad is None:
            raise ValueError(
                f"--layer-name={self.layer_name} chooses within an experiment or a file; add --uri or "
                "--h5ad, or leave it out."
            )


# What it does ---------------------------------------------------------------------------------------------


def run_demo(options: DemoOptions) -> None:
    """Find the cells, train on them, and report."""
    console = Console()
    say: Callable[[str], None] = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with errors_in_one_line():
        options.check()
        options.output_dir.mkdir(parents=True, exist_ok=True)
        task = load_task(
            _find_cells(options, say),
            batch_size=options.batch_size,
            seed=options.seed,
            snapshot_dir=options.output_dir if options.snapshot else None,
            say=say,
        )
    n_train, n_held_out = (len(part.query_ids.obs_joinids) for part in (task.train, task.held_out))
    say(f"training on {n_train:,} cells, testing on {n_held_out:,}")
    history = _train(task, options, console)
    console.print(summary(task, history))
    picture = options.output_dir / "loss.png"
    save_curves(picture, task, history)
    say(f"loss curve: {picture}")


def _find_cells(options: DemoOptions, say: Say) -> LabelledCells:
    """Return the cells of an experiment; those of a file, or simulated ones, are written to one first."""
    label, layer_name = options.label, options.layer_name
    if options.uri is not None:
        uri, name = options.uri, options.uri.rstrip("/").rpartition("/")[2]
    elif options.h5ad is not None:
        uri, label = ingest_h5ad(absolute_path(options.h5ad), label, options.output_dir, say, layer_name)
        name, layer_name = options.h5ad.name, None
    else:
        size = options.n_cells or N_CELLS, options.n_genes or N_GENES
        uri = build_simulated(options.output_dir, *size, seed=options.seed, say=say)
        name = "simulated cells"
    return LabelledCells(
        uri=uri,
        name=name,
        measurement_name=options.measurement_name,
        layer_name=layer_name,
        label=label or "cell_type",
        obs_filter=options.obs_filter,
    )


def _train(task: Task, options: DemoOptions, console: Console) -> History:
    """Train with a progress bar where there is a terminal, and a line for each epoch in any case."""
    with progress_bar(console) as progress, _core_left_to_readers():
        n_batches = options.epochs * len(task.train)
        bar = progress.add_task(f"epoch 1/{options.epochs}", total=n_batches, rates="")

        def on_batch(history: History) -> None:
            if math.isnan(history.losses[-1]):
                raise refusal(
                    "X must hold counts, or other numbers of 0 or more; choose another --layer-name."
                )
            epoch = f"epoch {len(history.accuracies) + 1}/{options.epochs}"
            rates = f"loss {history.losses[-1]:.3f}  {history.rows_per_s:,.0f} rows/s"
            progress.update(bar, advance=1, description=epoch, rates=rates)

        def on_epoch(history: History) -> None:
            epoch, loss = len(history.accuracies), np.mean(history.losses[-len(task.train) :])
            console.print(
                f"epoch {epoch}/{options.epochs}  training loss {loss:.3f}  "
                f"held-out accuracy {history.accuracies[-1]:.1%}  {history.rows_per_s:,.0f} rows/s",
                highlight=False,
            )

        return train_classifier(
            task,
            epochs=options.epochs,
            num_workers=options.num_workers,
            seed=options.seed,
            on_batch=on_batch,
            on_epoch=on_epoch,
        )


@contextmanager
def _core_left_to_readers() -> Iterator[None]:
    """Let torch compute on all cores but one, which the threads that read ahead need.

    Threads of torch wait for each other in every small step: on two cores of which one is busy, two of them
    are several times slower than one.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, n_threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
