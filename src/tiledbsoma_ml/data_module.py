"""`ExperimentDataModule`: the parts of a query for a Lightning `Trainer`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd
import tiledbsoma as soma
import torch
from scipy import sparse

from tiledbsoma_ml._common import MiniBatch, check_count
from tiledbsoma_ml._dataset.describe import as_line, as_table, described
from tiledbsoma_ml._dataset.options import DEFAULT_OBS_COLUMN_NAMES, OF_SHUFFLING
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml.dataloader import ExperimentDataLoader, check_dataloader_kwargs, experiment_dataloader
from tiledbsoma_ml.dataset import ExperimentDataset
from tiledbsoma_ml.snapshot import Snapshot

try:
    from lightning.pytorch.trainer.states import TrainerFn

    from tiledbsoma_ml._lightning import DATASET_DEFAULTS, QueryDataModule
except ImportError as err:
    raise ImportError(
        "ExperimentDataModule needs Lightning; run `pip install 'tiledbsoma-ml[lightning]'`."
    ) from err

__all__ = ["PADDING_COLUMN_NAME", "ExperimentDataModule", "Transform"]

Transform: TypeAlias = Callable[[Any], Any]
"""Takes a batch and returns a batch."""

PADDING_COLUMN_NAME = "is_padding"
"""Default name of the column of `obs` that is true for repeats: rows that are not to be counted."""

_SAY_WHAT = ("x_locator", "query_ids", "source")
"""Options of `ExperimentDataset` that say what is read, beside `query`, `layer_name` and `snapshot`."""


class ExperimentDataModule(QueryDataModule):
    """Train, validation, test and predict loaders over the rows of a query, for a Lightning `Trainer`.

    ```python
    experiment = tiledbsoma.Experiment.open(uri, context=tiledbsoma_ml.context())
    with experiment, experiment.axis_query("RNA") as query:
        data = ExperimentDataModule(query, obs_column_names=["cell_type"], batch_size=1024, snapshot=True)
    Trainer(strategy="ddp", devices=2).fit(model, datamodule=data)
    ```

    A batch is `(X, obs)`. `X` is a `torch.Tensor` of shape (rows, n_vars), dense or (with
    `return_sparse_X=True`) `torch.sparse_csr`; Lightning moves it to the device of the model. `obs` is a
    `DataFrame`, which stays where it is. `transform` makes of the batch what the model takes; above all, it
    makes tensors of the labels.

    The split depends on the query, the sizes and the seed. It does not depend on the epoch, nor on the number
    of ranks or workers.

    - Train: the rows are shuffled anew every epoch, and every rank has the same number of steps. A checkpoint
      of Lightning, within an epoch or at its end, holds the place in the order; a resumed run goes on with
      the next batch.
    - Validation and test: the rows come in the order of the query, rank after rank. Every rank has the same
      number of steps: where the ranks do not divide the rows, the last rows are repeated, and "is_padding" in
      `obs` is true for the repeats. Leave these out, and every row is counted once.
    - Predict: all rows of the query come in its order, with the same marks. With several ranks, each has a
      contiguous piece, rank after rank.

    In validation, test and predict batches, `obs` has "soma_joinid" and "is_padding" beside the columns that
    you ask for.

    Args:
        query: The cells and genes; see `ExperimentDataset`.
        layer_name: Layer of `X`.
        train_size: Share of the rows to train on.
        val_size: Share of the rows for validation; 0 for no validation.
        test_size: Share of the rows for the test; 0 for no test. The three shares sum to 1.
        seed: Seed of the split and of the order of training batches. Every rank must have the same seed.
        snapshot: See `ExperimentDataset`. Take one if you train for more than one epoch. It holds the whole
            query, and all parts are read from it.
        batch_size: Rows per batch, on each rank.
        transform: Takes the batch `(X, obs)`. What it returns goes to the device, and then to the model. It
            runs in the training process, before the batch is moved.
        device_transform: Takes what `transform` returned, when that is on the device.
        dataloader_kwargs: Arguments of `experiment_dataloader`, for instance `{"num_workers": 2}`. Predict
            uses one worker at most, because several would mix the order.
        obs_column_names: Columns of `obs` to return.
        padding_column_name: Name of the column that marks repeats. Choose another name where `obs` has a
            column of this name that you need. Training batches have the column with `tail="pad"` only.
        dataset_options: Other options of `ExperimentDataset`. `shuffle` is that of training batches.
            `shuffle_chunk_size` and `io_batch_size` are "auto" and `shuffle_scope` is "global" unless you
            set them.

    Raises:
        ValueError: If a size breaks its rule, or a part that was asked for is empty.
    """

    def __init__(
        self,
        query: soma.ExperimentAxisQuery | None = None,
        layer_name: str | None = None,
        *,
        train_size: float = 0.8,
        val_size: float = 0.1,
        test_size: float = 0.1,
        seed: int = 42,
        snapshot: Snapshot | str | os.PathLike[str] | bool | None = None,
        batch_size: int = 128,
        transform: Transform | None = None,
        device_transform: Transform | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        obs_column_names: Sequence[str] = DEFAULT_OBS_COLUMN_NAMES,
        padding_column_name: str = PADDING_COLUMN_NAME,
        **dataset_options: Any,
    ) -> None:
        super().__init__()
        seed = check_count("seed", seed, suggestion=42, minimum=0)
        said = {name: dataset_options.pop(name) for name in _SAY_WHAT if name in dataset_options}
        said |= {"query": query, "layer_name": layer_name, "snapshot": snapshot}
        options = {
            **DATASET_DEFAULTS,
            **dataset_options,
            "obs_column_names": obs_column_names,
            "seed": seed,
            "batch_size": batch_size,
        }
        repeats = options.get("tail") == "pad"
        shuffled = ExperimentDataset(
            **said, **options, padding_column_name=padding_column_name if repeats else None
        )
        self._source, self.query_ids = shuffled.source, shuffled.query_ids
        in_order = ExperimentDataset(
            source=self._source, query_ids=self.query_ids, **_in_order(options, padding_column_name)
        )
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
        self.train_ids, self.val_ids, self.test_ids = _split(self.query_ids, sizes, seed)
        self._take_parts(shuffled, in_order)
        self._transform = transform
        self._device_transform = device_transform
        self._dataloader_kwargs = check_dataloader_kwargs(dataloader_kwargs)
        self._is_resized = False
        self._loaded: dict[str, Any] | None = None

    def _take_parts(self, shuffled: ExperimentDataset, in_order: ExperimentDataset) -> None:
        """Take the parts of the query from a dataset that is shuffled and one that is in its order."""
        self._train, self._predict = shuffled.over(self.train_ids), in_order
        self._val, self._test = in_order.over(self.val_ids), in_order.over(self.test_ids)
        self._train_loader: ExperimentDataLoader | None = None

    def __repr__(self) -> str:
        """Return a line that says what the data module holds; nothing is read or written for it."""
        return as_line(type(self).__name__, self._described())

    def _repr_html_(self) -> str:
        """Return the same as a table."""
        return as_table(type(self).__name__, self._described(), self._train.not_in_use)

    def _described(self) -> dict[str, str]:
        parts = {"train": self.train_ids, "val": self.val_ids, "test": self.test_ids}
        found = described(self._train.iterations)
        found["rows"] = f"{len(self.query_ids.obs_joinids):,} rows by {self.n_vars:,} columns"
        return found | {name: f"{len(ids.obs_joinids):,} rows" for name, ids in parts.items()}

    @property
    def batch_size(self) -> int:
        """Rows per batch, on each rank.

        A size that you set, or that Lightning's `Tuner.scale_batch_size` sets, holds for the loaders that are
        made afterwards. An epoch that was left in the middle is over then.
        """
        return self._train.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        if batch_size == self.batch_size:
            return
        epoch = self._train.iterations.upcoming_epoch
        wholes = (self._train.over(self.query_ids), self._predict)
        self._take_parts(*(whole.with_batch_size(batch_size) for whole in wholes))
        self._train.set_epoch(epoch)
        self._is_resized = True

    @property
    def n_vars(self) -> int:
        """Number of columns of `X`."""
        return len(self.query_ids.var_joinids)

    def read_obs(self, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `obs`, for instance labels, for all rows of the query, in its order."""
        return self._source.obs(self.query_ids.obs_joinids, column_names)

    def read_var(self, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `var`, for instance names of genes, for the columns of `X`, in their order."""
        return self._source.var(self.query_ids.var_joinids, column_names)

    # Loaders ----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> ExperimentDataLoader:
        """Return the loader of the train part."""
        if self._loaded is not None:
            self._train.load_state_dict(self._of_size(self._loaded))
            self._loaded = None
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0
        dataset = self._train
        if overfits:
            dataset = dataset.over(dataset.query_ids)
            dataset.iterations.repeat()
        self._train_loader = self._loader(dataset, "train_size")
        self._train_loader.progress.ends_after = self._n_train_batches
        return self._handed(self._train_loader, "max_size_cycle")

    def val_dataloader(self) -> ExperimentDataLoader | list[Any]:
        """Return the loader of the validation part; an empty list if its size is 0."""
        return self._handed(self._loader(self._val, "val_size")) if len(self.val_ids.obs_joinids) else []

    def test_dataloader(self) -> ExperimentDataLoader:
        """Return the loader of the test part."""
        return self._handed(self._loader(self._test, "test_size"))

    def predict_dataloader(self) -> ExperimentDataLoader:
        """Return the loader of all rows, in the order of the query."""
        n_workers = min(self._dataloader_kwargs.get("num_workers", 0), 1)
        return self._handed(self._loader(self._predict, "query", num_workers=n_workers))

    def _loader(self, dataset: ExperimentDataset, part: str, **options: Any) -> ExperimentDataLoader:
        self._source.prepare()
        loader = experiment_dataloader(dataset, **{**self._dataloader_kwargs, **options})
        if not len(loader):
            n_rows, (_, n_ranks) = len(dataset.query_ids.obs_joinids), dataset.iterations.ranks
            raise ValueError(
                f"{part} must give each of {n_ranks} ranks at least one row, and gives {n_rows} rows in all; "
                "make it larger, select more rows or take fewer ranks."
            )
        return loader

    # Resuming ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position of training, for a checkpoint; the same on every rank."""
        if self._loaded is not None:
            return dict(self._loaded)
        used = None if self.trainer is None else self.trainer.train_dataloader
        if isinstance(used, ExperimentDataLoader) and used.dataset.batch_size == self.batch_size:
            return used.state_dict()
        return (self._train_loader or self._train).state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position, with the next `train_dataloader`, which checks that it can.

        Lightning loads checkpoints to validate, test and predict as well. Then this does nothing.
        """
        if self.trainer is None or self.trainer.state.fn in (None, TrainerFn.FITTING):
            self._loaded = state_dict

    def on_exception(self, exception: BaseException) -> None:
        """End a run that failed; Lightning calls this. The next run does not go on from its checkpoint."""
        super().on_exception(exception)
        self._loaded = None

    def _of_size(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state with the present batch size, which may be another at the start of an epoch."""
        if not self._is_resized or state["n_yielded"] or state["earlier"]:
            return state
        return {**state, **{name: self._train.iterations.identity[name] for name in ("batch_size", "auto")}}

    def _n_train_batches(self) -> float:
        """Return the number of batches after which an epoch is over; the trainer may limit it."""
        return math.inf if self.trainer is None else float(self.trainer.num_training_batches)

    # Batches ----------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: MiniBatch, dataloader_idx: int) -> Any:
        """Return what goes to the device; Lightning calls this in the training process."""
        X, obs = batch
        transformed = (_as_tensor(X), obs)
        return transformed if self._transform is None else self._transform(transformed)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return what goes to the model, made on the device; Lightning calls this."""
        return batch if self._device_transform is None else self._device_transform(batch)


def _in_order(options: Mapping[str, Any], padding_column_name: str) -> dict[str, Any]:
    """Return the options of evaluation batches, where those of training batches are given."""
    names = [*options["obs_column_names"], "soma_joinid"]
    return {
        **{name: value for name, value in options.items() if name not in OF_SHUFFLING},
        "obs_column_names": list(dict.fromkeys(names)),
        "shuffle": False,
        "tail": "pad",
        "padding_column_name": padding_column_name,
    }


def _split(ids: QueryIDs, sizes: Mapping[str, float], seed: int) -> tuple[QueryIDs, ...]:
    """Return the parts of the rows; their sizes do not depend on the seed."""
    listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
    try:
        parts = ids.random_split(*sizes.values(), seed=seed, method="deterministic")
    except ValueError as err:
        raise ValueError(
            f"{listed} must be shares from 0 to 1 that sum to 1; "
            "try train_size=0.8, val_size=0.1, test_size=0.1."
        ) from err
    for (name, size), part in zip(sizes.items(), parts, strict=True):
        if size and not len(part.obs_joinids):
            raise ValueError(
                f"{name}={size} must give at least one row, and gives none of {len(ids.obs_joinids)}; "
                f"make it larger, select more rows, or set {name}=0 and add its share to another."
            )
    return parts


def _as_tensor(X: Any) -> torch.Tensor:
    """Return `X` as a tensor of two dimensions; a dense one shares its memory."""
    if isinstance(X, sparse.csr_matrix):
        return torch.sparse_csr_tensor(X.indptr, X.indices, X.data, size=X.shape, check_invariants=False)
    tensor = torch.as_tensor(X)
    return tensor if tensor.ndim == 2 else tensor.view(1, -1)
