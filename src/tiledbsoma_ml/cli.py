"""The command line, `tiledbsoma-ml …`. It needs the extra `cli`, and imports it when it is used."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import numpy as np
import pandas as pd
import tiledbsoma as soma
import torch

from tiledbsoma_ml._common import absolute_path, check_count

if TYPE_CHECKING:
    import typer
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from tiledbsoma_ml._cli.demo import History, Task

__all__ = ["build_app", "main"]

MOST_SHOWN = 32
"""Workers that `tiledbsoma-ml plan` shows without --json."""


def main() -> None:
    """Run the command line.

    Raises:
        ImportError: If the extra `cli` is not installed.
    """
    build_app()()


def build_app() -> "typer.Typer":
    """Return the command line as a Typer application."""
    try:
        import anndata  # noqa: F401
        import matplotlib as mpl  # noqa: F401
        import rich  # noqa: F401
        import typer
    except ImportError as err:
        raise ImportError(
            f"the command line needs {err.name}; install it with: pip install 'tiledbsoma-ml[cli]'"
        ) from err
    app = typer.Typer(
        name="tiledbsoma-ml",
        help="From a TileDB-SOMA query to training mini-batches.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    _add_version(app)
    _add_demo(app)
    _add_plan(app)
    return app


def _add_version(app: "typer.Typer") -> None:
    import typer

    def show(asked: bool) -> None:
        if asked:
            typer.echo(f"tiledbsoma-ml {version('tiledbsoma-ml')}")
            raise typer.Exit

    @app.callback(epilog="Start with `tiledbsoma-ml demo`.")
    def tiledbsoma_ml(
        show_version: Annotated[
            bool, typer.Option("--version", callback=show, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass


def _add_demo(app: "typer.Typer") -> None:
    from typer import Option

    cells, training = "Which cells", "How to train"

    @app.command()
    def demo(
        h5ad: Annotated[
            Path | None, Option(help="Train on this AnnData file.", rich_help_panel=cells)
        ] = None,
        uri: Annotated[
            str | None,
            Option(
                help="Train on this SOMA Experiment, local or on S3; needs --label.", rich_help_panel=cells
            ),
        ] = None,
        label: Annotated[
            str | None,
            Option(
                metavar="COLUMN",
                help="Column of obs to learn. Without it: the first of cell_type, celltype, label, cluster, "
                "leiden and louvain, else the only categorical column.",
                rich_help_panel=cells,
            ),
        ] = None,
        obs_filter: Annotated[
            str | None,
            Option(metavar="FILTER", help="Which cells, as a SOMA value filter.", rich_help_panel=cells),
        ] = None,
        layer_name: Annotated[
            str | None,
            Option(
                help="Layer of X, with --uri or --h5ad. Without it: raw or the only one; in a file, counts.",
                rich_help_panel=cells,
            ),
        ] = None,
        measurement_name: Annotated[
            str | None,
            Option(help="Measurement, with --uri. Without it: RNA, or the only one.", rich_help_panel=cells),
        ] = None,
        n_cells: Annotated[
            int | None,
            Option("--cells", help="Cells to simulate.", show_default="20000", rich_help_panel=cells),
        ] = None,
        n_genes: Annotated[
            int | None,
            Option("--genes", help="Genes to simulate.", show_default="3000", rich_help_panel=cells),
        ] = None,
        epochs: Annotated[int, Option(help="Passes over the cells.", rich_help_panel=training)] = 5,
        batch_size: Annotated[int, Option(help="Cells per mini-batch.", rich_help_panel=training)] = 128,
        seed: Annotated[
            int, Option(help="For simulation, split, order and weights.", rich_help_panel=training)
        ] = 0,
        workers: Annotated[
            int, Option(help="Processes that read, beside this one.", rich_help_panel=training)
        ] = 0,
        snapshot: Annotated[
            bool | None,
            Option(
                "--snapshot/--stream",
                help="Read epochs from a snapshot of the cells, made first, or each from the experiment.",
                show_default="snapshot, if there is more than one epoch",
                rich_help_panel=training,
            ),
        ] = None,
        output_dir: Annotated[
            Path,
            Option(help="Where loss.png, new experiments and snapshots go.", rich_help_panel=training),
        ] = Path("demo_output"),
    ) -> None:
        """Train a classifier of cell types on shuffled mini-batches of a SOMA Experiment.

        Four fifths of the cells are for training, the others show how well it went. Without `--h5ad` and
        `--uri` the cells are simulated. The counts of a file are written to a SOMA Experiment first, once.
        For more than one epoch the cells are put in a snapshot, from which they are read many times faster.

        **Examples**

        - `tiledbsoma-ml demo`
        - `tiledbsoma-ml demo --h5ad pbmc.h5ad --label cell_type`
        - `tiledbsoma-ml demo --uri lung.soma --label cell_type --obs-filter "tissue == 'lung'"`
        """
        _run_demo(
            DemoOptions(
                h5ad=h5ad,
                uri=uri,
                label=label,
                obs_filter=obs_filter,
                layer_name=layer_name,
                measurement_name=measurement_name,
                n_cells=n_cells,
                n_genes=n_genes,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                workers=workers,
                snapshot=epochs > 1 if snapshot is None else snapshot,
                output_dir=output_dir,
            )
        )


def _add_plan(app: "typer.Typer") -> None:
    import typer
    from typer import Option

    rows, reading = "Which rows", "How they are read"

    @app.command()
    def plan(
        uri: Annotated[str, typer.Argument(help="A SOMA Experiment, local or on S3.", metavar="URI")],
        as_json: Annotated[
            bool, Option("--json", help="Print the plan as JSON, with the rows of every batch.")
        ] = False,
        measurement_name: Annotated[
            str | None,
            Option(help="Measurement. Without it: RNA, or the only one.", rich_help_panel=rows),
        ] = None,
        layer_name: Annotated[
            str | None, Option(help="Layer of X. Without it: raw, or the only one.", rich_help_panel=rows)
        ] = None,
        obs_filter: Annotated[
            str | None,
            Option(metavar="FILTER", help="Which rows, as a SOMA value filter.", rich_help_panel=rows),
        ] = None,
        shuffle_chunk_size: Annotated[
            str,
            Option(metavar="ROWS", help="Neighbours that stay together, or auto.", rich_help_panel=reading),
        ] = "64",
        io_batch_size: Annotated[
            str, Option(metavar="ROWS", help="Rows read together, or auto.", rich_help_panel=reading)
        ] = "65536",
        batch_size: Annotated[int, Option(help="Rows per mini-batch.", rich_help_panel=reading)] = 1024,
        seed: Annotated[int, Option(help="Of the order.", rich_help_panel=reading)] = 0,
        epoch: Annotated[int, Option(help="Which epoch, from 0.", rich_help_panel=reading)] = 0,
        world_size: Annotated[int, Option(help="Ranks.", rich_help_panel=reading)] = 1,
        num_workers: Annotated[
            int, Option(help="Workers of each rank; 0: it reads itself.", rich_help_panel=reading)
        ] = 0,
        shuffle_scope: Annotated[
            str,
            Option(metavar="SCOPE", help="Shuffle by partition, or global: all.", rich_help_panel=reading),
        ] = "partition",
        limit: Annotated[
            int, Option(help="Rows that --json lists at most: those that come first.")
        ] = 100_000,
    ) -> None:
        """Show which rows are read together and who yields which, without reading X.

        The page `shuffle_viz` draws what `--json` prints.

        **Examples**

        - `tiledbsoma-ml plan lung.soma`
        - `tiledbsoma-ml plan lung.soma --shuffle-chunk-size auto --io-batch-size auto`
        - `tiledbsoma-ml plan lung.soma --world-size 8 --json > plan.json`
        """
        from tiledbsoma_ml._cli.epoch_plan import PlanOptions, plan_epoch

        with _errors_in_one_line():
            found = plan_epoch(
                PlanOptions(
                    uri=uri,
                    measurement_name=measurement_name,
                    layer_name=layer_name,
                    obs_filter=obs_filter,
                    shuffle_chunk_size=_size(shuffle_chunk_size),
                    io_batch_size=_size(io_batch_size),
                    batch_size=batch_size,
                    seed=seed,
                    epoch=epoch,
                    world_size=world_size,
                    num_workers=num_workers,
                    shuffle_scope=shuffle_scope,
                    limit=limit,
                )
            )
        if as_json:
            typer.echo(json.dumps(found))
        else:
            _show_plan(found)


def _size(text: str) -> int | str:
    """Return the number that an option holds, or what else it holds."""
    return int(text) if text.lstrip("-").isdecimal() else text


def _show_plan(plan: dict[str, Any]) -> None:
    """Print a plan as tables: what is read together, and who reads and yields how much."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    sizes, predicted, settings = plan["sizes"], plan["predicted"], plan["settings"]
    parts: list[dict[str, Any]] = plan["parts"]
    table = Table("", "", "", box=box.SIMPLE, show_header=False)
    table.add_row("rows", f"{plan['n_rows']:,}", f"in tiles of {plan['row_tile']:,}")
    table.add_row(
        "chunks", f"{sum(part['n_chunks'] for part in parts):,}", f"of {sizes['chunk_rows']:,} rows"
    )
    n_io_batches = sum(part["n_io_batches"] for part in parts)
    table.add_row("IO batches", f"{n_io_batches:,}", f"of {sizes['io_batch_rows']:,} rows")
    n_mini_batches = sum(part["n_mini_batches"] for part in parts)
    table.add_row("mini-batches", f"{n_mini_batches:,}", f"of {settings['batch_size']:,} rows")
    times = f"{predicted['read_amplification']:.1f}"
    table.add_row("tiles decoded", times, "times each, in an epoch; predicted")
    table.add_row("mixing", f"{predicted['mixing']:.2f}", "of a true shuffle; predicted")
    console.print(table)
    table = Table("rank", "worker", "rows", "chunks", "IO batches", "mini-batches", box=box.SIMPLE)
    for part in parts[:MOST_SHOWN]:
        names = ("rank", "worker", "n_rows", "n_chunks", "n_io_batches", "n_mini_batches")
        table.add_row(*(f"{part[name]:,}" for name in names))
    console.print(table)
    if len(parts) > MOST_SHOWN:
        console.print(f"and {len(parts) - MOST_SHOWN:,} more; --json lists all of them")


