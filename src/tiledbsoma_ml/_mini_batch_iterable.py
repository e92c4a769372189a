"""IO batches become mini-batches: dense, sparse, or on a device."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeAlias, TypeVar

import attrs
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from tiledbsoma_ml._common import MiniBatch, NDArrayNumber, check_count, seeded_rng
from tiledbsoma_ml._csr import CSR_IO_Buffer, concat_toscipy
from tiledbsoma_ml._device import DeviceRows
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._io_batch_iterable import IOBatch
from tiledbsoma_ml._pool import Pool
from tiledbsoma_ml._threads import ClosedWhenDropped

MANY_CATEGORIES = 1000
"""From so many on, `pd.concat` is slower than what is done instead."""

_Rows = TypeVar("_Rows", CSR_IO_Buffer, DeviceRows)

Pieces: TypeAlias = list[tuple[_Rows, int, int]]
"""Rows of a mini-batch: matrices, each with the numbers of its first row and of the row after its last."""

KEPT_BATCHES = 3
"""Memory of so many dense mini-batches that nobody holds is kept for later ones."""


@attrs.frozen
class MiniBatchIterable(Iterable[MiniBatch]):
    """The rows of IO batches, `batch_size` at a time.

    Mini-batches run on across the borders of IO batches; only the last one may be smaller.

    Args:
        io_batch_iter: The IO batches.
        batch_size: Rows per mini-batch.
        use_eager_fetch: Whether to make the next mini-batch while this one is used.
        return_sparse_X: Whether to return `X` sparse.
        gpu_shuffle: Whether rows are permuted on the device, by the generator of [seed, epoch].
        gpu_shuffle_mode: "iobatch", to permute the rows of each IO batch, or "minibatch", to permute those of
            each mini-batch; one draw for each, in sequence.
        device: Where `X` is put, as a torch tensor; NumPy and SciPy on the CPU if None.
        seed: Of the shuffle on the device.
        epoch: Of the shuffle on the device.
        n_earlier: Mini-batches of the epoch that came before: their draws are passed over.
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
    n_earlier: int = 0

    def __attrs_post_init__(self) -> None:
        check_count("batch_size", self.batch_size, suggestion=128)
        if self.gpu_shuffle and self.device is None:
            raise ValueError(
                "device=None must be a device where gpu_shuffle=True; try device='cuda' or 'cpu'."
            )

    def __iter__(self) -> ClosedWhenDropped[MiniBatch]:
        return ClosedWhenDropped(self._mini_batches())

    def _mini_batches(self) -> Generator[MiniBatch, None, None]:
        made = self._on_cpu() if self.device is None else self._on_device(self.device)
        with closing(EagerIterator(made) if self.use_eager_fetch else made) as mini_batches:
            yield from mini_batches

    def _on_cpu(self) -> Generator[MiniBatch, None, None]:
        pool: Pool | None = None
        for pieces, obs in cut(self.io_batch_iter, self.batch_size):
            if self.return_sparse_X:
                yield concat_toscipy(pieces), obs
                continue
            rows, *_ = pieces[0]
            pool = pool or Pool(KEPT_BATCHES * self.batch_size * rows.shape[1] * rows.dtype.itemsize)
            yield self._squeezed(_concat_tonumpy(pieces, pool)), obs

    def _on_device(self, device: torch.device) -> Generator[MiniBatch, None, None]:
        rng = seeded_rng(self.seed, self.epoch) if self.gpu_shuffle else None
        within_mini_batch = self.gpu_shuffle_mode == "minibatch"
        if rng is not None and within_mini_batch:
            for _ in range(self.n_earlier):
                rng.permutation(self.batch_size)
        on_device = _put_io_batches(self.io_batch_iter, device, None if within_mini_batch else rng)
        for pieces, obs in cut(on_device, self.batch_size):
            rows = DeviceRows.concat([part.take(np.arange(start, stop)) for part, start, stop in pieces])
            if rng is not None and within_mini_batch:
                order = rng.permutation(len(obs))
                rows, obs = rows.take(order), _take_obs(obs, order)
            yield self._squeezed(rows.to_sparse() if self.return_sparse_X else rows.to_dense()), obs

    def _squeezed(self, X: _X) -> _X:
        """Return the one row of a dense `X` as a vector where mini-batches hold one row."""
        return X[0] if self.batch_size == 1 and not self.return_sparse_X else X


