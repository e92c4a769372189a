"""Options that several commands share: one name, one help text and one default each.

Where `ExperimentDataset` or a data module has a parameter of the same name, the default is theirs as well. An
option is an alias of its type, and a command takes it as `batch_size: BatchSize = BATCH_SIZE`.
"""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from typer import Argument, Option

from tiledbsoma_ml.dataset import DEFAULT_IO_BATCH_SIZE, DEFAULT_SHUFFLE_CHUNK_SIZE

BATCH_SIZE, SEED = 128, 42
SHUFFLE_CHUNK_SIZE, IO_BATCH_SIZE = str(DEFAULT_SHUFFLE_CHUNK_SIZE), str(DEFAULT_IO_BATCH_SIZE)

# Panels of `--help`.
CELLS, READING = "Which cells", "How they are read"

Uri: TypeAlias = Annotated[str, Argument(help="A SOMA Experiment, local or on S3.", metavar="URI")]

MeasurementName: TypeAlias = Annotated[
    str | None,
    Option(
        help="Measurement of the experiment. Without it: RNA, or the only one.",
        rich_help_panel=CELLS,
    ),
]

LayerName: TypeAlias = Annotated[
    str | None, Option(help="Layer of X. Without it: raw, or the only one.", rich_help_panel=CELLS)
]

ObsFilter: TypeAlias = Annotated[
    str | None,
    Option(metavar="FILTER", help="Cells to select, as a SOMA value filter.", rich_help_panel=CELLS),
]

ShuffleChunkSize: TypeAlias = Annotated[
    str,
    Option(metavar="ROWS", help="Neighbouring rows that stay together, or auto.", rich_help_panel=READING),
]

IoBatchSize: TypeAlias = Annotated[
    str,
    Option(
        metavar="ROWS",
        help="Rows that are read and shuffled together, or auto.",
        rich_help_panel=READING,
    ),
]

BatchSize: TypeAlias = Annotated[int, Option(help="Rows per mini-batch.", rich_help_panel=READING)]


def as_size(text: str) -> int | str:
    """Return a size as a number if it is one, else unchanged: "auto", or what a dataset refuses."""
    return int(text) if re.fullmatch(r"[+-]?\d{1,30}", text, flags=re.ASCII) else text
