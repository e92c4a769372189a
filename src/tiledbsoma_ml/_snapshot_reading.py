"""How an epoch is read from a snapshot, which is made when it is first needed."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow as pa

from tiledbsoma_ml._common import MiniBatch, NDArrayJoinId
from tiledbsoma_ml._dense_pool import DensePool
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._io_batch_iterable import IOBatch, io_batches
from tiledbsoma_ml._plan import Plan
from tiledbsoma_ml._quality import ShuffleQuality, evenly_spaced, measure_quality
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._snapshot_build import Rows, describe
from tiledbsoma_ml._snapshot_reader import SnapshotReader
from tiledbsoma_ml._window import Room
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.x_locator import XLocator

AUTO_IO_BATCH_SIZE = 65_536
"""Rows shuffled among each other, under "auto", where a snapshot is larger than memory."""

AUTO_CHUNK_SIZE = 64
"""Neighbouring rows that stay together there: a disk reads them at twice the speed of single ones."""


class SnapshotReading:
    """Reads rows of a query from a snapshot.

    Args:
        plan: In which order.
        snapshot: The snapshot, or where it is or is to be; True for a place in the user's cache directory.
        locator: Address of the layer that is queried; None if there is no query.
        ids: What is queried; None for all that the snapshot holds.
        layer_name: Layer of `X` where there is no query.
        obs_column_names: Columns of `obs`.
        memory_bytes: Budget of memory for making it.

    Raises:
        ValueError: If it is there and does not hold the query.
    """

    def __init__(
        self,
        plan: Plan,
        snapshot: Snapshot | str | os.PathLike[str] | bool,
        *,
        locator: XLocator | None,
        ids: QueryIDs | None,
        layer_name: str | None,
        obs_column_names: Sequence[str],
        memory_bytes: int,
    ) -> None:
        self._plan = plan
        self._locator = locator
        self._layer_name = layer_name if locator is None else locator.layer_name
        self._obs_column_names = obs_column_names
        self._memory_bytes = memory_bytes
        self._to_make = None if locator is None or ids is None else (locator, ids)
        self._snapshot = snapshot if isinstance(snapshot, Snapshot) else None
        self.path = snapshot.path if isinstance(snapshot, Snapshot) else self._place(snapshot)
        if self._to_make is None or self._snapshot is not None or self.path.exists():
            self._check(ids)

    def prepare(self) -> Snapshot:
        """Return the snapshot, having made it if it is not there."""
        if self._snapshot is None:
            if self._to_make is None or self.path.exists():
                self._snapshot = Snapshot.open(self.path)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._snapshot = Snapshot.create_from(
                    self.path,
                    [self._to_make],
                    obs_column_names=self._obs_column_names,
                    memory_budget=self._memory_bytes,
                )
        return self._snapshot

    def mini_batches(
        self, ids: QueryIDs, *, return_sparse_X: bool, seed: int, epoch: int, use_eager_fetch: bool
    ) -> Generator[MiniBatch, None, None]:
        """Yield the mini-batches of an epoch, straight from the files."""
        reader = self._reader(ids)
        batches = _cut(self._sized_plan().id_batches(ids, seed=seed, epoch=epoch), self._plan.batch_size)
        made = _sparse(reader, batches) if return_sparse_X else _dense(reader, batches, self._plan.batch_size)
        with closing(EagerIterator(made) if use_eager_fetch else made) as ahead:
            yield from ahead

    def room(self) -> Room:
        """Return the room of an epoch: no rows wait here."""
        return Room(math.inf)

    def io_batches(
        self, ids: QueryIDs, *, seed: int, epoch: int, use_eager_fetch: bool, room: Room
    ) -> Generator[IOBatch, None, None]:
        """Yield the rows of an epoch as whole IO batches, for a device."""
        batches = self._sized_plan().id_batches(ids, seed=seed, epoch=epoch)
        reader = _Whole(self._reader(ids))
        return io_batches(iter(batches), reader, use_eager_fetch=use_eager_fetch, room=room)

    def quality(self, ids: QueryIDs, column: str, n_batches: int, *, seed: int, epoch: int) -> ShuffleQuality:
        """Return how well the rows of an epoch are mixed; every row counts as a tile of its own."""
        rows = np.unique(ids.obs_joinids)
        labels = self.prepare().reader(rows, ids.var_joinids, [column]).obs(rows)[column]
        codes = pa.array(labels).dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
        plan = self._sized_plan()
        plan = attrs.evolve(plan, permutes=plan.shuffle_chunk_size is not None)
        batches = plan.id_batches(ids, seed=seed, epoch=epoch)
        chosen = evenly_spaced(batches, plan.batch_size, len(ids.obs_joinids), n_batches)
        return measure_quality(chosen, rows, codes.astype(np.int64), row_tile=1)

    def _place(self, snapshot: str | os.PathLike[str] | bool) -> Path:
        if not isinstance(snapshot, bool):
            return Path(snapshot).absolute()
        if self._to_make is None:
            raise ValueError("snapshot=True needs a query to make it of; name the folder of a snapshot.")
        locator, ids = self._to_make
        content = describe(
            [Rows.of(locator, ids)], obs_column_names=self._obs_column_names, layers=(), obsm=()
        )
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "tiledbsoma_ml" / f"{content.fingerprint}.snapshot"

    def _check(self, ids: QueryIDs | None) -> None:
        snapshot = self.prepare()
        if self._locator is not None:
            snapshot.check_holds(self._locator, self._obs_column_names)
        self._reader(snapshot.query_ids if ids is None else ids)

    def _reader(self, ids: QueryIDs) -> SnapshotReader:
        return self.prepare().reader(
            ids.obs_joinids, ids.var_joinids, self._obs_column_names, layer_name=self._layer_name
        )

    def _sized_plan(self) -> Plan:
        """Return the plan with numbers for "auto": a true shuffle where memory holds the snapshot."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        plan = self._plan
        if plan.shuffle_chunk_size == "auto":
            fits = self.prepare().nbytes < memory / 2
            plan = attrs.evolve(plan, shuffle_chunk_size=1 if fits else AUTO_CHUNK_SIZE)
        return attrs.evolve(plan, io_batch_size=AUTO_IO_BATCH_SIZE) if plan.io_batch_size == "auto" else plan

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_to_make": None} if self._snapshot is not None else {})


class _Whole:
    """A Reader that gives out what it reads in one IO batch."""

    def __init__(self, reader: SnapshotReader) -> None:
        self._reader = reader

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[IOBatch]:
        return iter([self._reader.rows(obs_joinids)])


def _cut(batches: Iterable[NDArrayJoinId], batch_size: int) -> Iterator[NDArrayJoinId]:
    """Yield joinids `batch_size` at a time, across the borders of batches."""
    rest = np.empty(0, dtype=np.int64)
    for batch in batches:
        rows = np.concatenate([rest, batch])
        n_whole = len(rows) // batch_size * batch_size
        yield from rows[:n_whole].reshape(-1, batch_size)
        rest = rows[n_whole:]
    if len(rest):
        yield rest


def _sparse(reader: SnapshotReader, batches: Iterator[NDArrayJoinId]) -> Generator[MiniBatch, None, None]:
    for ids in batches:
        yield reader.csr(ids), reader.obs(ids)


def _dense(
    reader: SnapshotReader, batches: Iterator[NDArrayJoinId], batch_size: int
) -> Generator[MiniBatch, None, None]:
    pool = DensePool()
    for ids in batches:
        X = pool.empty((len(ids), reader.n_cols), reader.dtype)
        reader.fill_dense(ids, X)
        yield X[0] if batch_size == 1 else X, reader.obs(ids)
