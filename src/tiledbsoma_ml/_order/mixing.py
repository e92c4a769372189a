"""The predicted mixing of mini-batches, for each number of ranks and workers.

Mixing is the mean entropy of the labels in a mini-batch, as a share of that in a mini-batch of as many rows
that are drawn from the whole query. Labels lie in long runs of the stored order, like datasets of the Census.

The entropy of B rows is log B - E log(1 + Y), where Y is the number of other rows of the mini-batch that have
the label of a row. A window has C of the M chunks that are shuffled together, and a mini-batch has B of the W
rows of a window. So the rows of the label in the chunk of this row are in the window, and those of another
chunk are there with the probability (C - 1) / (M - 1). A row of the window is in the mini-batch with the
probability (B - 1) / (W - 1). In the scope "partition", M counts the chunks of one part, whose rows alone are
in a mini-batch.

`tests/_order/test_mixing.py` compares the predictions with orders that were drawn. The page `shuffle_viz` has
the same formulas in TypeScript.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._order.share import ShuffleScope

Floats: TypeAlias = NDArray[np.float64]

FEWEST_LABELS, MOST_LABELS, ROWS_PER_LABEL = 10, 900, 600
"""Numbers of labels of the model, and the mean number of rows of a label between these numbers."""

FEWEST_ROWS = 16
"""Smallest number of rows by which a mini-batch is judged."""

Batches: TypeAlias = Literal["mean", "global"] | int
"""The mini-batches that a prediction is about.

