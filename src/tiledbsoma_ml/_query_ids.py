"""Which rows, in which order, for whom: splits, shuffle chunks and partitions of a query's joinids.

Pure NumPy on arrays of joinids: no input or output, no torch.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

import attrs
import numpy as np
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, check_count, seeded_rng
from tiledbsoma_ml._distributed import get_distributed_rank_and_world_size, get_worker_id_and_num
from tiledbsoma_ml.x_locator import check_open

Chunks: TypeAlias = list[NDArrayJoinId]
"""Runs of `obs_joinids`, in the order in which they are to be read."""

SamplingMethod: TypeAlias = Literal["deterministic", "multinomial", "stochastic_rounding"]
"""How `random_split` turns fractions into numbers of rows.

- "deterministic": each cut is rounded to the nearest row; the same sizes for every seed.
- "multinomial": each row is dealt independently; sizes vary.
- "stochastic_rounding": each part has at least the floor of its share; the remaining rows are dealt so that
  the expected sizes match the fractions.
"""

SamplingMethods: tuple[SamplingMethod, ...] = get_args(SamplingMethod)

Tail: TypeAlias = Literal["drop", "pad"]
"""What becomes of rows that do not divide by the number of ranks.

- "drop": up to `world_size - 1` rows belong to nobody.
- "pad": nobody goes without, and up to `world_size - 1` rows are repeated: the first ones.
"""


@attrs.frozen
class Partition:
    """One worker's place among all workers of all ranks."""

    rank: int
    world_size: int
    worker_id: int
    n_workers: int

    def bounds(self, n_rows: int, tail: Tail = "drop") -> tuple[int, int]:
        """Return (start, stop) of this part of `n_rows` rows: the one partition rule.

        Rows are cut among ranks like `np.array_split`, each rank's part is trimmed to `n_rows // world_size`
        (equal batches on every rank), and a rank's part is cut among its workers like `np.array_split`. With
        "pad" there are as many rows more as it takes to give every rank the same number.
        """
        size = rows_per_rank(n_rows, self.world_size, tail)
        n_dealt = n_rows if tail == "drop" else size * self.world_size
        rank_start, _ = array_split_bounds(n_dealt, self.world_size, self.rank)
        start, stop = array_split_bounds(size, self.n_workers, self.worker_id)
        return rank_start + start, rank_start + stop


def rows_per_rank(n_rows: int, world_size: int, tail: Tail) -> int:
    """Return how many rows each rank gets."""
    return n_rows // world_size if tail == "drop" else -(-n_rows // world_size)


def array_split_bounds(n_rows: int, n_parts: int, part: int) -> tuple[int, int]:
    """Return (start, stop) of one of the parts that `np.array_split` makes."""
    size, larger = divmod(n_rows, n_parts)
    start = part * size + min(part, larger)
    return start, start + size + (part < larger)


def _joinids(ids: object) -> NDArrayJoinId:
    return np.asarray(ids, dtype=np.int64)


