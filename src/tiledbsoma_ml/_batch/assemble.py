"""Rows become mini-batches: dense, sparse, or on a device."""

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

KEPT_BATCHES = 3
"""Memory of so many dense mini-batches that nobody holds is kept for later ones."""

RowsOnDevice: TypeAlias = Rows[DeviceRows]

_X = TypeVar("_X", NDArrayNumber, sparse.csr_matrix, torch.Tensor)


@attrs.frozen(kw_only=True)
class DeviceShuffle:
    """How rows are permuted on a device: by the generator of [seed, epoch], one draw for each unit.

    Attributes:
        unit: What is permuted: the rows that are read at once, or those of each mini-batch.
        seed: The seed of the shuffle.
        epoch: The epoch of the shuffle.
        n_earlier: Mini-batches of the epoch that came before; their draws are passed over.
    """

    unit: Literal["io_batch", "mini_batch"]
    seed: int | None
    epoch: int
    n_earlier: int = 0


@attrs.frozen(kw_only=True)
class Assembly:
    """How mini-batches are made of rows.

    Mini-batches run on across the borders of what comes together; only the last one may be smaller.

    Attributes:
        batch_size: Rows of a mini-batch.
        is_sparse: Whether `X` is sparse.
        device: Where `X` is put, as a torch tensor; NumPy and SciPy on the CPU if None.
        shuffle: How rows are permuted on the device, if they are.
        padding: How repeated rows are marked, if they are.
        use_eager_fetch: Whether the next mini-batch is made while this one is used.
    """

    batch_size: int
    is_sparse: bool
    device: torch.device | None = None
    shuffle: DeviceShuffle | None = None
    padding: Padding | None = None
    use_eager_fetch: bool = True

    def mini_batches(self, pieces: Iterable[Piece]) -> Generator[MiniBatch, None, None]:
        """Yield the mini-batches of rows that come in pieces."""
        made = self._on_cpu(pieces) if self.device is None else self._on_device(pieces, self.device)
        with closing(EagerIterator(made) if self.use_eager_fetch else made) as mini_batches:
            yield from mini_batches

    def _on_cpu(self, pieces: Iterable[Piece]) -> Generator[MiniBatch, None, None]:
        pool: Pool | None = None
        for parts in rebatch((rows for rows, _ in pieces), self.batch_size, Rows.slice):
            matrices = [part.X for part in parts]
            if self.is_sparse:
                yield self._finished(concat_toscipy(matrices), parts)
                continue
            n_bytes = self.batch_size * matrices[0].shape[1] * matrices[0].dtype.itemsize
            pool = pool or Pool(KEPT_BATCHES * n_bytes)
            yield self._finished(_concat_tonumpy(matrices, pool), parts)

    def _on_device(self, pieces: Iterable[Piece], device: torch.device) -> Generator[MiniBatch, None, None]:
        shuffle = self.shuffle
        rng = None if shuffle is None else seeded_rng(shuffle.seed, shuffle.epoch)
        of_mini_batches = rng if shuffle is not None and shuffle.unit == "mini_batch" else None
        if shuffle is not None and of_mini_batches is not None:
            for _ in range(shuffle.n_earlier):
                of_mini_batches.permutation(self.batch_size)
        on_device = _put(pieces, device, None if of_mini_batches is not None else rng)
        for parts in rebatch(on_device, self.batch_size, Rows.slice):
            whole = Rows.concat(parts)
            if of_mini_batches is not None:
                whole = whole.take(of_mini_batches.permutation(len(whole)))
            yield self._finished(whole.X.to_sparse() if self.is_sparse else whole.X.to_dense(), [whole])

    def _finished(
        self, X: _X, parts: Sequence[Rows[CSR_IO_Buffer]] | Sequence[Rows[DeviceRows]]
    ) -> MiniBatch:
        """Return a mini-batch; the one row of a dense `X` is a vector where mini-batches hold one row."""
        obs = concat_obs([part.obs for part in parts])
        if self.padding is not None:
            obs = self.padding.mark(obs, np.concatenate([part.obs_joinids for part in parts]))
        return X[0] if self.batch_size == 1 and not self.is_sparse else X, obs


def _put(
    pieces: Iterable[Piece], device: torch.device, rng: np.random.Generator | None
) -> Iterator[RowsOnDevice]:
    """Yield the rows on the device; with `rng`, those that are read at once are permuted there."""
    together: list[RowsOnDevice] = []
    for rows, is_last in pieces:
        on_device = rows.to(device)
        if rng is None:
            yield on_device
            continue
        together.append(on_device)
        if is_last:
            whole, together = Rows.concat(together), []
            yield whole.take(rng.permutation(len(whole)))


def _concat_tonumpy(matrices: Sequence[CSR_IO_Buffer], pool: Pool) -> NDArrayNumber:
    first = matrices[0]
    out = pool.empty((sum(map(len, matrices)), first.shape[1]), first.dtype)
    out.fill(0)
    filled = 0
    for matrix in matrices:
        matrix.fill_dense(0, len(matrix), out[filled : filled + len(matrix)])
        filled += len(matrix)
    return out
