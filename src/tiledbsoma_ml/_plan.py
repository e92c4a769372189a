"""What is read together, and in which order: the batches of joinids of an epoch.

Pure NumPy on joinids, like `_query_ids`: no input or output, no torch. What "auto" stands for is chosen from
the joinids, from how a layer is stored (`Layout`) and from a budget of memory, so that whoever has these
chooses the same.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from statistics import NormalDist
from typing import Literal, TypeAlias

import attrs
import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId, seeded_rng
from tiledbsoma_ml._deal import Deal, ShuffleScope, Spans, Stage
from tiledbsoma_ml._query_ids import Chunks, Partition, QueryIDs, Tail, rows_per_rank, wrapped

Size: TypeAlias = int | Literal["auto"]
"""A number of rows, or "auto"."""

REFERENCE_CHUNKS = 1024
"""Chunks in a window of the documented defaults, 65,536 rows in chunks of 64: "auto" mixes no worse."""

TOLERANCE = 0.005
"""A smaller difference in predicted mixing says nothing: the prediction is right to about one hundredth."""

UNSHUFFLED_ROWS = 65_536
"""Rows read together at most where nothing is shuffled, and more would only keep the first ones waiting."""


@attrs.frozen
class Layout:
    """How a layer is stored, as far as planning needs to know."""

    row_tile: int
    """Neighbouring rows that are decoded together."""
    bytes_per_row: float
    """What a row of the query takes up while it waits in a window."""


@attrs.frozen
class Sizes:
    """What to read together."""

    run_length: int
    """Rows of the layer, wanted or not, from which a chunk is taken; chunks follow each other in tiles."""
    window_rows: int
    """Rows read together and shuffled among each other, but for the last chunk."""
    first_window_rows: int
    """The same for the first window, which is waited for; each one after it is twice as large, up to that."""
    mixing: float
    """Predicted mixing; see `predicted_mixing`."""


@attrs.frozen(kw_only=True)
class EpochPart:
    """What one worker of one rank reads of an epoch.

    Attributes:
        ids: The whole query.
        place: Whose part.
        seed: Of the shuffle.
        epoch: Of the shuffle.
        skip: How many of its mini-batches were yielded before.
        earlier: What was yielded before by other ranks or workers.
    """

    ids: QueryIDs
    place: Partition
    seed: int
    epoch: int
    skip: int = 0
    earlier: tuple[Stage, ...] = ()


@attrs.frozen(kw_only=True)
class Plan:
    """How the rows of a query are put into batches that are read together.

    Args:
        shuffle_chunk_size: Neighbouring rows that stay together until they are read; None: all, in the order
            of the query.
        io_batch_size: Rows read together.
        batch_size: Rows per mini-batch.
        permutes: Whether the rows of each batch are permuted.
        mixing: What "auto" should reach, see `choose_sizes`.
        layout: How the layer is stored; needed where a size is "auto".
        window_bytes: What a window may hold, where `io_batch_size` is "auto".
        scope: Among which rows chunks are shuffled.
        tail: What becomes of rows that do not divide by the number of ranks.
    """

    shuffle_chunk_size: Size | None
    io_batch_size: Size
    batch_size: int
    permutes: bool
    mixing: float | None = None
    layout: Layout | None = None
    window_bytes: int = 0
    scope: ShuffleScope = "partition"
    tail: Tail = "drop"

    # Who yields what --------------------------------------------------------------------------------------

    def n_mini_batches(self, part: EpochPart) -> int:
        """Return how many mini-batches a part has, with those that it skips."""
        n_rows = len(part.ids.obs_joinids)
        if self.scope == "global":
            return self._deal(part).n_mini_batches(part.place)
        start, stop = part.place.bounds(n_rows, self.tail)
        return math.ceil((stop - start) / self.batch_size)

    def first_mini_batch(self, part: EpochPart) -> int:
        """Return how many mini-batches were made before those of a part, by the same draws."""
        first = self._deal(part).mini_batches(part.place)[0] if self.scope == "global" else 0
        return first + part.skip

    def batches_of(self, part: EpochPart) -> Iterator[NDArrayJoinId]:
        """Yield the joinids of a part, as many at a time as are read together."""
        plan = attrs.evolve(self, permutes=self.permutes_of(part))
        if self.scope == "global":
            return plan._batches_at(part, self._deal(part).spans(part.place, part.skip))
        ids = part.ids.partitioned(part.place, self.tail)
        return plan.id_batches(ids, seed=part.seed, epoch=part.epoch, skip=part.skip * self.batch_size)

    def permutes_of(self, part: EpochPart) -> bool:
        """Whether the rows of what is read together come permuted, and not only on the device.

        There, only whole ones are permuted, of which a part may have a piece.
        """
        is_cut = self.scope == "global" or part.skip > 0
        return self.permutes or (self.shuffle_chunk_size is not None and is_cut)

    def joinids_of(self, part: EpochPart) -> NDArrayJoinId:
        """Return all joinids of a part, in any order."""
        if self.scope == "partition":
            return part.ids.partitioned(part.place, self.tail).obs_joinids
        if (part.place.world_size, part.place.n_workers) == (1, 1) and not part.earlier:
            return part.ids.obs_joinids
        return np.concatenate([np.empty(0, dtype=np.int64), *self.batches_of(part)])

    def padding_of(self, part: EpochPart) -> NDArrayJoinId:
        """Return the joinids of the rows of a rank that another rank has as well."""
        n_rows = len(part.ids.obs_joinids)
        if self.scope == "global":
            found = self._batches_at(part, self._deal(part).padding(part.place))
            return np.concatenate([np.empty(0, dtype=np.int64), *found])
        place = attrs.evolve(part.place, worker_id=0, n_workers=1)
        start, stop = place.bounds(n_rows, self.tail)
        return wrapped(part.ids.obs_joinids, max(start, n_rows), max(stop, n_rows))

    def _deal(self, part: EpochPart) -> Deal:
        return Deal(len(part.ids.obs_joinids), self.batch_size, self.tail, part.earlier)

    # Chunks of a part are shuffled ------------------------------------------------------------------------

    def id_batches(self, ids: QueryIDs, *, seed: int, epoch: int, skip: int = 0) -> Iterator[NDArrayJoinId]:
        """Yield the joinids of an epoch but for the first `skip`, as many at a time as are read together."""
        n_rows = len(ids.obs_joinids)
        if not n_rows:
            return iter(())
        is_sized = isinstance(self.io_batch_size, int) and self.shuffle_chunk_size != "auto"
        sizes = None if is_sized else self.sizes(ids)
        run_length = 0 if sizes is None else sizes.run_length
        sequence = self._sequence(ids.obs_joinids, seeded_rng(seed, epoch), run_length)
        rng = seeded_rng(seed, epoch) if self.permutes else None
        return _batches(sequence, self._borders(sequence, sizes), rng, skip)

    def _borders(self, sequence: _Sequence, sizes: Sizes | None) -> Iterable[int]:
        """Return where each batch of a part ends."""
        n_rows = len(sequence.joinids)
        if sizes is None:
            assert isinstance(self.io_batch_size, int)
            return [*range(self.io_batch_size, n_rows, self.io_batch_size), n_rows]
        ends = sequence.ends
        if self.shuffle_chunk_size is None and _is_sorted(sequence.joinids):
            ends = np.append(_chunk_starts(sequence.joinids, sizes.run_length)[1:], n_rows)
        if ends is not None:
            return _next_ends(ends, window_borders(n_rows, sizes))
        size = self.shuffle_chunk_size if isinstance(self.shuffle_chunk_size, int) else 1
        step = -(-sizes.window_rows // size) * size
        return [*range(step, n_rows, step), n_rows]

    def sizes(self, ids: QueryIDs, world_size: int = 1) -> Sizes:
        """Return what "auto" stands for, where a rank of so many reads its share of rows."""
        assert self.layout is not None
        window_rows = self.io_batch_size
        if window_rows == "auto":
            window_rows = int(self.window_bytes / self.layout.bytes_per_row)
        if self.shuffle_chunk_size is None:
            rows = min(window_rows, UNSHUFFLED_ROWS)
            return Sizes(self.layout.row_tile, rows, rows, 0.0)
        joinids = _sorted(ids.obs_joinids)
        return choose_sizes(joinids, self.layout, window_rows, self.batch_size, self.mixing, world_size)

    def _sequence(self, joinids: NDArrayJoinId, rng: np.random.Generator, run_length: int) -> _Sequence:
        """Return joinids with their chunks in the order of an epoch, runs of `run_length` under "auto"."""
        size = self.shuffle_chunk_size
        if isinstance(size, int):
            return _Sequence(joinids, shuffled_chunks(len(joinids), size, rng))
        if size == "auto":
            joinids = _sorted(joinids)
            return _Sequence(joinids, *shuffled_tiles(joinids, run_length, rng))
        return _Sequence(joinids, np.arange)

    # Chunks of the query are shuffled ---------------------------------------------------------------------

    def _batches_at(self, part: EpochPart, spans: Spans) -> Iterator[NDArrayJoinId]:
        """Yield the joinids at places of an epoch, those of one window at a time.

        Windows are those of the ranks that began the epoch: each rank's rows are permuted a window at a time,
        by draws in sequence.
        """
        n_rows = len(part.ids.obs_joinids)
        if not n_rows or not spans:
            return
        world_size = part.earlier[0].world_size if part.earlier else part.place.world_size
        sizes = None if self.layout is None else self.sizes(part.ids, world_size)
        rows = self._sequence_of(part, 0 if sizes is None else sizes.run_length).rows
        windows = self._windows(part, world_size, sizes)
        for start, stop in spans:
            while start < stop:
                begin, end, order = windows.at(start)
                end = min(end, stop) if order is None else end
                last = min(stop, end)
                found = rows(begin, end)
                yield found[start - begin :] if order is None else found[order[start - begin : last - begin]]
                start = last

    def shuffled(self, part: EpochPart) -> NDArrayJoinId:
        """Return the joinids of the query with its chunks in the order of the epoch."""
        is_sized = self.layout is not None
        run_length = self.sizes(part.ids, part.place.world_size).run_length if is_sized else 0
        return self._sequence_of(part, run_length).rows(0, len(part.ids.obs_joinids))

    def _sequence_of(self, part: EpochPart, run_length: int) -> _Sequence:
        return self._sequence(part.ids.obs_joinids, seeded_rng(part.seed, part.epoch), run_length)

    def _windows(self, part: EpochPart, world_size: int, sizes: Sizes | None) -> _Windows:
        n_rows = len(part.ids.obs_joinids)
        size = rows_per_rank(n_rows, world_size, self.tail)
        if sizes is None:
            assert isinstance(self.io_batch_size, int)
            step = max(self.batch_size, self.io_batch_size // self.batch_size * self.batch_size)
            whole = list(range(step, size, step))
        else:  # whole mini-batches, so that none needs two windows
            whole = [-(-end // self.batch_size) * self.batch_size for end in window_borders(size, sizes)]
        borders = [*sorted({border for border in whole if border < size}), size]
        ranks = [Partition(rank, world_size, 0, 1).bounds(n_rows, self.tail)[0] for rank in range(world_size)]
        rng = partial(seeded_rng, part.seed, part.epoch) if self.permutes else None
        return _Windows(ranks, n_rows, borders, rng)


Places: TypeAlias = Callable[[int, int], NDArrayJoinId]
"""Where in the query the rows are that an epoch has from one place to another."""


@attrs.frozen(eq=False)
class _Sequence:
    """Joinids in an order that is computed for the rows that are asked for.

    Attributes:
        joinids: In the order of the query.
        places: Where in it the rows of the epoch are.
        ends: Where chunks end, in the order of the epoch, if no batch may cut one.
    """

    BLOCK = 2**18
    """Places are computed for so many rows at a time, because there may be 100 million."""

    joinids: NDArrayJoinId
    places: Places
    ends: NDArrayJoinId | None = None

    def rows(self, start: int, stop: int) -> NDArrayJoinId:
        """Return the joinids from one place of the epoch to another; after the last comes the first."""
        found, n_rows = np.empty(max(0, stop - start), dtype=np.int64), len(self.joinids)
        done = 0
        while done < len(found):
            begin = (start + done) % n_rows
            end = min(begin + self.BLOCK, begin + len(found) - done, n_rows)
            found[done : done + end - begin] = self.joinids[self.places(begin, end)]
            done += end - begin
        return found


def shuffled_chunks(n_rows: int, size: int, rng: np.random.Generator) -> Places:
    """Return the places of rows whose chunks of `size` are shuffled; the last of `n_rows` may be shorter."""
    n_chunks = -(-n_rows // size)
    order = rng.permutation(n_chunks)
    n_lacking = n_chunks * size - n_rows
    after_last = (int(np.flatnonzero(order == n_chunks - 1).max(initial=-1)) + 1) * size - n_lacking

    def places(start: int, stop: int) -> NDArrayJoinId:
        of_equal_chunks = np.arange(start, stop)
        of_equal_chunks[max(0, after_last - start) :] += n_lacking
        chunk = of_equal_chunks // size
        found: NDArrayJoinId = (order[chunk] - chunk) * size + of_equal_chunks
        return found

    return places


def shuffled_tiles(
    sorted_ids: NDArrayJoinId, run_length: int, rng: np.random.Generator
) -> tuple[Places, NDArrayJoinId]:
    """Return the places of rows whose chunks, runs of `run_length`, are shuffled, and where chunks end."""
    starts = _chunk_starts(sorted_ids, run_length)
    lengths = np.diff(starts, append=len(sorted_ids))
    order = rng.permutation(len(starts))
    ends = np.cumsum(lengths[order])
    offsets = starts[order] - (ends - lengths[order])

    def places(start: int, stop: int) -> NDArrayJoinId:
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        of_each = np.diff(np.minimum(ends[first : last + 1], stop), prepend=start)
        found: NDArrayJoinId = np.arange(start, stop) + np.repeat(offsets[first : last + 1], of_each)
        return found

    return places, ends


def _next_ends(ends: NDArrayJoinId, borders: Sequence[int]) -> list[int]:
    """Return where the first chunk ends that reaches each border."""
    found: list[int] = ends[np.searchsorted(ends, borders)].tolist()
    return found


def _batches(
    sequence: _Sequence, borders: Iterable[int], rng: np.random.Generator | None, skip: int
) -> Iterator[NDArrayJoinId]:
    """Yield the joinids up to each border, permuted by the next draw of `rng`, but for the first `skip`."""
    start = 0
    for stop in borders:
        if start < stop:
            order = None if rng is None else rng.permutation(stop - start)
            if skip < stop - start:
                found = sequence.rows(start, stop)
                yield (found if order is None else found[order])[skip:]
            skip = max(0, skip - (stop - start))
            start = stop


class _Windows:
    """What is read together: stretches of an epoch, and the order of the rows in each.

    Rows that a rank's share was trimmed by, and rows that are repeated, come last and as they are.

    Args:
        ranks: Where the rows of each rank begin.
        n_rows: Number of rows; those behind are repeated ones.
        borders: Where the windows of a rank end, from its beginning.
        rng: Makes the generator of a rank's permutations; None where rows are not permuted.
    """

    def __init__(
        self, ranks: list[int], n_rows: int, borders: list[int], rng: Callable[[], np.random.Generator] | None
    ) -> None:
        self._ranks = ranks
        self._n_rows = n_rows
        self._borders = borders
        self._make_rng = rng
        self._rank, self._n_drawn = -1, 0
        self._order = np.empty(0, dtype=np.int64)

    def at(self, place: int) -> tuple[int, int, NDArrayJoinId | None]:
        """Return the window that a place lies in, (start, stop), and the order of its rows."""
        rank = bisect_right(self._ranks, place) - 1
        number = bisect_right(self._borders, place - self._ranks[rank])
        if place >= self._n_rows or number == len(self._borders):
            return place, place + 1, None
        start, stop = self._bounds(rank, number)
        return start, stop, self._order_of(rank, number)

    def _bounds(self, rank: int, number: int) -> tuple[int, int]:
        start, stop = (self._borders[number - 1] if number else 0), self._borders[number]
        return self._ranks[rank] + start, min(self._ranks[rank] + stop, self._n_rows)

    def _order_of(self, rank: int, number: int) -> NDArrayJoinId | None:
        if self._make_rng is None:
            return None
        if rank != self._rank or number < self._n_drawn - 1:
            self._rank, self._n_drawn, self._rng = rank, 0, self._make_rng()
        while self._n_drawn <= number:
            start, stop = self._bounds(rank, self._n_drawn)
            self._order = self._rng.permutation(stop - start)
            self._n_drawn += 1
        return self._order


def id_batches(
    chunks: Chunks, io_batch_size: int, rng: np.random.Generator | None
) -> Iterator[NDArrayJoinId]:
    """Yield the joinids of `chunks`, put end to end, `io_batch_size` at a time.

    With `rng`, each batch is permuted by the generator's next draw.
    """
    for batch in _rebatched(chunks, io_batch_size):
        yield batch if rng is None else batch[rng.permutation(len(batch))]


def predicted_mixing(n_chunks: float, batch_size: int) -> float:
    """Return the mean entropy of labels in a mini-batch as a share of that in a truly random one.

    The labels are those of a model of the CELLxGENE Census: 900 datasets of log-normal size, stored one after
    the other, so that a chunk has one label. A mini-batch of `batch_size` rows drawn from a window of
    `n_chunks` chunks is as diverse as one of `1 / (1 / n_chunks + 1 / batch_size)` rows from everywhere.
    Few rows say little about that: 16 that follow each other are looked at where `batch_size` is smaller.
    """
    size = min(max(batch_size, 16), 4096)
    return max(0.0, float(_entropy(1 / (1 / n_chunks + 1 / size)) / _entropy(size)))


@lru_cache(maxsize=1024)
def _entropy(n_draws: float) -> float:
    """Return the expected entropy, in nats, of the labels of rows drawn at random from the model."""
    quantiles = (np.arange(900) + 0.5) / 900
    share = np.exp(1.5 * np.array([NormalDist().inv_cdf(q) for q in quantiles]))
    expected = n_draws * (share / share.sum())[:, np.newaxis]
    k = np.arange(1, 600)
    log_factorial = np.cumsum(np.log(k))
    poisson = np.exp(k * np.log(expected) - expected - log_factorial)
    return math.log(n_draws) - float((poisson * (k * np.log(k))).sum()) / n_draws


def read_amplification(chunk_rows: int, io_batch_rows: int, row_tile: int, n_rows: int) -> float:
    """Return how many times a tile is decoded in an epoch of shuffled chunks of neighbouring rows.

    Chunks of one IO batch that lie in one tile share its decoding.
    """
    n_tiles = max(1.0, n_rows / row_tile)
    n_io_batches = max(1.0, n_rows / io_batch_rows)
    chunks_per_io_batch = min(n_rows, io_batch_rows) / chunk_rows
    tiles_per_chunk = max(1.0, chunk_rows / row_tile)
    touched = n_tiles * -math.expm1(-chunks_per_io_batch * tiles_per_chunk / n_tiles)
    return max(1.0, n_io_batches * touched / n_tiles)


def choose_sizes(
    joinids: NDArrayJoinId,
    layout: Layout,
    window_rows: int,
    batch_size: int,
    mixing: float | None,
    world_size: int = 1,
) -> Sizes:
    """Return the longest runs, of whole tiles at most, that mix well enough, and windows for them.

    Args:
        joinids: The rows, sorted.
        layout: How they are stored.
        window_rows: As many rows fit into a window.
        batch_size: Rows per mini-batch.
        mixing: What is well enough; the mixing of the documented defaults if None.
        world_size: Ranks that share the rows.
    """
    window_rows = max(1, window_rows)
    n_rows = math.ceil(len(joinids) / world_size)
    n_windows = max(1, math.ceil(n_rows / window_rows))
    rows = math.ceil(n_rows / n_windows)
    if n_windows == 1:
        return Sizes(layout.row_tile, rows, rows, 1.0)
    target = predicted_mixing(REFERENCE_CHUNKS, batch_size) - TOLERANCE if mixing is None else mixing
    for run_length in _run_lengths(layout.row_tile):
        per_chunk = _rows_per_chunk(joinids, run_length)
        reached = predicted_mixing(rows / per_chunk, batch_size)
        if reached >= target:
            break
    first = rows
    while first > 4 * batch_size and predicted_mixing(first / 2 / per_chunk, batch_size) >= target:
        first //= 2
    return Sizes(run_length, rows, first, reached)


def _chunk_starts(joinids: NDArrayJoinId, run_length: int) -> NDArrayJoinId:
    """Return where chunks of sorted joinids start: one for each run of so many rows that has any.

    A block of joinids at a time is looked at, because there may be 100 million.
    """
    starts, block = [], 2**20
    for begin in range(0, len(joinids), block):
        run = joinids[max(0, begin - 1) : begin + block] // run_length
        found = np.flatnonzero(run[1:] != run[:-1]) + max(0, begin - 1) + 1
        starts.append(found if begin else np.append(0, found))
    return np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)


def window_borders(n_rows: int, sizes: Sizes) -> list[int]:
    """Return after how many rows each window should end: growing ones first, then equal ones."""
    borders, size = [0], sizes.first_window_rows
    while size < sizes.window_rows and borders[-1] + size < n_rows:
        borders.append(borders[-1] + size)
        size *= 2
    n_left = math.ceil((n_rows - borders[-1]) / sizes.window_rows)
    even = np.linspace(borders[-1], n_rows, n_left + 1).round().astype(int).tolist()
    return [*borders[1:], *even[1:]]


def _run_lengths(row_tile: int) -> Iterator[int]:
    """Yield what divides tiles evenly, longest first."""
    length = row_tile
    yield length
    while length % 2 == 0:
        length //= 2
        yield length


def _rows_per_chunk(joinids: NDArrayJoinId, run_length: int) -> float:
    """Return how many of the joinids there are in a chunk, on average, from samples where there are many."""
    size, n_samples = 2**14, 64
    if len(joinids) <= size * n_samples:
        return len(joinids) / len(_chunk_starts(joinids, run_length))
    begins = np.linspace(0, len(joinids) - size, n_samples).astype(int)
    n_chunks = sum(np.count_nonzero(np.diff(joinids[b : b + size] // run_length)) for b in begins.tolist())
    return size * n_samples / max(1, n_chunks)


def _sorted(joinids: NDArrayJoinId) -> NDArrayJoinId:
    return joinids if _is_sorted(joinids) else np.sort(joinids)


def _is_sorted(joinids: NDArrayJoinId) -> bool:
    return bool((joinids[1:] >= joinids[:-1]).all())


def _rebatched(chunks: Iterable[NDArrayJoinId], size: int) -> Iterator[NDArrayJoinId]:
    pending: list[NDArrayJoinId] = []
    room = size
    for chunk in chunks:
        while len(chunk) >= room:
            yield np.concatenate([*pending, chunk[:room]])
            chunk, pending, room = chunk[room:], [], size
        if len(chunk):
            pending.append(chunk)
            room -= len(chunk)
    if pending:
        yield np.concatenate(pending)
