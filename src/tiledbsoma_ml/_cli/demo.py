"""The demo: a classifier of cell types, trained on shuffled mini-batches of a SOMA query."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
import torch
from torch.utils.data import DataLoader

from tiledbsoma_ml import _context
from tiledbsoma_ml._common import absolute_path, absolute_uri, check_name, first_line
from tiledbsoma_ml._ingest.choose import find_counts
from tiledbsoma_ml._ingest.experiment import Say, build_once, fingerprint
from tiledbsoma_ml._ingest.frames import is_categorical, is_kept
from tiledbsoma_ml._ingest.h5ad import ingest_h5ads
from tiledbsoma_ml._ingest.h5ad_file import open_h5ad
from tiledbsoma_ml.dataloader import experiment_dataloader
from tiledbsoma_ml.dataset import ExperimentDataset
from tiledbsoma_ml.simulate import simulate_experiment
from tiledbsoma_ml.snapshot import Snapshot

__all__ = [
    "History",
    "Task",
    "build_simulated",
    "choose_measurement",
    "ingest_h5ad",
    "load_task",
    "normalise",
    "open_experiment",
    "train_classifier",
]

# Names under which h5ad files keep their classes, most telling first.
_LABEL_NAMES = ("cell_type", "celltype", "label", "cluster", "leiden", "louvain")
_MAX_GUESSED_CLASSES = 100
_MIN_CELLS = 10


@attrs.frozen(kw_only=True)
class Task:
    """What to learn, and from which cells."""

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
        """Return the class of each row of a mini-batch's `obs` as a number, its place in `classes`."""
        codes = pd.Categorical(obs[self.label], categories=self.classes).codes
        return torch.from_numpy(codes.astype(np.int64))


@attrs.define
class History:
    """What happened in training so far."""

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


# The cells --------------------------------------------------------------------------------------------


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
        say: Told what is done.
        layer_name: Which matrix to take; if None, the first one of `X`, `layers["counts"]` and `raw.X` that
            holds counts, else numbers of 0 or more.

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


# The query --------------------------------------------------------------------------------------------


def load_task(
    uri: str,
    *,
    name: str,
    measurement_name: str | None,
    layer_name: str | None,
    label: str,
    obs_filter: str | None,
    batch_size: int,
    seed: int,
    snapshot_dir: Path | None,
    say: Say,
) -> Task:
    """Query the labelled cells of an experiment and hold out a fifth of them.

    Args:
        uri: URI of the experiment.
        name: A name for the cells.
        measurement_name: If left out, "RNA" if there is one, else the only one.
        layer_name: If left out, "raw" if there is one, else the only one.
        label: Column of `obs` with the classes.
        obs_filter: Which cells, as a SOMA value filter; all if left out.
        batch_size: Rows per mini-batch.
        seed: For the split and the order of the cells.
        snapshot_dir: Folder for a snapshot to read the cells from; None to read them from the experiment.
        say: Told what is left out, and what is made.

    Raises:
        ValueError: If there is nothing to learn there; the message tells why.
    """
    uri = absolute_uri(uri)
    with open_experiment(uri) as experiment:
        measurement_name = choose_measurement(measurement_name, experiment)
        labels = _read_labels(experiment, label, obs_filter)
        if n_missing := int(labels.isna().sum()):
            say(f"{n_missing:,} of {len(labels):,} cells have no {label} and are left out")
            labelled = f"attr({label!r}) != None"
            obs_filter = f"({obs_filter}) and {labelled}" if obs_filter else labelled
            labels = labels.dropna()
        _check_classes(label, labels)
        with experiment.axis_query(
            measurement_name, obs_query=soma.AxisQuery(value_filter=obs_filter)
        ) as query:
            options: dict[str, Any] = {"layer_name": layer_name, "obs_column_names": [label]}
            if snapshot_dir is not None:
                made_of = fingerprint(uri, measurement_name, layer_name, label, obs_filter)
                path = absolute_path(snapshot_dir) / f"{Path(uri).stem}-{made_of}.snapshot"
                say(f"snapshot of the cells: {path}")
                Snapshot.create(path, query, **options)
                options |= {"snapshot": path, "shuffle_chunk_size": "auto", "io_batch_size": "auto"}
            dataset = ExperimentDataset(query, batch_size=batch_size, seed=seed, **options)
    train, held_out = dataset.random_split(0.8, 0.2, seed=seed)
    majority = labels.loc[pd.Index(train.query_ids.obs_joinids)].mode()[0]
    return Task(
        name=name,
        label=label,
        classes=pd.Index(sorted(labels.unique())),
        train=train,
        held_out=held_out,
        majority_accuracy=float((labels.loc[pd.Index(held_out.query_ids.obs_joinids)] == majority).mean()),
    )


@contextmanager
def open_experiment(uri: str) -> Iterator[soma.Experiment]:
    """Open an experiment; raise a ValueError if there is none."""
    try:
        experiment = _context.open_experiment(uri)
    except (soma.SOMAError, TypeError, ValueError) as err:
        raise ValueError(
            f"uri={uri!r} must be a SOMA experiment, and cannot be opened as one ({first_line(err)}); "
            "check the path and your access to it."
        ) from err
    with experiment:
        yield experiment


def choose_measurement(name: str | None, experiment: soma.Experiment) -> str:
    """Return the measurement of this name; without a name "RNA" if there is one, else the only one."""
    known: list[str] = list(experiment.ms)
    if name is None and len(known) == 1:
        return known[0]
    return check_name("measurement_name", name or "RNA", known, of="a measurement of the experiment")


def _read_labels(experiment: soma.Experiment, label: str, obs_filter: str | None) -> pd.Series[Any]:
    """Return the label of each cell that passes the filter, with its joinid as index."""
    schema = experiment.obs.schema
    check_name("label", label, set(schema.names) - {"soma_joinid"}, of="a column of obs")
    if pa.types.is_floating(schema.field(label).type):
        raise ValueError(f"label={label!r} must hold classes, not decimal numbers; choose another column.")
    try:
        obs = experiment.obs.read(column_names=["soma_joinid", label], value_filter=obs_filter).concat()
    except soma.SOMAError as err:
        raise ValueError(
            f"obs_filter={obs_filter!r} must be a filter that SOMA understands ({first_line(err)}); "
            "try one like \"assay == 'Smart-seq2' and donor_id != 'D1'\"."
        ) from err
    labels: pd.Series[Any] = obs.to_pandas().set_index("soma_joinid")[label]
    if labels.empty and obs_filter:
        raise ValueError(
            f"obs_filter={obs_filter!r} must select cells, and selects none of {experiment.obs.count:,}; "
            "loosen it or leave it out."
        )
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


# Training ---------------------------------------------------------------------------------------------


def train_classifier(
    task: Task,
    *,
    epochs: int,
    workers: int,
    seed: int,
    on_batch: Callable[[History], None],
    on_epoch: Callable[[History], None],
) -> History:
    """Train a small classifier on the mini-batches of the training cells, and test it after each epoch.

    Args:
        task: The task to learn.
        epochs: Passes over the training cells.
        workers: Processes that read, beside this one.
        seed: For the first weights of the model.
        on_batch: Called after each mini-batch.
        on_epoch: Called after each epoch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _make_classifier(task.n_genes, len(task.classes), seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train_loader = experiment_dataloader(task.train, num_workers=workers)
    held_out_loader = experiment_dataloader(task.held_out, num_workers=workers)
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
