"""Where an epoch stands, as a small dictionary: what a checkpoint keeps of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from tiledbsoma_ml._deal import ShuffleScope, Stage, n_yielded_by
from tiledbsoma_ml._plan import EpochPart

VERSION = 1

_OF_PLACE = ("epoch", "world_size", "num_workers", "worker_id", "n_yielded", "earlier")


@attrs.frozen(kw_only=True)
class Position:
    """Where an epoch stands.

    Attributes:
        epoch: Its number.
        world_size: Ranks that took part.
        num_workers: Workers of each; 0 where mini-batches were made in the training process.
        worker_id: The worker whose position it is; None if it is that of a rank.
        n_yielded: How many mini-batches the worker, or every rank, had yielded.
        earlier: What others had yielded of the epoch before.
    """

    epoch: int
    world_size: int = 1
    num_workers: int = 0
    worker_id: int | None = None
    n_yielded: int = 0
    earlier: tuple[Stage, ...] = ()

    def to_dict(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a dataset that has this identity."""
        place = attrs.asdict(self, recurse=False)
        stages = [list(attrs.astuple(stage)) for stage in self.earlier]
        return {"version": VERSION, **identity, **place, "earlier": stages}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], identity: Mapping[str, Any]) -> Position:
        """Return the position that a state tells.

        Raises:
            TypeError: If it is no state.
            ValueError: If it is the state of a dataset with another identity.
        """
        if not isinstance(state, Mapping) or "n_yielded" not in state:
            raise TypeError(f"state={state!r} must be what state_dict() returned; load that of this dataset.")
        if state.get("version") != VERSION:
            raise ValueError(
                f"state must have version {VERSION}, not {state.get('version')!r}; load it with the "
                "tiledbsoma-ml that made it."
            )
        differences = [
            f"{name} is {state.get(name)!r} there, not {value!r}"
            for name, value in identity.items()
            if state.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"state must be of this dataset, but {'; '.join(differences)}; make the dataset as it was, "
                "or start anew without the state."
            )
        place = {name: state[name] for name in _OF_PLACE}
        return cls(**{**place, "earlier": tuple(Stage(*stage) for stage in state["earlier"])})

    def rest_of(self, part: EpochPart, scope: ShuffleScope) -> EpochPart:
        """Return what is left of a part of this epoch.

        Raises:
            ValueError: If there are other numbers of ranks or workers, and chunks are shuffled by parts.
        """
        place, n_workers = part.place, max(self.num_workers, 1)
        if (self.world_size, n_workers) == (place.world_size, place.n_workers):
            return self._rest_of_same(part)
        if self._over and scope == "partition":
            raise ValueError(
                f"state must be of {place.world_size} ranks with {place.n_workers} workers, but is of "
                f"{self.world_size} with {n_workers}; resume with as many, or use shuffle_scope='global' "
                "from the start."
            )
        return attrs.evolve(part, earlier=self._over)

    def _rest_of_same(self, part: EpochPart) -> EpochPart:
        if self.worker_id is not None:
            worker_id, skip = self.worker_id, self.n_yielded
        else:
            # A `DataLoader` always begins with its first worker: that one takes the place of the worker whose
            # turn it is, and so on.
            n_workers = part.place.n_workers
            worker_id = (part.place.worker_id + self.n_yielded) % n_workers
            skip = n_yielded_by(worker_id, n_workers, self.n_yielded)
        place = attrs.evolve(part.place, worker_id=worker_id)
        return attrs.evolve(part, place=place, skip=skip, earlier=self.earlier)

    @property
    def _over(self) -> tuple[Stage, ...]:
        """What was yielded of the epoch so far."""
        if not self.n_yielded:
            return self.earlier
        return (*self.earlier, Stage(self.world_size, max(self.num_workers, 1), self.n_yielded))
