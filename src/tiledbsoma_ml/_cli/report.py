"""The report of the demo: a bar while it trains, then a table and a picture of the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tiledbsoma_ml._cli.classifier import History
from tiledbsoma_ml._cli.task import Task

__all__ = ["progress_bar", "save_curves", "summary"]


def progress_bar(console: Console) -> Progress:
    """Return a bar with a field `rates`; it is shown on terminals only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rates]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def summary(task: Task, history: History) -> Table:
    """Return a table of what was learned from, how fast and how well."""
    n_batches = len(history.losses)
    table = Table("", "", "", box=box.SIMPLE, show_header=False)
    table.add_row("cells", f"{task.n_cells:,}", f"{len(task.classes)} classes of {escape(task.label)}")
    table.add_row("genes", f"{task.n_genes:,}")
    table.add_row(
        "mini-batches",
        f"{n_batches:,}",
        f"of {task.train.batch_size} cells, {n_batches / history.train_s:,.0f} per second",
    )
    table.add_row("rows/s", f"{history.rows_per_s:,.0f}", "reading, shuffling and training together")
    table.add_row("held-out accuracy", f"{history.accuracies[-1]:.1%}", "after the last epoch")
    table.add_row(
        "majority class", f"{task.majority_accuracy:.1%}", "accuracy of always naming the largest class"
    )
    return table


def save_curves(path: Path, task: Task, history: History) -> None:
    """Write a PNG with the loss of each mini-batch and, below, the held-out accuracy after each epoch."""
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    n_epochs, n_batches = len(history.accuracies), len(history.losses)
    in_epochs = np.arange(1, n_batches + 1) * n_epochs / n_batches
    smooth = pd.Series(history.losses).rolling(n_batches // 30 + 3, center=True, min_periods=1).mean()

    upper.plot(in_epochs, history.losses, color="#9db8d9", linewidth=0.8, label="each mini-batch")
    upper.plot(in_epochs, smooth, color="#1f4e8c", linewidth=2, label="moving average")
    upper.set(ylabel="training loss", ylim=(0, None))
    title = f"Learning {task.label} from {task.name}\n{task.n_cells:,} cells, {task.n_genes:,} genes"
    upper.set_title(title, loc="left", parse_math=False)
    lower.plot(np.arange(1, n_epochs + 1), history.accuracies, "o-", color="#c4572b", label="held-out cells")
    lower.axhline(task.majority_accuracy, color="#777777", linestyle="--", label="always the largest class")
    lower.set(xlabel="epoch", ylabel="accuracy", xlim=(0, n_epochs * 1.01), ylim=(0, 1.05))
    lower.yaxis.set_major_formatter(PercentFormatter(1.0))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.legend(frameon=False)
        axes.grid(axis="x", color="#e3e3e3")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
