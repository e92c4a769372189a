"""Where an epoch stands, as a small dictionary: what a checkpoint keeps of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from tiledbsoma_ml._deal import Stage, n_yielded_by
from tiledbsoma_ml._query_ids import Partition

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

    def resumed_by(self, place: Partition) -> tuple[Partition, int, tuple[Stage, ...]] | None:
        """Return who continues it here, how many mini-batches it skips, and what others did before.

        None where there are other numbers of ranks or workers. A `DataLoader` always begins with its first
        worker: the workers take on the parts in turn, beginning with the one whose turn it is.
        """
        n_workers = max(self.num_workers, 1)
        if (self.world_size, n_workers) != (place.world_size, place.n_workers):
            return None
        if self.worker_id is not None:
            return attrs.evolve(place, worker_id=self.worker_id), self.n_yielded, self.earlier
        worker = (place.worker_id + self.n_yielded) % n_workers
        skip = n_yielded_by(worker, n_workers, self.n_yielded)
        return attrs.evolve(place, worker_id=worker), skip, self.earlier

    def as_stage(self) -> tuple[Stage, ...]:
        """Return what was yielded of the epoch, for others who go on."""
        if not self.n_yielded:
            return self.earlier
        return (*self.earlier, Stage(self.world_size, max(self.num_workers, 1), self.n_yielded))
