"""`ExperimentDataset`: a query as an iterable of shuffled mini-batches."""

from __future__ import annotations

import copy
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import attrs
import tiledbsoma as soma
import torch

from tiledbsoma_ml._common import MiniBatch, check_count
from tiledbsoma_ml._dataset.choose_source import check_snapshot, choose_source
from tiledbsoma_ml._dataset.facts import Facts
from tiledbsoma_ml._dataset.iterations import Iterations
from tiledbsoma_ml._dataset.mini_batches import leaves_device_work_to_loader, mini_batches, pieces_of_worker
from tiledbsoma_ml._dataset.options import (
    DEFAULT_IO_BATCH_SIZE,
    DEFAULT_MEMORY_BUDGET,
    DEFAULT_OBS_COLUMN_NAMES,
    DEFAULT_SHUFFLE_CHUNK_SIZE,
    Options,
    ShuffleMode,
    warn_of_not_in_use,
)
from tiledbsoma_ml._epoch.progress import Progress
from tiledbsoma_ml._order.quality import ShuffleQuality, quality_of
from tiledbsoma_ml._order.share import ShuffleScope
from tiledbsoma_ml._order.sizes import Size
from tiledbsoma_ml._query_ids import Partition, QueryIDs, SamplingMethod, Tail, check_other_rows
from tiledbsoma_ml._source import Source
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


class ExperimentDataset(Facts, torch.utils.data.IterableDataset[MiniBatch]):
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
        io_batch_size: Rows shuffled among each other: the shuffle window. A multiple of `shuffle_chunk_size`,
            or "auto": as many as `memory_budget` or `window_budget` holds, from the non-zeros that rows of
            this query have. What is read at once follows the budget, and changes no order.
        shuffle: Whether to shuffle; rows come in the order of the query otherwise.
        shuffle_chunk_size: Neighbouring rows that stay together until a window is read. Smaller means better
            mixed, larger means faster. "auto" follows the row tiles of the layer as it is stored: whole tiles
            where a window of one process holds the query, so that none is decoded twice in an epoch, else the
            longest runs within tiles that reach `mixing`.
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
            None, no worse than with the defaults (about 0.96 for mini-batches of 1,024 rows). In the scope
            "partition", a share of that of the rows of a rank and worker alone.
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
        snapshot = check_snapshot(snapshot)
        self.not_in_use = warn_of_not_in_use(options, has_snapshot=snapshot is not None)
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
        return ClosedWhenDropped(self._epoch(self.iterations.progress_of_caller))

    def __len__(self) -> int:
        """Return the number of mini-batches of an epoch: those of this rank; in a worker, of this worker."""
        return self.iterations.n_mini_batches()

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
        check_other_rows(query_ids, self.query_ids)
        dataset = copy.copy(self)
        dataset.iterations = self.iterations.over(query_ids)
        return dataset

    def with_batch_size(self, batch_size: int) -> ExperimentDataset:
        """Return a dataset with these rows and all other options, with epochs of its own.

        What "auto" stands for is found out anew, for these rows.
        """
        batch_size = check_count("batch_size", batch_size, suggestion=128)
        dataset = copy.copy(self)
        options = attrs.evolve(self.options, batch_size=batch_size)
        dataset.iterations = Iterations(self.source, self.query_ids, options)
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

    def shuffle_quality(self, column: str, n_batches: int = 256, num_workers: int = 0) -> ShuffleQuality:
        """Return how well the mini-batches of this rank, and those of all ranks together, mix labels.

        `X` is not read, but for a sample where a size is "auto".

        Args:
            column: The column of `obs` with the labels, for instance "dataset_id", whose cells are stored one
                after the other in the Census.
            n_batches: How many mini-batches to look at, spread evenly over an epoch.
            num_workers: Workers of each rank. They matter in the scope "partition", where each has a part of
                the rows only.

        Raises:
            ValueError: If the column does not exist, or a number is out of range.
        """
        n_batches = check_count("n_batches", n_batches, suggestion=256)
        n_workers = max(1, check_count("num_workers", num_workers, suggestion=0, minimum=0))
        # A device that permutes gives the order that is planned for the CPU.
        plan = attrs.evolve(self.plan, permutes=self.plan.shuffle_chunk_size is not None)
        partition = Partition(*self.iterations.ranks, 0, n_workers)
        planned = plan.of(self.iterations.part(self.epoch, partition))
        labels = self.source.obs(self.query_ids.obs_joinids, [column])[column]
        return quality_of(planned, labels, row_tile=self.source.row_tile, n_batches=n_batches)

    def __copy__(self) -> ExperimentDataset:
        """Return a dataset with these rows and options, and with epochs and a position of its own."""
        dataset = type(self).__new__(type(self))
        dataset.__dict__ |= self.__dict__ | {"iterations": copy.copy(self.iterations)}
        return dataset

    # The flow ---------------------------------------------------------------------------------------------

    def _epoch(self, progress: Progress) -> Generator[Any, None, None]:
        part, iteration = self.iterations.begin(progress)
        try:
            planned, options = self.plan.of(part), self.options
            leaves_device_work = leaves_device_work_to_loader(options, is_told=self.iterations.is_told)
            reader = self.source.open(planned, options.fields, self.iterations.budget)
            if leaves_device_work:
                yield from pieces_of_worker(planned, reader, options)
                return
            with closing(mini_batches(planned, reader, options)) as made:
                for mini_batch in made:
                    iteration.advance()
                    yield mini_batch
            iteration.end()
        finally:
            iteration.is_over = True
