"""`ExperimentDataset`: a query as an iterable of shuffled mini-batches."""

from __future__ import annotations

import copy
import multiprocessing.context
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from enum import StrEnum
from numbers import Real
from typing import Any

import numpy as np
import tiledbsoma as soma
import torch

from tiledbsoma_ml._budget import Budget, parse_bytes
from tiledbsoma_ml._common import MiniBatch, check_count
from tiledbsoma_ml._distributed import get_distributed_rank_and_world_size, get_worker_id_and_num
from tiledbsoma_ml._epoch import EpochCounter
from tiledbsoma_ml._io_batch_iterable import IOBatch
from tiledbsoma_ml._mini_batch_iterable import MiniBatchIterable
from tiledbsoma_ml._plan import Plan, Size
from tiledbsoma_ml._quality import ShuffleQuality
from tiledbsoma_ml._query_ids import Partition, QueryIDs, SamplingMethod
from tiledbsoma_ml._reader import check_obs_column_names
from tiledbsoma_ml._reading import Reading, check_window_dir
from tiledbsoma_ml._shared_ids import SharedQueryIDs
from tiledbsoma_ml._snapshot_reading import SnapshotReading
from tiledbsoma_ml._window import Room
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.x_locator import XLocator

DEFAULT_OBS_COLUMN_NAMES: Sequence[str] = ("soma_joinid",)
DEFAULT_SHUFFLE_CHUNK_SIZE = 64
DEFAULT_IO_BATCH_SIZE = 65536
DEFAULT_MEMORY_BUDGET = "2GiB"


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


