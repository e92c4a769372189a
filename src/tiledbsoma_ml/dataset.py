"""`ExperimentDataset`: a query as an iterable of shuffled mini-batches."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import tiledbsoma as soma
import torch

from tiledbsoma_ml._batch.assemble import Assembly, DeviceShuffle
from tiledbsoma_ml._batch.random_access import random_access_mini_batches
from tiledbsoma_ml._batch.read_ahead import Piece, read_ahead
from tiledbsoma_ml._common import MiniBatch, check_count
from tiledbsoma_ml._dataset.choose_source import choose_source
from tiledbsoma_ml._dataset.describe import as_line, as_table, described
from tiledbsoma_ml._dataset.iterations import Iterations
from tiledbsoma_ml._dataset.options import (
    DEFAULT_IO_BATCH_SIZE,
    DEFAULT_MEMORY_BUDGET,
    DEFAULT_OBS_COLUMN_NAMES,
    DEFAULT_SHUFFLE_CHUNK_SIZE,
    Options,
    ShuffleMode,
)
from tiledbsoma_ml._distributed import get_worker_id_and_num
from tiledbsoma_ml._epoch.progress import Progress
from tiledbsoma_ml._order.plan import PartPlan, Plan
from tiledbsoma_ml._order.quality import ShuffleQuality, quality_of
from tiledbsoma_ml._order.share import ShuffleScope
from tiledbsoma_ml._order.sizes import Size
from tiledbsoma_ml._query_ids import QueryIDs, SamplingMethod, Tail, check_whole
from tiledbsoma_ml._rows import Padding
from tiledbsoma_ml._source import RandomAccess, Reader, Source
from tiledbsoma_ml._threads import ClosedWhenDropped, end_with_parent
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.x_locator import XLocator

__all__ = [
    "DEFAULT_IO_BATCH_SIZE",
    "DEFAULT_MEMORY_BUDGET",
    "DEFAULT_OBS_COLUMN_NAMES",
    "DEFAULT_SHUFFLE_CHUNK_SIZE",
    "ExperimentDataset",
    "ShuffleMode",
]

_OPTIONS = frozenset(attrs.fields_dict(Options))
_CHANGEABLE = frozenset({"ranks", "return_sparse_X", "use_eager_fetch"})
"""Options that neither the order of the epoch depends on, nor what is read."""


class ExperimentDataset(torch.utils.data.IterableDataset[MiniBatch]):
    """The cells of a SOMA query as mini-batches `(X, obs)`, in a new random order every epoch.

    ```python
    lung = tiledbsoma.AxisQuery(value_filter="tissue == 'lung'")
    with tiledbsoma.Experiment.open(uri, context=tiledbsoma_ml.context()) as experiment:
        with experiment.axis_query("RNA", obs_query=lung) as query:
            dataset = ExperimentDataset(query, obs_column_names=["cell_type"], batch_size=1024)
    for X, obs in experiment_dataloader(dataset):
        ...
    ```

    The dataset keeps the joinids of the query and the address of the layer, and opens the experiment anew
    whenever it is iterated: in this process, in workers, or on another machine that it was pickled to.

    An epoch begins with the first mini-batch that is taken from an iterator. `docs/how_it_works.md` tells how
    rows are ordered and dealt to ranks and workers.

    Args:
        query: The cells and genes; its experiment must be open. Either `query` (and `layer_name`), or both
            `x_locator` and `query_ids`, or `source`.
        layer_name: Layer of `X`, sparse or dense. If left out: "raw" if there is one, else the only layer.
        x_locator: Address of the layer.
        query_ids: Joinids of the rows and columns; with `source` or `snapshot` alone, a part of what it has.
        obs_column_names: Columns of `obs` to return, in this order.
        batch_size: Rows per mini-batch; a worker's last one may be smaller. With 1, dense `X` has the shape
            (n_vars,).
        io_batch_size: Rows read together and shuffled among each other: the shuffle window. A multiple of
            `shuffle_chunk_size`, or "auto": as many as `memory_budget` or `window_budget` holds, from the
            non-zeros that rows of this query have.
        shuffle: Whether to shuffle; rows come in the order of the query otherwise.
        shuffle_chunk_size: Neighbouring rows that stay together until a window is read. Smaller means better
            mixed, larger means faster. "auto" follows the row tiles of the layer as it is stored: whole tiles
            where a window holds the query, so that none is decoded twice in an epoch, else the longest runs
            within tiles that reach `mixing`.
        seed: The same seed gives the same order in every epoch, and in epoch 0 that of tiledbsoma-ml 0.1.0.
            A seed is drawn if None; with several ranks rank 0's, where torch.distributed is initialized.
        return_sparse_X: Whether `X` is a `csr_matrix` (`torch.sparse_csr` with `device`) instead of dense.
        use_eager_fetch: Whether to read ahead on threads.
        shuffle_mode: A `ShuffleMode`, or its value as a string. Only read when shuffling.
        device: Where to put `X`, as a `torch.Tensor`. Needed by the GPU modes ("cpu" will do); if left out
            there, the current CUDA device is taken. Device work is done in the training process; with workers
            that takes `experiment_dataloader`.
        memory_budget: Bytes, or a string like "2GiB", for buffers, windows and what is read ahead, in each
            process that reads. It decides the window where `io_batch_size` is "auto". In the mode
            "gpu_iobatch" an IO batch is put together and permuted on the device, where it is held twice.
        mixing: Where `shuffle_chunk_size` is "auto": mean entropy of labels in a mini-batch as a share of a
            truly random one's, from 0.8 to 1, as predicted for data stored like the CELLxGENE Census. If
            None, no worse than with the defaults (about 0.96 for mini-batches of 1,024 rows).
        window_dir: Folder on a local disk where windows wait, in a file that is unlinked from the start. Rows
            come from there in parts, so that it is the CPU that permutes them, in every mode but
            "gpu_minibatch": the order is the same.
        window_budget: Bytes, or a string like "64GiB", that this file may take.
        snapshot: A `Snapshot`, or the path of one: the same mini-batches in the same order, read from local
            disk. If nothing is at the path the query is written there when it is first iterated. True for a
            folder of its own in the user's cache directory. A `Snapshot` that exists needs no query.
            "auto" is a true shuffle then, where memory holds the snapshot.
        shuffle_scope: "partition" deals the query to ranks and workers and shuffles each part by itself, like
            tiledbsoma-ml 0.1.0. "global" shuffles the chunks of the whole query and deals those, anew in
            every epoch: every rank sees all of the data, mini-batches do not depend on the number of workers,
            and an epoch can be resumed with other numbers of ranks and workers. IO batches consist of whole
            mini-batches then, and `io_batch_size` needs not be a multiple of `shuffle_chunk_size`.
        tail: What becomes of the rows that do not divide by the number of ranks, since every rank yields as
            many: "drop" leaves up to `world_size - 1` out, "pad" repeats as many instead.
        padding_column_name: Name of a column to add to `obs`: whether another rank yields the row as well,
            so that it should not be counted here. Needs `tail="pad"`.
        ranks: (rank, number of ranks), where these are not to be found out: (0, 1) reads everything here, on
            one rank of many or on each. Nothing is agreed on with other ranks then.
        source: A `Source` in place of a query: a `MemorySource` of what is in memory, or one of your own.

    Raises:
        ValueError: If a value breaks one of these rules, before any data is read. A budget that does not hold
            what "auto" needs is told when that is found out: see `plan`.
        TypeError: If a value has the wrong type.
    """

    batch_size: int
    device: torch.device | None
    io_batch_size: Size
    memory_budget: int
    mixing: float | None
    obs_column_names: list[str]
    padding_column_name: str | None
    ranks: tuple[int, int] | None
    return_sparse_X: bool
    seed: int | None
    shuffle: bool
    shuffle_chunk_size: Size
    shuffle_mode: ShuffleMode
    shuffle_scope: ShuffleScope
    tail: Tail
    use_eager_fetch: bool
    window_budget: int
    window_dir: Path | None

    def __init__(
        self,
        query: soma.ExperimentAxisQuery | None = None,
        layer_name: str | None = None,
        x_locator: XLocator | None = None,
        query_ids: QueryIDs | None = None,
        obs_column_names: Sequence[str] = DEFAULT_OBS_COLUMN_NAMES,
        batch_size: int = 1,
        io_batch_size: Size = DEFAULT_IO_BATCH_SIZE,
        shuffle: bool = True,
        shuffle_chunk_size: Size = DEFAULT_SHUFFLE_CHUNK_SIZE,
        seed: int | None = None,
        return_sparse_X: bool = False,
        use_eager_fetch: bool = True,
        shuffle_mode: ShuffleMode | str = ShuffleMode.CPU,
        device: torch.device | str | None = None,
        memory_budget: int | str = DEFAULT_MEMORY_BUDGET,
        mixing: float | None = None,
        window_dir: str | os.PathLike[str] | None = None,
        window_budget: int | str | None = None,
        snapshot: Snapshot | str | os.PathLike[str] | bool | None = None,
        shuffle_scope: ShuffleScope = "partition",
        tail: Tail = "drop",
        padding_column_name: str | None = None,
        ranks: tuple[int, int] | None = None,
        source: Source | None = None,
    ) -> None:
        options = Options.check(
            obs_column_names=obs_column_names,
            batch_size=batch_size,
            io_batch_size=io_batch_size,
            shuffle=shuffle,
            shuffle_chunk_size=shuffle_chunk_size,
            seed=seed,
            return_sparse_X=return_sparse_X,
            use_eager_fetch=use_eager_fetch,
            shuffle_mode=shuffle_mode,
            device=device,
            memory_budget=memory_budget,
            mixing=mixing,
            window_dir=window_dir,
            window_budget=window_budget,
            shuffle_scope=shuffle_scope,
            tail=tail,
            padding_column_name=padding_column_name,
            ranks=ranks,
        )
        has_snapshot = snapshot is not None and snapshot is not False
        self.not_in_use = options.not_in_use(has_snapshot=has_snapshot)
        for name, why in self.not_in_use.items():
            value = getattr(options, name)
            warnings.warn(f"{name}={value!r} changes nothing here: {why}; leave it out.", stacklevel=2)
        chosen, ids = choose_source(
            query,
            layer_name,
            x_locator,
            query_ids,
            source,
            snapshot,
            fields=options.fields,
            memory_bytes=options.memory_budget,
        )
        self.iterations = Iterations(chosen, ids, options)

    def __iter__(self) -> Iterator[MiniBatch]:
        """Yield the mini-batches of one epoch: those of this rank, and of this worker in a worker."""
        if torch.utils.data.get_worker_info() is not None:
            end_with_parent()
        return ClosedWhenDropped(self._epoch(self.iterations.asking()))

    def __len__(self) -> int:
        """Return the number of mini-batches of an epoch: those of this rank; in a worker, of this worker."""
        return self.iterations.n_mini_batches()

    # What it is -------------------------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """Where rows come from."""
        return self.iterations.source

    @property
    def query_ids(self) -> QueryIDs:
        """The rows and columns that are read."""
        return self.iterations.ids

    @property
    def options(self) -> Options:
        """All settings, checked and resolved; each of them is an attribute of the dataset as well."""
        return self.iterations.options

    @property
    def plan(self) -> Plan:
        """In which order rows come and what is read together, with what "auto" stands for.

        That is found out when it is first asked for; a snapshot that it depends on is made.
        """
        return self.iterations.plan

    @property
    def x_locator(self) -> XLocator | None:
        """Address of the layer; None if `X` is of no experiment, or a snapshot alone was given."""
        return self.source.locator

    @property
    def measurement_name(self) -> str | None:
        """Measurement that `X` is read from; None if `x_locator` is."""
        return None if self.x_locator is None else self.x_locator.measurement_name

    @property
    def layer_name(self) -> str | None:
        """Layer of `X`; None if `x_locator` is."""
        return None if self.x_locator is None else self.x_locator.layer_name

    @property
    def shape(self) -> tuple[int, int]:
        """Number of mini-batches, as `len` has it, and number of columns of `X`."""
        return len(self), len(self.query_ids.var_joinids)

    @property
    def rank(self) -> int:
        """Number of this process among those that train, as it is known now."""
        return self.iterations.ranks[0]

    @property
    def world_size(self) -> int:
        """Number of processes that train, as it is known now."""
        return self.iterations.ranks[1]

    def __getattr__(self, name: str) -> Any:
        """Return an option."""
        if name in _OPTIONS and "iterations" in self.__dict__:
            value = getattr(self.options, name)
            return list(value) if name == "obs_column_names" else value
        return object.__getattribute__(self, name)  # raises the error of a property that failed, too

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHANGEABLE:
            self.iterations.options = attrs.evolve(self.options, **{name: value})
        elif name in _OPTIONS or name in ("query_ids", "source", "x_locator"):
            raise AttributeError(
                f"{name} of a dataset cannot be changed, for its order was made with it; make another "
                f"dataset: ExperimentDataset(…, {name}={value!r})."
            )
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_OPTIONS})

    def __repr__(self) -> str:
        """Return what it yields and where that is, in a line; nothing is read for it, or written."""
        return as_line(type(self).__name__, described(self.iterations))

    def _repr_html_(self) -> str:
        """Return the same as a table, with the settings that are not in use."""
        return as_table(type(self).__name__, described(self.iterations), self.not_in_use)

    # Epochs -----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch in progress; between epochs the last one, or what `set_epoch` set."""
        return self.iterations.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` (0, 1, …) the next one to be iterated; later ones count on from there.

        Without this call epochs count by themselves.
        """
        self.iterations.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch stands: after the last mini-batch that was yielded, whatever was read ahead.

        That of the iterator that began last, of this dataset or of an `experiment_dataloader` of it. A new
        dictionary of a few numbers and strings, the same on every rank.

        Raises:
            RuntimeError: If workers of another loader make the mini-batches, so that only they know.
        """
        return self.iterations.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state says: the next iterator begins with the mini-batch after its last.

        The rows before it are not read. An iterator that is left after its first mini-batch does not use the
        state up. Numbers of ranks and workers other than those of the state need `shuffle_scope="global"`.

        Raises:
            ValueError: If the state is that of another query, seed, batch size or order, or out of range.
            TypeError: If it is no state.
        """
        self.iterations.load_state_dict(state)

    # Others -----------------------------------------------------------------------------------------------

    def over(self, query_ids: QueryIDs) -> ExperimentDataset:
        """Return a dataset with these options over other rows of the same query, with epochs of its own.

        Raises:
            ValueError: If they have other columns.
        """
        if not isinstance(query_ids, QueryIDs):
            raise TypeError(
                f"query_ids must be QueryIDs, not of type {type(query_ids).__name__}; try "
                "QueryIDs(obs_joinids=…, var_joinids=dataset.query_ids.var_joinids)."
            )
        check_whole(query_ids)
        if not np.array_equal(query_ids.var_joinids, self.query_ids.var_joinids):
            raise ValueError(
                "query_ids must have the columns of the dataset, in their order; make another "
                "ExperimentDataset for others."
            )
        dataset = copy.copy(self)
        dataset.iterations = self.iterations.over(query_ids)
        return dataset

    def random_split(
        self,
        *fracs: float,
        seed: int | None = None,
        method: SamplingMethod = "stochastic_rounding",
    ) -> tuple[ExperimentDataset, ...]:
        """Return datasets with these options over disjoint random parts of the rows; each can be split again.

        See `QueryIDs.random_split` for the arguments.
        """
        parts = self.query_ids.random_split(*fracs, seed=seed, method=method)
        return tuple(self.over(part) for part in parts)

    def shuffle_quality(self, column: str, n_batches: int = 256) -> ShuffleQuality:
        """Return how well mini-batches mix the labels of a column of `obs`.

        `X` is not read, but for a sample where a size is "auto".

        Args:
            column: For instance "dataset_id", whose cells are stored one after the other in the Census.
            n_batches: How many mini-batches to look at, spread evenly over this rank's part of an epoch.
                Workers mix worse, because each has a part of it only.

        Raises:
            ValueError: If the column does not exist, or `n_batches` is not positive.
        """
        n_batches = check_count("n_batches", n_batches, suggestion=256)
        # A device that permutes gives the order that is planned for the CPU.
        plan = attrs.evolve(self.plan, permutes=self.plan.shuffle_chunk_size is not None)
        planned = plan.of(self.iterations.part(self.epoch, self.iterations.place()))
        rows = np.unique(planned.obs_joinids)
        labels = self.source.obs(rows, [column])[column]
        return quality_of(planned, rows, labels, self.source.row_tile, n_batches)

    def __copy__(self) -> ExperimentDataset:
        """Return a dataset with these rows and options, and with epochs and a position of its own."""
        dataset = type(self).__new__(type(self))
        dataset.__dict__ |= self.__dict__ | {"iterations": copy.copy(self.iterations)}
        return dataset

    # The flow ---------------------------------------------------------------------------------------------

    def _epoch(self, progress: Progress) -> Generator[MiniBatch, None, None]:
        part, run = self.iterations.begin(progress)
        try:
            planned, leaves_device_work = self.plan.of(part), self._leaves_device_work_to_loader
            reader = self.source.open(planned, self.options.fields, self.iterations.budget)
            if leaves_device_work:
                yield from self._pieces_of_worker(planned, reader)  # type: ignore[misc]
                return
            mini_batches = self._mini_batches(planned, reader)
            # Whoever leaves closes a reader that reads ahead first: then nobody waits for rows any longer.
            reads_ahead = nullcontext() if isinstance(reader, RandomAccess) else closing(reader)
            with closing(reader), closing(mini_batches), reads_ahead:
                for mini_batch in mini_batches:
                    run.advance()
                    yield mini_batch
            run.end()
        finally:
            run.is_over = True

    def _mini_batches(self, planned: PartPlan, reader: Reader) -> Generator[MiniBatch, None, None]:
        if self.device is None and isinstance(reader, RandomAccess):
            yield from random_access_mini_batches(
                planned.batches(),
                reader,
                batch_size=self.batch_size,
                is_sparse=self.return_sparse_X,
                padding=self._padding(planned),
                use_eager_fetch=self.use_eager_fetch,
            )
            return
        with closing(self._pieces(planned, reader)) as pieces:
            yield from self.assembly(planned, self.use_eager_fetch).mini_batches(pieces)

    def _pieces(self, planned: PartPlan, reader: Reader) -> Generator[Piece, None, None]:
        return read_ahead(planned.batches(), reader, use_eager_fetch=self.use_eager_fetch)

    def _pieces_of_worker(
        self, planned: PartPlan, reader: Reader
    ) -> Generator[tuple[int, Piece], None, None]:
        """Yield what the training process makes mini-batches of, with the number of this worker."""
        worker, _ = get_worker_id_and_num()
        with closing(self._pieces(planned, reader)) as pieces:
            yield from ((worker, piece) for piece in pieces)

    def assembly(self, planned: PartPlan, use_eager_fetch: bool) -> Assembly:
        """Return how the mini-batches of a part of an epoch are made of its rows."""
        return Assembly(
            batch_size=self.batch_size,
            is_sparse=self.return_sparse_X,
            device=self.device,
            shuffle=self._device_shuffle(planned),
            padding=self._padding(planned),
            use_eager_fetch=use_eager_fetch,
        )

    def _device_shuffle(self, planned: PartPlan) -> DeviceShuffle | None:
        of_mini_batches = self.shuffle_mode is ShuffleMode.GPU_MINIBATCH
        of_io_batches = self.shuffle_mode is ShuffleMode.GPU_IOBATCH and not planned.permutes
        if not self.shuffle or not (of_mini_batches or of_io_batches):
            return None
        return DeviceShuffle(
            unit="mini_batch" if of_mini_batches else "io_batch",
            seed=planned.part.seed,
            epoch=planned.part.epoch,
            n_earlier=planned.first_mini_batch,
        )

    def _padding(self, planned: PartPlan) -> Padding:
        name = self.padding_column_name
        found = planned.padding() if name is not None else planned.ids.obs_joinids[:0]
        return Padding(column_name=name, obs_joinids=found)

    @property
    def _leaves_device_work_to_loader(self) -> bool:
        if self.device is None or torch.utils.data.get_worker_info() is None:
            return False
        if not self.iterations.is_told:
            raise RuntimeError(
                f"device={str(self.device)!r} with workers must be loaded by `experiment_dataloader`, which "
                "does the device work in the training process; use it in place of `DataLoader`."
            )
        return True
