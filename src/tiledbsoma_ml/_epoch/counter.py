"""The number of the epoch, the same in a dataset and in the copies of it that DataLoader workers hold."""

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
"""Processes that can tell their workers an epoch through one counter: the ranks that share its memory."""

N_ITERATIONS = 4
"""Iterations whose workers may begin at the same time."""

PATIENCE_S = 600.0
"""As long a worker waits for the first one of its iteration, which decides about the epoch."""

# Columns of the shared table, which has a row for each process that iterates. At the end there are
# (seed, number of the first worker, epoch) of iterations.
_PROCESS, _N_SET, _SET, _LAST, _N_BEGUN, _BEGUN = range(6)


class EpochCounter:
    """Counts epochs: every `take` gives the next one, unless `set` said otherwise since.

    Nothing tells a dataset that a plain `DataLoader` with workers begins an epoch, so the copies of this
    counter in workers tell each other, and the process that they work for, through shared memory. Workers
    that are started for an iteration take the epoch after the last one that was begun: the first of them
    decides, and the others do as it does. Workers that are kept count on by themselves, and see what was
    `set` in the meantime.

    Attributes:
        n_set: How often it was set.
        last_set: The epoch that was set last.
        same_since: Which of these times was the first of those that set this epoch one after the other.
        step: By how much an epoch's number is larger than that of the one before; 0 repeats one.
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
        """The epoch that was begun last, here or by workers; or what was set since."""
        return max(self._current, self._last_of_workers())

    @property
    def upcoming(self) -> int:
        """The epoch that the next `take` gives."""
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
        """Make `epoch` the one that the next `take` gives, here and in the copies.

        Args:
            epoch: In a worker, what only this one takes.
            has_begun: Whether it goes on rather than begins.
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
        """Return the number of the epoch that begins now."""
        epoch = self.upcoming
        if self._taken_in == os.getpid() and (told := self._row(self._iterating())) is not None:
            self._n_seen = int(told[_N_SET])
        self._current, self._next, self._taken_in = epoch, epoch + self.step, os.getpid()
        if self._is_in_worker():
            self._publish(epoch)
        return epoch

    def reach(self, epoch: int, *, has_begun: bool) -> None:
        """Note that a loader, which counts by itself, is in an epoch, or will begin it."""
        self._current, self._next = epoch, max(self._next, epoch + (self.step if has_begun else 0))

    # Workers of a plain DataLoader ------------------------------------------------------------------------

    def _is_in_worker(self) -> bool:
        return torch.utils.data.get_worker_info() is not None and self._iterating() != os.getpid()

    def _iterating(self) -> int:
        """Return the process that iterates: this one, or that which made this copy for a worker."""
        return self._owner if self._made_in == os.getpid() else os.getppid()

    def _of_this_iteration(self) -> int:
        """Return the epoch of the iteration that this worker was started for: what its first worker says."""
        info, process = torch.utils.data.get_worker_info(), self._iterating()
        assert info is not None
        seed, number = info.seed - info.id, _number_of_process()
        if info.id == 0:
            row = self._claimed(process)
            last = int(row[_LAST]) if row[_N_SET] == self._n_seen else -1
            epoch = max(self._next, last + self.step)
            self._publish(epoch)
            place = _BEGUN + 3 * int(row[_N_BEGUN] % N_ITERATIONS)
            row[place : place + 3] = 0, number, epoch
            row[place], row[_N_BEGUN] = seed, row[_N_BEGUN] + 1
            return epoch
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            told = self._row(process)
            for of, first, epoch in [] if told is None else told[_BEGUN:].reshape(-1, 3).tolist():
                # A generator that is seeded for each epoch gives the seed of the iteration before as well.
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
        """Return what a process and its workers tell each other, if they do."""
        rows = self._shared.numbers
        found = np.flatnonzero(rows[:, _PROCESS] == process)
        return rows[found[0]] if len(found) else None

    def _claimed(self, process: int) -> NDArray[np.int64]:
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
    """Return which of the processes that its parent started this is; 0 if that is not known."""
    identity: tuple[int, ...] = getattr(multiprocessing.current_process(), "_identity", ())
    return identity[-1] if identity else 0
