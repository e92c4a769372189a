"""Pieces of any size, cut anew into batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId

_Piece = TypeVar("_Piece", bound=Sized)


def rebatch(
    pieces: Iterable[_Piece], size: int, cut: Callable[[_Piece, int, int], _Piece]
) -> Iterator[list[_Piece]]:
    """Yield batches of `size` items, each as a list of cuts of the pieces, which are not concatenated.

    Args:
        pieces: The items, in order, in pieces of any size.
        size: Items per batch. The last batch may be smaller.
        cut: Returns the items of a piece from a start to a stop.
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


def rebatch_joinids(arrays: Iterable[NDArrayJoinId], size: int) -> Iterator[NDArrayJoinId]:
    """Yield joinids in batches of `size`, whatever the sizes of the arrays in which they come."""
    for pieces in rebatch(arrays, size, _cut):
        yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _cut(joinids: NDArrayJoinId, start: int, stop: int) -> NDArrayJoinId:
    return joinids[start:stop]
