"""How well the rows of mini-batches are mixed, as numbers."""

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
    """How well mini-batches mix the labels of a column, and the tiles of a layer.

    Attributes:
        mixing: `entropy_bits` as a share of `random_entropy_bits`: 1 is a true shuffle of all rows.
        entropy_bits: Mean entropy of the labels within a mini-batch.
        random_entropy_bits: The same for mini-batches of that size drawn at random from all rows.
        tiles_per_batch: Mean number of row tiles of the layer that a mini-batch has rows of.
        n_batches: How many mini-batches these figures are from.
    """

    mixing: float
    entropy_bits: float
    random_entropy_bits: float
    tiles_per_batch: float
    n_batches: int


def measure_quality(
    batches: Iterable[NDArrayJoinId], sorted_ids: NDArrayJoinId, labels: NDArray[np.int64], row_tile: int
) -> ShuffleQuality:
    """Return how well mini-batches are mixed.

    Args:
        batches: The joinids of each mini-batch.
        sorted_ids: The joinids of all rows.
        labels: The label of each of them, as a number.
        row_tile: Rows of a tile.
    """
    entropies, random, tiles = [], [], []
    rng = seeded_rng(0)
    for batch in batches:
        entropies.append(_entropy(labels[np.searchsorted(sorted_ids, batch)]))
        random.append(_entropy(labels[_draw(len(labels), len(batch), rng)]))
        tiles.append(len(np.unique(batch // row_tile)))
    if not entropies:
        return ShuffleQuality(1.0, 0.0, 0.0, 0.0, 0)
    entropy, of_random = float(np.mean(entropies)), float(np.mean(random))
    mixing = entropy / of_random if of_random else 1.0
    return ShuffleQuality(mixing, entropy, of_random, float(np.mean(tiles)), len(entropies))


def quality_of(
    planned: PartPlan, sorted_ids: NDArrayJoinId, labels: pd.Series[Any], row_tile: int, n_batches: int
) -> ShuffleQuality:
    """Return how well the mini-batches of a part of an epoch are mixed.

    Args:
        planned: The part.
        sorted_ids: The joinids of its rows.
        labels: The label of each of them; a missing one is a label as well.
        row_tile: Rows of a tile.
        n_batches: Number of mini-batches to look at.
    """
    codes = labels.cat.codes if isinstance(labels.dtype, pd.CategoricalDtype) else pd.factorize(labels)[0]
    batches = evenly_spaced(planned.batches(), planned.plan.batch_size, len(planned.obs_joinids), n_batches)
    return measure_quality(batches, sorted_ids, np.asarray(codes, dtype=np.int64), row_tile)


def evenly_spaced(
    id_batches: Iterable[NDArrayJoinId], batch_size: int, n_rows: int, n_batches: int
) -> Iterator[NDArrayJoinId]:
    """Yield `n_batches` of the mini-batches of an epoch, or all if there are fewer, spread over it evenly."""
    total = -(-n_rows // batch_size)
    wanted = set(np.linspace(0, total - 1, min(n_batches, total)).round().astype(int).tolist())
    for number, batch in enumerate(rebatch_joinids(id_batches, batch_size)):
        if number in wanted:
            yield batch


def _draw(n_rows: int, n_draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return different places; of many, which may repeat as rarely as it hardly matters."""
    if n_rows > 100 * n_draws:
        return rng.integers(n_rows, size=n_draws)
    return rng.choice(n_rows, n_draws, replace=False)


def _entropy(labels: NDArray[np.int64]) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())
