"""The number of the epoch, the same in a dataset and in the copies of it that DataLoader workers hold."""

from __future__ import annotations

import torch


class EpochCounter:
    """Counts epochs: every `take` gives the next one, unless `set` said otherwise since.

    A copy in a worker process starts from the epoch that was current when it was copied. While it lives on
    (persistent workers), what is `set` in the training process reaches it through shared memory, and
    otherwise it counts by itself: nothing else tells a worker that an epoch begins.
    """

    def __init__(self) -> None:
        self.current = 0
        self._is_fresh = True
        self._n_set = 0
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def upcoming(self) -> int:
        """The epoch that the next `take` gives."""
        if self._is_fresh:
            return self.current
        n_set, epoch = self._shared.tolist()
        return int(epoch) if n_set > self._n_set else self.current + 1

    def set(self, epoch: int) -> None:
        """Make `epoch` the one that the next `take` gives, here and in the copies."""
        self.current = epoch
        self._is_fresh = True
        self._n_set += 1
        self._shared.copy_(torch.tensor([self._n_set, epoch]))

    def take(self) -> int:
        """Return the number of the epoch that begins now."""
        self.current = self.upcoming
        if not self._is_fresh:
            self._n_set = int(self._shared[0])
        self._is_fresh = False
        return self.current
