"""The one place where what comes in pieces of any size is cut into pieces of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId

_Piece = TypeVar("_Piece", bound=Sized)


def rebatch(
    pieces: Iterable[_Piece], size: int, cut: Callable[[_Piece, int, int], _Piece]
) -> Iterator[list[_Piece]]:
    """Yield the items of pieces, `size` at a time: as cuts of pieces, which are not put together.

    Args:
        pieces: Items one after the other.
        size: Items of each batch; the last batch may be smaller.
        cut: Returns a piece from one item of it to another.
    """
    batch: list[_Piece] = []
    n_lacking = size
    for piece in pieces:
        start = 0
        while start < len(piece):
            stop = min(start + n_lacking, len(piece))
            batch.append(cut(piece, start, stop))
            n_lacking -= stop - start
            start = stop
            if not n_lacking:
                yield batch
                batch, n_lacking = [], size
    if batch:
        yield batch


def rebatch_joinids(batches: Iterable[NDArrayJoinId], size: int) -> Iterator[NDArrayJoinId]:
    """Yield joinids, `size` at a time, across the borders of the batches in which they come."""
    for pieces in rebatch(batches, size, _cut):
        yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _cut(joinids: NDArrayJoinId, start: int, stop: int) -> NDArrayJoinId:
    return joinids[start:stop]
