"""Where iterators stand: which epoch begins next, what was loaded, and how far the newest iterator is.

An epoch belongs to an iterator, and a position to whoever makes iterators: each loader, and a dataset that is
iterated by itself. They share the counter of the dataset alone, so that none moves another's position.
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

LOOKS = 3
"""So many iterators may be left after their first mini-batch before a state that was loaded counts as used.

Callbacks look at a mini-batch when training starts; a loop that takes one from a new iterator at each step
goes on all the same.
"""


@attrs.define(eq=False)
class Loaded:
    """A position that the next iterator goes on from. It is used up by the second mini-batch.

    Attributes:
        position: The position to go on from.
        n_set: Number of times that the counter had been set when it was loaded.
        n_begun: Number of iterators that began there.
        is_used: Whether one of them went on.
    """

    position: Position
    n_set: int
    n_begun: int = 0
    is_used: bool = False


@attrs.define(eq=False)
class Told:
    """What the copies of a dataset in the workers of a loader are told.

    Attributes:
        ranks: Rank and number of ranks.
        position: The position at which their first epoch begins.
        channel: The number of the epoch, in shared memory, for workers that are kept.
    """

    ranks: tuple[int, int]
    position: Position | None
    channel: SharedArray

    def begin(self) -> Position:
        """Return where the epoch begins that a worker begins now."""
        position, self.position = self.position, None
        return position or Position(epoch=int(self.channel.numbers[0]))


@attrs.define(eq=False, kw_only=True)
class Run:
    """One iterator, and where it stands.

    Attributes:
        start: The position at which it began.
        total: Mini-batches of the epoch, with those before `start`.
        loaded: The loaded position that it goes on from, if there is one.
        waits: Whether the epoch goes on after its last mini-batch: a worker waits for the others.
        step: The difference between the number of the next epoch and that of this one.
        ends_after: Returns the number of mini-batches after which the trainer counts the epoch as over.
        n_yielded: Mini-batches until now, with those before `start`.
        has_ended: Whether it was asked for more than there are.
        is_over: Whether it ended or was left.
    """

    start: Position
    total: int
    loaded: Loaded | None = None
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
        """Note that a mini-batch is yielded."""
        self.n_yielded += 1
        if self.loaded is not None:
            self.loaded.is_used |= self.n_yielded > self.start.n_yielded + 1 or self._has_all

    def end(self) -> None:
        """Note that there is no more."""
        self.has_ended = True
        if self.loaded is not None:
            self.loaded.is_used = True

    @property
    def position(self) -> Position:
        """Where it stands: after the last mini-batch that was yielded; at the end, in the next epoch."""
        if self._has_all and (self.has_ended or not self.waits):
            return Position(epoch=self.start.epoch + self.step)
        return attrs.evolve(self.start, n_yielded=self.n_yielded)

    @property
    def _has_all(self) -> bool:
        limit = self.total if self.ends_after is None else self.ends_after() or self.total
        return self.n_yielded >= min(self.total, limit)


class Epochs:
    """The epochs of a dataset: the counter, and who iterates it.

    Attributes:
        counter: Which epochs there were.
        own: The iterators that the dataset made without a loader.
        latest: The owner of the iterator that began last.
    """

    def __init__(self) -> None:
        self.counter = EpochCounter()
        self.own = Progress(self)
        self.latest = self.own

    def iterating(self) -> Progress:
        """Return who asks for an iterator of the dataset: the dataset itself, or a loader."""
        progress = _ASKING.get()
        return progress if progress is not None and progress.epochs is self else self.own

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"latest": self.own}


_ASKING: ContextVar[Progress | None] = ContextVar("_ASKING", default=None)


class Progress:
    """The iterators of one loader, or of a dataset by itself.

    A loader counts its own epochs, from that which was to come when it was made.

    Attributes:
        epochs: The epochs of the dataset.
        ends_after: See `Run`.
    """

    def __init__(self, epochs: Epochs) -> None:
        self.epochs = epochs
        self._next, self._n_set = 0, -1
        self._loaded: Loaded | None = None
        self._run: Run | None = None
        self._channel: SharedArray | None = None
        self.ends_after: Callable[[], float] | None = None

    @classmethod
    def of_loader(cls, epochs: Epochs) -> Progress:
        """Return that of a new loader."""
        progress = cls(epochs)
        progress._next, progress._n_set = epochs.counter.upcoming, epochs.counter.n_set
        return progress

    def load(self, position: Position) -> None:
        """Go on from a position with the next iterator."""
        counter, of_dataset = self.epochs.counter, self.epochs.own._loaded
        if self._is_own:
            counter.set(position.epoch, has_begun=position.n_yielded > 0)
        else:
            counter.reach(position.epoch, has_begun=False)
            self._next, self._n_set = position.epoch, counter.n_set
        waits = of_dataset is not None and self.epochs.own._pending() is of_dataset
        if of_dataset is not None and waits and not self._is_own and of_dataset.position == position:
            self._loaded = of_dataset  # both of a checkpoint: used once
        else:
            self._loaded = Loaded(position, counter.n_set)
        self._run, self.epochs.latest = None, self

    def upcoming(self) -> tuple[int, Loaded | None]:
        """Return the epoch that the next iterator begins, and what it goes on from."""
        counter, in_worker = self.epochs.counter, torch.utils.data.get_worker_info() is not None
        loaded = self._pending()
        if loaded is not None and not in_worker:
            return loaded.position.epoch, loaded
        if self._is_own:
            epoch = counter.upcoming
        else:
            epoch = self._next if self._n_set == counter.n_set else counter.last_set
        return epoch, loaded if loaded is not None and loaded.position.epoch == epoch else None

    def begin(self, run: Run) -> Run:
        """Note that an iterator begins the epoch that was `upcoming`."""
        counter, epoch = self.epochs.counter, run.start.epoch
        if not self._is_own or (run.loaded is not None and not run.waits):
            counter.reach(epoch, has_begun=True)
        else:
            counter.take()
        self._next, self._n_set = epoch + counter.step, counter.n_set
        run.step, run.ends_after = counter.step, self.ends_after
        self._run, self.epochs.latest = run, self
        return run

    def tell(self, epoch: int) -> SharedArray:
        """Tell workers that are kept the epoch that begins now; return what they look at."""
        if self._channel is None:
            self._channel = SharedArray(np.zeros(1, dtype=np.int64))
        self._channel.numbers[0] = epoch
        return self._channel

    @property
    def position(self) -> Position:
        """Where the newest iterator stands; where the next one begins, if there is none."""
        loaded, run = self._pending(), self._run
        if loaded is not None and (run is None or run.loaded is not loaded or run.is_over):
            return loaded.position
        return Position(epoch=self.upcoming()[0]) if run is None else run.position

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Make iterators of the dataset that are asked for inside this one's."""
        token = _ASKING.set(self)
        try:
            yield
        finally:
            _ASKING.reset(token)

    @property
    def _is_own(self) -> bool:
        return self.epochs.own is self

    def _pending(self) -> Loaded | None:
        """Return what was loaded last, here or into the dataset, unless used or another epoch was set."""
        found = [p._loaded for p in (self, self.epochs.own) if p._loaded is not None]
        for loaded in sorted(found, key=lambda loaded: -loaded.n_set)[:1]:
            counter = self.epochs.counter
            was_set = loaded.n_set != counter.n_set and (
                counter.last_set != loaded.position.epoch or counter.same_since > loaded.n_set + 1
            )
            if not (was_set or loaded.is_used or loaded.n_begun > LOOKS):
                return loaded
        return None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_run": None}
