"""`ShuffleQuality`: numbers that measure how well mini-batches are mixed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, seeded_rng
from tiledbsoma_ml._order.plan import PartPlan
from tiledbsoma_ml._rebatch import rebatch_joinids


@attrs.frozen
class ShuffleQuality:
    """Measures of how well mini-batches mix the labels of a column, and the tiles of a layer.

    Attributes:
        mixing: `entropy_bits` as a share of `random_entropy_bits`; 1 for a true shuffle of all rows.
        entropy_bits: Mean entropy of the labels within a mini-batch.
        random_entropy_bits: The same for mini-batches of the same size that are drawn from all rows.
        tiles_per_batch: Mean number of row tiles of the layer from which a mini-batch has rows.
        n_batches: Number of mini-batches that were measured.
    """

    mixing: float
    entropy_bits: float
    random_entropy_bits: float
    tiles_per_batch: float
    n_batches: int


def measure_quality(
    batches: Iterable[NDArrayJoinId], sorted_joinids: NDArrayJoinId, labels: NDArray[np.int64], row_tile: int
) -> ShuffleQuality:
    """Return how well mini-batches are mixed.

    Args:
        batches: The joinids of each mini-batch.
        sorted_joinids: The joinids of all rows.
        labels: The label of each row, as a number.
        row_tile: Rows per tile.
    """
    entropies, random, tiles = [], [], []
    rng = seeded_rng(0)
    for batch in batches:
        entropies.append(_entropy(labels[np.searchsorted(sorted_joinids, batch)]))
        random.append(_entropy(labels[_draw(len(labels), len(batch), rng)]))
        tiles.append(len(np.unique(batch // row_tile)))
    if not entropies:
        return ShuffleQuality(1.0, 0.0, 0.0, 0.0, 0)
    entropy, of_random = float(np.mean(entropies)), float(np.mean(random))
    mixing = entropy / of_random if of_random else 1.0
    return ShuffleQuality(mixing, entropy, of_random, float(np.mean(tiles)), len(entropies))


def quality_of(
    planned: PartPlan, sorted_joinids: NDArrayJoinId, labels: pd.Series[Any], row_tile: int, n_batches: int
) -> ShuffleQuality:
    """Return how well the mini-batches of a part of an epoch are mixed.

    Args:
        planned: The plan of the part.
        sorted_joinids: The joinids of its rows.
        labels: The label of each row; a missing label counts as a label.
        row_tile: Rows per tile.
        n_batches: Number of mini-batches to measure.
    """
    codes = labels.cat.codes if isinstance(labels.dtype, pd.CategoricalDtype) else pd.factorize(labels)[0]
    batches = evenly_spaced(
        planned.io_batches(), planned.plan.batch_size, len(planned.obs_joinids), n_batches
    )
    return measure_quality(batches, sorted_joinids, np.asarray(codes, dtype=np.int64), row_tile)


def evenly_spaced(
    io_batches: Iterable[NDArrayJoinId], batch_size: int, n_rows: int, n_batches: int
) -> Iterator[NDArrayJoinId]:
    """Yield `n_batches` mini-batches (all if there are fewer) that are spread evenly over an epoch."""
    total = -(-n_rows // batch_size)
    wanted = set(np.linspace(0, total - 1, min(n_batches, total)).round().astype(int).tolist())
    for number, batch in enumerate(rebatch_joinids(io_batches, batch_size)):
        if number in wanted:
            yield batch


def _draw(n_rows: int, n_draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return random rows, which differ; they may repeat if there are so many that it hardly matters."""
    if n_rows > 100 * n_draws:
        return rng.integers(n_rows, size=n_draws)
    return rng.choice(n_rows, n_draws, replace=False)


def _entropy(labels: NDArray[np.int64]) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())