_X = TypeVar("_X", NDArrayNumber, sparse.csr_matrix, torch.Tensor)


def cut(
    io_batches: Iterable[tuple[_Rows, pd.DataFrame]], batch_size: int
) -> Iterator[tuple[Pieces[_Rows], pd.DataFrame]]:
    """Yield the rows of IO batches `batch_size` at a time: pieces of `X`, not yet put together, and `obs`."""
    pieces: Pieces[_Rows] = []
    obs_pieces: list[pd.DataFrame] = []
    room = batch_size
    for rows, obs in io_batches:
        start = 0
        while start < len(rows):
            stop = min(start + room, len(rows))
            pieces.append((rows, start, stop))
            obs_pieces.append(obs.iloc[start:stop])
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces, _concat_obs(obs_pieces)
                pieces, obs_pieces, room = [], [], batch_size
    if pieces:
        yield pieces, _concat_obs(obs_pieces)


def _put_io_batches(
    io_batches: Iterable[IOBatch], device: torch.device, rng: np.random.Generator | None
) -> Iterator[tuple[DeviceRows, pd.DataFrame]]:
    """Yield the IO batches on the device; with `rng`, permuted there."""
    for csr, obs in io_batches:
        csr.sort_indices()
        rows = DeviceRows.put(csr.indptr, csr.indices, csr.data, csr.shape[1], device)
        if rng is None:
            yield rows, obs
        else:
            order = rng.permutation(len(obs))
            yield rows.take(order), _take_obs(obs, order)


def _concat_tonumpy(pieces: Pieces[CSR_IO_Buffer], pool: Pool) -> NDArrayNumber:
    n_rows = sum(stop - start for _, start, stop in pieces)
    first = pieces[0][0]
    out = pool.empty((n_rows, first.shape[1]), first.dtype)
    out.fill(0)
    filled = 0
    for csr, start, stop in pieces:
        csr.fill_dense(start, stop, out[filled : filled + stop - start])
        filled += stop - start
    return out


def _concat_obs(pieces: list[pd.DataFrame]) -> pd.DataFrame:
    first = pieces[0]
    if len(pieces) == 1:
        return first.reset_index(drop=True)
    if not any(_has_many_categories(dtype) for dtype in first.dtypes):
        return pd.concat(pieces, ignore_index=True)
    columns = {name: _concat_column([piece[name] for piece in pieces]) for name in first}
    return pd.DataFrame(columns, copy=False)


def _concat_column(pieces: list[pd.Series[Any]]) -> Any:
    """Do what `pd.concat` does, which hashes all categories, though pieces of one column have the same."""
    dtype: Any = pieces[0].dtype
    if _has_many_categories(dtype) and all(_is_same(dtype, piece.dtype) for piece in pieces[1:]):
        codes = np.concatenate([piece.cat.codes.to_numpy() for piece in pieces])
        return pd.Categorical.from_codes(codes, dtype=dtype)
    return pd.concat(pieces, ignore_index=True)


def _has_many_categories(dtype: Any) -> bool:
    return isinstance(dtype, pd.CategoricalDtype) and len(dtype.categories) > MANY_CATEGORIES


def _is_same(dtype: Any, other: Any) -> bool:
    return (
        isinstance(other, pd.CategoricalDtype)
        and dtype.ordered == other.ordered
        and dtype.categories.equals(other.categories)
    )


def _take_obs(obs: pd.DataFrame, order: NDArray[np.int64]) -> pd.DataFrame:
    return obs.take(order).reset_index(drop=True)
