"""`Position`: the position of an iterator in an epoch, which a checkpoint has as a small dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import attrs

from tiledbsoma_ml._order.plan import EpochPart
from tiledbsoma_ml._order.share import Deal, ShuffleScope, Stage, n_yielded_by
from tiledbsoma_ml._query_ids import Partition

VERSION = 1

MOST = 2**20
"""A number of ranks, or of workers of a rank, that no epoch has had."""

_KEYS = ("epoch", "world_size", "num_workers", "worker_id", "n_yielded", "earlier")


@attrs.frozen(kw_only=True)
class Position:
    """The position of a rank, or of one of its workers, in an epoch.

    Attributes:
        epoch: The number of the epoch.
        world_size: Number of ranks.
        num_workers: Number of workers of each rank; 0 if the training process makes the mini-batches.
        worker_id: The worker whose position this is; None if it is the position of a rank.
        n_yielded: Number of mini-batches that the worker, or each rank, has yielded.
        earlier: The stages of the epoch before a resume with other ranks or workers.
    """

    epoch: int
    world_size: int = 1
    num_workers: int = 0
    worker_id: int | None = None
    n_yielded: int = 0
    earlier: tuple[Stage, ...] = ()

    def to_dict(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a dataset with this identity at this position."""
        position = attrs.asdict(self, recurse=False)
        stages = [list(attrs.astuple(stage)) for stage in self.earlier]
        return {"version": VERSION, **identity, **position, "earlier": stages}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], identity: Mapping[str, Any]) -> Position:
        """Return the position in a state.

        Raises:
            TypeError: If `state` is not the state of a dataset.
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
        if missing := [name for name in _KEYS if name not in state]:
            raise TypeError(
                f"state={state!r} must be what state_dict() returned, but has no {missing[0]!r}; load that "
                "of this dataset."
            )
        n_workers = _whole("num_workers", state["num_workers"], 0, MOST)
        worker_id = state["worker_id"]
        position = cls(
            epoch=_whole("epoch", state["epoch"], 0, 2**63 - 1),
            world_size=_whole("world_size", state["world_size"], 1, MOST),
            num_workers=n_workers,
            worker_id=None if worker_id is None else _whole("worker_id", worker_id, 0, max(n_workers, 1) - 1),
            earlier=_stages(state["earlier"], identity),
        )
        most = position._n_mini_batches(identity)
        return attrs.evolve(position, n_yielded=_whole("n_yielded", state["n_yielded"], 0, most))

    def rest_of(self, part: EpochPart, scope: ShuffleScope) -> EpochPart:
        """Return the rest of a part of this epoch, from this position on.

        Raises:
            ValueError: If the numbers of ranks or workers differ, and the scope is "partition".
        """
        partition, n_workers = part.partition, max(self.num_workers, 1)
        if (self.world_size, n_workers) == (partition.world_size, partition.n_workers):
            return self._rest_of_same(part)
        if self.stages and scope == "partition":
            raise ValueError(
                f"state must be of {partition.world_size} ranks with {partition.n_workers} workers, but is "
                f"of {self.world_size} with {n_workers}; resume with as many, or use shuffle_scope='global' "
                "from the start."
            )
        return attrs.evolve(part, earlier=self.stages)

    def _rest_of_same(self, part: EpochPart) -> EpochPart:
        if self.worker_id is not None:
            worker_id, skip = self.worker_id, self.n_yielded
        else:
            # A `DataLoader` always begins with its first worker. So that worker takes over the rows of the
            # worker whose turn it is, the second worker those of the next one, and so on.
            n_workers = part.partition.n_workers
            worker_id = (part.partition.worker_id + self.n_yielded) % n_workers
            skip = n_yielded_by(worker_id, n_workers, self.n_yielded)
        partition = attrs.evolve(part.partition, worker_id=worker_id)
        return attrs.evolve(part, partition=partition, skip=skip, earlier=self.earlier)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the epoch up to this position."""
        if not self.n_yielded:
            return self.earlier
        return (*self.earlier, Stage(self.world_size, max(self.num_workers, 1), self.n_yielded))

    def _n_mini_batches(self, identity: Mapping[str, Any]) -> int:
        """Return the largest number of mini-batches that the worker or rank can have yielded."""
        deal, n_workers = _deal(identity, self.earlier), max(self.num_workers, 1)
        if self.worker_id is None:
            return deal.n_mini_batches_of_rank(self.world_size, n_workers)
        return deal.n_mini_batches(Partition(0, self.world_size, self.worker_id, n_workers))


def _deal(identity: Mapping[str, Any], earlier: tuple[Stage, ...]) -> Deal:
    return Deal(
        n_rows=identity["n_obs"],
        batch_size=identity["batch_size"],
        tail=identity["tail"],
        scope=identity["shuffle_scope"],
        earlier=earlier,
    )


def _stages(stages: Any, identity: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return the stages of a state, having checked each with the rows that the stages before it left."""
    found: tuple[Stage, ...] = ()
    if not isinstance(stages, Sequence) or not all(isinstance(s, Sequence) and len(s) == 3 for s in stages):
        raise TypeError(
            f"earlier={stages!r} in state must be a list of three numbers each; load a state as it was."
        )
    for world_size, n_workers, n_yielded in stages:
        world_size = _whole("earlier", world_size, 1, MOST)
        n_workers = _whole("earlier", n_workers, 1, MOST)
        most = _deal(identity, found).n_mini_batches_of_rank(world_size, n_workers)
        found = (*found, Stage(world_size, n_workers, _whole("earlier", n_yielded, 0, most)))
    return found


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a number of a state."""
    way_out = "load a state as it was saved, or start anew without it"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name}={value!r} in state must be an integer, not a {type(value).__name__}; {way_out}."
        )
    number = int(value)
    if not least <= number <= most:
        raise ValueError(f"{name}={number} in state must lie in {least} … {most}; {way_out}.")
    return number
