"""What the demo learns: labelled cells of an experiment, some for training and some held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
import torch

from tiledbsoma_ml._cli.query import check_selects, choose_measurement, filtering, open_experiment
from tiledbsoma_ml._common import absolute_path, absolute_uri, check_name
from tiledbsoma_ml._ingest.choose import find_counts
from tiledbsoma_ml._ingest.experiment import Say, build_once, fingerprint
from tiledbsoma_ml._ingest.frames import is_categorical, is_kept
from tiledbsoma_ml._ingest.h5ad import ingest_h5ads
from tiledbsoma_ml._ingest.h5ad_file import open_h5ad
from tiledbsoma_ml.dataset import ExperimentDataset
from tiledbsoma_ml.simulate import simulate_experiment
from tiledbsoma_ml.snapshot import Snapshot

__all__ = ["LabelledCells", "Task", "build_simulated", "ingest_h5ad", "load_task"]

# Names under which h5ad files keep their classes, the most telling first.
_LABEL_NAMES = ("cell_type", "celltype", "label", "cluster", "leiden", "louvain")
_MAX_GUESSED_CLASSES = 100
_MIN_CELLS = 10


@attrs.frozen(kw_only=True)
class LabelledCells:
    """The cells to learn from, and the column of `obs` that holds their classes.

    Attributes:
        uri: URI of the experiment.
        name: A name for the cells.
        measurement_name: If None, "RNA" if there is one, else the only one.
        layer_name: If None, "raw" if there is one, else the only one.
        label: The column.
        obs_filter: Cells to select, as a SOMA value filter; None for all.
    """

    uri: str = attrs.field(converter=absolute_uri)
    name: str
    measurement_name: str | None
    layer_name: str | None
    label: str
    obs_filter: str | None

    def without_missing(self) -> LabelledCells:
        """Return the cells that have a label."""
        has_label = f"attr({self.label!r}) != None"
        return attrs.evolve(
            self, obs_filter=f"({self.obs_filter}) and {has_label}" if self.obs_filter else has_label
        )


@attrs.frozen(kw_only=True)
class Task:
    """Cells to train on, cells to test on, and the classes to tell apart."""

    name: str
    label: str
    classes: pd.Index[Any]
    train: ExperimentDataset
    held_out: ExperimentDataset
    majority_accuracy: float
    """Share of the held-out cells that have the most frequent class of the training cells."""

    @property
    def n_cells(self) -> int:
        """Number of cells, held-out ones included."""
        return len(self.train.query_ids.obs_joinids) + len(self.held_out.query_ids.obs_joinids)

    @property
    def n_genes(self) -> int:
        """Number of genes, which is the width of `X`."""
        return len(self.train.query_ids.var_joinids)

    def codes(self, obs: pd.DataFrame) -> torch.Tensor:
        """Return the class of each row of a mini-batch's `obs`, as its position in `classes`."""
        codes = pd.Categorical(obs[self.label], categories=self.classes).codes
        return torch.from_numpy(codes.astype(np.int64))


# Experiments ----------------------------------------------------------------------------------------------


def build_simulated(output_dir: Path, n_cells: int, n_genes: int, *, seed: int, say: Say) -> str:
    """Return the URI of an experiment in `output_dir` with the cells of `simulate_cells`."""
    folder = absolute_path(output_dir) / f"simulated-{fingerprint(n_cells, n_genes, seed)}.soma"
    build_once(folder, lambda uri: simulate_experiment(uri, n_cells, n_genes, seed), say)
    return str(folder)


def ingest_h5ad(
    path: Path, label: str | None, output_dir: Path, say: Say, layer_name: str | None = None
) -> tuple[str, str]:
    """Return the URI of the experiment that holds the counts of an h5ad file, and the label to learn.

    Args:
        path: The file.
        label: Column of `obs` to learn; the most telling one if None.
        output_dir: The folder in which the experiment is made.
        say: Called with a line for each step.
        layer_name: The matrix to take; if None, the first of `X`, `layers["counts"]` and `raw.X` that holds
            counts, else the first that holds no negative numbers.

    Raises:
        ValueError: If it is no h5ad file, has no such label, or no numbers to learn from.
    """
    with open_h5ad(path) as file:
        if label is None:
            label = _guess_label(file.obs, path)
            say(f"no --label was given: learning {label!r}, the most telling column of obs")
        check_name("label", label, file.obs.columns, of="a column of obs")
        _check_holds_classes(file.obs[label])
    return ingest_h5ads([path], layer_name, output_dir, say, choose=find_counts), label


def _check_holds_classes(column: pd.Series[Any]) -> None:
    if not is_kept(column, "obs") or not (is_categorical(column) or pd.api.types.is_integer_dtype(column)):
        raise ValueError(
            f"label={column.name!r} must hold classes: strings, whole numbers, or true and false; choose "
            "another column of obs."
        )


