"""`Iteration`, `Progress` and `Epochs`: the state of one iterator, of one loader, and of the whole dataset.

A loader has many iterators, one after the other; its position is that of the newest one. A dataset can have
many loaders, and can be iterated without any: then it has a position like a loader. They share only the
counter of the dataset, so none changes the position of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import attrs
import numpy as np
import torch

from tiledbsoma_ml._epoch.counter import EpochCounter
from tiledbsoma_ml._epoch.position import Position
from tiledbsoma_ml._shared_array import SharedArray

MAX_PEEKS = 3
"""Number of iterators that may stop after one mini-batch before a loaded position counts as used.

Callbacks look at a mini-batch when training starts. But a loop that takes one mini-batch from a new iterator
at each step must move on.
"""


@attrs.define(eq=False)
class LoadedPosition:
    """A position that was loaded, at which the next iterator begins until its second mini-batch uses it up.

    Attributes:
        position: The position.
        n_set: Number of times that the counter had been set when the position was loaded.
        n_begun: Number of iterators that began at the position.
        is_used: Whether one of them yielded a second mini-batch, or ended.
    """

    position: Position
    n_set: int
    n_begun: int = 0
    is_used: bool = False


@attrs.define(eq=False)
class WorkerStart:
    """The facts that the workers of a loader need to begin an epoch.

    Attributes:
        ranks: Rank and number of ranks.
        position: The position at which their first epoch begins.
        channel: The number of the epoch, in shared memory, for persistent workers.
    """

    ranks: tuple[int, int]
    position: Position | None
    channel: SharedArray

    def begin(self) -> Position:
        """Return the position at which the worker begins its next epoch."""
        position, self.position = self.position, None
        return position or Position(epoch=int(self.channel.numbers[0]))


@attrs.define(eq=False, kw_only=True)
class Iteration:
    """The state of one iterator over an epoch.

    Attributes:
        start: The position at which the iterator began.
        total: Number of mini-batches of the epoch, including those before `start`.
        loaded: The loaded position at which the iterator began; None if there was none.
        waits: Whether the epoch continues after the last mini-batch, because a worker waits for the others.
        step: Difference between the numbers of the next epoch and of this one.
        ends_after: Returns the number of mini-batches after which the trainer ends the epoch.
        n_yielded: Number of mini-batches until now, including those before `start`.
        has_ended: Whether the iterator was asked for a mini-batch after the last one.
        is_over: Whether the iterator ended or was dropped.
    """

    start: Position
    total: int
    loaded: LoadedPosition | None = None
    waits: bool = False
    step: int = 1
    ends_after: Callable[[], float] | None = None
    n_yielded: int = attrs.field(init=False)
    has_ended: bool = False
    is_over: bool = False

    def __attrs_post_init__(self) -> None:
        self.n_yielded = self.start.n_yielded
        if self.loaded is not None:
            self.loaded.n_begun += 1
            self.loaded.is_used |= self.waits

    def advance(self) -> None:
        """Count a mini-batch that is yielded."""
        self.n_yielded += 1
        if self.loaded is not None:
            self.loaded.is_used |= self.n_yielded > self.start.n_yielded + 1 or self._has_all

    def end(self) -> None:
        """Note that there are no more mini-batches."""
        self.has_ended = True
        if self.loaded is not None:
            self.loaded.is_used = True

    @property
    def position(self) -> Position:
        """The position after the last mini-batch that was yielded; after the epoch, that of the next one."""
        if self._has_all and (self.has_ended or not self.waits):
            return Position(epoch=self.start.epoch + self.step)
        return attrs.evolve(self.start, n_yielded=self.n_yielded)

    @property
    def _has_all(self) -> bool:
        limit = self.total if self.ends_after is None else self.ends_after() or self.total
        return self.n_yielded >= min(self.total, limit)


class Epochs:
    """The state of the epochs of a dataset, which all of its loaders share.

    Attributes:
        counter: The counter of epochs.
        of_dataset: The progress of the dataset where it is iterated without a loader.
        latest: The progress, of a loader or of the dataset, whose iterator began last.
    """

    def __init__(self) -> None:
        self.counter = EpochCounter()
        self.of_dataset = Progress(self)
        self.latest = self.of_dataset

    @property
    def of_caller(self) -> Progress:
        """The progress of the loader that makes an iterator now, or else that of the dataset."""
        progress = _CALLER.get()
        return progress if progress is not None and progress.epochs is self else self.of_dataset

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"latest": self.of_dataset}


_CALLER: ContextVar[Progress | None] = ContextVar("_CALLER", default=None)
"""The progress of the loader that makes an iterator now. A `DataLoader` passes nothing to its dataset."""


class Progress:
    """The progress of the iterators of one loader, or of a dataset without a loader.

    A loader counts its own epochs. The first is the upcoming epoch of the dataset when the loader was made.

    Attributes:
        epochs: The epochs of the dataset.
        ends_after: See `Iteration`.
    """

    def __init__(self, epochs: Epochs) -> None:
        self.epochs = epochs
        self._next, self._n_set = 0, -1
        self._loaded: LoadedPosition | None = None
        self._iteration: Iteration | None = None
        self._channel: SharedArray | None = None
        self.ends_after: Callable[[], float] | None = None

    @classmethod
    def of_loader(cls, epochs: Epochs) -> Progress:
        """Return the progress of a new loader."""
        progress = cls(epochs)
        progress._next, progress._n_set = epochs.counter.upcoming, epochs.counter.n_set
        return progress

    def load(self, position: Position) -> None:
        """Make the next iterator begin at a position."""
        counter, other = self.epochs.counter, self.epochs.of_dataset._loaded
        if self._is_of_dataset:
            counter.set(position.epoch, has_begun=position.n_yielded > 0)
        else:
            counter.reach(position.epoch, has_begun=False)
            self._next, self._n_set = position.epoch, counter.n_set
        waits = other is not None and self.epochs.of_dataset._pending() is other
        if other is not None and waits and not self._is_of_dataset and other.position == position:
            self._loaded = other  # both come from one checkpoint, and are used once
        else:
            self._loaded = LoadedPosition(position, counter.n_set)
        self._iteration, self.epochs.latest = None, self

    def upcoming(self) -> tuple[int, LoadedPosition | None]:
        """Return the epoch that the next iterator begins, and the loaded position at which it begins."""
        counter, in_worker = self.epochs.counter, torch.utils.data.get_worker_info() is not None
        loaded = self._pending()
        if loaded is not None and not in_worker:
            return loaded.position.epoch, loaded
        if self._is_of_dataset:
            epoch = counter.upcoming
        else:
            epoch = self._next if self._n_set == counter.n_set else counter.last_set
        return epoch, loaded if loaded is not None and loaded.position.epoch == epoch else None

    def begin(self, iteration: Iteration) -> Iteration:
        """Note that an iterator begins the epoch that was `upcoming`, and return its state."""
        counter, epoch = self.epochs.counter, iteration.start.epoch
        if not self._is_of_dataset or (iteration.loaded is not None and not iteration.waits):
            counter.reach(epoch, has_begun=True)
        else:
            counter.take()
        self._next, self._n_set = epoch + counter.step, counter.n_set
        iteration.step, iteration.ends_after = counter.step, self.ends_after
        self._iteration, self.epochs.latest = iteration, self
        return iteration

    def publish(self, epoch: int) -> SharedArray:
        """Write the epoch that begins now to memory that persistent workers read, and return that memory."""
        if self._channel is None:
            self._channel = SharedArray(np.zeros(1, dtype=np.int64))
        self._channel.numbers[0] = epoch
        return self._channel

    @property
    def position(self) -> Position:
        """The position of the newest iterator; if there is none, the position where the next one begins."""
        loaded, newest = self._pending(), self._iteration
        if loaded is not None and (newest is None or newest.loaded is not loaded or newest.is_over):
            return loaded.position
        return Position(epoch=self.upcoming()[0]) if newest is None else newest.position

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Count iterators that the dataset makes within this context as iterators of this loader."""
        token = _CALLER.set(self)
        try:
            yield
        finally:
            _CALLER.reset(token)

    @property
    def _is_of_dataset(self) -> bool:
        return self.epochs.of_dataset is self

    def _pending(self) -> LoadedPosition | None:
        """Return the position that was loaded last, here or into the dataset, if it is still valid.

        It is not valid any longer if it was used, or if another epoch was set since.
        """
        found = [p._loaded for p in (self, self.epochs.of_dataset) if p._loaded is not None]
        for loaded in sorted(found, key=lambda loaded: -loaded.n_set)[:1]:
            counter = self.epochs.counter
            # Training loops set the epoch that was loaded once more, which changes nothing.
            another_was_set = loaded.n_set != counter.n_set and (
                counter.last_set != loaded.position.epoch or counter.same_since > loaded.n_set + 1
            )
            if not (another_was_set or loaded.is_used or loaded.n_begun > MAX_PEEKS):
                return loaded
        return None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_iteration": None}
