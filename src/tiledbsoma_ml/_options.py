"""What `ExperimentDataset` takes, checked where it enters."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from enum import StrEnum
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from tiledbsoma_ml._budget import parse_bytes
from tiledbsoma_ml._common import absolute_path, check_count
from tiledbsoma_ml._order.sizes import Size
from tiledbsoma_ml._query_ids import Tail


class ShuffleMode(StrEnum):
    """Where rows are shuffled, and how far. Strings are accepted in its place.

    The device changes where the work is done, never the order: `CPU` and `GPU_IOBATCH` yield the same rows
    in the same order.
    """

    CPU = "cpu"
    """Chunks are shuffled, then the rows of each IO batch, before they are read."""

    GPU_IOBATCH = "gpu_iobatch"
    """The same, but each IO batch goes to the device as it is read and is permuted and made dense there."""

    GPU_MINIBATCH = "gpu_minibatch"
    """Rows are read in the order of the query; those of each mini-batch are permuted on the device."""

    GPU = "gpu_iobatch"
    """Another name of `GPU_IOBATCH`."""

    @classmethod
    def _missing_(cls, value: object) -> ShuffleMode:
        if isinstance(value, str) and value.lower() in {"gpu", *cls}:
            return cls.GPU if value.lower() == "gpu" else cls(value.lower())
        listed = ", ".join(repr(str(mode)) for mode in cls)
        raise ValueError(f"shuffle_mode={value!r} must be one of {listed} or 'gpu'.")


def check_size(name: str, value: object, suggestion: int) -> Size:
    """Return a number of rows, or "auto"."""
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name}={value!r} must be a positive integer or 'auto'; try 'auto'.")
        return "auto"
    return check_count(name, value, suggestion)


def check_multiple(io_batch_size: Size, shuffle_chunk_size: Size) -> None:
    """Raise a ValueError unless an IO batch holds whole chunks, where both sizes are given."""
    if isinstance(io_batch_size, str) or isinstance(shuffle_chunk_size, str):
        return
    if io_batch_size % shuffle_chunk_size:
        raise ValueError(
            f"io_batch_size={io_batch_size} must be a multiple of shuffle_chunk_size={shuffle_chunk_size}; "
            f"try {-(-io_batch_size // shuffle_chunk_size) * shuffle_chunk_size}."
        )


def check_padding(name: str | None, tail: Tail, obs_column_names: Sequence[str]) -> str | None:
    """Return the name of the column that marks padding, if there may be one."""
    if name is not None and tail != "pad":
        raise ValueError(f"padding_column_name={name!r} needs rows that are repeated; add tail='pad'.")
    if name is not None and name in obs_column_names:
        raise ValueError(
            f"padding_column_name={name!r} must not be one of obs_column_names; try 'is_padding'."
        )
    return name


def check_mixing(mixing: object) -> float | None:
    """Return a share from 0.8 to 1, or None."""
    if mixing is None:
        return None
    if isinstance(mixing, bool) or not isinstance(mixing, Real):
        raise TypeError(f"mixing={mixing!r} must be a number from 0.8 to 1, or None; try 0.95.")
    share = float(mixing)
    if not 0.8 <= share <= 1:
        raise ValueError(f"mixing={mixing!r} must lie from 0.8 to 1; try 0.95.")
    return share


def check_seed(seed: int | None) -> int | None:
    """Return a seed, or None."""
    return None if seed is None else check_count("seed", seed, suggestion=42, minimum=0)


def check_ranks(ranks: object) -> tuple[int, int] | None:
    """Return (rank, number of ranks), or None."""
    if ranks is None:
        return None
    rank: Any
    world_size: Any
    try:
        rank, world_size = ranks  # type: ignore[misc]
    except (TypeError, ValueError) as err:
        raise TypeError(
            f"ranks={ranks!r} must be two integers, the rank and the number of ranks; try (0, 1)."
        ) from err
    rank = check_count("ranks", rank, suggestion=0, minimum=0)
    world_size = check_count("ranks", world_size, suggestion=1)
    if rank >= world_size:
        raise ValueError(
            f"ranks=({rank}, {world_size}) must be a rank below the number of ranks; try (0, 1)."
        )
    return rank, world_size


def choose_device(mode: ShuffleMode, device: torch.device | str | None) -> torch.device | None:
    """Return the device that is given, or that a mode needs."""
    if device is not None or mode is ShuffleMode.CPU:
        return None if device is None else torch.device(device)
    if not torch.cuda.is_available():
        raise ValueError(
            f"device=None with shuffle_mode={str(mode)!r} must name a device where CUDA is not available; "
            "try device='cpu'."
        )
    return torch.device("cuda", torch.cuda.current_device())


def check_window_dir(window_dir: object, window_budget: int | str | None) -> tuple[Path | None, int]:
    """Return the folder for windows, if one is asked for, and the bytes that they may take there.

    Raises:
        ValueError: If it is no folder, has less space than the budget, or one comes without the other.
    """
    budget = 0 if window_budget is None else parse_bytes("window_budget", window_budget)
    if window_dir is None:
        if budget:
            raise ValueError("window_budget needs a folder on a local disk; add window_dir='/path'.")
        return None, 0
    folder = absolute_path(str(window_dir))
    if not folder.is_dir():
        raise ValueError(
            f"window_dir={str(folder)!r} must be an existing folder; make it, or choose another."
        )
    if not budget:
        raise ValueError(f"window_dir={str(folder)!r} needs a limit; add window_budget='64GiB'.")
    free = shutil.disk_usage(folder).free
    if free < budget:
        raise ValueError(
            f"window_budget={budget / 2**30:.1f} GiB must fit into window_dir={str(folder)!r}, where "
            f"{free / 2**30:.1f} GiB are free; lower it, or choose another folder."
        )
    return folder, budget
