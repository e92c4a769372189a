"""`ExperimentDataset`: a query as an iterable of shuffled mini-batches."""

from __future__ import annotations

import copy
import multiprocessing.context
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, get_args

import attrs
import numpy as np
import tiledbsoma as soma
import torch

from tiledbsoma_ml._agreement import agreed_seed, check_seed_of_all, log_parts
from tiledbsoma_ml._assemble import Assembly, DeviceShuffle
from tiledbsoma_ml._auto import log_sizes, with_layout
from tiledbsoma_ml._budget import Budget, parse_bytes
from tiledbsoma_ml._choose_source import choose_source
from tiledbsoma_ml._common import MiniBatch, check_choice, check_count, check_distinct
from tiledbsoma_ml._distributed import (
    dealt_again_by,
    get_distributed_rank_and_world_size,
    get_worker_id_and_num,
)
from tiledbsoma_ml._options import (
    ShuffleMode,
    check_mixing,
    check_multiple,
    check_padding,
    check_ranks,
    check_seed,
    check_size,
    check_window_dir,
    choose_device,
)
from tiledbsoma_ml._order.plan import EpochPart, PartPlan, Plan
from tiledbsoma_ml._order.quality import ShuffleQuality, quality_of
from tiledbsoma_ml._order.share import Deal, ShuffleScope, Stage
from tiledbsoma_ml._order.sizes import Size
from tiledbsoma_ml._progress import Epochs, Loaded, Progress, Run, Told
from tiledbsoma_ml._query_ids import Partition, QueryIDs, SamplingMethod, Tail
from tiledbsoma_ml._random_access import random_access_mini_batches
from tiledbsoma_ml._read_ahead import Piece, read_ahead
from tiledbsoma_ml._rows import Padding
from tiledbsoma_ml._shared_ids import SharedQueryIDs
from tiledbsoma_ml._source import Fields, RandomAccess, Reader, Source
from tiledbsoma_ml._state import Position
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

DEFAULT_OBS_COLUMN_NAMES: Sequence[str] = ("soma_joinid",)
DEFAULT_SHUFFLE_CHUNK_SIZE = 64
DEFAULT_IO_BATCH_SIZE = 65536
DEFAULT_MEMORY_BUDGET = "2GiB"

