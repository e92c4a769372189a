"""The rank of this process in distributed training, and its number among the workers of a `DataLoader`.

| variable | set by | used when |
| --- | --- | --- |
| `torch.distributed` | the caller of `init_process_group` | it is initialized |
| `RANK`, `WORLD_SIZE` | torchrun, most launchers | both are set |
| `NODE_RANK`, `LOCAL_RANK`, `WORLD_SIZE` | Lightning's launcher | no `RANK` is set |
| `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` | srun, for each of its tasks | none of the others is set |

`torch.distributed` and `torch.utils.data` are called through their modules, so that tests and embedding
frameworks can replace them.
"""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch

_ACCELERATE = "accelerate.data_loader"
_DEALERS = ("DataLoaderDispatcher", "IterableDatasetShard")


def get_distributed_rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks; (0, 1) outside distributed training.

    Raises:
        ValueError: If the environment names ranks that do not fit together.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _checked(_from_env("RANK"), _from_env("WORLD_SIZE"))
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _checked(_rank_on_this_node(), _from_env("WORLD_SIZE"))
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        return _checked(_from_env("SLURM_PROCID"), _from_env("SLURM_STEP_NUM_TASKS"))
    return 0, 1


def get_worker_id_and_num() -> tuple[int, int]:
    """Return the number of this `DataLoader` worker and the number of workers; (0, 1) outside a worker."""
    info = torch.utils.data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def dealt_again_by() -> str | None:
    """Return the class of Accelerate that is asking for mini-batches, if it deals them to ranks itself.

    Accelerate's `prepare` does not change the dataset, so only the call stack shows it. A forked process has
    the stack of its parent.
    """
    frame: FrameType | None = sys._getframe() if _ACCELERATE in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == _ACCELERATE:
            name = type(frame.f_locals.get("self")).__name__
            if name in _DEALERS:
                return name
        frame = frame.f_back
    return None


def _rank_on_this_node() -> int:
    node, local = _from_env("NODE_RANK", 0), _from_env("LOCAL_RANK")
    if node == 0:
        return local
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"NODE_RANK={node} and LOCAL_RANK={local} do not tell the rank without LOCAL_WORLD_SIZE; "
            "set RANK, or initialize torch.distributed before iterating."
        )
    return node * _from_env("LOCAL_WORLD_SIZE") + local


def _from_env(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as err:
        raise ValueError(
            f"{name}={value!r} in the environment must be an integer; correct or unset it."
        ) from err


def _checked(rank: int, world_size: int) -> tuple[int, int]:
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} must lie in 0 … {world_size - 1} (WORLD_SIZE={world_size}); "
            "correct RANK and WORLD_SIZE in the environment, or unset both."
        )
    return rank, world_size
