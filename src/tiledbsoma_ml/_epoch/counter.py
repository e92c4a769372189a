"""`EpochCounter`: the number of the epoch, which a dataset shares with its copies in workers."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tiledbsoma_ml._shared_array import SharedArray

N_PROCESSES = 64
"""Number of training processes (ranks on one machine) that can share a counter with their workers."""

N_ITERATIONS = 4
"""Number of iterations whose workers may start at the same time."""

PATIENCE_S = 600.0
"""Longest time that a worker waits for the first worker of its iteration, which decides about the epoch."""

# Columns of the shared table, which has a row for each process that iterates. The last columns have
# (seed, number of the first worker, epoch) for each of some iterations.
_PROCESS, _N_SET, _SET, _LAST, _N_BEGUN, _BEGUN = range(6)


class EpochCounter:
    """A counter of epochs: each `take` returns the next epoch, or the one that was `set` since the last.

    A dataset does not notice when a plain `DataLoader` with workers begins an epoch. So the copies of this
    counter in workers, and the process that they work for, share numbers in memory. Workers that are started
    for an iteration take the epoch after the last one that was begun: the first worker decides, and the
    others follow it. Persistent workers count by themselves, and see if an epoch was `set` meanwhile.

    Attributes:
        n_set: Number of calls of `set`.
        last_set: The epoch that was set last.
        same_since: Number of the first call in the latest series of calls that set the same epoch.
        step: Difference between the numbers of two successive epochs; 0 repeats an epoch.
    """

    def __init__(self) -> None:
        self.step = 1
        self.n_set, self.last_set, self.same_since = 0, 0, 0
        self._current = self._next = 0
        self._n_seen = 0
        self._taken_in = self._set_in = 0
        self._owner = self._made_in = os.getpid()
        columns = _BEGUN + 3 * N_ITERATIONS
        self._shared = SharedArray(np.zeros((N_PROCESSES, columns), dtype=np.int64))

    @property
    def current(self) -> int:
        """The epoch that was begun last, here or by workers, or the one that was set since."""
        return max(self._current, self._last_of_workers())

    @property
    def upcoming(self) -> int:
        """The epoch that the next `take` returns."""
        process = os.getpid()
        if self._is_in_worker() and process not in (self._taken_in, self._set_in):
            self._next, self._set_in = self._of_this_iteration(), process
        told = self._row(self._iterating()) if self._taken_in == process else None
        if told is not None and told[_N_SET] > self._n_seen:
            return int(told[_SET])
        return max(self._next, self._last_of_workers() + self.step)

    @property
    def is_ahead_in_workers(self) -> bool:
        """Whether the last epoch was begun by workers of a plain `DataLoader`."""
        return self._last_of_workers() >= self._next

    def set(self, epoch: int, *, has_begun: bool = False) -> None:
        """Make the next `take` return `epoch`, here and in the copies.

        Args:
            epoch: The epoch. In a worker, only this worker takes it.
            has_begun: Whether the epoch was begun before and continues now.
        """
        self.n_set += 1
        if epoch != self.last_set:
            self.same_since = self.n_set
        self._current = self._next = self.last_set = epoch
        self._taken_in, self._set_in = 0, os.getpid()
        if self._is_in_worker():
            self._publish(epoch if has_begun else epoch - 1)
        elif torch.utils.data.get_worker_info() is None:
            row = self._claimed(os.getpid())
            row[_SET], row[_LAST] = epoch, -1
            row[_N_SET] = self._n_seen = self.n_set

    def take(self) -> int:
        """Begin an epoch, and return its number."""
        epoch = self.upcoming
        if self._taken_in == os.getpid() and (told := self._row(self._iterating())) is not None:
            self._n_seen = int(told[_N_SET])
        self._current, self._next, self._taken_in = epoch, epoch + self.step, os.getpid()
        if self._is_in_worker():
            self._publish(epoch)
        return epoch

    def reach(self, epoch: int, *, has_begun: bool) -> None:
        """Note that a loader, which counts by itself, has begun or will begin an epoch."""
        self._current, self._next = epoch, max(self._next, epoch + (self.step if has_begun else 0))

    # Workers of a plain DataLoader ------------------------------------------------------------------------

    def _is_in_worker(self) -> bool:
        return torch.utils.data.get_worker_info() is not None and self._iterating() != os.getpid()

    def _iterating(self) -> int:
        """Return the process that iterates: this one, or the one that made this copy for a worker."""
        return self._owner if self._made_in == os.getpid() else os.getppid()

    def _of_this_iteration(self) -> int:
        """Return the epoch of the iteration for which this worker was started; its first worker decides."""
        info, process = torch.utils.data.get_worker_info(), self._iterating()
        assert info is not None
        seed, number = info.seed - info.id, _number_of_process()
        if info.id == 0:
            row = self._claimed(process)
            last = int(row[_LAST]) if row[_N_SET] == self._n_seen else -1
            epoch = max(self._next, last + self.step)
            self._publish(epoch)
            column = _BEGUN + 3 * int(row[_N_BEGUN] % N_ITERATIONS)
            row[column : column + 3] = 0, number, epoch
            row[column], row[_N_BEGUN] = seed, row[_N_BEGUN] + 1
            return epoch
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            told = self._row(process)
            for of, first, epoch in [] if told is None else told[_BEGUN:].reshape(-1, 3).tolist():
                # A generator that is seeded anew for each epoch repeats the seed of the iteration before.
                if of == seed and (not number or 0 < number - first < info.num_workers + info.id):
                    return int(epoch)
            time.sleep(0.002)
        raise RuntimeError(
            f"worker {info.id} of {info.num_workers} must learn its epoch from worker 0, which did not begin "
            f"within {PATIENCE_S:.0f} s; use experiment_dataloader, which tells its workers."
        )

    def _publish(self, epoch: int) -> None:
        row = self._claimed(self._iterating())
        if row[_N_SET] == self._n_seen:
            row[_LAST] = max(int(row[_LAST]), epoch)

    def _last_of_workers(self) -> int:
        row = self._row(os.getpid())
        return -1 if row is None else int(row[_LAST])

    def _row(self, process: int) -> NDArray[np.int64] | None:
        """Return the row of the shared table for a process and its workers; None if there is none."""
        rows = self._shared.numbers
        found = np.flatnonzero(rows[:, _PROCESS] == process)
        return rows[found[0]] if len(found) else None

    def _claimed(self, process: int) -> NDArray[np.int64]:
        """Return the row of a process; claim a free row if it has none."""
        if (known := self._row(process)) is not None:
            return known
        with self._shared.locked():  # processes that share it may claim a row at the same time
            if (known := self._row(process)) is not None:
                return known
            rows = self._shared.numbers
            free = (k for k, of in enumerate(rows[:, _PROCESS].tolist()) if not of or not _is_alive(of))
            row: NDArray[np.int64] = rows[next(free, process % N_PROCESSES)]
            row[:] = 0
            row[_LAST], row[_N_SET] = -1, self._n_seen
            row[_PROCESS] = process
            return row

    def __getstate__(self) -> dict[str, Any]:
        is_for_worker = multiprocessing.context.get_spawning_popen() is not None
        return self.__dict__ | ({"_owner": os.getpid()} if is_for_worker else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._made_in = os.getpid()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _number_of_process() -> int:
    """Return the number of this process among those that its parent started; 0 if it is not known."""
    identity: tuple[int, ...] = getattr(multiprocessing.current_process(), "_identity", ())
    return identity[-1] if identity else 0
