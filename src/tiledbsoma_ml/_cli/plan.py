"""`tiledbsoma-ml plan`: show what an epoch reads, and who yields which rows."""

from __future__ import annotations

import json
from typing import Annotated, TypeAlias

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer import Option

from tiledbsoma_ml._cli.epoch_plan import Json, PlanOptions, plan_epoch
from tiledbsoma_ml._cli.errors import errors_in_one_line
from tiledbsoma_ml._cli.options import (
    BATCH_SIZE,
    IO_BATCH_SIZE,
    READING,
    SEED,
    SHUFFLE_CHUNK_SIZE,
    BatchSize,
    IoBatchSize,
    LayerName,
    MeasurementName,
    ObsFilter,
    ShuffleChunkSize,
    Uri,
    as_size,
)

__all__ = ["plan"]

MOST_SHOWN = 32
"""Workers that are shown without --json."""

AsJson: TypeAlias = Annotated[
    bool, Option("--json", help="Print the plan as JSON, with the rows of every batch.")
]

Seed: TypeAlias = Annotated[int, Option(help="Seed of the order.", rich_help_panel=READING)]

Epoch: TypeAlias = Annotated[
    int, Option(help="Number of the epoch; the first one is 0.", rich_help_panel=READING)
]

WorldSize: TypeAlias = Annotated[int, Option(help="Number of ranks.", rich_help_panel=READING)]

NumWorkers: TypeAlias = Annotated[
    int, Option(help="Workers of each rank; with 0, each rank reads by itself.", rich_help_panel=READING)
]

Scope: TypeAlias = Annotated[
    str,
    Option(
        metavar="SCOPE",
        help="Rows that are shuffled together: partition (those of a worker), or global (all).",
        rich_help_panel=READING,
    ),
]

Column: TypeAlias = Annotated[
    str | None,
    Option(
        help="Column of obs for whose labels the mixing is predicted. Without it: dataset_id, or labels like "
        "the datasets of the Census."
    ),
]

Limit: TypeAlias = Annotated[int, Option(help="Rows that --json lists at most: those that come first.")]


def plan(
    uri: Uri,
    as_json: AsJson = False,
    measurement_name: MeasurementName = None,
    layer_name: LayerName = None,
    obs_filter: ObsFilter = None,
    shuffle_chunk_size: ShuffleChunkSize = SHUFFLE_CHUNK_SIZE,
    io_batch_size: IoBatchSize = IO_BATCH_SIZE,
    batch_size: BatchSize = BATCH_SIZE,
    seed: Seed = SEED,
    epoch: Epoch = 0,
    world_size: WorldSize = 1,
    num_workers: NumWorkers = 0,
    shuffle_scope: Scope = "partition",
    column: Column = None,
    limit: Limit = 100_000,
) -> None:
    """Show which rows are read together, and which worker yields them.

    `X` is not read, but for a sample of it if a size is `auto`. The page `shuffle_viz` draws what `--json`
    prints.

    **Examples**

    - `tiledbsoma-ml plan lung.soma`
    - `tiledbsoma-ml plan lung.soma --shuffle-chunk-size auto --io-batch-size auto`
    - `tiledbsoma-ml plan lung.soma --world-size 8 --column dataset_id`
    - `tiledbsoma-ml plan lung.soma --world-size 8 --json > plan.json`
    """
    with errors_in_one_line():
        options = PlanOptions(
            uri=uri,
            measurement_name=measurement_name,
            layer_name=layer_name,
            obs_filter=obs_filter,
            shuffle_chunk_size=as_size(shuffle_chunk_size),
            io_batch_size=as_size(io_batch_size),
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            world_size=world_size,
            num_workers=num_workers,
            shuffle_scope=shuffle_scope,
            column=column,
            limit=limit,
        )
        planned = plan_epoch(options)
    if as_json:
        typer.echo(json.dumps(planned))
    else:
        _show(planned)


def _show(planned: Json) -> None:
    """Print a plan as two tables: what is read together, and how much each worker reads and yields."""
    console = Console(highlight=False, soft_wrap=True)
    sizes, predicted, settings = planned["sizes"], planned["predicted"], planned["settings"]
    parts: list[Json] = planned["parts"]
    table = Table("", "", "", box=box.SIMPLE, show_header=False)
    table.add_row("rows", f"{planned['n_rows']:,}", f"in tiles of {planned['row_tile']:,}")
    for name, what, size in (
        ("n_chunks", "chunks", sizes["chunk_rows"]),
        ("n_io_batches", "IO batches", sizes["io_batch_rows"]),
        ("n_mini_batches", "mini-batches", settings["batch_size"]),
    ):
        table.add_row(what, f"{sum(part[name] for part in parts):,}", f"of {size:,} rows")
    times = f"{predicted['read_amplification']:.1f}"
    table.add_row("held at once", f"{predicted['rows_held']:,}", "rows, by the default memory_budget")
    table.add_row("tiles decoded", times, "times each, in an epoch; predicted")
    mixing = f"{predicted['mixing']:.2f}"
    table.add_row("mixing", mixing, "of a true shuffle, in a mini-batch; predicted")
    if settings["world_size"] > 1:
        mixing = f"{predicted['global_mixing']:.2f}"
        table.add_row("", mixing, "in those of all ranks in a step; predicted")
    console.print(table)
    table = Table("rank", "worker", "rows", "chunks", "IO batches", "mini-batches", box=box.SIMPLE)
    for part in parts[:MOST_SHOWN]:
        names = ("rank", "worker", "n_rows", "n_chunks", "n_io_batches", "n_mini_batches")
        table.add_row(*(f"{part[name]:,}" for name in names))
    console.print(table)
    if len(parts) > MOST_SHOWN:
        console.print(f"and {len(parts) - MOST_SHOWN:,} more; --json lists all of them")