@attrs.frozen(kw_only=True, eq=False)
class QueryIDs:
    """The rows and columns of a query, as joinids; picklable, and never changed in place.

    Attributes:
        obs_joinids: Rows, in the order of the query.
        var_joinids: Columns, in the order in which `X` has them.
        partition: Whose part of the query this is; None for the whole.
    """

    obs_joinids: NDArrayJoinId = attrs.field(converter=_joinids)
    var_joinids: NDArrayJoinId = attrs.field(converter=_joinids)
    partition: Partition | None = None

    @classmethod
    def create(cls, query: soma.ExperimentAxisQuery) -> QueryIDs:
        """Return the rows and columns that a query selects.

        Raises:
            ValueError: If the query's experiment is closed.
        """
        check_open(query.experiment)
        return cls(
            obs_joinids=query.obs_joinids().to_numpy(),
            var_joinids=query.var_joinids().to_numpy(),
        )

    def random_split(
        self,
        *fracs: float,
        seed: int | None = None,
        method: SamplingMethod = "stochastic_rounding",
    ) -> tuple[QueryIDs, ...]:
        """Return disjoint random parts that together are this query; rows within a part are sorted.

        Args:
            fracs: The share of each part, from 0 to 1, summing to 1.
            seed: The same seed gives the same parts, and those of tiledbsoma-ml 0.1.0.
            method: See `SamplingMethod`.

        Raises:
            ValueError: If the fractions are not shares that sum to 1, or the method is unknown.
        """
        shares = _check_fracs(fracs)
        if method not in SamplingMethods:
            raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, SamplingMethods))}.")
        rng = seeded_rng(seed)
        shuffled = rng.permutation(self.obs_joinids)
        cuts = _split_cuts(len(shuffled), shares, method, rng)
        return tuple(
            attrs.evolve(self, obs_joinids=np.sort(shuffled[start:stop])) for start, stop in pairwise(cuts)
        )

    def partitioned(self, partition: Partition | None = None, tail: Tail = "drop") -> QueryIDs:
        """Return the part of the rows that belongs to one worker of one rank.

        Args:
            partition: Whose part; found out from this process if None.
            tail: See `Tail`; every rank gets the same number of rows.
        """
        if partition is None:
            partition = Partition(*get_distributed_rank_and_world_size(), *get_worker_id_and_num())
        bounds = partition.bounds(len(self.obs_joinids), tail)
        return attrs.evolve(self, obs_joinids=wrapped(self.obs_joinids, *bounds), partition=partition)

    @property
    def fingerprint(self) -> str:
        """A digest of the joinids and their order."""
        found = hashlib.blake2b(digest_size=16)
        for joinids in (self.obs_joinids, self.var_joinids):
            found.update(len(joinids).to_bytes(8, "little"))
            found.update(np.ascontiguousarray(joinids).data)
        return found.hexdigest()

    def shuffle_chunks(self, shuffle_chunk_size: int, seed: int | None = None, epoch: int = 0) -> Chunks:
        """Return the rows as runs of `shuffle_chunk_size`, in random order; rows within a run keep theirs.

        A run of neighbouring rows is read much faster than the same number of scattered ones. The last run
        of the query may be shorter.
        """
        size = check_count("shuffle_chunk_size", shuffle_chunk_size, suggestion=64)
        n_chunks = -(-len(self.obs_joinids) // size)
        starts = seeded_rng(seed, epoch).permutation(n_chunks) * size
        return [self.obs_joinids[start : start + size] for start in starts.tolist()]


def wrapped(joinids: NDArrayJoinId, start: int, stop: int) -> NDArrayJoinId:
    """Return joinids from `start` to `stop`, going on with the first ones behind the last."""
    n_rows = len(joinids)
    if stop <= n_rows or not n_rows:
        return joinids[start:stop]
    return joinids[np.arange(start, stop) % n_rows]


def _check_fracs(fracs: tuple[float, ...]) -> NDArray[np.float64]:
    way_out = "try random_split(0.8, 0.2)"
    if not fracs:
        raise ValueError(f"fracs must hold at least one fraction; {way_out}.")
    try:
        shares = np.array([float(frac) for frac in fracs])
    except (TypeError, ValueError) as err:
        raise ValueError(f"fracs={fracs} must be numbers from 0 to 1; {way_out}.") from err
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"fracs={fracs} must each lie from 0 to 1; {way_out}.")
    if not np.isclose(shares.sum(), 1):
        raise ValueError(f"fracs={fracs} must sum to 1, not {shares.sum():g}; {way_out}.")
    return shares


def _split_cuts(
    n_rows: int, shares: NDArray[np.float64], method: SamplingMethod, rng: np.random.Generator
) -> list[int]:
    """Return the len(shares) + 1 borders of the parts, from 0 to `n_rows`."""
    if method == "deterministic":
        cuts = np.round(np.cumsum(shares) * n_rows)
    elif method == "multinomial":
        cuts = np.cumsum(rng.multinomial(n_rows, shares / shares.sum()))
    else:
        cuts = np.cumsum(_stochastically_rounded(n_rows * shares, rng))
    return [0, *cuts[:-1].astype(int).tolist(), n_rows]


def _stochastically_rounded(sizes: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return whole numbers with the same sum: the floor of each size, and the rest dealt at random."""
    rounded = np.floor(sizes).astype(np.int64)
    remaining = sizes - rounded
    for _ in range(round(remaining.sum())):
        part = rng.choice(len(sizes), p=remaining / remaining.sum())
        rounded[part] += 1
        remaining[part] = 0
    return rounded
