"""`QueryIDs`: the joinids of a query, and its splits, shuffle chunks and partitions.

All of this is NumPy on arrays of joinids: it reads no data and needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import attrs
import numpy as np
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, check_choice, check_count, seeded_rng
from tiledbsoma_ml._distributed import get_distributed_rank_and_world_size, get_worker_id_and_num
from tiledbsoma_ml.x_locator import check_open

Chunks: TypeAlias = list[NDArrayJoinId]
"""Shuffle chunks, each an array of `obs_joinids`, in the order in which they are read."""

SamplingMethod: TypeAlias = Literal["deterministic", "multinomial", "stochastic_rounding"]
"""The method by which `random_split` turns fractions into numbers of rows.

- "deterministic": each border is rounded to the nearest row; the sizes are the same for every seed.
- "multinomial": the split of each row is drawn independently; sizes vary.
- "stochastic_rounding": each split has at least the floor of its share; the remaining rows are drawn so that
  the expected sizes match the fractions.
"""

SamplingMethods: tuple[SamplingMethod, ...] = get_args(SamplingMethod)

Tail: TypeAlias = Literal["drop", "pad"]
"""The treatment of rows that cannot be divided evenly among ranks.

- "drop": no rank yields them; there are up to `world_size - 1` of them.
- "pad": ranks yield them, and up to `world_size - 1` rows, the first ones, are repeated.
"""


@attrs.frozen
class Partition:
    """The number of one worker among the workers of all ranks, which decides its share of the rows.

    Raises:
        ValueError: If the number of a rank or worker is not below the number of ranks or workers.
    """

    rank: int
    world_size: int
    worker_id: int
    n_workers: int

    def __attrs_post_init__(self) -> None:
        for name, number, count_name, count in (
            ("rank", self.rank, "world_size", self.world_size),
            ("worker_id", self.worker_id, "n_workers", self.n_workers),
        ):
            if not 0 <= number < count:
                raise ValueError(f"{name}={number} must lie in 0 … {count - 1} ({count_name}={count}).")

    def bounds(self, n_rows: int, tail: Tail = "drop") -> tuple[int, int]:
        """Return (start, stop) of the worker's share of `n_rows` rows. All code divides rows by this rule.

        Rows are divided among ranks like `np.array_split`. The share of each rank is cut to
        `n_rows // world_size` rows, so that all ranks have the same number, and is divided among its workers
        like `np.array_split`. With "pad", rows are added until every rank has the same number.
        """
        size = rows_per_rank(n_rows, self.world_size, tail)
        n_dealt = n_rows if tail == "drop" else size * self.world_size
        rank_start, _ = array_split_bounds(n_dealt, self.world_size, self.rank)
        start, stop = array_split_bounds(size, self.n_workers, self.worker_id)
        return rank_start + start, rank_start + stop


def rows_per_rank(n_rows: int, world_size: int, tail: Tail) -> int:
    """Return the number of rows that each rank gets."""
    return n_rows // world_size if tail == "drop" else -(-n_rows // world_size)


def array_split_bounds(n_rows: int, n_parts: int, part: int) -> tuple[int, int]:
    """Return (start, stop) of one of the parts that `np.array_split` makes."""
    size, larger = divmod(n_rows, n_parts)
    start = part * size + min(part, larger)
    return start, start + size + (part < larger)


def check_joinids(name: str, ids: object, *, unique: bool = False) -> NDArrayJoinId:
    """Return joinids as an array.

    Raises:
        TypeError: If they are not integers (a mask or floats), or some are masked.
        ValueError: If they do not have one dimension, one is negative or too large for int64, or one repeats
            where all must be `unique`.
    """
    if np.ma.is_masked(ids):
        raise TypeError(f"{name} must all be wanted, but some are masked; try ids.compressed().")
    given = np.asarray(ids)
    if given.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not the shape {given.shape}; try ids.ravel().")
    if not given.size:
        return np.empty(0, dtype=np.int64)
    if given.dtype.kind == "b":
        raise TypeError(
            f"{name} must be joinids, not a mask of {len(given):,} rows; try joinids[mask], or "
            "np.flatnonzero(mask) where joinids count from 0."
        )
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers that fit into int64, not {given.dtype}; convert them.")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high > np.iinfo(np.int64).max:
        raise ValueError(
            f"{name} must lie from 0 to {np.iinfo(np.int64).max}, but {low if low < 0 else high} does not; "
            "take the soma_joinid of rows that exist."
        )
    joinids: NDArrayJoinId = given.astype(np.int64, copy=False)
    if unique and (repeated := first_repeated(joinids)) is not None:
        raise ValueError(f"{name} must differ from each other, but {repeated} repeats; name each once.")
    return joinids


def first_repeated(joinids: NDArrayJoinId) -> int | None:
    """Return the smallest joinid that repeats; None if all differ."""
    if (joinids[1:] > joinids[:-1]).all():
        return None
    ordered = np.sort(joinids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return int(repeated[0]) if len(repeated) else None


def check_among(name: str, joinids: NDArrayJoinId, known: NDArrayJoinId) -> None:
    """Raise a ValueError if a joinid is not among the known ones."""
    if joinids is known:
        return
    is_unknown = np.isin(joinids, known, invert=True)
    if is_unknown.any():
        raise ValueError(
            f"{name} must be those of the source, but {is_unknown.sum():,} of {len(joinids):,} are not, "
            f"{joinids[is_unknown][0]} for instance; take them from its query_ids."
        )


def check_query(query: object) -> None:
    """Raise a TypeError if `query` is not a query, for instance an experiment or its address."""
    if not isinstance(query, soma.ExperimentAxisQuery):
        raise TypeError(
            f"query must be an ExperimentAxisQuery, not of type {type(query).__name__}; "
            "try experiment.axis_query('RNA') of an open tiledbsoma.Experiment."
        )


def check_once(frame: soma.DataFrame, joinids: NDArrayJoinId) -> None:
    """Raise a ValueError if a joinid of `obs` or `var` repeats."""
    if (repeated := first_repeated(joinids)) is not None:
        raise ValueError(
            f"{frame.uri!r} must have every soma_joinid once, because it is the number of a row or column "
            f"of X, but {repeated} repeats; write it anew with joinids that differ."
        )


def _obs_joinids(ids: object) -> NDArrayJoinId:
    return _read_only(check_joinids("obs_joinids", ids))


def _var_joinids(ids: object) -> NDArrayJoinId:
    return _read_only(check_joinids("var_joinids", ids, unique=True))


def _read_only(joinids: NDArrayJoinId) -> NDArrayJoinId:
    """Return joinids as a read-only array: a copy, if the array can be written to."""
    if joinids.size and joinids.flags.writeable:
        joinids = joinids.copy()
        joinids.flags.writeable = False
    return joinids


_same_joinids = attrs.cmp_using(eq=np.array_equal)


@attrs.frozen(kw_only=True, repr=False)
class QueryIDs:
    """The joinids of the rows and columns of a query; it is picklable and never changes.

    Two are equal if their rows, columns and partitions are equal.

    Attributes:
        obs_joinids: Rows, in the order of the query; they may repeat.
        var_joinids: Columns, in the order in which `X` has them; all differ.
        partition: The worker whose share of the query this is; None if this is the whole query.

    Raises:
        TypeError: If joinids are not integers (a mask or floats).
        ValueError: If they do not have one dimension, one is negative, or a column repeats.
    """

    obs_joinids: NDArrayJoinId = attrs.field(converter=_obs_joinids, eq=_same_joinids)
    var_joinids: NDArrayJoinId = attrs.field(converter=_var_joinids, eq=_same_joinids)
    partition: Partition | None = None

    def __repr__(self) -> str:
        """Return the numbers of rows and columns, in one line."""
        part = "" if self.partition is None else f"; {self.partition}"
        return f"<QueryIDs: {len(self.obs_joinids):,} rows by {len(self.var_joinids):,} columns{part}>"

    @classmethod
    def create(cls, query: soma.ExperimentAxisQuery) -> QueryIDs:
        """Return the rows and columns that a query selects.

        Raises:
            TypeError: If it is not a query.
            ValueError: If the query's experiment is closed, or a joinid repeats in its `obs` or `var`.
        """
        check_query(query)
        experiment = query.experiment
        check_open(experiment)
        obs_joinids, var_joinids = query.obs_joinids().to_numpy(), query.var_joinids().to_numpy()
        check_once(experiment.obs, obs_joinids)
        check_once(experiment.ms[query.measurement_name].var, var_joinids)
        return cls(obs_joinids=obs_joinids, var_joinids=var_joinids)

    def random_split(
        self,
        *fracs: float,
        seed: int | None = None,
        method: SamplingMethod = "stochastic_rounding",
    ) -> tuple[QueryIDs, ...]:
        """Return random splits of this query, which are disjoint and cover it; the rows of each are sorted.

        Args:
            fracs: The share of each split, from 0 to 1, summing to 1; or one list of them.
            seed: The seed. The same seed gives the same splits, which are those of tiledbsoma-ml 0.1.0.
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
        """Return the share of the rows that belongs to one worker of one rank.

        Args:
            partition: The worker and its rank; those of this process if None.
            tail: See `Tail`. Every rank gets the same number of rows.

        Raises:
            ValueError: If this is the share of a worker already, so that no worker would get the rest of it;
                or if `tail` is unknown.
        """
        check_whole(self)
        check_choice("tail", tail, get_args(Tail))
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
        """Return chunks of `shuffle_chunk_size` rows in random order; rows within a chunk keep their order.

        A chunk of neighbouring rows is read much faster than the same number of scattered ones. The last
        chunk of the query may be shorter.
        """
        size = check_count("shuffle_chunk_size", shuffle_chunk_size, suggestion=64)
        n_chunks = -(-len(self.obs_joinids) // size)
        starts = seeded_rng(seed, epoch).permutation(n_chunks) * size
        return [self.obs_joinids[start : start + size] for start in starts.tolist()]


def check_whole(ids: QueryIDs) -> None:
    """Raise a ValueError if these are the rows of one worker: divided again, most of them would be lost."""
    if ids.partition is not None:
        raise ValueError(
            f"query_ids must be the rows of all, and these are the part of {ids.partition}; take the query "
            "of which they are a part, or attrs.evolve(query_ids, partition=None) if nothing else is read."
        )


def check_other_rows(ids: QueryIDs, of: QueryIDs) -> None:
    """Raise a TypeError or ValueError unless `ids` may be read in place of `of`: rows of the same columns."""
    if not isinstance(ids, QueryIDs):
        raise TypeError(
            f"query_ids must be QueryIDs, not of type {type(ids).__name__}; try "
            "QueryIDs(obs_joinids=…, var_joinids=dataset.query_ids.var_joinids)."
        )
    check_whole(ids)
    if not np.array_equal(ids.var_joinids, of.var_joinids):
        raise ValueError(
            "query_ids must have the columns of the dataset, in their order; make another "
            "ExperimentDataset for others."
        )


def wrapped(joinids: NDArrayJoinId, start: int, stop: int) -> NDArrayJoinId:
    """Return the joinids from `start` to `stop`; after the last joinid, the first ones follow again."""
    n_rows = len(joinids)
    if stop <= n_rows or not n_rows:
        return joinids[start:stop]
    return joinids[np.arange(start, stop) % n_rows]


def _check_fracs(fracs: tuple[Any, ...]) -> NDArray[np.float64]:
    way_out = "try random_split(0.8, 0.2)"
    if len(fracs) == 1 and isinstance(fracs[0], Sequence | np.ndarray):
        fracs = tuple(fracs[0])
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
    """Return the len(shares) + 1 borders of the splits, from 0 to `n_rows`."""
    if method == "deterministic":
        cuts = np.round(np.cumsum(shares) * n_rows)
    elif method == "multinomial":
        cuts = np.cumsum(rng.multinomial(n_rows, shares / shares.sum()))
    else:
        cuts = np.cumsum(_stochastically_rounded(n_rows * shares, rng))
    return [0, *cuts[:-1].astype(int).tolist(), n_rows]


def _stochastically_rounded(sizes: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return integers with the same sum: the floor of each size, plus ones that are drawn at random."""
    rounded = np.floor(sizes).astype(np.int64)
    remaining = sizes - rounded
    for _ in range(round(remaining.sum())):
        split = rng.choice(len(sizes), p=remaining / remaining.sum())
        rounded[split] += 1
        remaining[split] = 0
    return rounded
