"""`MiniBatchIterable` of tiledbsoma-ml 0.1.0: makes mini-batches of IO batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import attrs
import numpy as np
import torch

from tiledbsoma_ml._batch.assemble import Assembly, DeviceShuffle
from tiledbsoma_ml._batch.read_ahead import Piece
from tiledbsoma_ml._common import MiniBatch, check_bool, check_count
from tiledbsoma_ml._io_batch_iterable import IOBatch
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._threads import ClosedWhenDropped


@attrs.frozen
class MiniBatchIterable(Iterable[MiniBatch]):
    """An iterable over mini-batches of the rows of IO batches.

    A mini-batch can have rows of several IO batches; only the last mini-batch may be smaller.

    Args:
        io_batch_iter: The IO batches.
        batch_size: Rows per mini-batch.
        use_eager_fetch: Whether to make the next mini-batch while this one is used.
        return_sparse_X: Whether to return `X` sparse.
        gpu_shuffle: Whether rows are permuted on the device, by the generator of [seed, epoch].
        gpu_shuffle_mode: "iobatch" to permute the rows of each IO batch, or "minibatch" to permute those of
            each mini-batch, by one draw for each, in sequence.
        device: Device of `X`, which is a torch tensor then; if None, `X` is an array of NumPy or SciPy.
        seed: The seed of the shuffle on the device.
        epoch: The epoch of the shuffle on the device.
    """

    io_batch_iter: Iterable[IOBatch]
    batch_size: int
    use_eager_fetch: bool = True
    return_sparse_X: bool = False
    gpu_shuffle: bool = False
    gpu_shuffle_mode: str = attrs.field(
        default="iobatch", validator=attrs.validators.in_(["iobatch", "minibatch"])
    )
    device: torch.device | None = attrs.field(default=None, converter=attrs.converters.optional(torch.device))
    seed: int | None = None
    epoch: int = 0

    def __attrs_post_init__(self) -> None:
        check_count("batch_size", self.batch_size, suggestion=128)
        for name in ("use_eager_fetch", "return_sparse_X", "gpu_shuffle"):
            check_bool(name, getattr(self, name))
        if self.gpu_shuffle and self.device is None:
            raise ValueError(
                "device=None must be a device where gpu_shuffle=True; try device='cuda' or 'cpu'."
            )

    def __iter__(self) -> ClosedWhenDropped[MiniBatch]:
        assembly = Assembly(
            batch_size=self.batch_size,
            is_sparse=self.return_sparse_X,
            device=self.device,
            shuffle=self._shuffle() if self.gpu_shuffle else None,
            use_eager_fetch=self.use_eager_fetch,
        )
        return ClosedWhenDropped(assembly.mini_batches(_as_pieces(self.io_batch_iter)))

    def _shuffle(self) -> DeviceShuffle:
        of_io_batches = self.gpu_shuffle_mode == "iobatch"
        unit: Literal["io_batch", "mini_batch"] = "io_batch" if of_io_batches else "mini_batch"
        return DeviceShuffle(unit=unit, seed=self.seed, epoch=self.epoch)


def _as_pieces(io_batches: Iterable[IOBatch]) -> Iterator[Piece]:
    """Yield IO batches as rows with dummy joinids, which are not used: `obs` may lack the real ones."""
    for X, obs in io_batches:
        yield Rows(obs_joinids=np.full(len(obs), -1), X=X, obs=obs), True
