"""`ShuffleQuality`: numbers that measure how well mini-batches are mixed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, seeded_rng
from tiledbsoma_ml._order.mixing import Labels
from tiledbsoma_ml._order.order import is_sorted
from tiledbsoma_ml._order.plan import PartPlan
from tiledbsoma_ml._rebatch import rebatch_joinids

LEAST_DRAWS, MOST_DRAWN_ROWS = 1000, 2**22
"""Number of batches that are drawn at random to compare with, unless they have so many rows in all."""


@attrs.frozen(kw_only=True)
class ShuffleQuality:
    """Measures of how well mini-batches mix the labels of a column, and the tiles of a layer.

    A global batch consists of the mini-batches that all ranks yield in the same step.

    Attributes:
        mixing: `entropy_bits` as a share of `random_entropy_bits`; 1 for a true shuffle of the whole query.
        predicted_mixing: The prediction of `mixing` for these labels, as "auto" makes it for others.
        global_mixing: The same as `mixing`, but for global batches.
        entropy_bits: Mean entropy of the labels within a mini-batch of this rank.
        random_entropy_bits: The same for mini-batches of the same size that are drawn from the whole query.
        tiles_per_batch: Mean number of row tiles of the layer from which a mini-batch has rows.
        n_batches: Number of mini-batches that were measured.
    """

    mixing: float
    predicted_mixing: float
    global_mixing: float
    entropy_bits: float
    random_entropy_bits: float
    tiles_per_batch: float
    n_batches: int


def quality_of(planned: PartPlan, labels: pd.Series[Any], *, row_tile: int, n_batches: int) -> ShuffleQuality:
    """Return how well the mini-batches of a rank are mixed, and the global batches.

    Args:
        planned: The plan of a part of the rank.
        labels: The label of each row of the query, in its order; a missing label counts as a label.
        row_tile: Rows per tile.
        n_batches: Number of mini-batches to measure.
    """
    codes = codes_of(labels)
    joinids, partition = planned.part.ids.obs_joinids, planned.part.partition
    order = None if is_sorted(joinids) else np.argsort(joinids, kind="stable")
    sorted_joinids, sorted_codes = (joinids, codes) if order is None else (joinids[order], codes[order])

    def mean_entropies(batches: Iterable[NDArrayJoinId]) -> tuple[float, float]:
        return _mean_entropies([np.searchsorted(sorted_joinids, batch) for batch in batches], sorted_codes)

    of_ranks = [evenly_spaced(planned, rank, n_batches) for rank in range(partition.world_size)]
    own = of_ranks[partition.rank]
    entropy, at_random = mean_entropies(own)
    of_global, global_at_random = mean_entropies(map(np.concatenate, zip(*of_ranks, strict=True)))
    return ShuffleQuality(
        mixing=_share(entropy, at_random),
        predicted_mixing=planned.predicted_mixing(Labels.of_rows(codes), partition.rank),
        global_mixing=_share(of_global, global_at_random),
        entropy_bits=entropy,
        random_entropy_bits=at_random,
        tiles_per_batch=float(np.mean([len(np.unique(batch // row_tile)) for batch in own] or [0])),
        n_batches=len(own),
    )


def codes_of(labels: pd.Series[Any]) -> NDArray[np.int64]:
    """Return labels as numbers; a missing label is a label."""
    found = labels.cat.codes if isinstance(labels.dtype, pd.CategoricalDtype) else pd.factorize(labels)[0]
    return np.asarray(found, dtype=np.int64)


def evenly_spaced(planned: PartPlan, rank: int, n_batches: int) -> list[NDArrayJoinId]:
    """Return `n_batches` mini-batches of a rank (all if there are fewer), spread evenly over an epoch.

    The workers of a rank yield mini-batches in turn, as in a `DataLoader`.
    """
    whole = planned.part.partition
    workers = [
        planned.plan.of(attrs.evolve(planned.part, partition=attrs.evolve(whole, rank=rank, worker_id=k)))
        for k in range(whole.n_workers)
    ]
    turns = sorted((number, k) for k, worker in enumerate(workers) for number in range(worker.n_mini_batches))
    wanted = np.linspace(0, len(turns) - 1, min(n_batches, len(turns))).round().astype(int).tolist()
    found: dict[tuple[int, int], NDArrayJoinId] = {}
    for k, worker in enumerate(workers):
        numbers = {turns[step][0] for step in wanted if turns[step][1] == k}
        batches = enumerate(rebatch_joinids(worker.io_batches(), planned.plan.batch_size))
        found |= {(number, k): batch for number, batch in batches if number in numbers}
    return [found[turns[step]] for step in wanted]


def _mean_entropies(batches: Sequence[NDArray[np.int64]], codes: NDArray[np.int64]) -> tuple[float, float]:
    """Return the mean entropy of the labels of batches, and that of batches that are drawn from all rows.

    Args:
        batches: Batches of rows.
        codes: The label of each row, as a number.
    """
    rng = seeded_rng(0)
    sizes = [len(batch) for batch in batches]
    if not sizes:
        return 0.0, 0.0
    n_times = math.ceil(max(1, min(LEAST_DRAWS / len(sizes), MOST_DRAWN_ROWS / sum(sizes))))
    at_random = [_entropy(codes[_draw(len(codes), size, rng)]) for size in sizes * n_times]
    return float(np.mean([_entropy(codes[batch]) for batch in batches])), float(np.mean(at_random))


def _draw(n_rows: int, n_draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return random rows, which differ; they may repeat if there are so many that it hardly matters."""
    if n_rows > 100 * n_draws or n_draws > n_rows:
        return rng.integers(n_rows, size=n_draws)
    return rng.choice(n_rows, n_draws, replace=False)


def _entropy(labels: NDArray[np.int64]) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())


def _share(entropy: float, at_random: float) -> float:
    """Return an entropy as a share of that at random; 1 if all rows have one label."""
    return entropy / at_random if at_random else 1.0
