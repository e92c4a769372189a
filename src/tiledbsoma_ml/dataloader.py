"""`experiment_dataloader`: a `DataLoader` that knows how many batches there are, and when an epoch begins."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, overload

from torch.utils.data import DataLoader, IterableDataset

from tiledbsoma_ml._batch.read_ahead import Piece
from tiledbsoma_ml._common import MiniBatch, check_bool, check_count
from tiledbsoma_ml._dataset.describe import as_line, as_table, described
from tiledbsoma_ml._dataset.mini_batches import assembly
from tiledbsoma_ml._epoch.position import Position
from tiledbsoma_ml._epoch.progress import Iteration, Progress
from tiledbsoma_ml.dataset import ExperimentDataset

_T = TypeVar("_T")

_BOOLS = ("drop_last", "in_order", "persistent_workers", "pin_memory")

_SET_ELSEWHERE = {
    "batch_sampler": "ExperimentDataset(batch_size=…, shuffle=…)",
    "batch_size": "ExperimentDataset(batch_size=…)",
    "sampler": "ExperimentDataset(shuffle=…, seed=…)",
    "shuffle": "ExperimentDataset(shuffle=…)",
}


@overload
def experiment_dataloader(ds: ExperimentDataset, **dataloader_kwargs: Any) -> ExperimentDataLoader: ...
@overload
def experiment_dataloader(ds: IterableDataset[Any], **dataloader_kwargs: Any) -> DataLoader[Any]: ...
def experiment_dataloader(ds: IterableDataset[Any], **dataloader_kwargs: Any) -> DataLoader[Any]:
    """Return a `DataLoader` that yields the mini-batches of a dataset as they are.

    Reading ahead on threads needs no workers. With `num_workers`, they are started with "spawn" (a fork of a
    process that uses TileDB or CUDA can hang) and kept between epochs, unless `multiprocessing_context` or
    `persistent_workers` say otherwise.

    Args:
        ds: Its options decide about batch size and shuffling. Of what is made of several, such as the sum of
            two, a plain `DataLoader` is returned, which cannot be resumed.
        dataloader_kwargs: For `torch.utils.data.DataLoader`.

    Raises:
        TypeError: If `ds` is not an `ExperimentDataset`, nor another iterable dataset, or an argument has the
            wrong type.
        ValueError: If an argument does not apply: `shuffle`, `batch_size`, `sampler`, `batch_sampler`, or
            `in_order=False`.
    """
    if not isinstance(ds, IterableDataset):
        raise TypeError(
            f"ds must be an ExperimentDataset, not a {type(ds).__name__}; "
            "give any other dataset to torch.utils.data.DataLoader."
        )
    given = check_dataloader_kwargs(dataloader_kwargs)
    options: dict[str, Any] = {"batch_size": None, "collate_fn": _unchanged}
    if given.get("num_workers", 0) > 0:
        options |= {"multiprocessing_context": "spawn", "persistent_workers": True}
    options |= given
    if not isinstance(ds, ExperimentDataset):
        return DataLoader(ds, **options)
    loader = ExperimentDataLoader(ds, **options)
    loader.own_progress = ds.iterations.of_loader()  # from now on it counts its own epochs
    return loader


def check_dataloader_kwargs(dataloader_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `experiment_dataloader` beside the dataset, checked; none for None.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one does not apply.
    """
    given = dict(dataloader_kwargs or {})
    for name, place in _SET_ELSEWHERE.items():
        if name in given:
            raise ValueError(
                f"{name}={given[name]!r} does not apply to experiment_dataloader; set it in {place}."
            )
    given |= {name: check_bool(name, given[name]) for name in _BOOLS if name in given}
    if "num_workers" in given:
        given["num_workers"] = check_count("num_workers", given["num_workers"], suggestion=2, minimum=0)
    if given.get("num_workers", 0) > 0 and not given.get("in_order", True):
        raise ValueError(
            "in_order=False does not apply to experiment_dataloader, whose state tells by a number which "
            "mini-batches there were, so that a resumed run would lose some; leave it out."
        )
    return given


