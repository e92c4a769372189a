"""The mini-batches of a planned part of an epoch, made as the options of a dataset say."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import torch

from tiledbsoma_ml._batch.assemble import Assembly, DeviceShuffle
from tiledbsoma_ml._batch.random_access import random_access_mini_batches
from tiledbsoma_ml._batch.read_ahead import Piece, read_ahead
from tiledbsoma_ml._common import MiniBatch
from tiledbsoma_ml._dataset.options import Options, ShuffleMode
from tiledbsoma_ml._dataset.read_size import next_read_size
from tiledbsoma_ml._distributed import get_worker_id_and_num
from tiledbsoma_ml._order.plan import PartPlan
from tiledbsoma_ml._rows import Padding
from tiledbsoma_ml._source import RandomAccess, Reader, TiledReader


def mini_batches(planned: PartPlan, reader: Reader, options: Options) -> Generator[MiniBatch, None, None]:
    """Yield the mini-batches of a part of an epoch, and close the reader at the end."""
    if options.device is None and isinstance(reader, RandomAccess):
        with closing(reader):
            yield from random_access_mini_batches(
                planned.io_batches(),
                reader,
                batch_size=options.batch_size,
                is_sparse=options.return_sparse_X,
                padding=_padding(planned, options),
                use_eager_fetch=options.use_eager_fetch,
            )
        return
    pieces = _pieces(planned, reader, options)
    made = assembly(planned, options).mini_batches(pieces)
    # The reader is closed first, so that no thread waits for rows any longer. `yield from` would first close
    # what waits.
    with closing(pieces), closing(made), closing(reader):
        for mini_batch in made:  # noqa: UP028
            yield mini_batch


def pieces_of_worker(
    planned: PartPlan, reader: Reader, options: Options
) -> Generator[tuple[int, Piece], None, None]:
    """Yield the rows that this worker reads, with its number; the loader makes mini-batches of them."""
    worker, _ = get_worker_id_and_num()
    with closing(_pieces(planned, reader, options)) as pieces:
        yield from ((worker, (rows.narrowed(), is_last)) for rows, is_last in pieces)


def leaves_device_work_to_loader(options: Options, *, is_told: bool) -> bool:
    """Return whether the training process makes mini-batches of what this worker reads.

    Args:
        options: The options of the dataset.
        is_told: Whether this is a worker of an `experiment_dataloader`.

    Raises:
        RuntimeError: If this is a worker of another loader, which cannot do device work.
    """
    if options.device is None or torch.utils.data.get_worker_info() is None:
        return False
    if not is_told:
        raise RuntimeError(
            f"device={str(options.device)!r} with workers must be loaded by `experiment_dataloader`, which "
            "does the device work in the training process; use it in place of `DataLoader`."
        )
    return True


def assembly(planned: PartPlan, options: Options, *, in_worker: bool = False) -> Assembly:
    """Return how the mini-batches of a part of an epoch are made of its rows.

    Args:
        planned: The part of the epoch.
        options: The options of the dataset.
        in_worker: Whether a worker reads the rows, so that no thread need read ahead here.
    """
    return Assembly(
        batch_size=options.batch_size,
        is_sparse=options.return_sparse_X,
        device=options.device,
        shuffle=_device_shuffle(planned, options),
        padding=_padding(planned, options),
        use_eager_fetch=options.use_eager_fetch and not in_worker,
    )


def _pieces(planned: PartPlan, reader: Reader, options: Options) -> Generator[Piece, None, None]:
    next_size = None
    if planned.plan.io_batch_size != "auto" and isinstance(reader, TiledReader):
        # The windows of "auto" are as large as memory holds, others need not be.
        next_size = next_read_size(planned, reader)
    eager = options.use_eager_fetch
    return read_ahead(planned.io_batches(), reader, use_eager_fetch=eager, next_size=next_size)


def _device_shuffle(planned: PartPlan, options: Options) -> DeviceShuffle | None:
    of_mini_batches = options.shuffle_mode is ShuffleMode.GPU_MINIBATCH
    of_io_batches = options.shuffle_mode is ShuffleMode.GPU_IOBATCH and not planned.permutes
    if not options.shuffle or not (of_mini_batches or of_io_batches):
        return None
    return DeviceShuffle(
        unit="mini_batch" if of_mini_batches else "io_batch",
        seed=planned.part.seed,
        epoch=planned.part.epoch,
        n_earlier=planned.first_mini_batch,
    )


def _padding(planned: PartPlan, options: Options) -> Padding:
    name = options.padding_column_name
    found = planned.padding() if name is not None else planned.ids.obs_joinids[:0]
    return Padding(column_name=name, obs_joinids=found)