# What the order of rows, or what is read, was decided by when the dataset was built.
_FIXED = {
    "batch_size",
    "device",
    "io_batch_size",
    "obs_column_names",
    "padding_column_name",
    "query_ids",
    "seed",
    "shuffle",
    "shuffle_chunk_size",
    "shuffle_mode",
    "shuffle_scope",
    "tail",
    "x_locator",
}


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
            "gpu_iobatch" an IO batch is put together before it goes to the device, and takes more.
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
        ValueError: If a value breaks one of these rules, before any data is read.
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
        self.batch_size = check_count("batch_size", batch_size, suggestion=128)
        self.io_batch_size = check_size("io_batch_size", io_batch_size, DEFAULT_IO_BATCH_SIZE)
        self.shuffle_chunk_size = check_size(
            "shuffle_chunk_size", shuffle_chunk_size, DEFAULT_SHUFFLE_CHUNK_SIZE
        )
        self.shuffle = shuffle
        self.shuffle_mode = ShuffleMode(shuffle_mode)
        self.device = choose_device(self.shuffle_mode, device) if shuffle or device is not None else None
        self.seed = check_seed(seed)
        self.return_sparse_X = return_sparse_X
        self.use_eager_fetch = use_eager_fetch
        self.shuffle_scope = check_choice("shuffle_scope", shuffle_scope, get_args(ShuffleScope))
        self.tail = check_choice("tail", tail, get_args(Tail))
        self.padding_column_name = check_padding(padding_column_name, tail, obs_column_names)
        self.ranks = check_ranks(ranks)
        if self._shuffles_chunks and shuffle_scope == "partition":
            check_multiple(self.io_batch_size, self.shuffle_chunk_size)
        folder, window_bytes = check_window_dir(window_dir, window_budget)
        self._fields = Fields(obs_column_names=obs_column_names)
        self.obs_column_names = list(obs_column_names)
        memory_bytes = parse_bytes("memory_budget", memory_budget)
        self.source, self.query_ids = choose_source(
            query,
            layer_name,
            x_locator,
            query_ids,
            source,
            snapshot,
            fields=self._fields,
            memory_bytes=memory_bytes,
        )
        self.x_locator = self.source.locator
        n_vars = len(self.query_ids.var_joinids)
        self.budget = Budget(
            memory_bytes,
            mini_batch_bytes=0 if return_sparse_X else 3 * self.batch_size * n_vars * 4,
            window_dir=folder,
            window_budget=window_bytes,
            use_eager_fetch=use_eager_fetch,
        )
        in_memory = self.shuffle_mode is ShuffleMode.CPU or (
            self.shuffle_mode is ShuffleMode.GPU_IOBATCH and folder is not None
        )
        self._asked = Plan(
            shuffle_chunk_size=self.shuffle_chunk_size if self._shuffles_chunks else None,
            io_batch_size=self.io_batch_size,
            batch_size=self.batch_size,
            permutes=shuffle and in_memory,
            mixing=check_mixing(mixing),
            scope=self.shuffle_scope,
            tail=self.tail,
        )
        self._plan: Plan | None = None
        self._drawn_seed = (
            np.random.SeedSequence().generate_state(1).item() if self.seed is None else self.seed
        )
        self._epochs = Epochs()
        self._told: Told | None = None
        self._shared_ids: SharedQueryIDs | None = None
        self._fingerprint: str | None = None
        self._content: Mapping[str, str] | None = None
        self._is_first = True
        self._dealer: str | None = None
        if snapshot is None or snapshot is False:  # else this would make it
            log_sizes(self.plan, self.source, self.query_ids)

    def __iter__(self) -> Iterator[MiniBatch]:
        """Yield the mini-batches of one epoch: those of this rank, and of this worker in a worker."""
        if torch.utils.data.get_worker_info() is not None:
            end_with_parent()
        return ClosedWhenDropped(self._iterate(self._epochs.iterating()))

    def __repr__(self) -> str:
        """Return what it yields and where that is, in a line; nothing is read for it, or written."""
        n_rows, n_cols = len(self.query_ids.obs_joinids), len(self.query_ids.var_joinids)
        place = "" if self.x_locator is None else f" of {self.x_locator.uri!r}"
        options = f"batch_size={self.batch_size}, seed={self.seed}"
        return f"<{type(self).__name__}: {n_rows:,} rows by {n_cols:,} columns{place}; {options}>"

    def __len__(self) -> int:
        """Return the number of mini-batches of an epoch: those of this rank; in a worker, of this worker."""
        return self._deal().n_mini_batches(self._place())

    @property
    def shape(self) -> tuple[int, int]:
        """Number of mini-batches, as `len` has it, and number of columns of `X`."""
        return len(self), len(self.query_ids.var_joinids)

    @property
    def plan(self) -> Plan:
        """In which order rows come and what is read together, with what "auto" stands for.

        That is found out when it is first asked for; a snapshot that it depends on is made.
        """
        if self._plan is None:
            self._plan = with_layout(self._asked, self.source, self.query_ids, self.budget)
        return self._plan

    @property
    def rank(self) -> int:
        """Number of this process among those that train, as it is known now."""
        return self._ranks()[0]

    @property
    def world_size(self) -> int:
        """Number of processes that train, as it is known now."""
        return self._ranks()[1]

    @property
    def measurement_name(self) -> str | None:
        """Measurement that `X` is read from; None if a snapshot alone was given."""
        return None if self.x_locator is None else self.x_locator.measurement_name

    @property
    def layer_name(self) -> str | None:
        """Layer of `X`; None if a snapshot alone was given."""
        return None if self.x_locator is None else self.x_locator.layer_name

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"{name} of a dataset cannot be changed, for its order was made with it; make another "
                f"dataset: ExperimentDataset(…, {name}={value!r})."
            )
        super().__setattr__(name, value)

    @property
    def epoch(self) -> int:
        """The epoch in progress; between epochs the last one, or what `set_epoch` set."""
        return self._epochs.counter.current

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` (0, 1, …) the next one to be iterated; later ones count on from there.

        Without this call epochs count by themselves.
        """
        self._epochs.counter.set(check_count("epoch", epoch, suggestion=0, minimum=0))

    # Resuming ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch stands: after the last mini-batch that was yielded, whatever was read ahead.

        That of the iterator that began last, of this dataset or of an `experiment_dataloader` of it. A new
        dictionary of a few numbers and strings, the same on every rank.

        Raises:
            RuntimeError: If workers of another loader make the mini-batches, so that only they know.
        """
        if torch.utils.data.get_worker_info() is None and self._epochs.counter.is_ahead_in_workers:
            raise RuntimeError(
                "state_dict() must be that of the loader where workers make the mini-batches, which only "
                "they count; take experiment_dataloader or StatefulDataLoader, and state_dict() of it."
            )
        return self._epochs.latest.position.to_dict(self._identity)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state says: the next iterator begins with the mini-batch after its last.

        The rows before it are not read. An iterator that is left after its first mini-batch does not use the
        state up. Numbers of ranks and workers other than those of the state need `shuffle_scope="global"`.

        Raises:
            ValueError: If the state is that of another query, seed, batch size or order, or out of range.
            TypeError: If it is no state.
        """
        self._load(state, self._epochs.own)

    def _load(self, state: Mapping[str, Any], progress: Progress) -> None:
        identity = self._identity
        if self.seed is None and isinstance(state, Mapping) and "seed" in state:
            identity["seed"] = check_count("seed", state["seed"], suggestion=42, minimum=0)
        position = Position.from_dict(state, identity)
        self._drawn_seed = identity["seed"]
        progress.load(position)

    @property
    def _identity(self) -> dict[str, Any]:
        """What a state must agree about with the dataset that continues it."""
        if self._fingerprint is None:
            self._fingerprint = self.query_ids.fingerprint
        return {
            "query": self._fingerprint,
            "n_obs": len(self.query_ids.obs_joinids),
            "n_vars": len(self.query_ids.var_joinids),
            "seed": self._drawn_seed,
            "batch_size": self.batch_size,
            "shuffle": bool(self.shuffle),
            "shuffle_mode": str(self.shuffle_mode)
            if self.shuffle_mode is ShuffleMode.GPU_MINIBATCH
            else "cpu",
            "shuffle_chunk_size": self.shuffle_chunk_size,
            "io_batch_size": self.io_batch_size,
            "shuffle_scope": self.shuffle_scope,
            "tail": self.tail,
            "auto": self.plan.order_key,
        }

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
        return tuple(self._over(part) for part in parts)

    def shuffle_quality(self, column: str, n_batches: int = 256) -> ShuffleQuality:
        """Return how well mini-batches mix the labels of a column of `obs`, without reading `X`.

        Args:
            column: For instance "dataset_id", whose cells are stored one after the other in the Census.
            n_batches: How many mini-batches to look at, spread evenly over this rank's part of an epoch.
                Workers mix worse, because each has a part of it only.

        Raises:
            ValueError: If the column does not exist, or `n_batches` is not positive.
        """
        n_batches = check_count("n_batches", n_batches, suggestion=256)
        # Order matters here, not where it is made.
        plan = attrs.evolve(self.plan, permutes=self.plan.shuffle_chunk_size is not None)
        planned = plan.of(self._part(self.epoch, self._place()))
        rows = np.unique(planned.obs_joinids)
        labels = self.source.obs(rows, check_distinct("column", [column]))[column]
        return quality_of(planned, rows, labels, self.source.row_tile, n_batches)

    def _over(self, query_ids: QueryIDs) -> ExperimentDataset:
        dataset = copy.copy(self)
        dataset.__dict__["query_ids"] = query_ids
        dataset._epochs = Epochs()
        dataset._shared_ids = dataset._fingerprint = None
        dataset._is_first = True
        return dataset

    def _repeating(self) -> ExperimentDataset:
        """Return a dataset of the same rows, in which every epoch is the first one again."""
        dataset = self._over(self.query_ids)
        dataset._epochs.counter.step = 0
        return dataset

    def __copy__(self) -> ExperimentDataset:
        """Return a dataset with these rows and options, and with epochs and a position of its own."""
        dataset = type(self).__new__(type(self))
        dataset.__dict__ |= self.__dict__
        dataset._epochs = copy.deepcopy(self._epochs)
        return dataset

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if multiprocessing.context.get_spawning_popen() is not None:  # for a worker on this machine
            self._shared_ids = self._shared_ids or SharedQueryIDs.of(self.query_ids)
            state["query_ids"] = self._shared_ids
            state["_dealer"] = dealt_again_by()
        state["_shared_ids"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if isinstance(ids := state["query_ids"], SharedQueryIDs):
            self.__dict__["query_ids"] = ids.query_ids()

    # The flow ---------------------------------------------------------------------------------------------

    def _iterate(self, progress: Progress) -> Generator[MiniBatch, None, None]:
        part, run = self._begin(progress)
        try:
            planned = self.plan.of(part)
            reader = self.source.open(planned, self._fields, self.budget)
            if self._leaves_device_work_to_loader:
                worker, _ = get_worker_id_and_num()
                with closing(self._pieces(planned, reader)) as pieces:
                    yield from ((worker, piece) for piece in pieces)  # type: ignore[misc]
                return
            mini_batches = self._mini_batches(planned, reader)
            # Whoever leaves closes the reader first: then nobody waits for rows that are still being read.
            with closing(mini_batches), closing(reader):
                for mini_batch in mini_batches:
                    run.advance()
                    yield mini_batch
            run.end()
        finally:
            run.is_over = True

    def _begin(self, progress: Progress) -> tuple[EpochPart, Run]:
        """Begin an epoch, or go on with one that a state told of; return what of it is to be yielded here."""
        place, in_worker = self._place(), torch.utils.data.get_worker_info() is not None
        if self._told is not None and in_worker:
            part = self._continued(self._told.begin(), place)
            return part, Run(start=Position(epoch=part.epoch), total=0, waits=True)
        self._check_dealt_once()
        epoch, loaded = progress.upcoming()
        begin = Position(epoch=epoch) if loaded is None else loaded.position
        if not in_worker:
            self._agree(0, begin)
        elif self.shuffle:
            check_seed_of_all(self.seed, scope=self.shuffle_scope, world_size=place.world_size)
        part = self._continued(begin, place)
        start = Position(
            epoch=epoch,
            world_size=place.world_size,
            num_workers=place.n_workers if in_worker else 0,
            worker_id=part.place.worker_id if in_worker else None,
            n_yielded=part.skip,
            earlier=part.earlier,
        )
        n = self._deal(part.earlier).n_mini_batches(part.place)
        return part, progress.begin(Run(start=start, total=n, loaded=loaded, waits=in_worker))

    def _part(self, epoch: int, place: Partition) -> EpochPart:
        return EpochPart(ids=self.query_ids, place=place, seed=self._drawn_seed, epoch=epoch)

    def _continued(self, begin: Position, place: Partition) -> EpochPart:
        """Return the part of a place, from a position on."""
        return begin.rest_of(self._part(begin.epoch, place), self.shuffle_scope)

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
            yield from self._assembly(planned, self.use_eager_fetch).mini_batches(pieces)

    def _pieces(self, planned: PartPlan, reader: Reader) -> Generator[Piece, None, None]:
        return read_ahead(planned.batches(), reader, use_eager_fetch=self.use_eager_fetch)

    def _assembly(self, planned: PartPlan, use_eager_fetch: bool) -> Assembly:
        """Return how the mini-batches of a part are made of its rows."""
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
    def _shuffles_chunks(self) -> bool:
        return self.shuffle and self.shuffle_mode is not ShuffleMode.GPU_MINIBATCH

    # Who does what ----------------------------------------------------------------------------------------

    def _deal(self, earlier: tuple[Stage, ...] = ()) -> Deal:
        """Return how rows are dealt, where others have yielded some of them."""
        return Deal(
            n_rows=len(self.query_ids.obs_joinids),
            batch_size=self.batch_size,
            tail=self.tail,
            scope=self.shuffle_scope,
            earlier=earlier,
        )

    def _place(self) -> Partition:
        return Partition(*self._ranks(), *get_worker_id_and_num())

    def _ranks(self) -> tuple[int, int]:
        """Return this rank and the number of ranks: as told, or as found now."""
        return (
            (self._told.ranks if self._told is not None else None)
            or self.ranks
            or get_distributed_rank_and_world_size()
        )

    def _n_mini_batches(self, num_workers: int) -> int:
        """Return how many mini-batches an epoch of this rank has, with so many workers."""
        return self._run_of_workers(Position(epoch=self.epoch), num_workers).total

    def _parts_of_workers(self, begin: Position, num_workers: int) -> list[EpochPart]:
        ranks, n = self._ranks(), max(num_workers, 1)
        return [self._continued(begin, Partition(*ranks, worker, n)) for worker in range(n)]

    def _run_of_workers(self, begin: Position, num_workers: int, loaded: Loaded | None = None) -> Run:
        """Return the run of a rank with workers, from where it begins."""
        parts = self._parts_of_workers(begin, num_workers)
        start = Position(
            epoch=begin.epoch,
            world_size=parts[0].place.world_size,
            num_workers=num_workers,
            n_yielded=sum(part.skip for part in parts),
            earlier=parts[0].earlier,
        )
        total = self._deal(start.earlier).n_mini_batches_of_rank(start.world_size, len(parts))
        return Run(start=start, total=total, loaded=loaded)

    def _check_dealt_once(self) -> None:
        """Raise a ValueError where Accelerate would deal to ranks what is dealt to them here."""
        dealer = dealt_again_by() or self._dealer
        if dealer is not None and self.ranks is None and self._ranks()[1] > 1:
            raise ValueError(
                f"Accelerate's prepare deals to all {self._ranks()[1]} ranks what ExperimentDataset deals to "
                "them already, so that most rows were lost; make the dataset with ranks=(0, 1), or do not "
                "prepare its loader."
            )
        if dealer == "IterableDatasetShard" and self.shuffle and self.seed is None:
            raise ValueError(
                "seed=None must be a number where each rank takes its share of one order, as Accelerate's "
                "dispatch_batches=False has it; try seed=42."
            )

    def _agree(self, num_workers: int, begin: Position) -> None:
        """Make sure that all ranks can iterate, and that they iterate the same."""
        _, world_size = self._ranks()
        n_rows = len(self.query_ids.obs_joinids)
        if self.tail == "drop" and 0 < n_rows < world_size:
            raise ValueError(
                f"{world_size} ranks must each get a row, but the query has {n_rows}; use fewer ranks, or "
                "tail='pad'."
            )
        if world_size > 1:
            self._drawn_seed = agreed_seed(
                partial(self._shared_by_ranks, begin, max(num_workers, 1)),
                self.seed if self.shuffle else 0,  # where nothing is shuffled, any will do
                drawn_seed=self._drawn_seed,
                scope=self.shuffle_scope,
                world_size=world_size,
                are_told=self.ranks is not None,
                is_first=self._is_first,
            )
        if self.shuffle and self.shuffle_scope == "partition" and self._is_first:
            log_parts(world_size, max(num_workers, 1))
        self._is_first = False

    def _shared_by_ranks(self, begin: Position, n_workers: int) -> dict[str, Any]:
        """Return what must be the same on all ranks at the start of an epoch, but for the seed."""
        if self._content is None:
            self._content = self.source.content
        # At the start of an epoch it is of no account who took part in the one before.
        begin = begin if begin.n_yielded or begin.earlier else Position(epoch=begin.epoch)
        place = {"epoch": begin.epoch, "n_yielded": begin.n_yielded}  # what is told first where ranks differ
        state = {**place, **begin.to_dict({**self._identity, **self._content})}
        del state["seed"]
        # Each worker's last mini-batch may be smaller there, so that their number counts.
        return state | ({"workers": n_workers} if self.shuffle_scope == "partition" else {})

    @property
    def _leaves_device_work_to_loader(self) -> bool:
        if self.device is None or torch.utils.data.get_worker_info() is None:
            return False
        if self._told is None:
            raise RuntimeError(
                f"device={str(self.device)!r} with workers must be loaded by `experiment_dataloader`, which "
                "does the device work in the training process; use it in place of `DataLoader`."
            )
        return True

    @contextmanager
    def _handed_to_workers(self, progress: Progress, num_workers: int) -> Iterator[tuple[Position, Run]]:
        """Begin an epoch that workers will iterate: copies made inside know rank, epoch and state.

        Yields:
            Where the epoch begins, and the run of it.
        """
        self._check_dealt_once()
        epoch, loaded = progress.upcoming()
        begin = Position(epoch=epoch) if loaded is None else loaded.position
        self._agree(num_workers, begin)
        self.source.prepare()
        run = progress.begin(self._run_of_workers(begin, num_workers, loaded))
        self._told = Told(self._ranks(), begin, progress.tell(epoch))
        try:
            yield begin, run
        finally:
            self._told = None