class ExperimentDataLoader(DataLoader[MiniBatch]):
    """A `DataLoader` of an `ExperimentDataset`; made by `experiment_dataloader`.

    Beyond a plain one, its length is exact for any number of workers, every epoch has a new order, workers
    learn the rank and the epoch from the training process, which also does the device work, and it can be
    resumed: Lightning and torchdata keep what `state_dict` returns in their checkpoints by themselves.

    An epoch and a position are this loader's: another loader of the same dataset does not move them. Its
    iterators are independent of each other, but for workers that are kept: these serve the newest one.
    """

    dataset: ExperimentDataset
    own_progress: Progress | None = None
    _n_iterators = 0

    def __repr__(self) -> str:
        """Return what it is a loader of, in a line."""
        return as_line(type(self).__name__, self._described())

    def _repr_html_(self) -> str:
        """Return the same as a table, with the settings that are not in use."""
        return as_table(type(self).__name__, self._described(), self.dataset.not_in_use)

    def _described(self) -> dict[str, str]:
        return described(self.dataset.iterations) | {"num_workers": str(self.num_workers)}

    def __len__(self) -> int:
        """Return the number of mini-batches of an epoch, over all workers of this rank."""
        return self.dataset.iterations.n_mini_batches(self.num_workers)

    def __iter__(self) -> Iterator[MiniBatch]:  # type: ignore[override]
        """Begin an epoch, or go on with the one that was loaded."""
        if self.num_workers == 0:
            with self.progress.calling():
                return super().__iter__()
        iterations = self.dataset.iterations
        with iterations.handed_to_workers(self.progress, self.num_workers) as (position, iteration):
            if iteration.loaded is not None:
                self._iterator = None  # workers that were kept do not know of a state: new ones are started
            items: Iterator[Any] = super().__iter__()
        self._n_iterators += 1
        mini_batches = items if self.dataset.device is None else self._on_device(items, position)
        named = _naming_dead_workers(mini_batches, getattr(items, "_workers", []))
        return self._counted(named, iteration, self._n_iterators)

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch stands: after the last mini-batch that was yielded, whatever was read ahead.

        That of the iterator of this loader that began last. A new dictionary of a few numbers and strings,
        the same on every rank.
        """
        return self.dataset.iterations.state_dict(self.progress)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state says: see `ExperimentDataset.load_state_dict`."""
        self.dataset.iterations.load_state_dict(state, self.progress)

    @property
    def progress(self) -> Progress:
        """The iterators of this loader: which epoch comes next, and where the newest one stands."""
        if self.own_progress is None:
            self.own_progress = self.dataset.iterations.of_loader()
        return self.own_progress

    def _counted(
        self, mini_batches: Iterator[MiniBatch], iteration: Iteration, number: int
    ) -> Iterator[MiniBatch]:
        """Yield mini-batches of the iterator that has a number, and note where the epoch stands."""
        try:
            while True:
                if self.persistent_workers and number != self._n_iterators:
                    raise RuntimeError(
                        "an iterator of a loader with persistent_workers=True must be the newest one, but "
                        "another began since, which the workers serve now; go on with that one, or take "
                        "persistent_workers=False."
                    )
                try:
                    mini_batch = next(mini_batches)
                except StopIteration:
                    break
                iteration.advance()
                yield mini_batch
            iteration.end()
        finally:
            iteration.is_over = True

    def _on_device(self, items: Iterator[Any], position: Position) -> Iterator[MiniBatch]:
        return _in_turn(
            assembly(self.dataset.plan.of(part), self.dataset.options, in_worker=True).mini_batches(pieces)
            for pieces, part in zip(
                _by_worker(items, self.num_workers),
                self.dataset.iterations.parts_of_workers(position, self.num_workers),
                strict=True,
            )
        )


def _naming_dead_workers(items: Iterator[_T], workers: Sequence[BaseProcess]) -> Iterator[_T]:
    """Yield items; say which worker it was when one dies, which a `DataLoader` tells by its process alone."""
    try:
        yield from items
    except RuntimeError as err:
        for number, worker in enumerate(workers):
            if worker.exitcode:
                raise RuntimeError(
                    f"worker {number} of {len(workers)} (process {worker.pid}) died by "
                    f"{_cause_of_death(worker.exitcode)} ({err})"
                ) from err
        raise


def _cause_of_death(exit_code: int) -> str:
    """Return what an exit code that is not zero says, and what to do about it."""
    if exit_code > 0:
        return f"exit code {exit_code}: what it wrote before says why"
    if exit_code == -signal.SIGKILL:
        way_out = "memory may be short: take fewer workers or a smaller memory_budget"
    elif exit_code == -signal.SIGBUS:
        way_out = (
            "a file that it had mapped is damaged or was cut, or a disk or /dev/shm is full: call "
            "`verify()` on the snapshot, and look at `df`"
        )
    elif exit_code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE):
        way_out = (
            "native code crashed: set PYTHONFAULTHANDLER=1, and it tells where; damaged files can be the "
            "reason: call `verify()` on a snapshot"
        )
    else:
        way_out = "somebody ended it"
    return f"signal {-exit_code}: {way_out}"


def _by_worker(items: Iterator[tuple[int, Piece]], n_workers: int) -> list[Iterator[Piece]]:
    """Return the pieces of each worker, from items (worker, piece) of all workers."""
    waiting: list[deque[Piece]] = [deque() for _ in range(n_workers)]

    def of(worker: int) -> Iterator[Piece]:
        while True:
            while not waiting[worker]:
                try:
                    sender, piece = next(items)
                except StopIteration:
                    return
                waiting[sender].append(piece)
            yield waiting[worker].popleft()

    return [of(worker) for worker in range(n_workers)]


def _in_turn(iterators: Iterable[Iterator[_T]]) -> Iterator[_T]:
    """Yield one item of each iterator in turn, passing over those that ended: the order of a `DataLoader`."""
    alive = deque(iterators)
    while alive:
        iterator = alive.popleft()
        try:
            item = next(iterator)
        except StopIteration:
            continue
        alive.append(iterator)
        yield item


def _unchanged(item: _T) -> _T:
    return item