@attrs.frozen(kw_only=True)
class DemoOptions:
    """The options of `tiledbsoma-ml demo`."""

    h5ad: Path | None
    uri: str | None
    label: str | None
    obs_filter: str | None
    layer_name: str | None
    measurement_name: str | None
    n_cells: int | None
    n_genes: int | None
    epochs: int
    batch_size: int
    seed: int
    workers: int
    snapshot: bool
    output_dir: Path = attrs.field(converter=absolute_path)

    def check(self) -> None:
        """Raise a ValueError if options contradict each other, or a number is too small."""
        check_count("epochs", self.epochs, suggestion=5)
        check_count("batch_size", self.batch_size, suggestion=128)
        check_count("seed", self.seed, suggestion=0, minimum=0)
        check_count("workers", self.workers, suggestion=0, minimum=0)
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


def _run_demo(options: DemoOptions) -> None:
    from rich.console import Console

    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with _errors_in_one_line():
        options.check()
        options.output_dir.mkdir(parents=True, exist_ok=True)
        task = _load_task(options, say)
    n_train, n_held_out = (len(part.query_ids.obs_joinids) for part in (task.train, task.held_out))
    say(f"training on {n_train:,} cells, testing on {n_held_out:,}")
    history = _train(task, options, console)
    console.print(_table(task, history))
    picture = options.output_dir / "loss.png"
    _save_curves(picture, task, history)
    say(f"loss curve: {picture}")


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turn an error that tells the user what to change into one sentence and exit code 2."""
    try:
        yield
    except (ValueError, OSError, soma.SOMAError) as err:
        raise _refusal(str(err)) from err


def _refusal(sentence: str) -> "typer.Exit":
    import typer
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), sentence), soft_wrap=True)
    return typer.Exit(2)


def _load_task(options: DemoOptions, say: Callable[[str], None]) -> "Task":
    from tiledbsoma_ml._cli import demo
    from tiledbsoma_ml.simulate import N_CELLS, N_GENES

    label, layer_name = options.label, options.layer_name
    if options.uri is not None:
        uri, name = options.uri, options.uri.rstrip("/").rpartition("/")[2]
    elif options.h5ad is not None:
        uri, label = demo.ingest_h5ad(absolute_path(options.h5ad), label, options.output_dir, say, layer_name)
        name, layer_name = options.h5ad.name, None
    else:
        size = options.n_cells or N_CELLS, options.n_genes or N_GENES
        uri = demo.build_simulated(options.output_dir, *size, seed=options.seed, say=say)
        name = "simulated cells"
    return demo.load_task(
        uri,
        name=name,
        measurement_name=options.measurement_name,
        layer_name=layer_name,
        label=label or "cell_type",
        obs_filter=options.obs_filter,
        batch_size=options.batch_size,
        seed=options.seed,
        snapshot_dir=options.output_dir if options.snapshot else None,
        say=say,
    )


def _train(task: "Task", options: DemoOptions, console: "Console") -> "History":
    """Train with a progress bar where there is a terminal, and a line for each epoch in any case."""
    from tiledbsoma_ml._cli.demo import train_classifier

    with _progress_bar(console) as progress, _core_left_to_readers():
        n_batches = options.epochs * len(task.train)
        bar = progress.add_task(f"epoch 1/{options.epochs}", total=n_batches, rates="")

        def on_batch(history: "History") -> None:
            if math.isnan(history.losses[-1]):
                raise _refusal(
                    "X must hold counts, or other numbers of 0 or more; choose another --layer-name."
                )
            epoch = f"epoch {len(history.accuracies) + 1}/{options.epochs}"
            rates = f"loss {history.losses[-1]:.3f}  {history.rows_per_s:,.0f} rows/s"
            progress.update(bar, advance=1, description=epoch, rates=rates)

        def on_epoch(history: "History") -> None:
            epoch, loss = len(history.accuracies), np.mean(history.losses[-len(task.train) :])
            console.print(
                f"epoch {epoch}/{options.epochs}  training loss {loss:.3f}  "
                f"held-out accuracy {history.accuracies[-1]:.1%}  {history.rows_per_s:,.0f} rows/s",
                highlight=False,
            )

        return train_classifier(
            task,
            epochs=options.epochs,
            workers=options.workers,
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


def _progress_bar(console: "Console") -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rates]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _table(task: "Task", history: "History") -> "Table":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

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


def _save_curves(path: Path, task: "Task", history: "History") -> None:
    """Write a PNG with the loss of each mini-batch and, below, the held-out accuracy after each epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

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