"mean" stands for those of all ranks, in the mean; a number for those of this rank; and "global" for global
batches: the mini-batches that all ranks yield in the same step, taken together as one.
"""

MOST_LISTED = 6.0
"""Expected number of chunks up to which the chances of 0, 1, 2, … chunks are listed one by one."""


@attrs.frozen(kw_only=True)
class Sharing:
    """The rows of a query, and the ranks and workers that share them.

    Attributes:
        n_rows: Rows of the whole query.
        batch_size: Rows per mini-batch.
        scope: See `ShuffleScope`.
        world_size: Number of ranks.
        n_workers: Number of workers of each rank. It changes nothing in the scope "global".
    """

    n_rows: int
    batch_size: int
    scope: ShuffleScope = "partition"
    world_size: int = 1
    n_workers: int = 1

    @property
    def n_parts(self) -> int:
        """Number of parts that are shuffled by themselves."""
        return 1 if self.scope == "global" else self.world_size * self.n_workers

    @property
    def rows_per_share(self) -> float:
        """Rows that are divided into windows: those of a rank, or those of a part."""
        return max(1.0, self.n_rows / (self.world_size if self.scope == "global" else self.n_parts))


@attrs.frozen(kw_only=True, eq=False)
class Labels:
    """The labels of the rows of a query, as runs of equal labels in stored order.

    Attributes:
        starts: The first row of each run. It need not be a whole number.
        stops: The row behind each run.
        codes: The label of each run, as a number from 0.
    """

    starts: Floats
    stops: Floats
    codes: NDArray[np.int64]

    @classmethod
    def of_rows(cls, codes: NDArray[np.int64]) -> Labels:
        """Return the runs of rows whose labels are known; codes need not be from 0."""
        starts = np.flatnonzero(np.diff(codes, prepend=codes[:1] - 1))
        stops = np.append(starts[1:], len(codes))
        found = np.unique(codes[starts], return_inverse=True)[1]
        return cls(starts=starts.astype(np.float64), stops=stops.astype(np.float64), codes=found)

    def cut(self, n_parts: int) -> tuple[Labels, NDArray[np.int64]]:
        """Return the same labels in runs that lie in one part each, and the numbers of these parts."""
        size = self.stops[-1] / n_parts
        starts = np.union1d(self.starts, np.arange(n_parts) * size)
        codes = self.codes[np.searchsorted(self.starts, starts, side="right") - 1]
        part = np.searchsorted(np.arange(1, n_parts) * size, starts, side="right")
        return Labels(starts=starts, stops=np.append(starts[1:], self.stops[-1]), codes=codes), part


def predicted_mixing(
    sharing: Sharing,
    *,
    chunk_rows: float,
    window_rows: float,
    labels: Labels | None = None,
    batches: Batches = "mean",
    ends_with_chunk: bool = False,
) -> float:
    """Return the predicted mixing of the mini-batches of an epoch.

    A mini-batch of fewer than 16 rows is judged by 16 neighbouring rows, because few rows say little. The
    mixing of one rank exceeds 1 if its part has more labels of equal size than the query.

    Args:
        sharing: The query, and the ranks and workers that share it.
        chunk_rows: Mean number of rows of a shuffle chunk.
        window_rows: Rows of a window.
        labels: The labels of the rows; if None, those of a model, see `_model`.
        batches: See `Batches`.
        ends_with_chunk: Whether no window cuts a chunk.
    """
    if not sharing.n_rows:
        return 1.0
    n_ranks = sharing.world_size if batches == "global" else 1
    batch = min(max(sharing.batch_size, FEWEST_ROWS), sharing.rows_per_share)
    window = min(max(window_rows, batch), sharing.rows_per_share)
    if sharing.n_parts == 1 and (chunk_rows <= 1 or window * n_ranks >= sharing.n_rows):
        return 1.0
    if labels is None:
        labels, most = _model(sharing.n_rows), _entropy_of_model(sharing.n_rows, batch * n_ranks)
    else:
        most = _entropy_at_random(labels, batch * n_ranks)
    if most <= 1e-9:  # all rows have the same label
        return 1.0
    n_pools = max(1, sharing.n_parts // n_ranks)
    drawn = _Drawn(
        n_rows=sharing.n_rows / n_pools,
        chunk_rows=chunk_rows,
        window_rows=window * n_ranks,
        batch_rows=batch * n_ranks,
        # In the scope "partition", windows cut chunks after the last chunk of the query, which is shorter.
        cuts=0.0 if ends_with_chunk else 1.0 if sharing.scope == "global" else 0.5,
    )
    of_pools = labels if n_pools == 1 else _labels_of_pools(labels, sharing, batches)
    mixing = max(0.0, drawn.entropy(of_pools) / most)
    return mixing if isinstance(batches, int) else min(1.0, mixing)


def _labels_of_pools(labels: Labels, sharing: Sharing, batches: Batches) -> Labels:
    """Return labels that differ between the parts whose rows are never in one mini-batch."""
    cut, part = labels.cut(sharing.n_parts)
    rank, worker = part // sharing.n_workers, part % sharing.n_workers
    pool = worker if batches == "global" else part  # in a step, all ranks take turns to the same worker
    wanted = rank == batches if isinstance(batches, int) else np.full(len(part), True)
    codes = np.unique((cut.codes + pool * len(cut.codes))[wanted], return_inverse=True)[1]
    return Labels(starts=cut.starts[wanted], stops=cut.stops[wanted], codes=codes)


@lru_cache(maxsize=64)
def _entropy_of_model(n_rows: int, batch_rows: float) -> float:
    return _entropy_at_random(_model(n_rows), batch_rows)


def _entropy_at_random(labels: Labels, batch_rows: float) -> float:
    """Return the expected entropy of a mini-batch that is drawn from the whole query."""
    n_rows = float(labels.stops[-1])
    drawn = _Drawn(n_rows=n_rows, chunk_rows=1.0, window_rows=n_rows, batch_rows=batch_rows)
    return drawn.entropy(labels)


@attrs.frozen(kw_only=True)
class _Drawn:
    """The way in which the rows of a mini-batch are drawn.

    Attributes:
        n_rows: Rows of a pool: those that may be in one mini-batch. Each pool has labels of its own.
        chunk_rows: Rows of a chunk.
        window_rows: Rows of a window, which has some of the chunks of a pool.
        batch_rows: Rows of a mini-batch, which has some of the rows of a window.
        cuts: Share of the ends of windows that cut a chunk.
    """

    n_rows: float
    chunk_rows: float
    window_rows: float
    batch_rows: float
    cuts: float = 0.0

    @property
    def _share_of_own(self) -> float:
        """The mean share of a chunk that is in the window of a row of the chunk."""
        chunk = min(self.chunk_rows, self.n_rows)
        smaller, larger = min(chunk, self.window_rows), max(chunk, self.window_rows)
        lost = self.cuts * (1 - self.window_rows / self.n_rows) * smaller / (3 * larger)
        return smaller / chunk * (1 - lost)

    @property
    def _share_of_others(self) -> float:
        """The mean share of the rows of all other chunks that are in the window."""
        n_others = self.n_rows - self.chunk_rows
        if n_others <= 0:
            return 1.0
        n_in_window = self.window_rows - self._share_of_own * self.chunk_rows
        return min(1.0, max(0.0, n_in_window / n_others))

    def entropy(self, labels: Labels) -> float:
        """Return the expected entropy of the labels in a mini-batch, in nats."""
        n_of_label, in_chunk, variance_in_chunk = _rows_in_chunks(labels, self.chunk_rows)
        others = np.maximum(n_of_label - in_chunk, 0.0)
        n_chunks = _ratio(others, in_chunk)  # that have the others, if all of them had as many
        n_in_window = n_chunks * self._share_of_others
        variance = n_in_window * (1 - self._share_of_others)
        total = self.n_rows / self.chunk_rows
        if total > 2:
            variance *= np.clip(1 - (n_chunks - 1) / (total - 2), 0.0, 1.0)
        rate = (self.batch_rows - 1) / (self.window_rows - 1) if self.window_rows > 1 else 1.0
        own, each = rate * np.maximum(in_chunk * self._share_of_own - 1, 0.0), rate * in_chunk
        mean_log = _mean_log(own, each, n_in_window, variance)
        # So far, Y has the variance of a Poisson number, which is too much where labels or mini-batches are a
        # large part of the window; and all chunks of a label have as many rows of it.
        mean = own + each * n_in_window
        of_window = np.minimum(1.0, mean / max(self.batch_rows - 1, 1e-9))
        excess = mean * (1 - (1 - of_window) * (1 - rate))
        excess -= (rate * (self._share_of_own - self._share_of_others)) ** 2 * variance_in_chunk
        mean_log += excess / (2 * (1 + mean) ** 2)
        return math.log(self.batch_rows) - float((n_of_label * mean_log).sum() / n_of_label.sum())


def _rows_in_chunks(labels: Labels, chunk_rows: float) -> tuple[Floats, Floats, Floats]:
    """Return, for each label, its rows, and the mean and variance of the rows in the chunk of a row of it."""
    first, last = labels.starts // chunk_rows, labels.stops // chunk_rows
    is_within = first == last
    lengths = labels.stops - labels.starts
    begins = np.where(is_within, lengths, (first + 1) * chunk_rows - labels.starts)
    ends = np.where(is_within, 0.0, labels.stops - last * chunk_rows)
    n_whole = np.maximum(last - first - 1, 0.0)
    # Several runs of a label may have rows in one chunk.
    n_codes = int(labels.codes.max()) + 1
    chunks = np.concatenate([first, last]).astype(np.int64)
    keys, pieces = np.unique(chunks * n_codes + np.tile(labels.codes, 2), return_inverse=True)
    sizes = _sums(pieces, np.concatenate([begins, ends]), len(keys))

    def moment(power: int) -> Floats:
        of_ends = _sums(keys % n_codes, sizes**power, n_codes)
        return of_ends + _sums(labels.codes, n_whole * chunk_rows**power, n_codes)

    n_rows, mean = moment(1), moment(2) / moment(1)
    return n_rows, mean, np.maximum(moment(3) / n_rows - mean**2, 0.0)


def _sums(numbers: NDArray[np.int64], values: Floats, n: int) -> Floats:
    """Return, for each number from 0 to `n` - 1, the sum of the values with this number."""
    return np.bincount(numbers, values, minlength=n).astype(np.float64)


def _mean_log(own: Floats, each: Floats, n_chunks: Floats, variance: Floats) -> Floats:
    """Return E log(1 + Y), where Y is a Poisson number of the mean `own` + `each` * h.

    The number h of chunks is binomial, with the mean `n_chunks` and a variance.
    """
    mean = own + each * n_chunks
    result = _poisson_mean_log(mean) - each**2 * variance / (2 * (1 + mean) ** 2)
    chance = 1 - _ratio(variance, n_chunks)
    n_tries = _ratio(n_chunks, chance)
    n_misses = n_tries - n_chunks
    for counts_hits, chosen in ((True, n_chunks <= n_misses), (False, n_chunks > n_misses)):
        chosen = chosen & (np.minimum(n_chunks, n_misses) < MOST_LISTED) & (variance > 1e-9)
        p = (chance if counts_hits else 1 - chance)[chosen]
        result[chosen] = _listed(own[chosen], each[chosen], n_tries[chosen], p, counts_hits)
    return result


def _listed(own: Floats, each: Floats, n_tries: Floats, chance: Floats, counts_hits: bool) -> Floats:
    """Return the same mean as `_mean_log`: the sum over all numbers of chunks that are likely.

    Args:
        own: See `_mean_log`.
        each: See `_mean_log`.
        n_tries: Parameter of the binomial distribution. If it is no whole number, the mean of the two nearest
            ones is taken.
        chance: Parameter of the distribution.
        counts_hits: Whether `chance` is that of a chunk to be in the window, or not to be in it.
    """
    below = np.floor(n_tries)
    result = np.zeros_like(own)
    for tries, weight in ((below, 1 - (n_tries - below)), (below + 1, n_tries - below)):
        likely = weight * (1 - chance) ** tries
        for n in range(64):
            h = n if counts_hits else np.maximum(tries - n, 0.0)
            result += likely * _poisson_mean_log(own + each * h)
            likely = likely * np.maximum(tries - n, 0.0) / (n + 1) * chance / (1 - chance)
            if n > MOST_LISTED and likely.max(initial=0.0) < 1e-9:
                break
    return result


def _poisson_mean_log(mean: Floats) -> Floats:
    """Return E log(1 + Y) of Poisson numbers Y with these means."""
    logs, differences = _table()
    log = np.log1p(mean)
    return log - np.interp(log, logs, differences)


@lru_cache(maxsize=1)
def _table() -> tuple[Floats, Floats]:
    """Return log(1 + mean) and log(1 + mean) - E log(1 + Y), for means from 0 to 100,000."""
    logs = np.linspace(0.0, math.log(100_001), 4097)
    mean = np.expm1(logs)
    # A sum where the mean is small, else a series.
    likely, logs_of_numbers = np.exp(-mean), np.zeros_like(mean)
    for n in range(1, 180):
        likely = likely * mean / n
        logs_of_numbers += likely * math.log1p(n)
    a = 1 + mean
    series = mean / (2 * a**2) - mean / (3 * a**3) + mean * (1 + 3 * mean) / (4 * a**4)
    return logs, np.where(mean < 60, logs - logs_of_numbers, series)


@lru_cache(maxsize=8)
def _model(n_rows: int) -> Labels:
    """Return a model of the datasets of the CELLxGENE Census.

    Each label has one run. There are 900 labels, fewer in a query of less than 540,000 rows. Their sizes are
    log-normal (sigma 1.5), and follow each other in an order in which small and large ones alternate.
    """
    n = min(n_rows, max(FEWEST_LABELS, min(MOST_LABELS, math.ceil(n_rows / ROWS_PER_LABEL))))
    quantiles = (np.arange(n) + 0.5) / n
    weights = np.exp(1.5 * np.array([NormalDist().inv_cdf(q) for q in quantiles.tolist()]))
    golden = (math.sqrt(5) - 1) / 2
    weights = weights[np.argsort(np.arange(n) * golden % 1)]
    stops = n_rows * (np.cumsum(weights) / weights.sum())
    stops[-1] = n_rows
    return Labels(starts=np.append(0.0, stops[:-1]), stops=stops, codes=np.arange(n))


def _ratio(a: Floats, b: Floats) -> Floats:
    """Return `a / b`, and 0 where `b` is 0 or nearly so."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 1e-9)
