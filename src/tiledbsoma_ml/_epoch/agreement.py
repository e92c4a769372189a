"""Checks at the start of each epoch that all ranks iterate over the same rows, with the same seed.

Ranks compare their options in the store of the process group, not by a collective operation. This works with
all backends, and a rank that waits knows which rank is missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tiledbsoma_ml._order.share import ShuffleScope

logger = logging.getLogger("tiledbsoma_ml")

WARN_AFTER_S = 15.0
"""Time after which a rank that waits for others logs a warning."""

_ALONE = "iterate on all ranks alike, or give ExperimentDataset(ranks=(0, 1)) what one rank reads alone"

_meetings: list[str] = []
"""Keys of this process in the store that are not deleted yet."""

_n_meetings = 0


def agreed_seed(
    options: Callable[[], Mapping[str, Any]],
    seed: int | None,
    *,
    drawn_seed: int,
    scope: ShuffleScope,
    world_size: int,
    are_told: bool,
    is_first: bool,
) -> int:
    """Return the seed of all ranks: the seed that the user gave, or else the one that rank 0 drew.

    If there is a process group of torch.distributed, all ranks must call this at the same time.

    Args:
        options: Returns the values that must be the same on all ranks, beside `seed`.
        seed: The seed that the user gave to this rank.
        drawn_seed: The seed that this rank uses if it is alone.
        scope: See `ShuffleScope`.
        world_size: Number of ranks.
        are_told: Whether the user gave the ranks, which may differ from those of the process group.
        is_first: Whether to log a seed that was drawn.

    Raises:
        ValueError: If ranks differ, or if they need a common seed and cannot agree on one.
        TimeoutError: If a rank does not call this before the timeout of the process group.
    """
    store = None if are_told else _store()
    if store is None:
        check_seed_of_all(seed, scope=scope, world_size=world_size)
        return drawn_seed
    verdict = _meet(store, {**options(), "seed": seed}, drawn_seed)
    if "differ" in verdict:
        raise ValueError(verdict["differ"])
    if "missing" in verdict:
        raise _late(verdict["missing"], store.timeout.total_seconds())
    if seed is None and is_first and torch.distributed.get_rank() == 0:
        logger.info("seed=None: all %d ranks use seed=%d, drawn by rank 0", world_size, verdict["seed"])
    return int(verdict["seed"])


def check_seed_of_all(seed: int | None, *, scope: ShuffleScope, world_size: int) -> None:
    """Raise a ValueError if ranks need a common seed and cannot agree on one."""
    if seed is None and scope == "global" and world_size > 1:
        raise ValueError(
            f"seed=None must be a number where {world_size} ranks share one shuffle and cannot agree on one: "
            "without a process group of torch.distributed, or in workers of a plain DataLoader; try seed=42."
        )


def check_dealt_once(dealer: str | None, shuffle: bool, seed: int | None, world_size: int) -> None:
    """Raise a ValueError if Accelerate would divide rows among ranks which are divided here already.

    Args:
        dealer: The class of Accelerate that deals rows to ranks, if one does: see `dealt_again_by`.
        shuffle: Whether rows are shuffled.
        seed: The seed that was given.
        world_size: Number of ranks that rows are dealt to here; 1 if this rank reads everything.
    """
    if dealer is not None and world_size > 1:
        raise ValueError(
            f"Accelerate's prepare deals to all {world_size} ranks what ExperimentDataset deals to "
            "them already, so that most rows were lost; make the dataset with ranks=(0, 1), or do not "
            "prepare its loader."
        )
    if dealer == "IterableDatasetShard" and shuffle and seed is None:
        raise ValueError(
            "seed=None must be a number where each rank takes its share of one order, as Accelerate's "
            "dispatch_batches=False has it; try seed=42."
        )


def check_a_row_each(n_rows: int, world_size: int) -> None:
    """Raise a ValueError if there are fewer rows than ranks, and no row may be repeated."""
    if 0 < n_rows < world_size:
        raise ValueError(
            f"{world_size} ranks must each get a row, but the query has {n_rows}; use fewer ranks, or "
            "tail='pad'."
        )


def _store() -> Any:
    """Return the store of the process group; None if there is no group, whatever `is_initialized` says."""
    distributed = torch.distributed
    if not distributed.is_available() or distributed.group.WORLD is None:
        return None
    return distributed.distributed_c10d._get_default_store()


def _meet(store: Any, options: Mapping[str, Any], drawn_seed: int) -> dict[str, Any]:
    """Store the options of this rank, and return the verdict of rank 0, which compares those of all ranks."""
    global _n_meetings
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    key, limit = f"tiledbsoma_ml/{_n_meetings}", store.timeout.total_seconds()
    keys = [f"{key}/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps([options, drawn_seed]))
    if rank == 0:
        missing = _wait(store, keys, limit)
        if len(missing) == world_size - 1:
            store.delete_key(keys[0])
            raise _late(missing, limit)
        verdict = {"missing": missing} if missing else _compared([json.loads(store.get(k)) for k in keys])
        store.set(key, json.dumps(verdict))
    else:
        if missing := _wait(store, keys[:1], limit):
            store.delete_key(keys[rank])
            raise _late(missing, limit)
        if _wait(store, [key], limit + WARN_AFTER_S):  # rank 0 came, and waits for others
            raise _late([0], limit)
        verdict = json.loads(store.get(key))
    _n_meetings += 1
    _clear(store, [keys[rank], key] if rank == 0 else [keys[rank]])
    return verdict


def _compared(of_ranks: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """Return the verdict: a seed for all ranks, or the difference of the first rank that differs."""
    expected, drawn_seed = of_ranks[0]
    for rank, (found, _) in enumerate(of_ranks):
        for name, value in expected.items():
            if found.get(name) != value:
                return {
                    "differ": f"{name} must be the same on all ranks, but is {value!r} on rank 0 and "
                    f"{found.get(name)!r} on rank {rank}; make the dataset with the same query, options and "
                    f"seeds everywhere, load the same state, {_ALONE}."
                }
    return {"seed": drawn_seed}


def _wait(store: Any, keys: Sequence[str], limit: float) -> list[int]:
    """Wait until all keys exist, but not longer than `limit`; return the indices of missing keys."""
    began, warned, pause = time.monotonic(), False, 0.0005
    while not store.check(list(keys)):
        waited = time.monotonic() - began
        is_long = waited > min(WARN_AFTER_S, limit)
        missing = [k for k, key in enumerate(keys) if not store.check([key])] if is_long else []
        if missing and waited > limit:
            return missing
        if missing and not warned:
            warned = True
            logger.warning("waiting for rank %s to begin the epoch; %s", _listed(missing), _ALONE)
        pause = min(2 * pause, 0.1)
        time.sleep(pause)
    return []


def _late(missing: Sequence[int], limit: float) -> TimeoutError:
    return TimeoutError(
        f"rank {_listed(missing)} must begin the epoch as the others do, but did not within {limit:g} s, the "
        f"timeout of the process group; {_ALONE}."
    )


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown


def _clear(store: Any, keys: Sequence[str]) -> None:
    """Delete this rank's keys of the meeting before; all ranks that came to this one have read them."""
    for key in _meetings:
        store.delete_key(key)
    _meetings[:] = keys
