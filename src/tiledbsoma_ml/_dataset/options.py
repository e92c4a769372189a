"""`Options`: the settings of a dataset, checked where they enter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from enum import StrEnum
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import attrs
import torch

from tiledbsoma_ml._budget import Budget, parse_bytes
from tiledbsoma_ml._common import absolute_path, check_bool, check_choice, check_count, check_distinct, warn
from tiledbsoma_ml._order.plan import Plan
from tiledbsoma_ml._order.share import ShuffleScope
from tiledbsoma_ml._order.sizes import Size
from tiledbsoma_ml._query_ids import Tail
from tiledbsoma_ml._source import Fields


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


DEFAULT_OBS_COLUMN_NAMES: Sequence[str] = ("soma_joinid",)
DEFAULT_SHUFFLE_CHUNK_SIZE = 64
DEFAULT_IO_BATCH_SIZE = 65_536
DEFAULT_MEMORY_BUDGET = "2GiB"

MAX_SIZE = 2**63 - 1

OF_SHUFFLING = frozenset({"mixing", "shuffle_chunk_size", "shuffle_mode"})
"""Options that change nothing where rows come in the order of the query."""


@attrs.frozen(kw_only=True)
class Options:
    """The settings of a dataset, checked and resolved; `ExperimentDataset` describes each.

    Attributes:
        obs_column_names: As the dataset has it, and so are the others.
        batch_size: A number.
        io_batch_size: A number, or "auto".
        shuffle: Whether rows are shuffled.
        shuffle_chunk_size: A number, or "auto".
        seed: None where one is to be drawn.
        return_sparse_X: Whether `X` is sparse.
        use_eager_fetch: Whether threads read ahead.
        shuffle_mode: Where rows are shuffled.
        device: Where `X` is put; None for NumPy and SciPy.
        memory_budget: Bytes.
        mixing: A share, or None.
        window_dir: An absolute path, or None.
        window_budget: Bytes; 0 without a folder.
        shuffle_scope: "partition" or "global".
        tail: "drop" or "pad".
        padding_column_name: A name, or None.
        ranks: (rank, number of ranks), or None.
    """

    obs_column_names: tuple[str, ...]
    batch_size: int
    io_batch_size: Size
    shuffle: bool
    shuffle_chunk_size: Size
    seed: int | None
    return_sparse_X: bool
    use_eager_fetch: bool
    shuffle_mode: ShuffleMode
    device: torch.device | None
    memory_budget: int
    mixing: float | None
    window_dir: Path | None
    window_budget: int
    shuffle_scope: ShuffleScope
    tail: Tail
    padding_column_name: str | None
    ranks: tuple[int, int] | None

    @classmethod
    def check(
        cls,
        *,
        obs_column_names: Sequence[str],
        batch_size: int,
        io_batch_size: Size,
        shuffle: bool,
        shuffle_chunk_size: Size,
        seed: int | None,
        return_sparse_X: bool,
        use_eager_fetch: bool,
        shuffle_mode: ShuffleMode | str,
        device: torch.device | str | None,
        memory_budget: int | str,
        mixing: float | None,
        window_dir: str | os.PathLike[str] | None,
        window_budget: int | str | None,
        shuffle_scope: ShuffleScope,
        tail: Tail,
        padding_column_name: str | None,
        ranks: tuple[int, int] | None,
    ) -> Options:
        """Return the options, as they are given to a dataset.

        Raises:
            ValueError: If a value breaks its rule.
            TypeError: If a value has the wrong type.
        """
        mode = ShuffleMode(shuffle_mode)
        folder, window_bytes = check_window_dir(window_dir, window_budget)
        options = cls(
            obs_column_names=check_distinct("obs_column_names", obs_column_names),
            batch_size=check_count("batch_size", batch_size, suggestion=128),
            io_batch_size=check_size("io_batch_size", io_batch_size, DEFAULT_IO_BATCH_SIZE),
            shuffle=check_bool("shuffle", shuffle),
            shuffle_chunk_size=check_size(
                "shuffle_chunk_size", shuffle_chunk_size, DEFAULT_SHUFFLE_CHUNK_SIZE
            ),
            seed=check_seed(seed),
            return_sparse_X=check_bool("return_sparse_X", return_sparse_X),
            use_eager_fetch=check_bool("use_eager_fetch", use_eager_fetch),
            shuffle_mode=mode,
            device=choose_device(mode, device) if shuffle or device is not None else None,
            memory_budget=parse_bytes("memory_budget", memory_budget),
            mixing=check_mixing(mixing),
            window_dir=folder,
            window_budget=window_bytes,
            shuffle_scope=check_choice("shuffle_scope", shuffle_scope, get_args(ShuffleScope)),
            tail=check_choice("tail", tail, get_args(Tail)),
            padding_column_name=check_padding(padding_column_name, tail, obs_column_names),
            ranks=check_ranks(ranks),
        )
        if options.shuffles_chunks and options.shuffle_scope == "partition":
            check_multiple(options.io_batch_size, options.shuffle_chunk_size)
        return options

    @property
    def shuffles_chunks(self) -> bool:
        """Whether chunks are shuffled, and not only the rows of each mini-batch, or nothing."""
        return self.shuffle and self.shuffle_mode is not ShuffleMode.GPU_MINIBATCH

    @property
    def of_order(self) -> dict[str, Any]:
        """The options that the order of an epoch depends on, beside the seed, by name."""
        of_mini_batches = self.shuffle_mode is ShuffleMode.GPU_MINIBATCH
        return {
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "shuffle_mode": str(self.shuffle_mode) if of_mini_batches else "cpu",
            "shuffle_chunk_size": self.shuffle_chunk_size,
            "io_batch_size": self.io_batch_size,
            "shuffle_scope": self.shuffle_scope,
            "tail": self.tail,
        }

    @property
    def fields(self) -> Fields:
        """What of each row is wanted beside `X`."""
        return Fields(obs_column_names=self.obs_column_names)

    @property
    def plan(self) -> Plan:
        """In which order rows come, as far as that is known without their source."""
        # Windows in a file come in parts, so that it is the CPU that permutes them.
        on_cpu = self.shuffle_mode is ShuffleMode.CPU or self.window_dir is not None
        return Plan(
            shuffle_chunk_size=self.shuffle_chunk_size if self.shuffles_chunks else None,
            io_batch_size=self.io_batch_size,
            batch_size=self.batch_size,
            permutes=self.shuffles_chunks and on_cpu,
            mixing=self.mixing,
            scope=self.shuffle_scope,
            tail=self.tail,
        )

    def budget(self, n_vars: int) -> Budget:
        """Return the memory that reading so many columns may take."""
        return Budget(
            self.memory_budget,
            mini_batch_bytes=0 if self.return_sparse_X else 3 * self.batch_size * n_vars * 4,
            window_dir=self.window_dir,
            window_budget=self.window_budget,
            use_eager_fetch=self.use_eager_fetch,
        )

    def not_in_use(self, *, has_snapshot: bool) -> dict[str, str]:
        """Return the settings that were made and change nothing here, each with the reason."""
        found = {}
        unshuffled = f"shuffle={self.shuffle} leaves rows in the order of the query"
        if self.shuffle and not self.shuffles_chunks:
            unshuffled = f"shuffle_mode={str(self.shuffle_mode)!r} permutes rows within mini-batches alone"
        if not self.shuffles_chunks and self.shuffle_chunk_size not in (DEFAULT_SHUFFLE_CHUNK_SIZE, "auto"):
            found["shuffle_chunk_size"] = unshuffled
        if self.mixing is not None and not self.shuffles_chunks:
            found["mixing"] = unshuffled
        elif self.mixing is not None and self.shuffle_chunk_size != "auto":
            found["mixing"] = f"shuffle_chunk_size={self.shuffle_chunk_size} says how far rows are mixed"
        if not self.shuffle and self.shuffle_mode is not ShuffleMode.CPU:
            found["shuffle_mode"] = unshuffled
        if has_snapshot and self.window_dir is not None:
            found["window_dir"] = "a snapshot is read without windows"
        return found


def warn_of_not_in_use(options: Options, *, has_snapshot: bool) -> dict[str, str]:
    """Return the settings that change nothing here, each with the reason, and warn of each."""
    found = options.not_in_use(has_snapshot=has_snapshot)
    for name, why in found.items():
        warn(f"{name}={getattr(options, name)!r} changes nothing here: {why}; leave it out.")
    return found


def check_size(name: str, value: object, suggestion: int) -> Size:
    """Return a number of rows, or "auto"."""
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name}={value!r} must be a positive integer or 'auto'; try 'auto'.")
        return "auto"
    size = check_count(name, value, suggestion)
    if size > MAX_SIZE:
        raise ValueError(f"{name}={size} must be at most {MAX_SIZE}, the largest joinid; try 'auto'.")
    return size


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
        other = "is_repeated" if name == "is_padding" else "is_padding"
        raise ValueError(f"padding_column_name={name!r} must not be one of obs_column_names; try {other!r}.")
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
    folder = absolute_path(str(window_dir), "window_dir")
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
