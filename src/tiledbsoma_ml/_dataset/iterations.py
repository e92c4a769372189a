"""`Iterations`: begins epochs of a dataset, for the dataset itself, its loaders and data modules.

It knows which epoch comes next, how many mini-batches it has, which rows each rank and worker yields, and
where an epoch continues after a resume. The state that changes while rows are yielded is not here: see
`_epoch/progress.py`, where an `Iteration` is the state of one iterator, `Progress` that of one loader, and
`Epochs` that of the dataset.
"""

from __future__ import annotations

import copy
import multiprocessing.context
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import check_count
from tiledbsoma_ml._dataset.auto import LazyPlan, held_layout
from tiledbsoma_ml._dataset.log import is_log_read, log_order
from tiledbsoma_ml._dataset.options import Options
from tiledbsoma_ml._distributed import (
    dealt_again_by,
    get_distributed_rank_and_world_size,
    get_worker_id_and_num,
)
from tiledbsoma_ml._epoch.agreement import (
    agreed_seed,
    check_a_row_each,
    check_dealt_once,
    check_seed_of_all,
)
from tiledbsoma_ml._epoch.position import Position
from tiledbsoma_ml._epoch.progress import Epochs, Iteration, LoadedPosition, Progress, WorkerStart
from tiledbsoma_ml._epoch.shared_ids import SharedQueryIDs
from tiledbsoma_ml._order.plan import EpochPart, Plan
from tiledbsoma_ml._order.share import Deal, Stage
from tiledbsoma_ml._query_ids import Partition, QueryIDs
from tiledbsoma_ml._source import Source