class ExperimentDataset(torch.utils.data.IterableDataset[MiniBatch]):
    """The cells of a SOMA query as mini-batches `(X, obs)`, in a new random order every epoch.

    ```python
    lung = tiledbsoma.AxisQuery(value_filter="tissue == 'lung'")
    with tiledbsoma.Experiment.open(uri) as experiment:
        with experiment.axis_query("RNA", obs_query=lung) as query:
            dataset = ExperimentDataset(query, obs_column_names=["cell_type"], batch_size=1024)
    for X, obs in experiment_dataloader(dataset):
        ...
    ```

    The dataset keeps the joinids of the query and the address of the layer, and opens the experiment anew
    whenever it is iterated: in this process, in workers, or on another machine that it was pickled to.

    An epoch begins with the first mini-batch that is taken from an iterator. `docs/how_it_works.md` tells how
    rows are ordered and dealt to ranks and workers.

    Args:
        query: The cells and genes; its experiment must be open. Either `query` (and `layer_name`), or both
            `x_locator` and `query_ids`.
        layer_name: Layer of `X`, sparse or dense. If left out: "raw" if there is one, else the only layer.
        x_locator: Address of the layer.
        query_ids: Joinids of the rows and columns.
        obs_column_names: Columns of `obs` to return, in this order.
        batch_size: Rows per mini-batch; a worker's last one may be smaller. With 1, dense `X` has the shape
            (n_vars,).
        io_batch_size: Rows read together and shuffled among each other: the shuffle window. A multiple of
            `shuffle_chunk_size`, or "auto": as many as `memory_budget` or `window_budget` holds, from the
            non-zeros that rows of this query have.
        shuffle: Whether to shuffle; rows come in the order of the query otherwise.
        shuffle_chunk_size: Neighbouring rows that stay together until a window is read. Smaller means better
            mixed, larger means faster. "auto" follows the row tiles of the layer as it is stored: whole tiles
            where a window holds the query, so that none is decoded twice in an epoch, else the longest runs
            within tiles that reach `mixing`.
        seed: The same seed gives the same order in every epoch, and in epoch 0 that of tiledbsoma-ml 0.1.0.
            A seed is drawn if None; give one when there are several ranks.
        return_sparse_X: Whether `X` is a `csr_matrix` (`torch.sparse_csr` with `device`) instead of dense.
        use_eager_fetch: Whether to read ahead on threads.
        shuffle_mode: A `ShuffleMode`, or its value as a string. Only read when shuffling.
        device: Where to put `X`, as a `torch.Tensor`. Needed by the GPU modes ("cpu" will do); if left out
            there, the current CUDA device is taken. Device work is done in the training process; with workers
            that takes `experiment_dataloader`.
        memory_budget: Bytes, or a string like "2GiB", for buffers, windows and what is read ahead, in each
            process that reads. It decides the window where `io_batch_size` is "auto". With a `device` an IO
            batch is put together before it goes there, and takes more.
        mixing: Where `shuffle_chunk_size` is "auto": mean entropy of labels in a mini-batch as a share of a
            truly random one's, from 0.8 to 1, as predicted for data stored like the CELLxGENE Census. If
            None, no worse than with the defaults (about 0.96 for mini-batches of 1,024 rows).
        window_dir: Folder on a local disk where windows wait, in files that are unlinked from the start.
        window_budget: Bytes, or a string like "64GiB", that these files may take.
        snapshot: A `Snapshot`, or the path of one: the same mini-batches in the same order, read from local
            disk. If nothing is at the path the query is written there when it is first iterated. True for a
            folder of its own in the user's cache directory. A `Snapshot` that exists needs no query.
            "auto" is a true shuffle then, where memory holds the snapshot.

    Raises:
        ValueError: If a value breaks one of these rules, before any data is read.
        TypeError: If a value has the wrong type.
    """

    def __init__(
        self,
        query: soma.ExperimentAxisQuery | None = None,
        layer_name: str | None = None,
        x_locator: XLocator | None = None,
        query_ids: QueryIDs | None = None,
        obs_column_names: Sequence[str] = DEFAULT_OBS_COLUMN_NAMES,
        batch_size: int = 1,
        io_batch_size: Size = DEFAULT_IO_BATCH_SIZE,
        shuffle: bool = True,
        shuffle_chunk_size: Size = DEFAULT_SHUFFLE_CHUNK_SIZE,
        seed: int | None = None,
        return_sparse_X: bool = False,
        use_eager_fetch: bool = True,
        shuffle_mode: ShuffleMode | str = ShuffleMode.CPU,
        device: torch.device | str | None = None,
        memory_budget: int | str = DEFAULT_MEMORY_BUDGET,
        mixing: float | None = None,
        window_dir: str | os.PathLike[str] | None = None,
        window_budget: int | str | None = None,
        snapshot: Snapshot | str | os.PathLike[str] | bool | None = None,
    ) -> None:
        self.batch_size = check_count("batch_size", batch_size, suggestion=128)
        self.io_batch_size = _check_size("io_batch_size", io_batch_size, DEFAULT_IO_BATCH_SIZE)
        self.shuffle_chunk_size = _check_size(
            "shuffle_chunk_size", shuffle_chunk_size, DEFAULT_SHUFFLE_CHUNK_SIZE
        )
        self.shuffle = shuffle
        self.shuffle_mode = ShuffleMode(shuffle_mode)
        self.device = _choose_device(self.shuffle_mode, device) if shuffle or device is not None else None
        self.seed = _check_seed(seed)
        self.return_sparse_X = return_sparse_X
        self.use_eager_fetch = use_eager_fetch
        self._check_sizes()
        memory_bytes = parse_bytes("memory_budget", memory_budget)
        window_bytes = None if window_budget is None else parse_bytes("window_budget", window_budget)
        folder = check_window_dir(window_dir, window_bytes)
        mixing = _check_mixing(mixing)
        self.x_locator, ids = _locate(query, layer_name, x_locator, query_ids, obs_column_names, snapshot)
        self.obs_column_names = obs_column_names
        self._drawn_seed = np.random.SeedSequence().generate_state(1).item() if seed is None else seed
        self._epoch = EpochCounter()
        self._rank_and_world_size: tuple[int, int] | None = None
        self._shared_ids: SharedQueryIDs | None = None
        plan = Plan(
            shuffle_chunk_size=self.shuffle_chunk_size if self._shuffles_chunks else None,
            io_batch_size=self.io_batch_size,
            batch_size=self.batch_size,
            permutes=shuffle and self.shuffle_mode is ShuffleMode.CPU,
            mixing=mixing,
        )
        self._reading: Reading | SnapshotReading
        if snapshot is not None and snapshot is not False:
            self._reading = SnapshotReading(
                plan,
                snapshot,
                locator=self.x_locator,
                ids=ids,
                layer_name=layer_name,
                obs_column_names=obs_column_names,
                memory_bytes=memory_bytes,
            )
            ids = ids or self._reading.prepare().query_ids
        else:
            assert self.x_locator is not None
            assert ids is not None
            self._reading = Reading.choose(
                self.x_locator,
                ids,
                plan,
                obs_column_names=obs_column_names,
                budget=Budget(memory_bytes, self.x_locator.is_remote),
                window_dir=folder,
                window_budget=window_bytes,
                in_parts=self.device is None,
                is_dense=not return_sparse_X,
            )
            self._reading.log(ids)
        self.query_ids = ids

    def __iter__(self) -> Iterator[MiniBatch]:
        """Yield the mini-batches of one epoch: those of this rank, and of this worker in a worker."""
        epoch = self._epoch.take()
        if self._leaves_device_work_to_loader:
            worker, _ = get_worker_id_and_num()
            io_batches = self._io_batches(epoch, self._reading.room())
            yield from ((worker, io_batch) for io_batch in io_batches)  # type: ignore[misc]
        elif self.device is None and isinstance(self._reading, SnapshotReading):
            yield from self._reading.mini_batches(
                self.query_ids.partitioned(self._partition()),
                return_sparse_X=self.return_sparse_X,
                seed=self._drawn_seed,
                epoch=epoch,
                use_eager_fetch=self.use_eager_fetch,
            )
        else:
            room = self._reading.room()
            io_batches = self._io_batches(epoch, room)
            mini_batches = iter(self._mini_batches(io_batches, epoch, self.use_eager_fetch))
            # Whoever leaves closes the room first: then nobody waits for a window that is still being read.
            with closing(io_batches), closing(mini_batches), closing(room):
                for mini_batch in mini_batches:  # noqa: UP028 - `yield from` would close the mini-batches first
                    yield mini_batch

    def __len__(self) -> int:
        """Return the number of mini-batches of an epoch: those of this rank; in a worker, of this worker."""
        return self._n_mini_batches(self._partition())

    @property
    def shape(self) -> tuple[int, int]:
        """Number of mini-batches, as `len` has it, and number of columns of `X`."""
        return len(self), len(self.query_ids.var_joinids)

    @property
    def epoch(self) -> int:
        """The epoch in progress; between epochs the last one, or what `set_epoch` set."""
        return self._epoch.current

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` (0, 1, …) the next one to be iterated; later ones count on from there.

        Without this call epochs count by themselves.
        """
        self._epoch.set(check_count("epoch", epoch, suggestion=0, minimum=0))

    def random_split(
        self,
        *fracs: float,
        seed: int | None = None,
        method: SamplingMethod = "stochastic_rounding",
    ) -> tuple[ExperimentDataset, ...]:
        """Return datasets with these options over disjoint random parts of the rows; each can be split again.

        See `QueryIDs.random_split` for the arguments.
        """
        parts = self.query_ids.random_split(*fracs, seed=seed, method=method)
        return tuple(self._over(part) for part in parts)

    def shuffle_quality(self, column: str, n_batches: int = 256) -> ShuffleQuality:
        """Return how well mini-batches mix the labels of a column of `obs`, without reading `X`.

        Args:
            column: For instance "dataset_id", whose cells are stored one after the other in the Census.
            n_batches: How many mini-batches to look at, spread evenly over this rank's part of an epoch.
                Workers mix worse, because each has a part of it only.

        Raises:
            ValueError: If the column does not exist, or `n_batches` is not positive.
        """
        n_batches = check_count("n_batches", n_batches, suggestion=256)
        ids = self.query_ids.partitioned(self._partition())
        epoch = self._epoch.current
        return self._reading.quality(ids, column, n_batches, seed=self._drawn_seed, epoch=epoch)

    def _over(self, query_ids: QueryIDs) -> ExperimentDataset:
        dataset = copy.copy(self)
        dataset.query_ids = query_ids
        dataset._epoch = EpochCounter()
        dataset._shared_ids = None
        return dataset

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if multiprocessing.context.get_spawning_popen() is not None:  # for a worker on this machine
            self._shared_ids = self._shared_ids or SharedQueryIDs.of(self.query_ids)
            state["query_ids"] = self._shared_ids
        state["_shared_ids"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if isinstance(ids := state["query_ids"], SharedQueryIDs):
            self.query_ids = ids.query_ids()

    # The flow ---------------------------------------------------------------------------------------------

    def _io_batches(self, epoch: int, room: Room) -> Generator[IOBatch, None, None]:
        return self._reading.io_batches(
            self.query_ids.partitioned(self._partition()),
            seed=self._drawn_seed,
            epoch=epoch,
            use_eager_fetch=self.use_eager_fetch,
            room=room,
        )

    def _mini_batches(
        self, io_batches: Iterator[IOBatch], epoch: int, use_eager_fetch: bool
    ) -> MiniBatchIterable:
        return MiniBatchIterable(
            io_batches,
            batch_size=self.batch_size,
            use_eager_fetch=use_eager_fetch,
            return_sparse_X=self.return_sparse_X,
            gpu_shuffle=self.shuffle and self.shuffle_mode is not ShuffleMode.CPU,
            gpu_shuffle_mode="minibatch" if self.shuffle_mode is ShuffleMode.GPU_MINIBATCH else "iobatch",
            device=self.device,
            seed=self._drawn_seed,
            epoch=epoch,
        )

    def _check_sizes(self) -> None:
        chunk, io_batch = self.shuffle_chunk_size, self.io_batch_size
        if (
            self._shuffles_chunks
            and isinstance(chunk, int)
            and isinstance(io_batch, int)
            and io_batch % chunk
        ):
            raise ValueError(
                f"io_batch_size={io_batch} must be a multiple of shuffle_chunk_size={chunk}; "
                f"try {-(-io_batch // chunk) * chunk}."
            )

    @property
    def _shuffles_chunks(self) -> bool:
        return self.shuffle and self.shuffle_mode is not ShuffleMode.GPU_MINIBATCH

    # Who does what ----------------------------------------------------------------------------------------

    def _partition(self) -> Partition:
        ranks = self._rank_and_world_size or get_distributed_rank_and_world_size()
        return Partition(*ranks, *get_worker_id_and_num())

    def _n_mini_batches(self, partition: Partition) -> int:
        start, stop = partition.bounds(len(self.query_ids.obs_joinids))
        return -(-(stop - start) // self.batch_size)

    @property
    def _leaves_device_work_to_loader(self) -> bool:
        if self.device is None or torch.utils.data.get_worker_info() is None:
            return False
        if self._rank_and_world_size is None:
            raise RuntimeError(
                f"device={str(self.device)!r} with workers must be loaded by `experiment_dataloader`, which "
                "does the device work in the training process; use it in place of `DataLoader`."
            )
        return True

    @contextmanager
    def _handed_to_workers(self) -> Iterator[int]:
        """Begin an epoch that workers will iterate: copies made inside know their rank and the epoch.

        Yields:
            The epoch.
        """
        if isinstance(self._reading, SnapshotReading):
            self._reading.prepare()
        epoch = self._epoch.take()
        self._epoch.set(epoch)
        self._rank_and_world_size = get_distributed_rank_and_world_size()
        try:
            yield epoch
        finally:
            self._rank_and_world_size = None
            self._epoch.take()


def _locate(
    query: soma.ExperimentAxisQuery | None,
    layer_name: str | None,
    x_locator: XLocator | None,
    query_ids: QueryIDs | None,
    obs_column_names: Sequence[str],
    snapshot: object,
) -> tuple[XLocator | None, QueryIDs | None]:
    """Return where the layer is and which rows and columns are wanted, as far as a snapshot need not say."""
    if query is not None and x_locator is None and query_ids is None:
        locator = XLocator.create(query.experiment, query.measurement_name, layer_name)
        check_obs_column_names(obs_column_names, query.experiment.obs)
        return locator, QueryIDs.create(query)
    if query is None and layer_name is None and x_locator is not None and query_ids is not None:
        with x_locator.open() as (_, obs):
            check_obs_column_names(obs_column_names, obs)
        return x_locator, query_ids
    if query is None and x_locator is None and snapshot is not None:
        return None, query_ids
    given = {"query": query, "layer_name": layer_name, "x_locator": x_locator, "query_ids": query_ids}
    listed = ", ".join(name for name, value in given.items() if value is not None) or "none of them"
    raise ValueError(
        "either query (and layer_name), or both x_locator and query_ids must be given, "
        f"not {listed}; try ExperimentDataset(query, layer_name='raw')."
    )


def _check_size(name: str, value: object, suggestion: int) -> Size:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name}={value!r} must be a positive integer or 'auto'; try 'auto'.")
        return "auto"
    return check_count(name, value, suggestion)


def _check_mixing(mixing: object) -> float | None:
    if mixing is None:
        return None
    if isinstance(mixing, bool) or not isinstance(mixing, Real):
        raise TypeError(f"mixing={mixing!r} must be a number from 0.8 to 1, or None; try 0.95.")
    share = float(mixing)
    if not 0.8 <= share <= 1:
        raise ValueError(f"mixing={mixing!r} must lie from 0.8 to 1; try 0.95.")
    return share


def _check_seed(seed: int | None) -> int | None:
    return None if seed is None else check_count("seed", seed, suggestion=42, minimum=0)


def _choose_device(mode: ShuffleMode, device: torch.device | str | None) -> torch.device | None:
    if device is not None or mode is ShuffleMode.CPU:
        return None if device is None else torch.device(device)
    if not torch.cuda.is_available():
        raise ValueError(
            f"device=None with shuffle_mode={str(mode)!r} must name a device where CUDA is not available; "
            "try device='cpu'."
        )
    return torch.device("cuda", torch.cuda.current_device())
