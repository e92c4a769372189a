"""`Assembly`: makes mini-batches of rows, dense or sparse, in memory or on a device."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Literal, TypeAlias, TypeVar

import attrs
import numpy as np
import torch
from scipy import sparse

from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._batch.read_ahead import Piece
from tiledbsoma_ml._common import MiniBatch, NDArrayNumber, seeded_rng
from tiledbsoma_ml._csr import CSR_IO_Buffer, concat_toscipy
from tiledbsoma_ml._device import DeviceRows
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._rebatch import rebatch
from tiledbsoma_ml._rows import Padding, Rows, concat_obs

POOL_BATCHES = 3
"""Number of dense mini-batches whose memory is kept for later ones when nobody uses it any longer."""

RowsOnDevice: TypeAlias = Rows[DeviceRows]

_X = TypeVar("_X", NDArrayNumber, sparse.csr_matrix, torch.Tensor)


@attrs.frozen(kw_only=True)
class DeviceShuffle:
    """A permutation of rows on a device, by one draw of the generator of [seed, epoch] for each unit.

    Attributes:
        unit: The rows that are permuted together: those of an IO batch, or those of a mini-batch.
        seed: The seed of the shuffle.
        epoch: The epoch of the shuffle.
        n_earlier: Number of mini-batches of the epoch before these; their draws are skipped.
    """

    unit: Literal["io_batch", "mini_batch"]
    seed: int | None
    epoch: int
    n_earlier: int = 0


@attrs.frozen(kw_only=True)
class Assembly:
    """The settings with which mini-batches are made of rows.

    A mini-batch can have rows of several IO batches; only the last mini-batch may be smaller.

    Attributes:
        batch_size: Rows per mini-batch.
        is_sparse: Whether `X` is sparse.
        device: Device of `X`, which is a torch tensor then; if None, `X` is an array of NumPy or SciPy.
        shuffle: The permutation of rows on the device; None if there is none.
        padding: The marks of repeated rows; None to mark none.
        use_eager_fetch: Whether the next mini-batch is made while this one is used.
    """

    batch_size: int
    is_sparse: bool
    device: torch.device | None = None
    shuffle: DeviceShuffle | None = None
    padding: Padding | None = None
    use_eager_fetch: bool = True

    def mini_batches(self, pieces: Iterable[Piece]) -> Generator[MiniBatch, None, None]:
        """Yield the mini-batches of the rows of pieces."""
        made = self._on_cpu(pieces) if self.device is None else self._on_device(pieces, self.device)
        with closing(EagerIterator(made) if self.use_eager_fetch else made) as mini_batches:
            yield from mini_batches

    def _on_cpu(self, pieces: Iterable[Piece]) -> Generator[MiniBatch, None, None]:
        pool: Pool | None = None
        for cuts in rebatch((rows for rows, _ in pieces), self.batch_size, Rows.slice):
            matrices = [cut.X for cut in cuts]
            if self.is_sparse:
                yield self._finished(concat_toscipy(matrices), cuts)
                continue
            n_bytes = self.batch_size * matrices[0].shape[1] * matrices[0].dtype.itemsize
            pool = pool or Pool(POOL_BATCHES * n_bytes)
            yield self._finished(_concat_tonumpy(matrices, pool), cuts)

    def _on_device(self, pieces: Iterable[Piece], device: torch.device) -> Generator[MiniBatch, None, None]:
        shuffle = self.shuffle
        rng = None if shuffle is None else seeded_rng(shuffle.seed, shuffle.epoch)
        of_mini_batches = rng if shuffle is not None and shuffle.unit == "mini_batch" else None
        if shuffle is not None and of_mini_batches is not None:
            for _ in range(shuffle.n_earlier):
                of_mini_batches.permutation(self.batch_size)
        on_device = _put(pieces, device, None if of_mini_batches is not None else rng)
        for cuts in rebatch(on_device, self.batch_size, Rows.slice):
            rows = Rows.concat(cuts)
            if of_mini_batches is not None:
                rows = rows.take(of_mini_batches.permutation(len(rows)))
            yield self._finished(rows.X.to_sparse() if self.is_sparse else rows.X.to_dense(), [rows])

    def _finished(self, X: _X, cuts: Sequence[Rows[CSR_IO_Buffer]] | Sequence[Rows[DeviceRows]]) -> MiniBatch:
        """Return the mini-batch of `X` and the `obs` of the cuts; a dense `X` of one row becomes a vector."""
        obs = concat_obs([cut.obs for cut in cuts])
        if self.padding is not None:
            obs = self.padding.mark(obs, np.concatenate([cut.obs_joinids for cut in cuts]))
        return X[0] if self.batch_size == 1 and not self.is_sparse else X, obs


def _put(
    pieces: Iterable[Piece], device: torch.device, rng: np.random.Generator | None
) -> Iterator[RowsOnDevice]:
    """Yield the rows on the device. With `rng`, the rows of each IO batch come as one piece, permuted."""
    io_batch: list[RowsOnDevice] = []
    for rows, is_last in pieces:
        on_device = rows.to(device)
        if rng is None:
            yield on_device
            continue
        io_batch.append(on_device)
        if is_last:
            permuted = Rows.concat(io_batch)
            io_batch = []
            yield permuted.take(rng.permutation(len(permuted)))


def _concat_tonumpy(matrices: Sequence[CSR_IO_Buffer], pool: Pool) -> NDArrayNumber:
    first = matrices[0]
    out = pool.empty((sum(map(len, matrices)), first.shape[1]), first.dtype)
    out.fill(0)
    filled = 0
    for matrix in matrices:
        matrix.fill_dense(0, len(matrix), out[filled : filled + len(matrix)])
        filled += len(matrix)
    return out