def _guess_label(obs: pd.DataFrame, path: Path) -> str:
    """Return the first of `_LABEL_NAMES` that holds classes, else the only column that does."""
    n_values = {str(name): column.nunique() for name, column in obs.items() if is_categorical(column)}
    usable = [name for name, n in n_values.items() if 2 <= n <= _MAX_GUESSED_CLASSES]
    for name in [*_LABEL_NAMES, *(usable if len(usable) == 1 else [])]:
        if name in usable:
            return name
    if not n_values:
        raise ValueError(
            f"obs of {str(path)!r} must have a column of classes to learn, and has none; add one, for "
            "instance of clusters, and write the file anew."
        )
    listed = ", ".join(map(repr, n_values))
    raise ValueError(f"the column of obs to learn must be named with --label; categorical are: {listed}.")


# The task -------------------------------------------------------------------------------------------------


def load_task(
    cells: LabelledCells, *, batch_size: int, seed: int, snapshot_dir: Path | None, say: Say
) -> Task:
    """Query the cells that have a label, and hold out a fifth of them.

    Args:
        cells: The cells.
        batch_size: Rows per mini-batch.
        seed: Seed of the split and of the order of the cells.
        snapshot_dir: Folder for a snapshot to read the cells from; None to read them from the experiment.
        say: Called with a line on what is left out, and on what is made.

    Raises:
        ValueError: If these cells cannot be learned from; the message tells why.
    """
    with open_experiment(cells.uri) as experiment:
        cells = attrs.evolve(cells, measurement_name=choose_measurement(cells.measurement_name, experiment))
        labels = _read_labels(experiment, cells)
        if n_missing := int(labels.isna().sum()):
            say(f"{n_missing:,} of {len(labels):,} cells have no {cells.label} and are left out")
            cells, labels = cells.without_missing(), labels.dropna()
        _check_classes(cells.label, labels)
        obs_query = soma.AxisQuery(value_filter=cells.obs_filter)
        with experiment.axis_query(cells.measurement_name, obs_query=obs_query) as query:
            options: dict[str, Any] = {"layer_name": cells.layer_name, "obs_column_names": [cells.label]}
            if snapshot_dir is not None:
                path = _snapshot_path(cells, snapshot_dir)
                say(f"snapshot of the cells: {path}")
                Snapshot.create(path, query, **options)
                options |= {"snapshot": path, "shuffle_chunk_size": "auto", "io_batch_size": "auto"}
            dataset = ExperimentDataset(query, batch_size=batch_size, seed=seed, **options)
    train, held_out = dataset.random_split(0.8, 0.2, seed=seed)
    majority = labels.loc[pd.Index(train.query_ids.obs_joinids)].mode()[0]
    return Task(
        name=cells.name,
        label=cells.label,
        classes=pd.Index(sorted(labels.unique())),
        train=train,
        held_out=held_out,
        majority_accuracy=float((labels.loc[pd.Index(held_out.query_ids.obs_joinids)] == majority).mean()),
    )


def _snapshot_path(cells: LabelledCells, folder: Path) -> Path:
    made_of = fingerprint(cells.uri, cells.measurement_name, cells.layer_name, cells.label, cells.obs_filter)
    return absolute_path(folder) / f"{Path(cells.uri).stem}-{made_of}.snapshot"


def _read_labels(experiment: soma.Experiment, cells: LabelledCells) -> pd.Series[Any]:
    """Return the label of each cell that passes the filter, with its joinid as index."""
    label, schema = cells.label, experiment.obs.schema
    check_name("label", label, set(schema.names) - {"soma_joinid"}, of="a column of obs")
    if pa.types.is_floating(schema.field(label).type):
        raise ValueError(f"label={label!r} must hold classes, not decimal numbers; choose another column.")
    columns = ["soma_joinid", label]
    with filtering(cells.obs_filter):
        obs = experiment.obs.read(column_names=columns, value_filter=cells.obs_filter).concat()
    check_selects(cells.obs_filter, len(obs), experiment)
    labels: pd.Series[Any] = obs.to_pandas().set_index("soma_joinid")[label]
    return labels


def _check_classes(label: str, labels: pd.Series[Any]) -> None:
    n_cells, n_classes = len(labels), labels.nunique()
    if n_cells < _MIN_CELLS:
        raise ValueError(f"{n_cells} labelled cells are too few, {_MIN_CELLS} needed; select more of them.")
    if n_classes < 2:
        raise ValueError(
            f"label={label!r} must have 2 or more classes, and has only {str(labels.iloc[0])!r} in the "
            f"{n_cells:,} cells selected; choose another column or select more cells."
        )
    if n_classes > n_cells // 2:
        raise ValueError(
            f"label={label!r} must have classes of several cells, and has {n_classes:,} values in "
            f"{n_cells:,} cells; choose another column."
        )
