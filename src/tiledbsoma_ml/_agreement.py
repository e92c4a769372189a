"""Ranks that iterate together make sure, before the first mini-batch, that they iterate the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from tiledbsoma_ml._deal import ShuffleScope

logger = logging.getLogger("tiledbsoma_ml")


def agreed_seed(
    identity: Mapping[str, Any], seed: int | None, *, scope: ShuffleScope, world_size: int
) -> int:
    """Return the seed of all ranks: the one that was given to them, or that which rank 0 drew.

    All ranks call this at once where torch.distributed is initialized.

    Args:
        identity: What must be the same on all ranks; "seed" is that which this rank would use.
        seed: What was given to this rank.
        scope: Among which rows chunks are shuffled.
        world_size: Number of ranks.

    Raises:
        ValueError: If ranks differ; or if they have no means to agree on a seed and need one.
    """
    drawn_seed: int = identity["seed"]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if seed is None and scope == "global":
            raise ValueError(
                f"seed=None must be a number where {world_size} ranks share one shuffle and have no "
                "torch.distributed to agree on one; try seed=42."
            )
        return drawn_seed
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, (drawn_seed, {**identity, "seed": seed}))
    drawn_seed, expected = of_ranks[0]
    for rank, (_, found) in enumerate(of_ranks):
        for name, value in expected.items():
            if found[name] != value:
                raise ValueError(
                    f"{name} must be the same on all ranks, but is {value!r} on rank 0 and {found[name]!r} "
                    f"on rank {rank}; make the dataset with the same query, options and seeds everywhere."
                )
    if seed is None and torch.distributed.get_rank() == 0:
        logger.info("seed=None: all %d ranks use seed=%d, drawn by rank 0", world_size, drawn_seed)
    return drawn_seed


def log_parts(world_size: int, n_workers: int) -> None:
    """Tell what shuffling by parts means, where there are several."""
    if world_size * n_workers > 1:
        logger.info(
            "shuffle_scope='partition' shuffles each of the %d parts of ranks and workers by itself, of the "
            "same rows in every epoch; 'global' shuffles the whole query and deals it anew each time",
            world_size * n_workers,
        )
