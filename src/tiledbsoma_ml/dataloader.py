"""`experiment_dataloader`: a `DataLoader` that knows how many batches there are, and when an epoch begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from tiledbsoma_ml._common import MiniBatch
from tiledbsoma_ml._distributed import get_distributed_rank_and_world_size
from tiledbsoma_ml._io_batch_iterable import IOBatch
from tiledbsoma_ml._query_ids import Partition
from tiledbsoma_ml.dataset import ExperimentDataset

_T = TypeVar("_T")

_SET_ELSEWHERE = {
    "batch_sampler": "ExperimentDataset(batch_size=…, shuffle=…)",
    "batch_size": "ExperimentDataset(batch_size=…)",
    "sampler": "ExperimentDataset(shuffle=…, seed=…)",
    "shuffle": "ExperimentDataset(shuffle=…)",
}


def experiment_dataloader(ds: ExperimentDataset, **dataloader_kwargs: Any) -> ExperimentDataLoader:
    """Return a `DataLoader` that yields the mini-batches of a dataset as they are.

    Reading ahead on threads needs no workers. With `num_workers`, they are started with "spawn" (a fork of a
    process that uses TileDB or CUDA can hang) and kept between epochs, unless `multiprocessing_context` or
    `persistent_workers` say otherwise.

    Args:
        ds: Its options decide about batch size and shuffling.
        dataloader_kwargs: For `torch.utils.data.DataLoader`.

    Raises:
        TypeError: If `ds` is not an `ExperimentDataset`.
        ValueError: If an argument does not apply: `shuffle`, `batch_size`, `sampler`, `batch_sampler`.
    """
    if not isinstance(ds, ExperimentDataset):
        raise TypeError(
            f"ds must be an ExperimentDataset, not a {type(ds).__name__}; "
            "give any other dataset to torch.utils.data.DataLoader."
        )
    for name, place in _SET_ELSEWHERE.items():
        if name in dataloader_kwargs:
            raise ValueError(
                f"{name}={dataloader_kwargs[name]!r} does not apply to experiment_dataloader; "
                f"set it in {place}."
            )
    defaults: dict[str, Any] = {"collate_fn": _unchanged}
    if dataloader_kwargs.get("num_workers", 0) > 0:
        defaults |= {"multiprocessing_context": "spawn", "persistent_workers": True}
    return ExperimentDataLoader(ds, batch_size=None, **{**defaults, **dataloader_kwargs})


class ExperimentDataLoader(DataLoader[MiniBatch]):
    """A `DataLoader` of an `ExperimentDataset`; made by `experiment_dataloader`.

    Beyond a plain one, its length is exact for any number of workers, every epoch has a new order, and
    workers learn the rank and the epoch from the training process, which also does the device work.
    """

    dataset: ExperimentDataset

    def __len__(self) -> int:
        """Return the number of mini-batches of an epoch, over all workers of this rank."""
        ranks, n_workers = get_distributed_rank_and_world_size(), max(self.num_workers, 1)
        return sum(
            self.dataset._n_mini_batches(Partition(*ranks, worker, n_workers)) for worker in range(n_workers)
        )

    def __iter__(self) -> Iterator[MiniBatch]:  # type: ignore[override]
        """Begin an epoch."""
        if self.num_workers == 0:
            return super().__iter__()
        with self.dataset._handed_to_workers() as epoch:
            items: Iterator[Any] = super().__iter__()
        if self.dataset.device is None:
            return items
        return _in_turn(
            iter(self.dataset._mini_batches(io_batches, epoch, use_eager_fetch=False))
            for io_batches in _by_worker(items, self.num_workers)
        )


def _by_worker(items: Iterator[tuple[int, IOBatch]], n_workers: int) -> list[Iterator[IOBatch]]:
    """Return the IO batches of each worker, from items (worker, IO batch) of all workers."""
    waiting: list[deque[IOBatch]] = [deque() for _ in range(n_workers)]

    def of(worker: int) -> Iterator[IOBatch]:
        while True:
            while not waiting[worker]:
                try:
                    sender, io_batch = next(items)
                except StopIteration:
                    return
                waiting[sender].append(io_batch)
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