class Iterations:
    """The facts by which a dataset begins epochs, and the methods that begin them.

    Attributes:
        source: The source of the rows.
        ids: The rows and columns that are read.
        options: The settings of the dataset.
    """

    def __init__(self, source: Source, ids: QueryIDs, options: Options) -> None:
        self.source, self.ids, self.options = source, ids, options
        self._plan = LazyPlan(options.plan, source, ids, self.budget)
        seed = options.seed
        self._seed = np.random.SeedSequence().generate_state(1).item() if seed is None else seed
        self._epochs = Epochs()
        self._worker_start: WorkerStart | None = None
        self._shared_ids: SharedQueryIDs | None = None
        self._fingerprint: str | None = None
        self._content: Mapping[str, str] | None = None
        self._is_first = True
        self._dealer: str | None = None

    @property
    def budget(self) -> Budget:
        """The memory that reading may take."""
        return self.options.budget(len(self.ids.var_joinids))

    @property
    def plan(self) -> Plan:
        """The order of rows, found out when it is first asked for; a snapshot that it needs is made."""
        return self._plan.get()

    @property
    def has_plan(self) -> bool:
        """Whether it is known what "auto" stands for, or nothing is "auto"."""
        return self._plan.is_known

    def n_rows_held(self) -> int:
        """Return how many rows of the query memory holds at once, as a sample tells."""
        layout = self.plan.layout or held_layout(self.source, self.ids, self.budget)
        assert layout.window_rows is not None
        return max(1, min(layout.window_rows, len(self.ids.obs_joinids)))

    def over(self, ids: QueryIDs) -> Iterations:
        """Return epochs of their own over other rows of the source, in the same plan."""
        iterations = copy.copy(self)
        iterations.ids = ids
        iterations._epochs = Epochs()
        iterations._shared_ids = iterations._fingerprint = None
        iterations._is_first = True
        return iterations

    def __copy__(self) -> Iterations:
        iterations = type(self).__new__(type(self))
        iterations.__dict__ |= self.__dict__ | {"_epochs": copy.deepcopy(self._epochs)}
        return iterations

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"source": self.source.of_rows(self.ids)}
        if multiprocessing.context.get_spawning_popen() is not None:  # for a worker on this machine
            self._shared_ids = self._shared_ids or SharedQueryIDs.of(self.ids)
            self._plan.get()  # so that workers need not find it out
            no_rows = attrs.evolve(self.ids, obs_joinids=self.ids.obs_joinids[:0])
            state |= {"ids": self._shared_ids, "source": self.source.of_rows(no_rows)}
            state["_dealer"] = dealt_again_by()
        return state | {"_shared_ids": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if isinstance(ids := state["ids"], SharedQueryIDs):
            self.ids = ids.query_ids()
            self.source = self.source.of_rows(self.ids)

    # Which epoch ------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch in progress; between epochs the last one, or what was set."""
        return self._epochs.counter.current

    @property
    def upcoming_epoch(self) -> int:
        """The epoch that begins next."""
        return self._epochs.counter.upcoming

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the one that begins next."""
        self._epochs.counter.set(check_count("epoch", epoch, suggestion=0, minimum=0))

    def repeat(self) -> None:
        """Make every epoch the first one again."""
        self._epochs.counter.step = 0

    def of_loader(self) -> Progress:
        """Return the iterators of a new loader, which counts epochs by itself."""
        return Progress.of_loader(self._epochs)

    @property
    def progress_of_caller(self) -> Progress:
        """The progress of the loader that makes an iterator now, or else that of the dataset."""
        return self._epochs.of_caller

    # Where it stands --------------------------------------------------------------------------------------

    def state_dict(self, progress: Progress | None = None) -> dict[str, Any]:
        """Return where the iterator that began last stands: of a loader, or of any.

        Raises:
            RuntimeError: If workers of another loader make the mini-batches, so that only they know.
        """
        if progress is not None:
            return progress.position.to_dict(self.identity)
        if torch.utils.data.get_worker_info() is None and self._epochs.counter.is_ahead_in_workers:
            raise RuntimeError(
                "state_dict() must be that of the loader where workers make the mini-batches, which only "
                "they count; take experiment_dataloader or StatefulDataLoader, and state_dict() of it."
            )
        return self._epochs.latest.position.to_dict(self.identity)

    def load_state_dict(self, state: Mapping[str, Any], progress: Progress | None = None) -> None:
        """Let the next iterator, of a loader or of the dataset, go on where a state says."""
        identity = self.identity
        if self.options.seed is None and isinstance(state, Mapping) and "seed" in state:
            identity["seed"] = check_count("seed", state["seed"], suggestion=42, minimum=0)
        position = Position.from_dict(state, identity)
        self._seed = identity["seed"]
        (progress or self._epochs.of_dataset).load(position)

    @property
    def identity(self) -> dict[str, Any]:
        """The facts that a state and the dataset that continues it must agree on."""
        if self._fingerprint is None:
            self._fingerprint = self.ids.fingerprint
        return {
            "query": self._fingerprint,
            "n_obs": len(self.ids.obs_joinids),
            "n_vars": len(self.ids.var_joinids),
            "seed": self._seed,
            **self.options.of_order,
            "auto": self.plan.order_key,
        }

    # Beginning an epoch -----------------------------------------------------------------------------------

    def begin(self, progress: Progress) -> tuple[EpochPart, Iteration]:
        """Begin an epoch, or continue the loaded one; return the part of it that this process yields."""
        partition, in_worker = self.partition(), torch.utils.data.get_worker_info() is not None
        if self._worker_start is not None and in_worker:
            part = self._continued(self._worker_start.begin(), partition)
            return part, Iteration(start=Position(epoch=part.epoch), total=0, waits=True)
        self._check_ranks()
        epoch, loaded = progress.upcoming()
        position = Position(epoch=epoch) if loaded is None else loaded.position
        if not in_worker:
            self._agree(0, position)
            self._log_order(0)
        elif self.options.shuffle:
            scope = self.options.shuffle_scope
            check_seed_of_all(self.options.seed, scope=scope, world_size=partition.world_size)
        part = self._continued(position, partition)
        start = Position(
            epoch=epoch,
            world_size=partition.world_size,
            num_workers=partition.n_workers if in_worker else 0,
            worker_id=part.partition.worker_id if in_worker else None,
            n_yielded=part.skip,
            earlier=part.earlier,
        )
        n = self._deal(part.earlier).n_mini_batches(part.partition)
        return part, progress.begin(Iteration(start=start, total=n, loaded=loaded, waits=in_worker))

    @contextmanager
    def handed_to_workers(self, progress: Progress, num_workers: int) -> Iterator[tuple[Position, Iteration]]:
        """Begin an epoch that workers will iterate: copies made inside know rank, epoch and state.

        Yields:
            The position at which the epoch begins, and the state of the iterator.
        """
        self._check_ranks()
        epoch, loaded = progress.upcoming()
        position = Position(epoch=epoch) if loaded is None else loaded.position
        self._agree(num_workers, position)
        self.source.prepare()
        self._plan.get()  # which forked workers would find out each by itself
        self._log_order(num_workers)
        iteration = progress.begin(self._iteration_of_workers(position, num_workers, loaded))
        self._worker_start = WorkerStart(self.ranks, position, progress.publish(epoch))
        try:
            yield position, iteration
        finally:
            self._worker_start = None

    @property
    def is_told(self) -> bool:
        """Whether this is in a worker of a loader that told it rank, epoch and state."""
        return self._worker_start is not None

    def part(self, epoch: int, partition: Partition) -> EpochPart:
        """Return what a worker of a rank yields of an epoch."""
        return EpochPart(ids=self.ids, partition=partition, seed=self._seed, epoch=epoch)

    def parts_of_workers(self, position: Position, num_workers: int) -> list[EpochPart]:
        """Return what each worker of this rank yields of an epoch, from a position on."""
        n = max(num_workers, 1)
        return [self._continued(position, Partition(*self.ranks, worker, n)) for worker in range(n)]

    def n_mini_batches(self, num_workers: int | None = None) -> int:
        """Return how many mini-batches an epoch has here.

        Args:
            num_workers: Workers of this rank, for the mini-batches of all of them; those of this process if
                None.
        """
        if num_workers is None:
            return self._deal().n_mini_batches(self.partition())
        return self._iteration_of_workers(Position(epoch=self.epoch), num_workers).total

    # Who does what ----------------------------------------------------------------------------------------

    @property
    def ranks(self) -> tuple[int, int]:
        """This rank and the number of ranks: as told, or as found now."""
        of_loader = None if self._worker_start is None else self._worker_start.ranks
        return of_loader or self.options.ranks or get_distributed_rank_and_world_size()

    def partition(self) -> Partition:
        """Return this rank and this worker, and how many there are."""
        return Partition(*self.ranks, *get_worker_id_and_num())

    def _continued(self, position: Position, partition: Partition) -> EpochPart:
        """Return the part of a worker, from a position on."""
        return position.rest_of(self.part(position.epoch, partition), self.options.shuffle_scope)

    def _deal(self, earlier: tuple[Stage, ...] = ()) -> Deal:
        """Return how rows are dealt, where others have yielded some of them."""
        return Deal(
            n_rows=len(self.ids.obs_joinids),
            batch_size=self.options.batch_size,
            tail=self.options.tail,
            scope=self.options.shuffle_scope,
            earlier=earlier,
        )

    def _iteration_of_workers(
        self, position: Position, num_workers: int, loaded: LoadedPosition | None = None
    ) -> Iteration:
        """Return the state of the iterator of a rank with workers, from a position on."""
        parts = self.parts_of_workers(position, num_workers)
        start = Position(
            epoch=position.epoch,
            world_size=parts[0].partition.world_size,
            num_workers=num_workers,
            n_yielded=sum(part.skip for part in parts),
            earlier=parts[0].earlier,
        )
        total = self._deal(start.earlier).n_mini_batches_of_rank(start.world_size, len(parts))
        return Iteration(start=start, total=total, loaded=loaded)

    def _check_ranks(self) -> None:
        """Raise a ValueError where the ranks cannot iterate, or rows would be dealt to them twice."""
        options, (_, world_size), n_rows = self.options, self.ranks, len(self.ids.obs_joinids)
        n_dealt_to = world_size if options.ranks is None else 1
        check_dealt_once(dealt_again_by() or self._dealer, options.shuffle, options.seed, n_dealt_to)
        if options.tail == "drop":
            check_a_row_each(n_rows, world_size)

    def _agree(self, num_workers: int, position: Position) -> None:
        """Make sure that all ranks can iterate, and that they iterate the same."""
        (_, world_size), options = self.ranks, self.options
        if world_size > 1:
            self._seed = agreed_seed(
                partial(self._shared_by_ranks, position, max(num_workers, 1)),
                options.seed if options.shuffle else 0,  # where nothing is shuffled, any will do
                drawn_seed=self._seed,
                scope=options.shuffle_scope,
                world_size=world_size,
                are_told=options.ranks is not None,
                is_first=self._is_first,
            )

    def _log_order(self, num_workers: int) -> None:
        """Log, when the first epoch begins, how the rows are mixed."""
        if self._is_first and is_log_read():
            part = self.parts_of_workers(Position(epoch=0), num_workers)[0]
            log_order(self.plan.of(part), self.source)
        self._is_first = False

    def _shared_by_ranks(self, position: Position, n_workers: int) -> dict[str, Any]:
        """Return what must be the same on all ranks at the start of an epoch, but for the seed."""
        if self._content is None:
            self._content = self.source.content
        # At the start of an epoch it is of no account who took part in the one before.
        if not (position.n_yielded or position.earlier):
            position = Position(epoch=position.epoch)
        first = {"epoch": position.epoch, "n_yielded": position.n_yielded}  # told first where ranks differ
        state = {**first, **position.to_dict({**self.identity, **self._content})}
        del state["seed"]
        # Each worker's last mini-batch may be smaller there, so that their number counts.
        return state | ({"workers": n_workers} if self.options.shuffle_scope == "partition" else {})
